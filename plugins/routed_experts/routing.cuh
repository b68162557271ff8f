// Before the products: tokens sorted by expert, and inputs rounded and laid out as the products read them.
//
// A pair is (token, j), counted token * k + j; its expert is expert_ids[pair]. The sort is stable, so that the order within an expert
// is that of the pairs: nothing depends on which block or thread came first.
//
// The kernels are in sorting.cuh.
#pragma once

#include "weights.cuh"

namespace nq::experts {

constexpr int SORT = 512;             // pairs, and threads, of a block
constexpr int EXPERTS_MOST = 4096;    // of one layer: the counts lie in shared memory
constexpr int PLANES_MOST = 3;

// A block's work along the tokens: ``count`` slots of one expert.
struct alignas(16) Tile {
    int32_t expert, first, count, unused;
};

// How inputs are rounded: not at all (then they are a sum of 1, 2 or 3 bfloat16, exact for bfloat16, float16 and float32), to E4M3
// (with Weights::fp8 alone: codes) or to NVFP4 (one bfloat16: code times block scale; with Weights::fp4 codes and block scales).
enum class Rounding : int32_t { none, e4m3, nvfp4 };

struct Routing {
    const int64_t* ids;
    int32_t* counts;      // [blocks][experts]; after ``arrange``: where the block's first pair of the expert goes
    int32_t* order;       // [pairs] slot -> pair; those without an expert have no slot
    Tile* tiles;
    int32_t* tile_count;
    int32_t* skipped;  // null, or what pairs without an expert are added to
    int32_t pairs, experts, tile;  // tile: slots of one, at most
    int32_t blocks;                // of pairs
};

struct Inputs {
    const void* x;       // [tokens, size]
    const float* scale;  // [experts], if they are rounded
    unsigned char* out;  // [rows, planes, chunks of CHUNK], bfloat16 or codes (fp4: groups); a row is a token, or a pair if they are rounded
    int32_t dtype, size, planes, chosen;
    int64_t rows;
    Rounding rounding;
};

__device__ __forceinline__ bool is_expert(int64_t id, int experts) { return id >= 0 && id < experts; }

__device__ __forceinline__ float load_float(const void* x, int32_t dtype, int64_t i) {
    if (dtype == NEMOQUANT_BFLOAT16) return to_float(static_cast<const __nv_bfloat16*>(x)[i]);
    if (dtype == NEMOQUANT_FLOAT16) return to_float(static_cast<const __half*>(x)[i]);
    return static_cast<const float*>(x)[i];
}

// Bytes of a row's activations, one plane of them.
template <Weights F>
__host__ __device__ constexpr int64_t plane_bytes(int size) {
    if constexpr (F == Weights::fp4) return static_cast<int64_t>((size + GROUP - 1) / GROUP) * GROUP_BYTES;
    return static_cast<int64_t>((size + CHUNK - 1) / CHUNK) * CHUNK * BYTES<F>;
}

// Blocks of a row that are written.
template <Weights F>
__host__ __device__ constexpr int blocks_of(int size) {
    return F == Weights::fp4 ? (size + GROUP - 1) / GROUP * (GROUP / BLOCK) : size / BLOCK;
}

__device__ __forceinline__ uint16_t bf16_bits(float x) { return __bfloat16_as_ushort(__float2bfloat16_rn(x)); }

// ``value``, in units of its scale, as input ``i`` of a row that begins at ``row``: an E4M3 code, or the sum of ``planes`` bfloat16 that lie
// ``plane`` bytes apart, the smallest first: sums round less when they begin small.
template <Weights F>
__device__ __forceinline__ void store_input(unsigned char* row, int i, float value, int planes, int64_t plane) {
    unsigned char* const at = row + static_cast<int64_t>(i / CHUNK * CHUNK + place<F>(i % CHUNK)) * BYTES<F>;
    if constexpr (F == Weights::fp8) {
        *at = float_to_e4m3(value);
    } else {
        for (int p = planes - 1; p >= 0; --p) {
            const uint16_t bits = bf16_bits(value);
            store_as(at + p * plane, bits);
            value = (bits & 0x7f80U) == 0x7f80U ? 0.0F : value - __uint_as_float(static_cast<uint32_t>(bits) << 16);  // exact
        }
    }
}

// NVFP4: a block's scale as a code, from its largest magnitude (as bits, so that NaN is the largest); the code of a value in units of
// ``block``, that scale, times ``scale``; and what both are in units of ``scale``.
__device__ __forceinline__ uint8_t block_scale_code(uint32_t amax_bits, float scale) {
    return float_to_e4m3(__fdiv_rn(__uint_as_float(amax_bits), __fmul_rn(6.0F, scale)));
}
__device__ __forceinline__ float block_scale(uint32_t amax_bits, float scale) { return e4m3_to_float(block_scale_code(amax_bits, scale)); }
__device__ __forceinline__ uint32_t e2m1_code(float x, float block, float scale) {
    return block == 0.0F ? 0U : float_to_e2m1(__fdiv_rn(x, __fmul_rn(block, scale)));
}
__device__ __forceinline__ float round_e2m1(float x, float block, float scale) { return block * e2m1_to_float(e2m1_code(x, block, scale)); }

__device__ __forceinline__ uint32_t magnitude_bits(float x) { return __float_as_uint(x) & 0x7fffffffU; }

// ------------------------------------------------------------------------------------------------------------- sorting

// ``mine``: this thread's count of anything -> what all threads before it have, and the total. All threads of the block come here.
__device__ __forceinline__ int2 sum_before(int mine, int* warps) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int sum = mine;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const int other = __shfl_up_sync(0xffffffffU, sum, step);
        if (lane >= step) sum += other;
    }
    __syncthreads();
    if (lane == 31) warps[warp] = sum;
    __syncthreads();
    int before = 0, total = 0;
    for (int w = 0; w < SORT / 32; ++w) {
        if (w == warp) before = total;
        total += warps[w];
    }
    return make_int2(before + sum - mine, total);
}

