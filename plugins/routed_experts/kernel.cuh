// The products of RoutedExperts, and the sum of each token's experts. See README.md for the math, weights.cuh for the layout.
//
//     narrow    few tokens an expert: memory-bound. A warp takes 16 rows of a weight and 8 tokens; warps of a block may share the
//               inputs of the same rows, their sums added in the warps' order. No shared memory but for that.
//     wide      many: a block takes 256 rows and 32 or 64 tokens, the tokens by asynchronous copies through shared memory.
//     native    the same of FP4 as it is, see native.cuh
//     combine   y = the weighted sum over j, ascending
//
// The epilogue of up squares, rounds as the format has it, and writes what down reads, in its order; that of down writes float32.
#pragma once

#include "routing.cuh"

namespace nq::experts {

// One projection of all experts.
struct Projection {
    const void* weight;        // [experts, rows, inputs]
    const void* block_scales;  // NVFP4
    const float* global_scale;
    const float* input_scale;  // null: inputs are not rounded
    const unsigned char* inputs;  // as ``Inputs`` writes them
    const int32_t* order;
    const Tile* tiles;
    const int32_t* tile_count;
    int32_t rows, size, planes;  // size: inputs; planes: of the inputs, and of what down takes
    int32_t chosen;              // up: an input row is order[slot] / chosen
    bool is_up;
    int32_t split;  // warps that share the inputs of the same rows, ``narrow`` alone

    // Of up: what down takes. Of down: float32 [pairs, rows].
    unsigned char* hidden;
    float* results;
    const float* next_scale;
    Rounding next_rounding;
};

__device__ __forceinline__ int chunks_of(int size) { return (size + CHUNK - 1) / CHUNK; }

// Chunk ``c`` of all planes, counted in its plane; there are three at most.
__device__ __forceinline__ int in_plane(int c, int chunks) { return c < chunks ? c : c < 2 * chunks ? c - chunks : c - 2 * chunks; }

// Which row of inputs is the slot's, and where a row begins.
__device__ __forceinline__ int row_of(const Projection& p, int slot) { return p.is_up ? p.order[slot] / p.chosen : slot; }

template <Weights F>
__device__ __forceinline__ const unsigned char* input_row(const Projection& p, int row) {
    return p.inputs + row * (p.planes * plane_bytes<F>(p.size));
}

// Where an epilogue of up writes: of the first token of its tile, what belongs to output ``begin``; the others ``stride`` bytes apart.
struct Target {
    unsigned char* at;
    int64_t stride;
    int begin;
};

template <Weights F>
__device__ __forceinline__ Target hidden_of(const Projection& p, int slot) {
    const int64_t stride = p.planes * plane_bytes<F>(p.rows);
    return {p.hidden + slot * stride, stride, 0};
}

// The largest magnitude, as bits, of a block of 16 rows for one token: of the lanes that differ in g alone, two values each.
__device__ __forceinline__ uint32_t amax_of_rows(float one, float other) {
    uint32_t amax = magnitude_bits(one) > magnitude_bits(other) ? magnitude_bits(one) : magnitude_bits(other);
#pragma unroll
    for (int step = 4; step < 32; step *= 2) {
        const uint32_t far = __shfl_xor_sync(0xffffffffU, amax, step);
        amax = far > amax ? far : amax;
    }
    return amax;
}

// Block ``block`` of two tokens for products of FP4: values of rows g (0, 1) and g + 8 (2, 3) for one and the other, the first token's
// row at ``at``. ``left``: tokens from the first on, maybe none. Two rows are a byte; lanes of even g write the first token's, odd the other's.
__device__ __forceinline__ void store_codes(const float (&values)[4], float scale, unsigned char* at, int64_t stride, int block, int left) {
    const int g = threadIdx.x % 32 / 4, odd = g % 2;
    uint32_t codes = 0;  // a byte each
    uint8_t block_codes[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        block_codes[i] = block_scale_code(amax_of_rows(values[i], values[i + 2]), scale);
        const float unit = e4m3_to_float(block_codes[i]);
        codes |= e2m1_code(values[i], unit, scale) << 8 * i | e2m1_code(values[i + 2], unit, scale) << 8 * (i + 2);
    }
    const uint32_t far = __shfl_xor_sync(0xffffffffU, codes, 4);
    const uint32_t pairs = odd ? far | codes << 4 : codes | far << 4;
    if (odd >= left) return;
    unsigned char* const row = at + odd * stride;
    row[half_at(block, 0) + g / 2] = static_cast<uint8_t>(pairs >> 8 * odd);
    row[half_at(block, 1) + g / 2] = static_cast<uint8_t>(pairs >> 8 * (odd + 2));
    if (g < 2) row[scale_at(block)] = odd ? block_codes[1] : block_codes[0];
}

// The sums d of 16 rows from ``row`` by the tokens 2 t and 2 t + 1 of the eight from ``first`` of a tile.
template <Weights F>
__device__ __forceinline__ void finish(const Projection& p, const float (&d)[4], const Tile& tile, int row, int first, const Target& to) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    float scale = LEFT_OUT<F>;
    if constexpr (F != Weights::bf16) scale *= p.global_scale[tile.expert];
    if (p.input_scale) scale = __fmul_rn(scale, p.input_scale[tile.expert]);
    float values[4];  // rows g (0, 1) and g + 8 (2, 3)
#pragma unroll
    for (int i = 0; i < 4; ++i) values[i] = __fmul_rn(d[i], scale);
    const int token = first + 2 * t;  // and the next
    if (!p.is_up) {
#pragma unroll
        for (int i = 0; i < 4; ++i)
            if (token + i % 2 < tile.count)
                p.results[static_cast<int64_t>(p.order[tile.first + token + i % 2]) * p.rows + row + g + i / 2 * 8] = values[i];
        return;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float positive = values[i] < 0.0F ? 0.0F : values[i];  // NaN stays
        values[i] = __fmul_rn(positive, positive);
    }
    if constexpr (F == Weights::fp4) {
        store_codes(values, p.next_scale[tile.expert], to.at + token * to.stride, to.stride, (row - to.begin) / BLOCK, tile.count - token);
    } else {
        if (p.next_rounding == Rounding::e4m3) {
            const float next = p.next_scale[tile.expert];
#pragma unroll
            for (int i = 0; i < 4; ++i) values[i] = __fdiv_rn(values[i], next);  // stored as a code
        } else if (p.next_rounding == Rounding::nvfp4) {
            const float next = p.next_scale[tile.expert];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const float block = block_scale(amax_of_rows(values[i], values[i + 2]), next);
                values[i] = round_e2m1(values[i], block, next);
                values[i + 2] = round_e2m1(values[i + 2], block, next);
            }
        }
#pragma unroll
        for (int i = 0; i < 4; ++i)
            if (token + i % 2 < tile.count)
                store_input<F>(to.at + (token + i % 2) * to.stride, row + g + i / 2 * 8 - to.begin, values[i], p.planes, plane_bytes<F>(p.rows));
    }
}

