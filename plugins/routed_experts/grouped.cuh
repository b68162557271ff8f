// CUTLASS's grouped products for one choice of operands, tile and schedule. Included by grouped_sm90a.cu and grouped_sm100a.cu, which make
// the choices; nothing else here knows a CUTLASS type.
//
// The weight is A [rows, size] and the tokens are B [size, tokens], so that D [rows, tokens], column-major, is the sums [tokens, rows]: rows are
// multiples of 32 and fill the large side of a tile, tokens, of which experts have any number, the side whose size may be chosen.
// D = A B in float32: no C is read. Experts without tokens have no tiles, and are passed over by CUTLASS's scheduler on the device.
#pragma once

#include <cute/tensor.hpp>
#include <cutlass/cutlass.h>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <cutlass/gemm/group_array_problem_shape.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>

#include "../common/platform.cuh"
#include "grouped.hpp"

namespace nq::experts {

// ``Choice``: Arch, Class, Operand (CUTLASS's element, with its scales if it has any), Tile (rows, tokens, inputs), Schedule, Epilogue.
template <class Choice>
struct Product {
    using Row = cutlass::layout::RowMajor;
    using Column = cutlass::layout::ColumnMajor;
    using Cluster = cute::Shape<cute::_1, cute::_1, cute::_1>;
    using Sizes = cutlass::gemm::GroupProblemShape<cute::Shape<int, int, int>>;
    static constexpr int OPERAND_ALIGNMENT = 128 / cute::sizeof_bits_v<typename Choice::Element>, SUM_ALIGNMENT = 4;

    using CollectiveEpilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
        typename Choice::Arch, cutlass::arch::OpClassTensorOp, typename Choice::Tile, Cluster, cutlass::epilogue::collective::EpilogueTileAuto,
        float, float, void, Column*, SUM_ALIGNMENT, float, Column*, SUM_ALIGNMENT, typename Choice::Epilogue,
        cutlass::epilogue::fusion::LinearCombination<float, float, void>>::CollectiveOp;
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

template <class Choice>
int run_grouped(const Grouped& g, void* stream) {
    using P = Product<Choice>;
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
    a.epilogue.thread.alpha = 1.0F;
    a.epilogue.thread.beta = 0.0F;
    a.epilogue.ptr_D = const_cast<float**>(g.sums);
    a.epilogue.dD = reinterpret_cast<decltype(a.epilogue.dD)>(const_cast<int64_t*>(g.sum_strides));
    if (cudaGetDevice(&a.hw_info.device_id) != cudaSuccess) return fail(NEMOQUANT_LAUNCH_FAILED, "routed_experts: there is no current device");
    a.hw_info.sm_count = multiprocessors();
    a.hw_info.max_active_clusters = a.hw_info.sm_count;

    const size_t wanted = Gemm::get_workspace_size(a);
    if (wanted > SCRATCH_BYTES)
        return fail(NEMOQUANT_UNSUPPORTED, "routed_experts: CUTLASS wants %zu bytes on this device; expected at most %lld, SCRATCH_BYTES of grouped.hpp",
                    wanted, static_cast<long long>(SCRATCH_BYTES));
    Gemm gemm;
    cutlass::Status status = Gemm::can_implement(a);
    if (status == cutlass::Status::kSuccess) status = gemm.run(a, g.scratch, on);
    if (status == cutlass::Status::kSuccess) return NEMOQUANT_OK;
    return fail(NEMOQUANT_LAUNCH_FAILED, "routed_experts: CUTLASS's products of %d groups, [%d, %d] each: %s (%s)", g.groups, g.rows, g.size,
                cutlass::cutlassGetStatusString(status), cudaGetErrorString(cudaGetLastError()));
}

}  // namespace nq::experts
