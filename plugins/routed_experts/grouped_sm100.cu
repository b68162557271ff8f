// Grouped products on SM100: tcgen05 by CUTLASS, one multiprocessor a tile, sums in tensor memory. NVFP4 is multiplied as such, with its
// block scales.
#include "grouped.cuh"

namespace nq::experts {

namespace {

template <class E>
struct Choice {
    using Arch = cutlass::arch::Sm100;
    using Class = cutlass::arch::OpClassTensorOp;
    using Element = E;
    using Operand = E;
    using Tile = cute::Shape<cute::_128, cute::_128, cute::Int<128 / sizeof(E)>>;  // 128 bytes of inputs
    using Schedule = cutlass::gemm::KernelPtrArrayTmaWarpSpecialized1SmSm100;
    using Epilogue = cutlass::epilogue::PtrArrayTmaWarpSpecialized1Sm;
};

struct Nvfp4 : Choice<cutlass::float_e4m3_t> {
    using Class = cutlass::arch::OpClassBlockScaledTensorOp;
    using Element = cutlass::float_e2m1_t;
    using Operand = cutlass::nv_float4_t<cutlass::float_e2m1_t>;
    using Tile = cute::Shape<cute::_128, cute::_128, cute::_256>;
    using Schedule = cutlass::gemm::KernelPtrArrayTmaWarpSpecialized1SmNvf4Sm100;
};

template <class C>
int run(const Grouped& g, void* stream) {
    return g.squares ? run_grouped<C, Squares<typename C::Element>>(g, stream) : run_grouped<C, Sums>(g, stream);
}

}  // namespace

int grouped_sm100(const Grouped& g, void* stream) {
    switch (g.operands) {
        case Operands::bf16: return run<Choice<cutlass::bfloat16_t>>(g, stream);
        case Operands::e4m3: return run<Choice<cutlass::float_e4m3_t>>(g, stream);
        default: return run_grouped<Nvfp4, Sums>(g, stream);
    }
}

}  // namespace nq::experts
