// The kernels before the products, see routing.cuh:
//
//     begin     blocks of SORT pairs count their experts; further blocks write the inputs. One block of pairs does all of the sort.
//     arrange   one block: where each expert, and each block's share of it, begins; the list of tiles
//     scatter   blocks of SORT pairs write each pair to its slot
#pragma once

#include "routing.cuh"

namespace nq::experts {

template <Weights F>
__global__ void __launch_bounds__(SORT) begin(Routing r, Inputs in) {
    __shared__ int counts[EXPERTS_MOST];
    __shared__ __align__(16) int ids[SORT];
    __shared__ int warps[SORT / 32];
    const int block = blockIdx.x;
    if (block >= r.blocks) {
        write_inputs<F>(r, in, static_cast<int64_t>(block - r.blocks) * SORT + threadIdx.x);
        return;
    }
    for (int e = threadIdx.x; e < r.experts; e += SORT) counts[e] = 0;
    __syncthreads();
    const int pair = block * SORT + threadIdx.x, expert = expert_of(r, pair);
    if (expert >= 0) atomicAdd(&counts[expert], 1);  // integers: any order gives the same
    else if (r.skipped && pair < r.pairs) atomicAdd(r.skipped, 1);
    ids[threadIdx.x] = expert;
    __syncthreads();
    if (r.blocks > 1) {
        for (int e = threadIdx.x; e < r.experts; e += SORT) r.counts[static_cast<int64_t>(block) * r.experts + e] = counts[e];
        return;
    }
    lay_out(r, warps, [&](int e) { return counts[e]; }, [&](int e, int slot) { counts[e] = slot; });
    __syncthreads();
    if (expert >= 0) r.order[counts[expert] + rank(ids, expert)] = pair;
}

__global__ void __launch_bounds__(SORT) arrange(Routing r) {
    __shared__ int totals[EXPERTS_MOST];
    __shared__ int warps[SORT / 32];
    for (int e = threadIdx.x; e < r.experts; e += SORT) {
        int total = 0;
        for (int b = 0; b < r.blocks; ++b) {
            int32_t& count = r.counts[static_cast<int64_t>(b) * r.experts + e];
            const int here = count;
            count = total;
            total += here;
        }
        totals[e] = total;
    }
    __syncthreads();
    lay_out(r, warps, [&](int e) { return totals[e]; }, [&](int e, int slot) { totals[e] = slot; });
    __syncthreads();
    for (int e = threadIdx.x; e < r.experts; e += SORT)
        for (int b = 0; b < r.blocks; ++b) r.counts[static_cast<int64_t>(b) * r.experts + e] += totals[e];
}

__global__ void __launch_bounds__(SORT) scatter(Routing r) {
    __shared__ __align__(16) int ids[SORT];
    const int pair = blockIdx.x * SORT + threadIdx.x, expert = expert_of(r, pair);
    ids[threadIdx.x] = expert;
    __syncthreads();
    if (expert >= 0) r.order[r.counts[static_cast<int64_t>(blockIdx.x) * r.experts + expert] + rank(ids, expert)] = pair;
}

}  // namespace nq::experts
