// The kernels of the experts: inputs rounded, both products, the weighted sum. How they fit together is in launch.cu.
//
// Weights are the 16 x 16 operand of the matrix instruction and tokens the 8 columns, so that a few tokens waste little, and so that
// weights go from global memory into registers, are decoded there, and are never in shared memory.
#pragma once

#include "../common/mma.cuh"
#include "weights.cuh"

namespace nq::experts {

constexpr int WARPS = 4;           // of a block of a product
constexpr int ROWS = 16;           // of a fragment of weights
constexpr int LARGE_TOKENS = 64;   // of a block of product_large
constexpr int LARGE_ROWS = 128;
constexpr int SLAB = 128;          // values of k in a stage of its shared memory
constexpr int STAGES = 3;
constexpr int STRIDE = 2 * SLAB + 64;  // bytes of a token there: neighbours half a row of banks apart
constexpr int PAD = 4;                 // floats behind the rows of a table of sums: so that a warp meets each bank once
constexpr size_t LARGE_SHARED = static_cast<size_t>(STAGES) * LARGE_TOKENS * STRIDE;
static_assert(LARGE_SHARED >= sizeof(float) * LARGE_TOKENS * (LARGE_ROWS + PAD));

// n = tokens * k ids become ``rows`` positions (those in range), and positions become tiles of one expert each.
struct Routes {
    int32_t* place;        // [n]: the position of an id; -1: the id is out of range
    int32_t* token;        // [rows]: whose input a position wants
    int32_t* offsets;      // [E + 1]: an expert's positions begin here
    int32_t* tile_expert;  // [tiles]
    int32_t* tile_first;   // [tiles]: its first position
    int32_t* tiles;        // [1]
};

// What becomes of a product's sums.
enum class Into : int32_t {
    sums,    // float32, as they are
    planes,  // relu squared, as bfloat16 parts that add up to it
    e4m3,    // relu squared, through E4M3: the code's value
    e2m1     // relu squared, through E2M1 in blocks of 16: the code's value times the block's scale
};

// x [rows, in] by the weights [out, in] of each row's expert. Inputs are bfloat16: the sum of ``planes`` arrays.
struct Product {
    const void* weights;           // [E, out, in]
    const uint8_t* block_scales;   // [E, out, in / 16]
    const float* global_scale;     // [E] or null: 1
    const float* input_scale;      // [E] or null: 1; what x is to be multiplied with
    const __nv_bfloat16* x;        // [planes][.., in]
    const int32_t* row_of;         // [rows]: the row of x of a position; null: the position
    int64_t x_plane;               // elements from plane to plane
    int32_t planes, in, out;
    Into into;
    float* sums;                   // [rows, out]
    __nv_bfloat16* parts;          // [planes_out][rows, out]
    int64_t parts_plane;
    int32_t planes_out;
    const float* next_scale;       // [E]: with e4m3 and e2m1
    Routes routes;
    int32_t tile;                  // positions of a tile
    int32_t row_blocks, split;     // blocks that share a tile; warps that share the sums of a row
};

struct Tile {
    int expert, first, count;
};

__device__ __forceinline__ bool find(const Product& p, Tile& tile) {
    const int at = static_cast<int>(blockIdx.x / static_cast<unsigned>(p.row_blocks));
    if (at >= *p.routes.tiles) return false;
    tile.expert = p.routes.tile_expert[at];
    tile.first = p.routes.tile_first[at];
    const int left = p.routes.offsets[tile.expert + 1] - tile.first;
    tile.count = left < p.tile ? left : p.tile;
    return true;
}

// One of the bfloat16 parts that add up to x; what is left over goes into ``rest``.
__device__ __forceinline__ __nv_bfloat16 part_of(float x, float& rest) {
    const __nv_bfloat16 part = __float2bfloat16_rn(x);
    const float value = __bfloat162float(part);
    rest = fabsf(value) < __uint_as_float(0x7f800000U) ? x - value : 0.0F;  // infinity and NaN are a part of their own
    return part;
}

// The next bfloat16 part of 8 values; ``v`` becomes what is left over.
template <bool interleaved>
__device__ __forceinline__ uint4 parts_of(float (&v)[8]) {
    uint32_t pairs[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int first = interleaved ? i : 2 * i, second = interleaved ? i + 4 : 2 * i + 1;
        const float low = __bfloat162float(part_of(v[first], v[first])), high = __bfloat162float(part_of(v[second], v[second]));
        pairs[i] = pack_pair<__nv_bfloat16>(low, high);
    }
    return make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
}

// The largest magnitude, as bits: so NaN is the largest.
template <int n>
__device__ __forceinline__ uint32_t largest(const float (&v)[n]) {
    uint32_t amax = 0;
#pragma unroll
    for (int i = 0; i < n; ++i) {
        const uint32_t magnitude = __float_as_uint(v[i]) & 0x7fffffffU;
        amax = amax > magnitude ? amax : magnitude;
    }
    return amax;
}

__device__ __forceinline__ float through_e4m3(float x, float scale) { return e4m3_to_float(float_to_e4m3(__fdiv_rn(x, scale))); }

// The value of the block's scale for its largest magnitude, given as bits so that NaN is the largest.
__device__ __forceinline__ float block_scale(uint32_t amax, float scale) {
    return e4m3_to_float(float_to_e4m3(__fdiv_rn(__uint_as_float(amax), __fmul_rn(6.0F, scale))));
}

// The value of x's code times its block's scale; exact in bfloat16. A block whose scale is zero is zero.
__device__ __forceinline__ float through_e2m1(float x, float block, float scale) {
    return block == 0.0F ? 0.0F : e2m1_to_float(float_to_e2m1(__fdiv_rn(x, __fmul_rn(block, scale)))) * block;
}

// A warp's sums of 16 rows and 8 N tokens into a table of the block's, [token][row] in rows of ``stride``.
template <int N>
__device__ __forceinline__ void put(float* table, int stride, const float (&d)[N][4]) {
    const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) table[(8 * n + 2 * t + i % 2) * stride + g + i / 2 * 8] = d[n][i];
}