// From each expert's count to where it begins, and the list of tiles. ``count(e)``, ``begins(e, slot)``.
template <class Count, class Begins>
__device__ void lay_out(const Routing& r, int* warps, Count count, Begins begins) {
    const int each = (r.experts + SORT - 1) / SORT;
    const int first = threadIdx.x * each, last = first + each < r.experts ? first + each : r.experts;
    int slots = 0, tiles = 0;
    for (int e = first; e < last; ++e) {
        slots += count(e);
        tiles += (count(e) + r.tile - 1) / r.tile;
    }
    int slot = sum_before(slots, warps).x;
    const int2 before = sum_before(tiles, warps);
    int tile = before.x;
    for (int e = first; e < last; ++e) {
        const int n = count(e);
        begins(e, slot);
        for (int done = 0; done < n; done += r.tile) r.tiles[tile++] = Tile{e, slot + done, n - done < r.tile ? n - done : r.tile, 0};
        slot += n;
    }
    if (threadIdx.x == 0) *r.tile_count = before.y;
}

// How many pairs before this one in its block have the same expert. ``ids`` [SORT] in shared memory.
__device__ __forceinline__ int rank(const int* ids, int expert) {
    int before = 0;
    for (int i = 0; i < static_cast<int>(threadIdx.x); i += 4) {
        const int4 four = load_as<int4>(ids + i);
        const int left = static_cast<int>(threadIdx.x) - i;
        before += (four.x == expert) + (left > 1 && four.y == expert) + (left > 2 && four.z == expert) + (left > 3 && four.w == expert);
    }
    return before;
}

// This thread's expert, or -1.
__device__ __forceinline__ int expert_of(const Routing& r, int pair) {
    if (pair >= r.pairs) return -1;
    const int64_t id = r.ids[pair];
    return is_expert(id, r.experts) ? static_cast<int>(id) : -1;
}

// -------------------------------------------------------------------------------------------------------------- inputs

__device__ __forceinline__ uint32_t amax_bits(const float (&values)[BLOCK]) {
    uint32_t amax = 0;
#pragma unroll
    for (int k = 0; k < BLOCK; ++k) amax = magnitude_bits(values[k]) > amax ? magnitude_bits(values[k]) : amax;
    return amax;
}

// Block ``i`` of a row for products of FP4: codes and their scale.
__device__ __forceinline__ void store_block(unsigned char* row, int i, const float (&values)[BLOCK], float scale) {
    const uint8_t code = block_scale_code(amax_bits(values), scale);
    const float block = e4m3_to_float(code);
    uint32_t halves[2] = {};
#pragma unroll
    for (int k = 0; k < BLOCK; ++k) halves[k / 8] |= e2m1_code(values[k], block, scale) << 4 * (k % 8);
    store_as(row + half_at(i, 0), halves[0]);
    store_as(row + half_at(i, 1), halves[1]);
    row[scale_at(i)] = code;
}

// Thread ``i`` of all writes block ``i`` of 16 inputs.
template <Weights F>
__device__ void write_inputs(const Routing& r, const Inputs& in, int64_t i) {
    const int blocks = blocks_of<F>(in.size);
    const int64_t row = i / blocks;
    if (row >= in.rows) return;
    const int begin = static_cast<int>(i % blocks) * BLOCK;
    float scale = 1.0F;
    int64_t token = row;
    if (in.rounding != Rounding::none) {
        const int64_t id = r.ids[row];
        if (!is_expert(id, r.experts)) return;
        scale = in.scale[id];
        token = row / in.chosen;
    }
    float values[BLOCK];
#pragma unroll
    for (int k = 0; k < BLOCK; ++k) values[k] = F != Weights::fp4 || begin < in.size ? load_float(in.x, in.dtype, token * in.size + begin + k) : 0.0F;
    const int64_t plane = plane_bytes<F>(in.size);
    unsigned char* const out = in.out + row * in.planes * plane;
    if constexpr (F == Weights::fp4) {
        store_block(out, begin / BLOCK, values, scale);
    } else {
        if (in.rounding == Rounding::e4m3) {
#pragma unroll
            for (int k = 0; k < BLOCK; ++k) values[k] = __fdiv_rn(values[k], scale);  // stored as a code
        } else if (in.rounding == Rounding::nvfp4) {
            const float block = block_scale(amax_bits(values), scale);
#pragma unroll
            for (int k = 0; k < BLOCK; ++k) values[k] = round_e2m1(values[k], block, scale);
        }
#pragma unroll
        for (int k = 0; k < BLOCK; ++k) store_input<F>(out, begin + k, values[k], in.planes, plane);
    }
}

}  // namespace nq::experts
