// Products of FP4 as it is, both operands with their block scales: m16n8k64 of mma.cuh. For many tokens an expert, as ``wide``: a block of
// 8 warps takes 256 rows and 32 or 64 tokens, a warp 32 of the rows, the tokens by asynchronous copies through shared memory.
//
// Which of the inputs a lane holds is not free here: under one scale lie the eight codes of one register in two neighbouring lanes of the
// four. A lane's 16 bytes of a row are two whole blocks, as weights.cuh has it; so neighbours swap halves, two exchanges for a row's chunk:
// of blocks 4p to 4p + 3, which lanes 2p and 2p + 1 loaded, the even one then has the first halves and the odd one the second.
// Product h of a chunk takes blocks 4p + 2h (a0, a1) and 4p + 2h + 1 (a2, a3): its four scales are those of blocks 2h, 2h + 4, 2h + 1,
// 2h + 5. The activations are written in that order (``half_at``, ``scale_at``). The weights' scales come two blocks a lane too and are swapped
// so that lane t has those of row g + 8 t. Those of the tokens are read by one lane of the four for each eight tokens.
#pragma once

#include "kernel.cuh"

namespace nq::experts {

// A row's halves of blocks 4p to 4p + 3, from 16 bytes of the row in each of two neighbouring lanes.
__device__ __forceinline__ uint4 swap_halves(const uint4& mine, bool odd) {
    const uint32_t first = __shfl_xor_sync(0xffffffffU, odd ? mine.x : mine.y, 1);
    const uint32_t second = __shfl_xor_sync(0xffffffffU, odd ? mine.z : mine.w, 1);
    return odd ? make_uint4(first, second, mine.y, mine.w) : make_uint4(mine.x, mine.z, first, second);
}

// From the scales of a lane's two blocks in rows g, g + 8, g + 16 and g + 24: those of both products for row g + 8 t.
__device__ __forceinline__ uint2 swap_scales(const uint16_t (&mine)[4], int t) {
    const uint32_t upper = mine[0] | static_cast<uint32_t>(mine[1]) << 16, lower = mine[2] | static_cast<uint32_t>(mine[3]) << 16;
    const uint32_t far = __shfl_xor_sync(0xffffffffU, t < 2 ? lower : upper, 2);
    // of this lane's two rows, a half each: the blocks of lanes t % 2 and t % 2 + 2
    const uint32_t left = t < 2 ? upper : far, right = t < 2 ? far : lower;
    const uint32_t low = __byte_perm(left, right, 0x5140), high = __byte_perm(left, right, 0x7362);
    const bool odd = t % 2;
    const uint32_t other = __shfl_xor_sync(0xffffffffU, odd ? low : high, 1);
    return odd ? make_uint2(other, high) : make_uint2(low, other);
}

// A chunk of 32 rows: A of both products, for rows g and g + 8 and for those 16 further.
struct NativeRows {
    uint32_t a[2][2][4];  // [16 rows][product]
    uint2 scales;

    __device__ __forceinline__ NativeRows(const Held<Weights::e2m1, 4>& held, int t) : scales(swap_scales(held.scales, t)) {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            const uint4 halves = swap_halves(held.bits[0][r], t % 2);
            a[r / 2][0][r % 2] = halves.x;
            a[r / 2][0][r % 2 + 2] = halves.y;
            a[r / 2][1][r % 2] = halves.z;
            a[r / 2][1][r % 2 + 2] = halves.w;
        }
    }

    // d += these rows by a chunk ``b`` of eight tokens, whose scales lane LANE of the four has. Sums of a chunk are added in float32.
    template <int LANE>
    __device__ __forceinline__ void multiply(float (&upper)[4], float (&lower)[4], const uint4& b, const uint2& of_b) const {
        float sums[2][4] = {};
        mma_m16n8k64_nvfp4<0, LANE>(sums[0], a[0][0], b.x, b.y, scales.x, of_b.x);
        mma_m16n8k64_nvfp4<1, LANE>(sums[1], a[1][0], b.x, b.y, scales.x, of_b.x);
        mma_m16n8k64_nvfp4<0, LANE>(sums[0], a[0][1], b.z, b.w, scales.y, of_b.y);
        mma_m16n8k64_nvfp4<1, LANE>(sums[1], a[1][1], b.z, b.w, scales.y, of_b.y);
        add(upper, sums[0]);
        add(lower, sums[1]);
    }
};

// A stage is a group: codes [chunk][token][64], which puts the eight parts that are read together into different banks, then scales [token][16].
template <int N>
constexpr int NATIVE_STAGE = N * 8 * GROUP_BYTES;

// Where a token's scales are in a stage: turned by two for each eight tokens, since the four lanes read those of different eights.
__device__ __forceinline__ int native_scales(int token) { return token / 8 * 8 + (token + token / 8 * 2) % 8; }