// The block's sums to where they belong: ``rows`` rows from row0 on of the tile's tokens, 8 rows a thread at a time. Each is the sum
// of ``shares`` tables that lie ``apart``. Two neighbouring threads have a block of 16 rows.
template <class W>
__device__ __forceinline__ void finish(const Product& p, const Tile& tile, int row0, int rows, const float* table, int stride, int shares,
                                       int apart) {
    const int thread = static_cast<int>(threadIdx.x), eights = rows / 8, items = tile.count * eights;
    const float scale = W::SCALE * (p.global_scale ? p.global_scale[tile.expert] : 1.0F) * (p.input_scale ? p.input_scale[tile.expert] : 1.0F);
    const float next = p.into == Into::e4m3 || p.into == Into::e2m1 ? p.next_scale[tile.expert] : 1.0F;
#pragma unroll 1
    for (int first = 0; first < items; first += 32 * WARPS) {
        const int item = first + thread < items ? first + thread : items - 1, token = item / eights, row = item % eights * 8;
        const bool wanted = first + thread < items && row0 + row < p.out;
        const int64_t at = static_cast<int64_t>(tile.first + token) * p.out + row0 + row;
        float v[8] = {};
        for (int share = 0; share < shares; ++share)
            for (int i = 0; i < 2; ++i) {
                const float4 four = load_as<float4>(table + share * apart + token * stride + row + 4 * i);
                v[4 * i] += four.x, v[4 * i + 1] += four.y, v[4 * i + 2] += four.z, v[4 * i + 3] += four.w;
            }
#pragma unroll
        for (int i = 0; i < 8; ++i) v[i] *= scale;
        if (p.into == Into::sums) {
            if (wanted)
                for (int i = 0; i < 2; ++i) store_as(p.sums + at + 4 * i, make_float4(v[4 * i], v[4 * i + 1], v[4 * i + 2], v[4 * i + 3]));
            continue;
        }
#pragma unroll
        for (int i = 0; i < 8; ++i) v[i] = v[i] < 0.0F ? 0.0F : v[i] * v[i];
        if (p.into == Into::e2m1) {
            uint32_t amax = largest(v);
            const uint32_t other = __shfl_xor_sync(0xffffffffU, amax, 1);
            amax = amax > other ? amax : other;
            const float block = block_scale(amax, next);
#pragma unroll
            for (int i = 0; i < 8; ++i) v[i] = through_e2m1(v[i], block, next);
        } else if (p.into == Into::e4m3) {
#pragma unroll
            for (int i = 0; i < 8; ++i) v[i] = through_e4m3(v[i], next);
        }
        for (int plane = 0; plane < p.planes_out; ++plane) {
            const uint4 parts = parts_of<W::INTERLEAVED>(v);
            if (wanted) store_as(p.parts + plane * p.parts_plane + at, parts);
        }
    }
}

