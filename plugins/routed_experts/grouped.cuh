// CUTLASS's grouped products for one choice of operands, tile, schedule and output. Included by grouped_sm90.cu and grouped_sm100.cu, which make
// the choices; nothing else here knows a CUTLASS type.
//
// The weight is A [rows, size] and the tokens are B [size, tokens], so that D [rows, tokens], column-major, is the sums [tokens, rows]: rows are
// multiples of 32 and fill the large side of a tile, tokens, of which experts have any number, the side whose size may be chosen.
// No C is read, and D is A B in float32, or what down takes of it (``Grouped::squares``). Experts without tokens have no tiles, and are passed over by CUTLASS's scheduler on the device.
#pragma once

#include <cute/tensor.hpp>
#include <cutlass/cutlass.h>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/epilogue/fusion/operations.hpp>
#include <cutlass/epilogue/thread/activation.h>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <cutlass/gemm/group_array_problem_shape.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>

#include "../common/platform.cuh"
#include "grouped.hpp"

namespace nq::experts {

// What is done with a tile's sums: relu squared, as Grouped has it.
template <class T>
struct Squared;
template <int N>
struct Squared<cutlass::Array<float, N>> {
    using Values = cutlass::Array<float, N>;

    CUTLASS_DEVICE Values operator()(const Values& sums) const {
        Values made;
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < N; ++i) {
            const float positive = sums[i] < 0.0F ? 0.0F : sums[i];  // NaN stays
            made[i] = __fmul_rn(positive, positive);
        }
        return made;
    }

    CUTLASS_DEVICE Values operator()(const Values& sums, const Values& scales, const Values& next_scales) const {
        Values made;
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < N; ++i) {
            const float value = __fmul_rn(sums[i], scales[i]), positive = value < 0.0F ? 0.0F : value;
            made[i] = __fdiv_rn(__fmul_rn(positive, positive), next_scales[i]);
        }
        return made;
    }
};

// Epilogues: the type of D, and how it comes from the sums.
struct Sums {
    using Output = float;
    using Tree = cutlass::epilogue::fusion::Sm90EVT<
        cutlass::epilogue::fusion::Sm90Compute<cutlass::epilogue::thread::Identity, float, float, cutlass::FloatRoundStyle::round_to_nearest>,
        cutlass::epilogue::fusion::Sm90AccFetch>;
    static typename Tree::Arguments arguments(const Grouped&) { return {}; }
};
template <class Element>
struct Squares {
    using Output = Element;
    using Compute = cutlass::epilogue::fusion::Sm90Compute<Squared, Element, float, cutlass::FloatRoundStyle::round_to_nearest>;
    using OfGroup = cutlass::epilogue::fusion::Sm90ScalarBroadcast<float, cute::Stride<cute::_0, cute::_0, int64_t>>;
    static constexpr bool SCALED = cute::is_same_v<Element, cutlass::float_e4m3_t>;
    using Tree = cute::conditional_t<SCALED, cutlass::epilogue::fusion::Sm90EVT<Compute, cutlass::epilogue::fusion::Sm90AccFetch, OfGroup, OfGroup>,
                                     cutlass::epilogue::fusion::Sm90EVT<Compute, cutlass::epilogue::fusion::Sm90AccFetch>>;
    static typename Tree::Arguments arguments([[maybe_unused]] const Grouped& g) {
        if constexpr (SCALED) {
            const cute::Stride<cute::_0, cute::_0, int64_t> one{{}, {}, 1};
            return {{}, {{}, {g.scales}, {one}}, {{}, {g.next_scales}, {one}}, {}};
        } else {
            return {};
        }
    }
};

// ``Choice``: Arch, Class, Operand (CUTLASS's element, with its scales if it has any), Tile (rows, tokens, inputs), Schedule, Epilogue.
// ``To``: Sums or Squares.
template <class Choice, class To>
struct Product {
    using Row = cutlass::layout::RowMajor;
    using Column = cutlass::layout::ColumnMajor;
    using Cluster = cute::Shape<cute::_1, cute::_1, cute::_1>;
    using Sizes = cutlass::gemm::GroupProblemShape<cute::Shape<int, int, int>>;
    static constexpr int OPERAND_ALIGNMENT = 128 / cute::sizeof_bits_v<typename Choice::Element>;
    static constexpr int OUTPUT_ALIGNMENT = 128 / cute::sizeof_bits_v<typename To::Output>;

    using CollectiveEpilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
        typename Choice::Arch, cutlass::arch::OpClassTensorOp, typename Choice::Tile, Cluster, cutlass::epilogue::collective::EpilogueTileAuto,
        float, float, void, Column*, OUTPUT_ALIGNMENT, typename To::Output, Column*, OUTPUT_ALIGNMENT, typename Choice::Epilogue,
        typename To::Tree>::CollectiveOp;
    using CollectiveMainloop = typename cutlass::gemm::collective::CollectiveBuilder<
        typename Choice::Arch, typename Choice::Class, typename Choice::Operand, Row*, OPERAND_ALIGNMENT, typename Choice::Operand, Column*,
        OPERAND_ALIGNMENT, float, typename Choice::Tile, Cluster,
        cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(sizeof(typename CollectiveEpilogue::SharedStorage))>,
        typename Choice::Schedule>::CollectiveOp;
    using Kernel = cutlass::gemm::kernel::GemmUniversal<Sizes, CollectiveMainloop, CollectiveEpilogue>;
    using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;
    static constexpr bool SCALED = cute::is_same_v<typename Choice::Class, cutlass::arch::OpClassBlockScaledTensorOp>;

