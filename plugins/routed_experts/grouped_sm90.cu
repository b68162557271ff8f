// Grouped products on SM90: warpgroup products (wgmma) by CUTLASS, two consumer warpgroups that take turns at a tile each, so that one
// multiplies while the other writes its float32 sums. E4M3 sums of 128 inputs are added in float32 (the schedule is not FastAccum).
#include "grouped.cuh"

namespace nq::experts {

namespace {

template <class E, class T>
struct Choice {
    using Arch = cutlass::arch::Sm90;
    using Class = cutlass::arch::OpClassTensorOp;
    using Element = E;
    using Operand = E;
    using Tile = T;
    using Schedule = cutlass::gemm::KernelPtrArrayTmaWarpSpecializedPingpong;
    using Epilogue = cutlass::epilogue::PtrArrayTmaWarpSpecializedPingpong;
};

// A warpgroup has its tile's sums in registers, E4M3's twice.
using Bf16 = Choice<cutlass::bfloat16_t, cute::Shape<cute::_128, cute::_128, cute::_64>>;
using E4m3 = Choice<cutlass::float_e4m3_t, cute::Shape<cute::_64, cute::_128, cute::_128>>;

template <class C>
int run(const Grouped& g, void* stream) {
    return g.squares ? run_grouped<C, Squares<typename C::Element>>(g, stream) : run_grouped<C, Sums>(g, stream);
}

}  // namespace

int grouped_sm90(const Grouped& g, void* stream) {
    return g.operands == Operands::bf16 ? run<Bf16>(g, stream) : run<E4m3>(g, stream);
}

}  // namespace nq::experts