// Products of a chunk of 8 values of k a lane: rows g and g + 8 of the weights by one token a lane.
__device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&low)[4], const uint32_t (&high)[4], const uint4& x) {
    mma_m16n8k16<__nv_bfloat16>(d, {low[0], high[0], low[1], high[1]}, x.x, x.y);
    mma_m16n8k16<__nv_bfloat16>(d, {low[2], high[2], low[3], high[3]}, x.z, x.w);
}

// Few tokens an expert: bound by reading the weights. A warp has 16 rows, or one of ``split`` shares of their k, and 8 N tokens, which
// it reads from global memory (they are in the caches). No shared memory but for adding up the shares, in a fixed order. ``single``: x
// is one array.
template <class W, int N, bool single>
__global__ void __launch_bounds__(32 * WARPS) product_small(Product p) {
    constexpr int GROUP = 4 * W::VALUES, UNROLL = N == 1 ? 4 : 2;
    __shared__ __align__(16) float sums[WARPS * 8 * N * (ROWS + PAD)];  // of fewer rows with more shares: never more than this
    Tile tile;
    if (!find(p, tile)) return;
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
    const int share = warp % p.split, block = static_cast<int>(blockIdx.x % static_cast<unsigned>(p.row_blocks));
    const int row0 = (block * (WARPS / p.split) + warp / p.split) * ROWS;
    const Matrix matrix = W::matrix(p.weights, p.block_scales, static_cast<int64_t>(tile.expert) * p.out, p.in);
    const bool have[2] = {row0 + g < p.out, row0 + g + 8 < p.out};
    const __nv_bfloat16* x[N];
    for (int n = 0; n < N; ++n) {
        const int position = tile.first + 8 * n + g;
        x[n] = 8 * n + g < tile.count ? p.x + static_cast<int64_t>(p.row_of ? p.row_of[position] : position) * p.in : nullptr;
    }
    float d[N][4] = {};
    if (row0 < p.out)
        for (int k0 = share * GROUP; k0 < p.in; k0 += p.split * GROUP * UNROLL) {
            typename W::Raw raw[UNROLL][2] = {};
#pragma unroll
            for (int u = 0; u < UNROLL; ++u) {
                const int k = k0 + u * p.split * GROUP + t * W::VALUES;
                for (int half = 0; half < 2; ++half)
                    if (have[half] && k < p.in) raw[u][half] = W::load(matrix, row0 + g + 8 * half, k, p.in);
            }
#pragma unroll
            for (int u = 0; u < UNROLL; ++u) {
                const int k = k0 + u * p.split * GROUP + t * W::VALUES;
                const bool inside = k < p.in;
                if (k - t * W::VALUES >= p.in) break;
#pragma unroll
                for (int chunk = 0; chunk < W::VALUES / 8; ++chunk) {
                    uint32_t low[4], high[4];
                    W::decode(raw[u][0], chunk, low);
                    W::decode(raw[u][1], chunk, high);
#pragma unroll 1
                    for (int plane = 0; plane < (single ? 1 : p.planes); ++plane)
#pragma unroll
                        for (int n = 0; n < N; ++n) {
                            uint4 values = make_uint4(0, 0, 0, 0);
                            if (x[n] && inside) values = load_as<uint4>(x[n] + plane * p.x_plane + k + 8 * chunk);
                            multiply(d[n], low, high, values);
                        }
                }
            }
        }
    const int rows = ROWS * WARPS / p.split, stride = rows + PAD, apart = 8 * N * stride;
    put<N>(sums + share * apart + warp / p.split * ROWS, stride, d);
    __syncthreads();
    finish<W>(p, tile, block * rows, rows, sums, stride, p.split, apart);
}