// What one part of a chunk needs of 16 rows, two held ones from ``r``: A of two products, steps 2 ``part`` and 2 ``part`` + 1 of the chunk.
template <Weights F, int N>
struct Rows {
    uint32_t a[2][4];

    __device__ __forceinline__ Rows(const Held<F, N>& held, int part, int r) {
        constexpr int EACH = PARTS<F> / PIECES<F>;  // parts of a piece
        const int j = part / EACH;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int s = part % EACH * 2 + h;
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                uint32_t scale = 0;
                if constexpr (F == Weights::e2m1) scale = scale_pair(s < VALUES<F> / 8 ? held.scales[r + i] & 0xffU : held.scales[r + i] >> 8);
                const uint2 pairs = decode<F>(held.bits[j][r + i], s, scale);
                a[h][i] = pairs.x;
                a[h][i + 2] = pairs.y;
            }
        }
    }

    // d += these rows by the part ``b`` of eight tokens.
    __device__ __forceinline__ void multiply(float (&d)[4], const uint4& b) const {
        if constexpr (F == Weights::fp8) {
            mma_m16n8k32_e4m3(d, a[0], b.x, b.y);
            mma_m16n8k32_e4m3(d, a[1], b.z, b.w);
        } else {
            mma_m16n8k16<__nv_bfloat16>(d, a[0], b.x, b.y);
            mma_m16n8k16<__nv_bfloat16>(d, a[1], b.z, b.w);
        }
    }
};