// N: eights of tokens.
template <int N>
__global__ void __launch_bounds__(WIDE_WARPS * 32, N == 4 ? 2 : 0) native(Projection p) {
    constexpr int TOKENS = N * 8, THREADS = WIDE_WARPS * 32;
    static_assert(N % 4 == 0 && WIDE_ROWS == GROUP);
    if (static_cast<int32_t>(blockIdx.y) >= *p.tile_count) return;
    NQ_DYNAMIC_SHARED(unsigned char, stages);
    const Tile tile = p.tiles[blockIdx.y];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int row = static_cast<int>(blockIdx.x) * WIDE_ROWS + warp * 32;
    const bool active = row < p.rows;
    const int chunks = chunks_of(p.size), groups = (chunks + 1) / 2;

    // Copies: a thread has one part of the codes of some tokens, and the first of the eight that share a token its scales too.
    constexpr int EACH = GROUP / 32, TOGETHER = THREADS / EACH, COPIES = TOKENS / TOGETHER;
    const int part = threadIdx.x % EACH, token = threadIdx.x / EACH;
    int from[COPIES];  // rows, as in ``wide``
#pragma unroll
    for (int i = 0; i < COPIES; ++i) from[i] = token + i * TOGETHER < tile.count ? row_of(p, tile.first + token + i * TOGETHER) : -1;
    const auto copy = [&](int s) {
        if (s < groups) {
            unsigned char* const stage = stages + s % STAGES * NATIVE_STAGE<N>;
#pragma unroll
            for (int i = 0; i < COPIES; ++i) {
                const int mine = token + i * TOGETHER;
                const bool wanted = from[i] >= 0;
                const unsigned char* const at = input_row<Weights::fp4>(p, wanted ? from[i] : 0) + (wanted ? static_cast<int64_t>(s) * GROUP_BYTES : 0);
                copy_async16(stage + (part / 4 * TOKENS + mine) * 64 + part % 4 * 16, at + part * 16, wanted);
                if (part == 0) copy_async16(stage + TOKENS * (GROUP / 2) + native_scales(mine) * 16, at + GROUP / 2, wanted);
            }
        }
        copy_async_commit();
    };
    copy(0);
    copy(1);

    using Codes = View<Weights::e2m1>;
    const Codes view(p.weight, p.block_scales, static_cast<int64_t>(tile.expert) * p.rows + (active ? row + g : 0), p.size, t);
    Held<Weights::e2m1, 4> held[2];  // rows g, g + 8, g + 16, g + 24 of the next two chunks
#pragma unroll
    for (int i = 0; i < 2; ++i)
        if (i < chunks) view.load(held[i], i);

    float d[2][N][4] = {};
    for (int s = 0; s < groups; ++s) {
        copy_async_wait<1>();
        __syncthreads();  // the stage is whole, and the one before it is free
        copy(s + 2);
        if (!active) continue;
        const unsigned char* const stage = stages + s % STAGES * NATIVE_STAGE<N>;
        uint4 scales[N / 4];  // of token g of the eights t, t + 4, ...
#pragma unroll
        for (int i = 0; i < N / 4; ++i) scales[i] = load_as<uint4>(stage + TOKENS * (GROUP / 2) + native_scales((4 * i + t) * 8 + g) * 16);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int c = 2 * s + i;
            if (c >= chunks) break;
            const NativeRows rows(held[i], t);
            if (c + 2 < chunks) view.load(held[i], c + 2);
#pragma unroll
            for (int n = 0; n < N; ++n) {
                const uint4 b = load_as<uint4>(stage + (i * TOKENS + n * 8 + g) * 64 + t * 16);
                const uint4& both = scales[n / 4];
                const uint2 of_b = i ? make_uint2(both.z, both.w) : make_uint2(both.x, both.y);
                switch (n % 4) {
                    case 0: rows.multiply<0>(d[0][n], d[1][n], b, of_b); break;
                    case 1: rows.multiply<1>(d[0][n], d[1][n], b, of_b); break;
                    case 2: rows.multiply<2>(d[0][n], d[1][n], b, of_b); break;
                    default: rows.multiply<3>(d[0][n], d[1][n], b, of_b);
                }
            }
        }
    }
    copy_async_wait<0>();
    // What up hands on, a group of each token, goes through shared memory, where the stages were, so that it is written 16 bytes at a time.
    if (p.is_up) __syncthreads();
    const int block_row = static_cast<int>(blockIdx.x) * WIDE_ROWS;
    if (active) {
        const Target to{stages, GROUP_BYTES, block_row};
#pragma unroll
        for (int n = 0; n < N; ++n) {
            if (n * 8 >= tile.count) break;
            finish<Weights::fp4>(p, d[0][n], tile, row, n * 8, to);
            finish<Weights::fp4>(p, d[1][n], tile, row + 16, n * 8, to);
        }
    } else if (p.is_up) {  // rows that there are not are zeros
        for (int i = lane; i < tile.count * 4; i += 32) {
            unsigned char* const at = stages + i / 4 * GROUP_BYTES;
            const int block = warp * 2 + i % 4 / 2;
            store_as(at + half_at(block, i % 2), 0U);
            at[scale_at(block)] = 0;
        }
    }
    if (!p.is_up) return;
    __syncthreads();
    constexpr int LINE = GROUP_BYTES / 16;
    const Target out = hidden_of<Weights::fp4>(p, tile.first);
    for (int i = threadIdx.x; i < tile.count * LINE; i += THREADS) {
        const int n = i / LINE, at = i % LINE * 16;
        store_as(out.at + n * out.stride + static_cast<int64_t>(blockIdx.x) * GROUP_BYTES + at, load_as<uint4>(stages + n * GROUP_BYTES + at));
    }
}

// One projection, ``tiles`` tiles of ``tile`` tokens, 32 or 64.
int multiply_native(const Projection& p, int tile, int64_t tiles, void* stream);

}  // namespace nq::experts