// Many tokens an expert: 128 rows by 64 tokens a block, 32 rows by 64 tokens a warp. Tokens come through shared memory, three stages
// of 128 values of k; there the chunks that the lanes of a row read together lie side by side. Weights are loaded a group ahead.
template <class W>
__global__ void __launch_bounds__(32 * WARPS, 3) product_large(Product p) {
    constexpr int VALUES = W::VALUES, GROUP = 4 * VALUES, GROUPS = SLAB / GROUP, CHUNKS = VALUES / 8, N = LARGE_TOKENS / 8;
    NQ_DYNAMIC_SHARED(unsigned char, shared);
    __shared__ int32_t rows[LARGE_TOKENS];
    Tile tile;
    if (!find(p, tile)) return;
    const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32, g = lane / 4, t = lane % 4;
    const int block = static_cast<int>(blockIdx.x % static_cast<unsigned>(p.row_blocks));
    const int row0 = block * LARGE_ROWS + warp * 2 * ROWS;
    const Matrix matrix = W::matrix(p.weights, p.block_scales, static_cast<int64_t>(tile.expert) * p.out, p.in);
    const int stages = (p.in + SLAB - 1) / SLAB * p.planes;
    if (thread < LARGE_TOKENS)
        rows[thread] = thread >= tile.count ? -1 : p.row_of ? p.row_of[tile.first + thread] : tile.first + thread;
    __syncthreads();

    const auto fetch = [&](int stage) {
        if (stage < stages) {
            const int chunk = thread % 16, k = stage / p.planes * SLAB + 8 * chunk, within = chunk % (VALUES / 2);
            const int place = chunk - within + within % CHUNKS * 4 + within / CHUNKS;
            unsigned char* const to = shared + static_cast<size_t>(stage % STAGES) * LARGE_TOKENS * STRIDE + 16 * place;
#pragma unroll
            for (int i = 0; i < LARGE_TOKENS / 8; ++i) {
                const int token = 8 * i + thread / 16, row = rows[token];
                const bool wanted = row >= 0 && k < p.in;
                const __nv_bfloat16* const from = p.x + (wanted ? stage % p.planes * p.x_plane + static_cast<int64_t>(row) * p.in + k : 0);
                copy_async16(to + token * STRIDE, from, wanted);
            }
        }
        copy_async_commit();
    };
    typename W::Raw next[2][2] = {};
    const auto load = [&](int k) {
        k += t * VALUES;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int row = row0 + 8 * i + g;
            next[i / 2][i % 2] = {};
            if (row < p.out && k < p.in) next[i / 2][i % 2] = W::load(matrix, row, k, p.in);
        }
    };

    float d[2][N][4] = {};
    for (int stage = 0; stage < STAGES - 1; ++stage) fetch(stage);
    load(0);
    for (int stage = 0; stage < stages; ++stage) {
        copy_async_wait<STAGES - 2>();
        __syncthreads();
        fetch(stage + STAGES - 1);
        const unsigned char* const x = shared + static_cast<size_t>(stage % STAGES) * LARGE_TOKENS * STRIDE + g * STRIDE + 16 * t;
#pragma unroll
        for (int group = 0; group < GROUPS; ++group) {
            typename W::Raw raw[2][2];
#pragma unroll
            for (int i = 0; i < 4; ++i) raw[i / 2][i % 2] = next[i / 2][i % 2];
            load(group + 1 < GROUPS ? stage / p.planes * SLAB + (group + 1) * GROUP : (stage + 1) / p.planes * SLAB);
#pragma unroll
            for (int chunk = 0; chunk < CHUNKS; ++chunk) {
                uint32_t w[2][2][4];
#pragma unroll
                for (int i = 0; i < 4; ++i) W::decode(raw[i / 2][i % 2], chunk, w[i / 2][i % 2]);
#pragma unroll
                for (int n = 0; n < N; ++n) {
                    const uint4 values = load_as<uint4>(x + 8 * n * STRIDE + 16 * (group * VALUES / 2 + 4 * chunk));
#pragma unroll
                    for (int m = 0; m < 2; ++m) multiply(d[m][n], w[m][0], w[m][1], values);
                }
            }
        }
    }
    copy_async_wait<0>();
    __syncthreads();
    float* const table = reinterpret_cast<float*>(shared);