// Sums of one chunk's E4M3 products are added in float32: tensor cores keep fewer bits of them.
__device__ __forceinline__ void add(float (&d)[4], const float (&part)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) d[i] += part[i];
}

// -------------------------------------------------------------------------------------------------------------- narrow

constexpr int NARROW_WARPS = 4, NARROW_TOKENS = 8;
template <Weights F>
constexpr int DEPTH = F == Weights::e2m1 ? 4 : 2;  // chunks of weights that are under way

template <Weights F>
__global__ void __launch_bounds__(NARROW_WARPS * 32) narrow(Projection p) {
    if (static_cast<int32_t>(blockIdx.y) >= *p.tile_count) return;
    const Tile tile = p.tiles[blockIdx.y];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int share = warp % p.split;
    const int row = (static_cast<int>(blockIdx.x) * (NARROW_WARPS / p.split) + warp / p.split) * 16;
    const int chunks = chunks_of(p.size), total = p.planes * chunks;
    const int first = total * share / p.split, last = row < p.rows ? total * (share + 1) / p.split : first;

    const unsigned char* const tokens = g < tile.count ? input_row<F>(p, row_of(p, tile.first + g)) + t * 16 : nullptr;
    const View<F> view(p.weight, p.block_scales, static_cast<int64_t>(tile.expert) * p.rows + (row < p.rows ? row + g : 0), p.size, t);
    Held<F, 2> held[DEPTH<F>];
    uint4 inputs[2][PARTS<F>];
    const auto load_inputs = [&](uint4(&to)[PARTS<F>], int c) {
        const unsigned char* const at = tokens + static_cast<int64_t>(c) * CHUNK * BYTES<F>;
        const int left = p.size - in_plane(c, chunks) * CHUNK;
#pragma unroll
        for (int q = 0; q < PARTS<F>; ++q)
            to[q] = tokens && piece_begin<F>(q * 4 + t) < left ? load_as<uint4>(at + q * 64) : make_uint4(0, 0, 0, 0);
    };
#pragma unroll
    for (int i = 0; i < DEPTH<F>; ++i)
        if (first + i < last) view.load(held[i], in_plane(first + i, chunks));
    if (first < last) load_inputs(inputs[0], first);

    float d[4] = {};
    for (int c = first; c < last; c += DEPTH<F>) {
#pragma unroll
        for (int i = 0; i < DEPTH<F>; ++i) {
            if (c + i >= last) break;
            if (c + i + 1 < last) load_inputs(inputs[(i + 1) % 2], c + i + 1);
            float part[4] = {};
            float(&sum)[4] = F == Weights::fp8 ? part : d;
#pragma unroll
            for (int q = 0; q < PARTS<F>; ++q) Rows<F, 2>(held[i], q, 0).multiply(sum, inputs[i % 2][q]);
            if (F == Weights::fp8) add(d, part);
            if (c + i + DEPTH<F> < last) view.load(held[i], in_plane(c + i + DEPTH<F>, chunks));
        }
    }
    if (p.split > 1) {
        __shared__ float4 sums[NARROW_WARPS][32];
        sums[warp][lane] = make_float4(d[0], d[1], d[2], d[3]);
        __syncthreads();
        if (share) return;
        for (int w = 1; w < p.split; ++w) {
            const float4 other = sums[warp + w][lane];
            d[0] += other.x, d[1] += other.y, d[2] += other.z, d[3] += other.w;
        }
    }
    if (row < p.rows) finish<F>(p, d, tile, row, 0, hidden_of<F>(p, tile.first));
}

// ---------------------------------------------------------------------------------------------------------------- wide

constexpr int WIDE_WARPS = 8, WIDE_ROWS = WIDE_WARPS * 32;
constexpr int STAGES = 3;
template <Weights F>
constexpr int TOKEN_BYTES = CHUNK * BYTES<F> + 64;  // of a token in a stage: 64 more, so that two tokens use all banks
template <Weights F, int N>
constexpr int STAGE_BYTES = N * 8 * TOKEN_BYTES<F>;
template <Weights F>
constexpr int OUTPUT_BYTES = WIDE_ROWS * BYTES<F> + 16;  // of a token, on the way out
// Chunks of weights that are held: one is used while the next are loaded. Of bfloat16 the next takes the same registers, piece by piece;
// of E2M1 with few tokens, which is bound by memory, two are under way.
template <Weights F, int N>
constexpr int BUFFERS = F == Weights::bf16 ? 1 : F == Weights::e2m1 && N == 4 ? 3 : 2;

