// Sorting tokens by expert, in one block: positions are ascending in (expert, token, j), whatever the device does in which order.
#pragma once

#include "kernel.cuh"

namespace nq::experts {

constexpr int ROUTE_WARPS = 32;

// Shared memory of ``route`` with that many warps.
inline size_t route_shared(int64_t experts, int warps) { return static_cast<size_t>(experts) * (warps + 2) * sizeof(int32_t); }

// One block. Each warp counts the ids of a segment of its own; from the counts follows where each warp's ids of each expert begin;
// then each warp places its ids in order, 32 at a time.
static __global__ void __launch_bounds__(32 * ROUTE_WARPS)
    route(const int64_t* __restrict__ ids, Routes to, int32_t* skipped, bool first_pass, int n, int top_k, int experts, int tile) {
    NQ_DYNAMIC_SHARED(int32_t, shared);
    __shared__ int32_t bad;
    const int warps = static_cast<int>(blockDim.x) / 32, warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
    int32_t* const count = shared;                      // [warps][E]
    int32_t* const begin = shared + warps * experts;    // [E]
    int32_t* const first_tile = begin + experts;        // [E]
    const int segment = (n + warps * 32 - 1) / (warps * 32) * 32, from = warp * segment;
    const int to_end = from + segment < n ? from + segment : n;

    for (int i = thread; i < warps * experts; i += threads) count[i] = 0;
    if (thread == 0) bad = 0;
    __syncthreads();
    for (int i = from + lane; i < to_end; i += 32) {
        const int64_t id = ids[i];
        if (id >= 0 && id < experts)
            atomicAdd(&count[warp * experts + static_cast<int>(id)], 1);
        else
            atomicAdd(&bad, 1);
    }
    __syncthreads();
    for (int e = thread; e < experts; e += threads) {
        int32_t total = 0;
        for (int w = 0; w < warps; ++w) {
            const int32_t mine = count[w * experts + e];
            count[w * experts + e] = total;
            total += mine;
        }
        begin[e] = total;
    }
    __syncthreads();
    if (warp == 0) {
        int32_t rows = 0, tiles = 0;
        for (int e0 = 0; e0 < experts; e0 += 32) {
            const int e = e0 + lane;
            const int32_t mine = e < experts ? begin[e] : 0, my_tiles = (mine + tile - 1) / tile;
            int32_t row_sum = mine, tile_sum = my_tiles;
            for (int step = 1; step < 32; step *= 2) {
                const int32_t row_below = __shfl_up_sync(0xffffffffU, row_sum, step);
                const int32_t tile_below = __shfl_up_sync(0xffffffffU, tile_sum, step);
                if (lane >= step) row_sum += row_below, tile_sum += tile_below;
            }
            if (e < experts) {
                begin[e] = to.offsets[e] = rows + row_sum - mine;
                first_tile[e] = tiles + tile_sum - my_tiles;
            }
            rows += __shfl_sync(0xffffffffU, row_sum, 31);
            tiles += __shfl_sync(0xffffffffU, tile_sum, 31);
        }
        if (lane == 0) {
            to.offsets[experts] = rows;
            *to.tiles = tiles;
            if (skipped) *skipped = bad + (first_pass ? 0 : *skipped);
        }
    }
    __syncthreads();
    for (int e = thread; e < experts; e += threads) {
        const int32_t end = e + 1 < experts ? begin[e + 1] : n - bad;
        int32_t at = first_tile[e];
        for (int32_t row = begin[e]; row < end; row += tile, ++at) {
            to.tile_expert[at] = e;
            to.tile_first[at] = row;
        }
    }
    for (int i0 = from; i0 < to_end; i0 += 32) {
        const int i = i0 + lane;
        const int64_t id = i < to_end ? ids[i] : -1;
        const int e = id >= 0 && id < experts ? static_cast<int>(id) : -1;
        unsigned same = __ballot_sync(0xffffffffU, e >= 0);  // lanes whose id is of the same expert: bit by bit
        for (int bit = 0; (experts - 1) >> bit; ++bit) {
            const bool set = e >> bit & 1;
            const unsigned lanes = __ballot_sync(0xffffffffU, set);
            same &= set ? lanes : ~lanes;
        }
        const int before = __popc(static_cast<int>(same & ((1U << lane) - 1U))), all = __popc(static_cast<int>(same));
        int32_t* const mine = e >= 0 ? &count[warp * experts + e] : nullptr;
        const int32_t position = mine ? begin[e] + *mine + before : -1;
        __syncwarp();
        if (mine && before == all - 1) *mine += all;
        __syncwarp();
        if (i < to_end) to.place[i] = position;
        if (position >= 0) to.token[position] = i / top_k;
    }
}

}  // namespace nq::experts