#pragma unroll
    for (int m = 0; m < 2; ++m) put<N>(table + (2 * warp + m) * ROWS, LARGE_ROWS + PAD, d[m]);
    __syncthreads();
    finish<W>(p, tile, block * LARGE_ROWS, LARGE_ROWS, table, LARGE_ROWS + PAD, 1, 0);
}

// x [T, I] of type X into ``planes`` bfloat16 arrays that add up to it. A block a token; 8 values a thread at a time.
template <class X>
__global__ void __launch_bounds__(128)
    split_rows(const X* __restrict__ x, __nv_bfloat16* parts, int64_t plane, int planes, int in, bool interleaved) {
    const int64_t row = static_cast<int64_t>(blockIdx.x) * in;
    for (int at = 8 * static_cast<int>(threadIdx.x); at < in; at += 8 * static_cast<int>(blockDim.x)) {
        float v[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) v[i] = to_float(x[row + at + i]);
        for (int p = 0; p < planes; ++p)
            store_as(parts + p * plane + row + at, interleaved ? parts_of<true>(v) : parts_of<false>(v));
    }
}

// Each position's input as its expert wants it: through E4M3, or E2M1 in blocks of 16 (and interleaved), by the expert's scale;
// without that scale. A block an id; 16 values a thread at a time.
template <class X>
__global__ void __launch_bounds__(128)
    quantize_rows(const X* __restrict__ x, const int64_t* __restrict__ ids, const int32_t* __restrict__ place, const float* __restrict__ scales,
                  __nv_bfloat16* rounded, bool blocks, int top_k, int in) {
    const int id = static_cast<int>(blockIdx.x), position = place[id];
    if (position < 0) return;
    const float scale = scales[ids[id]];
    const X* const from = x + static_cast<int64_t>(id / top_k) * in;
    __nv_bfloat16* const to = rounded + static_cast<int64_t>(position) * in;
    for (int at = 16 * static_cast<int>(threadIdx.x); at < in; at += 16 * static_cast<int>(blockDim.x)) {
        float v[2][8];
#pragma unroll
        for (int i = 0; i < 16; ++i) v[i / 8][i % 8] = to_float(from[at + i]);
        const uint32_t low = largest(v[0]), high = largest(v[1]);
        const float block = blocks ? block_scale(low > high ? low : high, scale) : 1.0F;
#pragma unroll
        for (int i = 0; i < 16; ++i)
            v[i / 8][i % 8] = blocks ? through_e2m1(v[i / 8][i % 8], block, scale) : through_e4m3(v[i / 8][i % 8], scale);
#pragma unroll
        for (int half = 0; half < 2; ++half) store_as(to + at + 8 * half, blocks ? parts_of<true>(v[half]) : parts_of<false>(v[half]));
    }
}

// y [T, I]: each token's sums times its weights, in the order of j. A block a token; 4 values a thread.
template <class X>
__global__ void __launch_bounds__(128) combine(const float* __restrict__ sums, const int32_t* __restrict__ place, const float* __restrict__ weights,
                                               X* y, int top_k, int in) {
    const int64_t token = blockIdx.x;
    for (int at = 4 * static_cast<int>(threadIdx.x); at < in; at += 4 * static_cast<int>(blockDim.x)) {
        float total[4] = {};
#pragma unroll 4
        for (int j = 0; j < top_k; ++j) {
            const int32_t position = place[token * top_k + j];
            if (position < 0) continue;
            const float weight = weights[token * top_k + j];
            const float4 v = load_as<float4>(sums + static_cast<int64_t>(position) * in + at);
            total[0] = __fmaf_rn(v.x, weight, total[0]);
            total[1] = __fmaf_rn(v.y, weight, total[1]);
            total[2] = __fmaf_rn(v.z, weight, total[2]);
            total[3] = __fmaf_rn(v.w, weight, total[3]);
        }
        for (int i = 0; i < 4; ++i) y[token * in + at + i] = from_float<X>(total[i]);
    }
}

}  // namespace nq::experts