// N: eights of tokens.
template <Weights F, int N>
__global__ void __launch_bounds__(WIDE_WARPS * 32) wide(Projection p) {
    if (static_cast<int32_t>(blockIdx.y) >= *p.tile_count) return;
    NQ_DYNAMIC_SHARED(unsigned char, stages);
    static_assert(N * 8 * OUTPUT_BYTES<F> <= STAGES * STAGE_BYTES<F, N>);
    const Tile tile = p.tiles[blockIdx.y];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int row = static_cast<int>(blockIdx.x) * WIDE_ROWS + warp * 32;
    const bool active = row < p.rows;
    const int chunks = chunks_of(p.size), total = p.planes * chunks;

    // Copies: a thread has one part of some tokens.
    constexpr int EACH = PARTS<F> * 4, TOGETHER = WIDE_WARPS * 32 / EACH, COPIES = N * 8 / TOGETHER;
    const int part = threadIdx.x % EACH, token = threadIdx.x / EACH, inside = piece_begin<F>(part);
    int from[COPIES];  // rows: pointers would take twice the registers
#pragma unroll
    for (int i = 0; i < COPIES; ++i) from[i] = token + i * TOGETHER < tile.count ? row_of(p, tile.first + token + i * TOGETHER) : -1;
    const auto copy = [&](int c) {
        if (c < total) {
            unsigned char* const to = stages + c % STAGES * STAGE_BYTES<F, N> + token * TOKEN_BYTES<F> + part * 16;
            const bool there = inside < p.size - in_plane(c, chunks) * CHUNK;
#pragma unroll
            for (int i = 0; i < COPIES; ++i) {
                const bool wanted = there && from[i] >= 0;
                const unsigned char* const at = input_row<F>(p, wanted ? from[i] : 0) + (wanted ? static_cast<int64_t>(c) * CHUNK * BYTES<F> + part * 16 : 0);
                copy_async16(to + i * TOGETHER * TOKEN_BYTES<F>, at, wanted);
            }
        }
        copy_async_commit();
    };
    copy(0);
    copy(1);

    const View<F> view(p.weight, p.block_scales, static_cast<int64_t>(tile.expert) * p.rows + (active ? row + g : 0), p.size, t);
    constexpr int HELD = BUFFERS<F, N>, AHEAD = HELD > 1 ? HELD - 1 : 1;
    Held<F, 4> held[HELD];  // rows g, g + 8, g + 16, g + 24
#pragma unroll
    for (int i = 0; i < AHEAD; ++i)
        if (i < total) view.load(held[i], in_plane(i, chunks));

    float d[2][N][4] = {};
    const auto multiply = [&](const Held<F, 4>& now, int c, auto used) {
        const unsigned char* const stage = stages + c % STAGES * STAGE_BYTES<F, N> + g * TOKEN_BYTES<F> + t * 16;
        const auto inputs = [&](int n, int q) { return load_as<uint4>(stage + n * 8 * TOKEN_BYTES<F> + q * 64); };
        if constexpr (F == Weights::fp8) {
            const Rows<F, 4> rows[2][2] = {{{now, 0, 0}, {now, 0, 2}}, {{now, 1, 0}, {now, 1, 2}}};
#pragma unroll
            for (int n = 0; n < N; ++n) {
                float sums[2][4] = {};
#pragma unroll
                for (int q = 0; q < 2; ++q) {
                    const uint4 b = inputs(n, q);
                    rows[q][0].multiply(sums[0], b);
                    rows[q][1].multiply(sums[1], b);
                }
                add(d[0][n], sums[0]);
                add(d[1][n], sums[1]);
            }
        } else {
#pragma unroll
            for (int q = 0; q < PARTS<F>; ++q) {
                const Rows<F, 4> upper(now, q, 0), lower(now, q, 2);
#pragma unroll
                for (int n = 0; n < N; ++n) {
                    const uint4 b = inputs(n, q);
                    upper.multiply(d[0][n], b);
                    lower.multiply(d[1][n], b);
                }
                used(q);
            }
        }
    };
    for (int c = 0; c < total; c += HELD) {
#pragma unroll
        for (int i = 0; i < HELD; ++i) {
            if (c + i >= total) break;
            copy_async_wait<1>();
            __syncthreads();  // the stage is whole, and the one before it is free
            copy(c + i + 2);
            if (!active) continue;
            const bool more = c + i + AHEAD < total;
            const int next = in_plane(c + i + AHEAD, chunks);
            if constexpr (HELD > 1) {
                if (more) view.load(held[(i + AHEAD) % HELD], next);
                multiply(held[i], c + i, [](int) {});
            } else {
                multiply(held[0], c, [&](int q) {
                    if (more) view.load(held[0], q, next);
                });
            }
        }
    }
    copy_async_wait<0>();
    // What up hands on goes through shared memory, where the stages were, so that it is written 16 bytes at a time.
    const bool staged = p.is_up && p.planes == 1;
    const int block_row = static_cast<int>(blockIdx.x) * WIDE_ROWS;
    const Target to = staged ? Target{stages, OUTPUT_BYTES<F>, block_row} : hidden_of<F>(p, tile.first);
    if (staged) __syncthreads();
    if (active)
#pragma unroll
        for (int n = 0; n < N; ++n) {
            if (n * 8 >= tile.count) break;
            finish<F>(p, d[0][n], tile, row, n * 8, to);
            finish<F>(p, d[1][n], tile, row + 16, n * 8, to);
        }
    if (!staged) return;
    __syncthreads();
    constexpr int LINE = WIDE_ROWS * BYTES<F> / 16;  // parts of a token
    const Target out = hidden_of<F>(p, tile.first);
    for (int i = threadIdx.x; i < tile.count * LINE; i += WIDE_WARPS * 32) {
        const int n = i / LINE, at = i % LINE, chunk = at / EACH * CHUNK;
        if (piece_begin<F>(at % EACH) >= p.rows - block_row - chunk) continue;
        unsigned char* const there = out.at + n * out.stride + static_cast<int64_t>(block_row) * BYTES<F> + at * 16;
        store_as(there, load_as<uint4>(stages + n * OUTPUT_BYTES<F> + at * 16));
    }
}