    // The arrays of Grouped are read as these.
    static_assert(sizeof(typename Sizes::UnderlyingProblemShape) == 3 * sizeof(int32_t));
    static_assert(sizeof(typename Kernel::InternalStrideA) == sizeof(int64_t) && sizeof(typename Kernel::InternalStrideB) == sizeof(int64_t));
    static_assert(sizeof(typename Kernel::InternalStrideD) == sizeof(int64_t));
};

// CUTLASS's description of each group's block scales, [groups] of weights, then of inputs.
template <class Mainloop>
__global__ void __launch_bounds__(256) describe_scales(const int32_t* sizes, int32_t groups, typename Mainloop::InternalLayoutSFA* weights,
                                                       typename Mainloop::InternalLayoutSFB* inputs) {
    const int g = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
    if (g >= groups) return;
    const auto size = cute::make_shape(sizes[3 * g], sizes[3 * g + 1], sizes[3 * g + 2], 1);
    weights[g] = Mainloop::Sm1xxBlkScaledConfig::tile_atom_to_shape_SFA(size);
    inputs[g] = Mainloop::Sm1xxBlkScaledConfig::tile_atom_to_shape_SFB(size);
}

template <class Choice, class To>
int run_grouped(const Grouped& g, void* stream) {
    using P = Product<Choice, To>;
    using Gemm = typename P::Gemm;
    using Kernel = typename P::Kernel;
    using Mainloop = typename P::CollectiveMainloop;
    const auto on = static_cast<cudaStream_t>(stream);

    typename Gemm::Arguments a{};
    a.mode = cutlass::gemm::GemmUniversalMode::kGrouped;
    a.problem_shape = {g.groups, reinterpret_cast<typename P::Sizes::UnderlyingProblemShape*>(const_cast<int32_t*>(g.sizes)), nullptr};
    a.mainloop.ptr_A = reinterpret_cast<decltype(a.mainloop.ptr_A)>(const_cast<const void**>(g.weights));
    a.mainloop.dA = reinterpret_cast<decltype(a.mainloop.dA)>(const_cast<int64_t*>(g.operand_strides));
    a.mainloop.ptr_B = reinterpret_cast<decltype(a.mainloop.ptr_B)>(const_cast<const void**>(g.inputs));
    a.mainloop.dB = reinterpret_cast<decltype(a.mainloop.dB)>(const_cast<int64_t*>(g.operand_strides));
    if constexpr (P::SCALED) {
        using LayoutA = typename Mainloop::InternalLayoutSFA;
        using LayoutB = typename Mainloop::InternalLayoutSFB;
        static_assert(sizeof(LayoutA) <= LAYOUT_BYTES && sizeof(LayoutB) <= LAYOUT_BYTES);
        auto* const weights = static_cast<LayoutA*>(g.layouts);
        auto* const inputs = reinterpret_cast<LayoutB*>(static_cast<unsigned char*>(g.layouts) + g.groups * LAYOUT_BYTES);
        const dim3 grid(static_cast<unsigned>((g.groups + 255) / 256));
        if (const int code = NQ_LAUNCH((describe_scales<Mainloop>), grid, dim3(256), 0, stream, g.sizes, g.groups, weights, inputs)) return code;
        a.mainloop.ptr_SFA = reinterpret_cast<decltype(a.mainloop.ptr_SFA)>(const_cast<const void**>(g.weight_scales));
        a.mainloop.ptr_SFB = reinterpret_cast<decltype(a.mainloop.ptr_SFB)>(const_cast<const void**>(g.input_scales));
        a.mainloop.layout_SFA = weights;
        a.mainloop.layout_SFB = inputs;
    }
    a.epilogue.thread = To::arguments(g);
    a.epilogue.ptr_D = reinterpret_cast<decltype(a.epilogue.ptr_D)>(const_cast<void**>(g.outputs));
    a.epilogue.dD = reinterpret_cast<decltype(a.epilogue.dD)>(const_cast<int64_t*>(g.output_strides));
    if (taken(cudaGetDevice(&a.hw_info.device_id)) != cudaSuccess) return fail(NEMOQUANT_LAUNCH_FAILED, "routed_experts: there is no current device");
    a.hw_info.sm_count = multiprocessors();
    a.hw_info.max_active_clusters = a.hw_info.sm_count;

    const size_t wanted = Gemm::get_workspace_size(a);
    if (wanted > SCRATCH_BYTES)
        return fail(NEMOQUANT_UNSUPPORTED, "routed_experts: CUTLASS wants %zu bytes on this device; expected at most %lld, SCRATCH_BYTES of grouped.hpp",
                    wanted, static_cast<long long>(SCRATCH_BYTES));
    Gemm gemm;
    cutlass::Status status = Gemm::can_implement(a);
    if (status == cutlass::Status::kSuccess) {
        const Relaxed relaxed;  // at its first run it raises limits
        status = gemm.run(a, g.scratch, on);
    }
    if (status == cutlass::Status::kSuccess) return NEMOQUANT_OK;
    return fail(NEMOQUANT_LAUNCH_FAILED, "routed_experts: CUTLASS's products of %d groups, [%d, %d] each: %s (%s)", g.groups, g.rows, g.size,
                cutlass::cutlassGetStatusString(status), cudaGetErrorString(cudaGetLastError()));
}

}  // namespace nq::experts