// ------------------------------------------------------------------------------------------------------------- combine

struct Sum {
    const float* results;  // [pairs, size]
    const int64_t* ids;    // [tokens, chosen]
    const float* weights;
    void* y;  // [tokens, size]
    int64_t tokens;
    int32_t chosen, experts, size;
    const int32_t* slots = nullptr;  // pair -> row of results, if it is another
    const float *global_scale = nullptr, *input_scale = nullptr;  // [experts], if results have yet to be multiplied by them
};

constexpr int COMBINE_THREADS = 256;

// A thread has four neighbouring values of one token.
template <class Y>
__global__ void __launch_bounds__(COMBINE_THREADS) combine(Sum p) {
    const int64_t thread = static_cast<int64_t>(blockIdx.x) * COMBINE_THREADS + threadIdx.x;
    const int64_t token = thread / (p.size / 4);
    if (token >= p.tokens) return;
    const int64_t column = thread % (p.size / 4) * 4;
    float sum[4] = {};
    for (int j = 0; j < p.chosen; ++j) {
        const int64_t pair = token * p.chosen + j;
        if (!is_expert(p.ids[pair], p.experts)) continue;
        const float weight = p.weights[pair];
        float4 part = load_as<float4>(p.results + (p.slots ? p.slots[pair] : pair) * p.size + column);
        if (p.global_scale) {
            const float scale = __fmul_rn(p.global_scale[p.ids[pair]], p.input_scale[p.ids[pair]]);
            part.x = __fmul_rn(part.x, scale), part.y = __fmul_rn(part.y, scale), part.z = __fmul_rn(part.z, scale), part.w = __fmul_rn(part.w, scale);
        }
        sum[0] = __fmaf_rn(weight, part.x, sum[0]);
        sum[1] = __fmaf_rn(weight, part.y, sum[1]);
        sum[2] = __fmaf_rn(weight, part.z, sum[2]);
        sum[3] = __fmaf_rn(weight, part.w, sum[3]);
    }
    Y* const y = static_cast<Y*>(p.y) + token * p.size + column;
#pragma unroll
    for (int i = 0; i < 4; ++i) y[i] = from_float<Y>(sum[i]);
}

}  // namespace nq::experts
