// The selective scan of Mamba-2 on a device: two kernels, both right for every length >= 1.
//
// scan_steps    the recurrence as it is written, position after position, the state in registers: decode (one position, bound by
//               the state's bytes), few positions, float32 inputs. All in float32 with functions of the same bits on every device,
//               and sums in one order: so are its results.
// scan_chunks   the state-space dual form for bfloat16 and float16 inputs, chunks of 64 positions, products on matrix cores:
//               1. within a chunk     y_t  = sum over s <= t of (C_t . B_s) decay(s, t) dt_s x_s
//               2. a chunk's state    S'   = sum over s of decay(s, end) dt_s x_s (outer) B_s
//               3. passing states on  S   <- decay(chunk) S + S'
//               4. from before        y_t += decay(start, t) C_t . S
//               One block walks along the sequence for one head and 64 of its rows, and S never leaves its registers; a copy rounded
//               to the inputs' type lies in shared memory for step 4. The sequence may be cut into segments that run side by side: a
//               first pass computes the state that each adds, and each then begins with the sum of those before it.
#pragma once

#include "../common/mma.cuh"
#include "../common/philox.cuh"

namespace nq::mamba2 {

struct Params {
    const void *x, *b, *c, *dt;
    const float *a, *d, *dt_bias;
    const void* state_in;
    void *y, *state_out;
    const int64_t* seed;  // null: to the nearest
    int64_t step;
    float* segment_states;  // [batch, heads x tiles, segments] states in fragment order: the first one, then what segments add
    float* segment_decays;  // [batch, heads x tiles, segments], log2
    int64_t length, chunks_in_segment;
    int64_t x_batch_stride, x_position_stride, b_batch_stride, b_position_stride;
    int64_t c_batch_stride, c_position_stride, dt_batch_stride, dt_position_stride;
    int32_t heads, head_dim, heads_in_group, state, segments, stages;
    int32_t dtype, dt_dtype, y_dtype, state_dtype, philox_rounds;
    float dt_min, dt_max;
};

constexpr int THREADS = 128;
constexpr unsigned ALL = 0xffffffffU;

// ---- values of a type that is known at run time ----
//
// Bits are loaded first and become floats when they are used: a conversion beside each load would wait for memory each time.

// One value's bits: of a float, or of a 16-bit type in the low half.
__device__ __forceinline__ uint32_t load_bits(const void* at, int64_t i, bool wide) {
    return wide ? static_cast<const uint32_t*>(at)[i] : static_cast<const uint16_t*>(at)[i];
}

__device__ __forceinline__ float value_of(uint32_t bits, int32_t dtype) {
    const float half = unpack_pair<__half>(bits).x, brain = unpack_pair<__nv_bfloat16>(bits).x;
    return dtype == NEMOQUANT_FLOAT32 ? __uint_as_float(bits) : dtype == NEMOQUANT_FLOAT16 ? half : brain;
}

// ``count`` neighbours, the first at a multiple of count, by loads of 16 bytes (8 for four 16-bit values).
template <bool wide, int count>
struct Values {
    static_assert(count == 4 || count == 8);
    static constexpr int words = wide ? count : count / 2;
    uint32_t bits[words];

    __device__ __forceinline__ void load(const void* at, int64_t i) {
        const char* from = static_cast<const char*>(at) + i * (wide ? 4 : 2);
        if constexpr (words == 2) {
            const auto two = load_as<uint2>(from);
            bits[0] = two.x, bits[1] = two.y;
        } else {
#pragma unroll
            for (int j = 0; j < words; j += 4) {
                const auto four = load_as<uint4>(from + 4 * j);
                bits[j] = four.x, bits[j + 1] = four.y, bits[j + 2] = four.z, bits[j + 3] = four.w;
            }
        }
    }

    __device__ __forceinline__ void unpack(int32_t dtype, float* out) const {
#pragma unroll
        for (int j = 0; j < words; ++j) {
            if constexpr (wide) {
                out[j] = __uint_as_float(bits[j]);
            } else {
                const float2 half = unpack_pair<__half>(bits[j]), brain = unpack_pair<__nv_bfloat16>(bits[j]);
                out[2 * j] = dtype == NEMOQUANT_FLOAT16 ? half.x : brain.x;
                out[2 * j + 1] = dtype == NEMOQUANT_FLOAT16 ? half.y : brain.y;
            }
        }
    }
};

__device__ __forceinline__ void store_one(void* at, int64_t i, float value, int32_t dtype) {
    if (dtype == NEMOQUANT_FLOAT32)
        static_cast<float*>(at)[i] = value;
    else if (dtype == NEMOQUANT_FLOAT16)
        static_cast<__half*>(at)[i] = from_float<__half>(value);
    else
        static_cast<__nv_bfloat16*>(at)[i] = from_float<__nv_bfloat16>(value);
}

// Two neighbours, the first at an even place.
__device__ __forceinline__ void store_two(void* at, int64_t i, float first, float second, int32_t dtype) {
    if (dtype == NEMOQUANT_FLOAT32)
        store_as(static_cast<float*>(at) + i, make_float2(first, second));
    else
        store_as(static_cast<uint16_t*>(at) + i,
                 dtype == NEMOQUANT_FLOAT16 ? pack_pair<__half>(first, second) : pack_pair<__nv_bfloat16>(first, second));
}

__device__ __forceinline__ float2 load_two(const void* at, int64_t i, int32_t dtype) {
    if (dtype == NEMOQUANT_FLOAT32) return load_as<float2>(static_cast<const float*>(at) + i);
    const auto bits = load_as<uint32_t>(static_cast<const uint16_t*>(at) + i);
    return dtype == NEMOQUANT_FLOAT16 ? unpack_pair<__half>(bits) : unpack_pair<__nv_bfloat16>(bits);
}

__device__ __forceinline__ bool is_wide(int32_t dtype) { return dtype == NEMOQUANT_FLOAT32; }

// The random words of state elements 4 i to 4 i + 3.
__device__ __forceinline__ PhiloxWords words_of(const Params& p, int64_t i) {
    const uint64_t place = static_cast<uint64_t>(i), step = static_cast<uint64_t>(p.step);
    const PhiloxWords counter{{static_cast<uint32_t>(place), static_cast<uint32_t>(place >> 32), static_cast<uint32_t>(step),
                               static_cast<uint32_t>(step >> 32)}};
    return philox4x32(counter, philox_key(static_cast<uint64_t>(*p.seed)), p.philox_rounds);
}

__device__ __forceinline__ float bounded_step(const Params& p, float dt, float bias) {
    const float step = steady_softplus(__fadd_rn(dt, bias));
    return step != step ? step : fminf(fmaxf(step, p.dt_min), p.dt_max);  // fminf and fmaxf would hide a NaN
}

__device__ __forceinline__ float dt_value(const Params& p, int64_t row, int64_t t, int head) {
    return value_of(load_bits(p.dt, row * p.dt_batch_stride + t * p.dt_position_stride + head, is_wide(p.dt_dtype)), p.dt_dtype);
}

// ---- scan_steps ----

// How the lanes of a warp share rows of the state: a row's ``size`` elements lie on ``lanes`` lanes, ``vectors`` times 16 bytes each.
template <class State, int size>
struct Rows {
    static constexpr int width = 16 / sizeof(State);
    static constexpr int pieces = size / width;
    static constexpr int vectors = pieces % 3 == 0 ? 3 : pieces > 32 ? pieces / 32 : 1;
    static constexpr int lanes = pieces / vectors;
    static constexpr int held = vectors * width;                                 // of one row, by a thread
    static constexpr int rows = held >= 16 ? 1 : 16 / held;                      // of a thread
    static constexpr int at_once = THREADS / lanes, of_block = at_once * rows;   // rows
    static constexpr int resident = held > 16 ? 3 : 5;                           // blocks of a multiprocessor, as registers allow
    static_assert(lanes * vectors * width == size && 32 % lanes == 0);
};

// 16 bytes of the state from place i on.
template <class State>
__device__ __forceinline__ void store_row_part(const Params& p, int64_t i, const float* values) {
    if constexpr (sizeof(State) == 4) {
        store_as(static_cast<float*>(p.state_out) + i, make_float4(values[0], values[1], values[2], values[3]));
    } else {
        uint32_t bits[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) bits[j] = pack_pair<State>(values[2 * j], values[2 * j + 1]);
        if constexpr (std::is_same_v<State, __half>) {
            if (p.seed) {
#pragma unroll
                for (int j = 0; j < 8; j += 4) {
                    const PhiloxWords random = words_of(p, (i + j) / 4);
#pragma unroll
                    for (int k = 0; k < 4; k += 2)
                        bits[(j + k) / 2] = half_pair_by_chance(values[j + k], values[j + k + 1], random.word[k], random.word[k + 1]);
                }
            }
        }
        store_as(static_cast<uint16_t*>(p.state_out) + i, make_uint4(bits[0], bits[1], bits[2], bits[3]));
    }
}

// What a thread needs of one position, as bits.
template <class State, bool wide, int size>
struct Position {
    using R = Rows<State, size>;
    Values<wide, R::width> b[R::vectors], c[R::vectors];
    uint32_t x[R::rows];

    // ``first`` is the thread's first row of the head's; rows behind the last one read as 0.
    __device__ __forceinline__ void load(const Params& p, int64_t batch, int64_t t, int head, int first) {
        const int part = static_cast<int>(threadIdx.x) % R::lanes;
        const int64_t group = head / p.heads_in_group * static_cast<int64_t>(size);
        const int64_t b_row = batch * p.b_batch_stride + t * p.b_position_stride + group;
        const int64_t c_row = batch * p.c_batch_stride + t * p.c_position_stride + group;
        const int64_t x_row = batch * p.x_batch_stride + t * p.x_position_stride + static_cast<int64_t>(head) * p.head_dim;
#pragma unroll
        for (int v = 0; v < R::vectors; ++v) {
            b[v].load(p.b, b_row + (v * R::lanes + part) * R::width);
            c[v].load(p.c, c_row + (v * R::lanes + part) * R::width);
        }
#pragma unroll
        for (int r = 0; r < R::rows; ++r) {
            const int row = first + r * R::at_once;
            x[r] = row < p.head_dim ? load_bits(p.x, x_row + row, wide) : 0U;
        }
    }
};

// Grid: x blocks of rows, y heads, z batch. A thread keeps 16 state elements or so. What a position needs is fetched before the one
// before it is computed, and for the first position before anything: a decode step waits for memory once.
template <class State, bool wide, int size>
__global__ void __launch_bounds__(THREADS, Rows<State, size>::resident) scan_steps(const __grid_constant__ Params p) {
    using R = Rows<State, size>;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int part = static_cast<int>(threadIdx.x) % R::lanes;
    const int first = static_cast<int>(blockIdx.x) * R::of_block + static_cast<int>(threadIdx.x) / R::lanes;
    const int head = static_cast<int>(blockIdx.y);
    const int64_t batch = blockIdx.z, state_row = (batch * p.heads + head) * p.head_dim;
    const int64_t dt_row = batch * p.dt_batch_stride + head;

    Values<sizeof(State) == 4, R::width> kept[R::rows][R::vectors] = {};
#pragma unroll
    for (int r = 0; r < R::rows; ++r) {
        const int row = first + r * R::at_once;
#pragma unroll
        for (int v = 0; v < R::vectors; ++v)
            if (p.state_in && row < p.head_dim)
                kept[r][v].load(p.state_in, (state_row + row) * size + (v * R::lanes + part) * R::width);
    }
    Position<State, wide, size> next;
    next.load(p, batch, 0, head, first);
    const auto dt_at = [&](int64_t t) {
        return t < p.length ? load_bits(p.dt, dt_row + t * p.dt_position_stride, is_wide(p.dt_dtype)) : 0U;
    };
    uint32_t dt_bits = dt_at(lane);  // of the lane's position
    const float a = p.a[head], skip = p.d ? p.d[head] : 0.0F, bias = p.dt_bias ? p.dt_bias[head] : 0.0F;

    float state[R::rows][R::held];
#pragma unroll
    for (int r = 0; r < R::rows; ++r)
#pragma unroll
        for (int v = 0; v < R::vectors; ++v)
            kept[r][v].unpack(std::is_same_v<State, __half> ? NEMOQUANT_FLOAT16 : NEMOQUANT_BFLOAT16, &state[r][v * R::width]);

    for (int64_t start = 0; start < p.length; start += 32) {
        const float my_dt = bounded_step(p, value_of(dt_bits, p.dt_dtype), bias), my_decay = steady_exp(__fmul_rn(my_dt, a));
        dt_bits = dt_at(start + 32 + lane);
        const int count = static_cast<int>(p.length - start < 32 ? p.length - start : 32);
        for (int i = 0; i < count; ++i) {
            const int64_t t = start + i, out = ((batch * p.length + t) * p.heads + head) * p.head_dim;
            float b[R::held], c[R::held], x[R::rows];
#pragma unroll
            for (int v = 0; v < R::vectors; ++v) {
                next.b[v].unpack(p.dtype, &b[v * R::width]);
                next.c[v].unpack(p.dtype, &c[v * R::width]);
            }
#pragma unroll
            for (int r = 0; r < R::rows; ++r) x[r] = value_of(next.x[r], wide ? NEMOQUANT_FLOAT32 : p.dtype);
            if (t + 1 < p.length) next.load(p, batch, t + 1, head, first);
            const float dt = __shfl_sync(ALL, my_dt, i), decay = __shfl_sync(ALL, my_decay, i);
#pragma unroll
            for (int r = 0; r < R::rows; ++r) {
                const float written = __fmul_rn(dt, x[r]);
                float y = 0.0F;
#pragma unroll
                for (int e = 0; e < R::held; ++e) {
                    state[r][e] = __fmaf_rn(decay, state[r][e], __fmul_rn(written, b[e]));
                    y = __fmaf_rn(state[r][e], c[e], y);
                }
#pragma unroll
                for (int bits = R::lanes / 2; bits; bits /= 2) y = __fadd_rn(y, __shfl_xor_sync(ALL, y, bits));
                const int row = first + r * R::at_once;
                if (row < p.head_dim && part == 0) store_one(p.y, out + row, __fmaf_rn(skip, x[r], y), p.y_dtype);
            }
        }
    }

#pragma unroll
    for (int r = 0; r < R::rows; ++r) {
        const int row = first + r * R::at_once;
        if (row >= p.head_dim) continue;
#pragma unroll
        for (int v = 0; v < R::vectors; ++v)
            store_row_part<State>(p, (state_row + row) * size + (v * R::lanes + part) * R::width, &state[r][v * R::width]);
    }
}

// ---- scan_chunks ----

constexpr int CHUNK = 64;  // positions: four warps of 16 rows
constexpr int TILE = 64;   // rows of the state (of head_dim) in one block
constexpr int PAD = 8;     // elements behind each row in shared memory, so that the eight rows of a matrix lie in different banks

// The inputs of one chunk. T is bfloat16 or half.
template <class T, int size>
struct Chunk {
    T b[CHUNK][size + PAD];
    T c[CHUNK][size + PAD];
    T x[CHUNK][TILE + PAD];
};

// Half has a narrow range: dt and states far below 1, as slow heads have them, would become subnormal. So for half what is rounded to
// it is first brought near 1 by a power of two, which is taken back after the product; for bfloat16 there is no need.
template <class T>
constexpr bool IS_NARROW = std::is_same_v<T, __half>;

// A power of two, and its inverse.
struct Scale {
    float up, down;
};

// The scale that brings ``most`` (positive or 0) to between 1 and 2.
__device__ __forceinline__ Scale scale_of(float most) {
    int exponent = static_cast<int>(__float_as_uint(most) >> 23);
    exponent = most == 0.0F ? 127 : exponent < 67 ? 67 : exponent > 187 ? 187 : exponent;
    return {__uint_as_float(static_cast<uint32_t>(254 - exponent) << 23), __uint_as_float(static_cast<uint32_t>(exponent) << 23)};
}

__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
    for (int bits = 16; bits; bits /= 2) value = fmaxf(value, __shfl_xor_sync(ALL, value, bits));
    return value;
}

// Running sums of log2 decays from the chunk's start, each as a float and what it leaves; dt, scaled. Positions behind the end have dt 0.
struct Decays {
    float high[CHUNK], low[CHUNK], dt[CHUNK];
    Scale scale;  // of dt
    // log2 of the decay from s (not counted) to t
    __device__ __forceinline__ float between(int s, int t) const { return (high[t] - high[s]) + (low[t] - low[s]); }
    __device__ __forceinline__ float until(int t) const { return high[t] + low[t]; }
};

// The state rounded to T. For half each warp's 16 rows are scaled, and ``down`` takes that back.
template <class T, int size>
struct Rounded {
    T rows[TILE][size + PAD];
    float down[4];
};

template <class T, int size>
constexpr size_t shared_bytes(int stages) {
    return static_cast<size_t>(stages) * sizeof(Chunk<T, size>) + sizeof(Rounded<T, size>);
}

// What a block works on.
template <class T>
struct Place {
    int head, group, tile;
    int64_t row;  // of the batch
    const T *x, *b, *c;
    float a, bias, skip;
};

template <class T>
__device__ __forceinline__ Place<T> place_of_block(const Params& p) {
    const int tiles = p.head_dim / TILE;
    Place<T> at;
    at.head = static_cast<int>(blockIdx.x) / tiles;
    at.tile = static_cast<int>(blockIdx.x) % tiles;
    at.group = at.head / p.heads_in_group;
    at.row = blockIdx.y;
    at.x = static_cast<const T*>(p.x) + at.row * p.x_batch_stride + static_cast<int64_t>(at.head) * p.head_dim + at.tile * TILE;
    at.b = static_cast<const T*>(p.b) + at.row * p.b_batch_stride + static_cast<int64_t>(at.group) * p.state;
    at.c = static_cast<const T*>(p.c) + at.row * p.c_batch_stride + static_cast<int64_t>(at.group) * p.state;
    at.a = p.a[at.head];
    at.bias = p.dt_bias ? p.dt_bias[at.head] : 0.0F;
    at.skip = p.d ? p.d[at.head] : 0.0F;
    return at;
}

// Rows of ``columns`` elements into shared memory; rows from ``count`` on become zeros.
template <class T, int columns>
__device__ __forceinline__ void fetch_rows(T (*to)[columns + PAD], const T* from, int64_t stride, int count) {
    constexpr int pieces = columns / 8;
    for (int i = static_cast<int>(threadIdx.x); i < CHUNK * pieces; i += THREADS) {
        const int row = i / pieces, column = i % pieces * 8;
        const bool inside = row < count;
        copy_async16(&to[row][column], inside ? from + row * stride + column : from, inside);
    }
}

// Starts to fetch the chunk at position ``start``; ``with_c`` where outputs are wanted.
template <class T, int size>
__device__ __forceinline__ void fetch(const Params& p, const Place<T>& at, Chunk<T, size>& to, int64_t start, bool with_c) {
    const int count = static_cast<int>(p.length - start < CHUNK ? p.length - start : CHUNK);
    fetch_rows<T, size>(to.b, at.b + start * p.b_position_stride, p.b_position_stride, count);
    fetch_rows<T, TILE>(to.x, at.x + start * p.x_position_stride, p.x_position_stride, count);
    if (with_c) fetch_rows<T, size>(to.c, at.c + start * p.c_position_stride, p.c_position_stride, count);
    copy_async_commit();
}

// One warp: two positions a lane. Sums are float64: in float32 the weak decays that follow a strong one would be lost.
// A step's decay is held above 2^-1024, which is zero for any float state.
template <class T>
__device__ __forceinline__ void find_decays(const Params& p, const Place<T>& at, Decays& to, int64_t start) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    double log2_decay[2];
    float dts[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
        const int64_t t = start + 2 * lane + j;
        const float dt = t < p.length ? bounded_step(p, dt_value(p, at.row, t, at.head), at.bias) : 0.0F;
        dts[j] = dt;
        log2_decay[j] = fmax(static_cast<double>(dt) * at.a * 1.4426950408889634, -1024.0);
    }
    Scale scale{1.0F, 1.0F};
    if constexpr (IS_NARROW<T>) scale = scale_of(warp_max(fmaxf(dts[0], dts[1])));
    if (lane == 0) to.scale = scale;
    const double both = log2_decay[0] + log2_decay[1];
    double sum = both;
#pragma unroll
    for (int delta = 1; delta < 32; delta *= 2) {
        const double before = __shfl_up_sync(ALL, sum, static_cast<unsigned>(delta));
        if (lane >= delta) sum += before;
    }
    const double sums[2] = {sum - both + log2_decay[0], sum};
#pragma unroll
    for (int j = 0; j < 2; ++j) {
        to.dt[2 * lane + j] = dts[j] * scale.up;
        const float high = __double2float_rn(sums[j]);
        to.high[2 * lane + j] = high;
        to.low[2 * lane + j] = __double2float_rn(sums[j] - static_cast<double>(high));
    }
}

// A warp's 16 rows of the state in the fragments of matrix products: fragment j has columns 8 j + 2 t and + 1, rows g and g + 8.
template <int size>
using StateFragments = float[size / 8][4];

// Steps 1 and 4, and the skip, for 16 positions from ``own`` on. They see the chunk's ``blocks`` first blocks of 16 (a number that is
// known when compiling, so that no branch stands between loads and products), and of the last two what is not behind them.
template <class T, int size, int blocks>
__device__ __forceinline__ void write_block(const Params& p, const Place<T>& at, const Chunk<T, size>& in, const Decays& decays,
                                            const Rounded<T, size>& state, int64_t start, int own) {
    const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
    float scores[blocks][2][4] = {};  // C B^T: [blocks of positions][halves of 8]
    float y[TILE / 8][4] = {};
#pragma unroll (size <= 128 ? 2 : 1)
    for (int k = 0; k < size; k += 16) {
        uint32_t c[4], r[4];
        load_matrices(c, &in.c[own + lane % 16][k + lane / 16 * 8]);
#pragma unroll
        for (int block = 0; block < blocks; ++block) {
            load_matrices(r, &in.b[16 * block + lane / 16 * 8 + lane % 8][k + lane / 8 % 2 * 8]);
            mma_m16n8k16<T>(scores[block][0], c, r[0], r[1]);
            mma_m16n8k16<T>(scores[block][1], c, r[2], r[3]);
        }
#pragma unroll
        for (int j = 0; j < TILE / 16; ++j) {
            load_matrices(r, &state.rows[16 * j + lane / 16 * 8 + lane % 8][k + lane / 8 % 2 * 8]);
            mma_m16n8k16<T>(y[2 * j], c, r[0], r[1]);
            mma_m16n8k16<T>(y[2 * j + 1], c, r[2], r[3]);
        }
    }
    const int here[2] = {own + g, own + g + 8};
    const float from_start[2] = {quick_exp2(decays.until(here[0])), quick_exp2(decays.until(here[1]))};
#pragma unroll
    for (int j = 0; j < TILE / 8; ++j) {
        const float back = IS_NARROW<T> ? state.down[j / 2] * decays.scale.up : 1.0F;
#pragma unroll
        for (int i = 0; i < 4; ++i) y[j][i] *= from_start[i / 2] * back;
    }

#pragma unroll
    for (int block = 0; block < blocks; ++block) {
        uint32_t mixing[4], r[4];  // the scores, decayed and times dt, are the next product's left side
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                float pair[2];
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const int s = 16 * block + 8 * half + 2 * t + e;
                    pair[e] = block < blocks - 2 || s <= here[i] ? scores[block][half][2 * i + e] * quick_exp2(decays.between(s, here[i])) * decays.dt[s] : 0.0F;
                }
                mixing[2 * half + i] = pack_pair<T>(pair[0], pair[1]);
            }
#pragma unroll
        for (int j = 0; j < TILE / 16; ++j) {
            load_matrices_transposed(r, &in.x[16 * block + lane % 16][16 * j + lane / 16 * 8]);
            mma_m16n8k16<T>(y[2 * j], mixing, r[0], r[1]);
            mma_m16n8k16<T>(y[2 * j + 1], mixing, r[2], r[3]);
        }
    }

#pragma unroll
    for (int i = 0; i < 2; ++i) {
        if (start + here[i] >= p.length) continue;
        const int64_t out = ((at.row * p.length + start + here[i]) * p.heads + at.head) * p.head_dim + at.tile * TILE + 2 * t;
#pragma unroll
        for (int j = 0; j < TILE / 8; ++j) {
            const float2 x = unpack_pair<T>(load_as<uint32_t>(&in.x[here[i]][8 * j + 2 * t]));
            const float back = IS_NARROW<T> ? decays.scale.down : 1.0F;
            store_two(p.y, out + 8 * j, y[j][2 * i] * back + at.skip * x.x, y[j][2 * i + 1] * back + at.skip * x.y, p.y_dtype);
        }
    }
}

// Which block of positions is a warp's changes from chunk to chunk: they are of different length, and a warp has its own scheduler.
template <class T, int size>
__device__ __forceinline__ void write_outputs(const Params& p, const Place<T>& at, const Chunk<T, size>& in, const Decays& decays,
                                              const Rounded<T, size>& state, int64_t start, int turn) {
    const int warp = static_cast<int>(threadIdx.x) / 32, block = turn ? 3 - warp : warp;
    if (block < 2)
        write_block<T, size, 2>(p, at, in, decays, state, start, 16 * block);
    else
        write_block<T, size, 4>(p, at, in, decays, state, start, 16 * block);
}

// Steps 2 and 3 for the warp's 16 rows of the state.
template <class T, int size>
__device__ __forceinline__ void update_state(const Chunk<T, size>& in, const Decays& decays, StateFragments<size>& state) {
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32, t = lane % 4;
    const float kept = quick_exp2(decays.until(CHUNK - 1)) * (IS_NARROW<T> ? decays.scale.up : 1.0F);
#pragma unroll
    for (int j = 0; j < size / 8; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) state[j][i] *= kept;
#pragma unroll
    for (int block = 0; block < CHUNK / 16; ++block) {
        uint32_t x[4], r[4];
        load_matrices_transposed(x, &in.x[16 * block + lane / 16 * 8 + lane % 8][16 * warp + lane / 8 % 2 * 8]);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int s = 16 * block + 8 * half + 2 * t;
            const float first = quick_exp2(decays.between(s, CHUNK - 1)) * decays.dt[s];
            const float second = quick_exp2(decays.between(s + 1, CHUNK - 1)) * decays.dt[s + 1];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const float2 pair = unpack_pair<T>(x[2 * half + i]);
                x[2 * half + i] = pack_pair<T>(pair.x * first, pair.y * second);
            }
        }
#pragma unroll
        for (int j = 0; j < size / 16; ++j) {
            load_matrices_transposed(r, &in.b[16 * block + lane % 16][16 * j + lane / 16 * 8]);
            mma_m16n8k16<T>(state[2 * j], x, r[0], r[1]);
            mma_m16n8k16<T>(state[2 * j + 1], x, r[2], r[3]);
        }
    }
    if constexpr (IS_NARROW<T>)
#pragma unroll
        for (int j = 0; j < size / 8; ++j)
#pragma unroll
            for (int i = 0; i < 4; ++i) state[j][i] *= decays.scale.down;
}

// Puts the warp's rows into shared memory for step 4.
template <class T, int size>
__device__ __forceinline__ void share_state(const StateFragments<size>& state, Rounded<T, size>& to) {
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
    float up = 1.0F;
    if constexpr (IS_NARROW<T>) {
        float most = 0.0F;
#pragma unroll
        for (int j = 0; j < size / 8; ++j)
#pragma unroll
            for (int i = 0; i < 4; ++i) most = fmaxf(most, fabsf(state[j][i]));
        const Scale scale = scale_of(warp_max(most));
        up = scale.up;
        if (lane == 0) to.down[warp] = scale.down;
    }
#pragma unroll
    for (int j = 0; j < size / 8; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i)
            store_as(&to.rows[16 * warp + g + 8 * i][8 * j + 2 * t], pack_pair<T>(state[j][2 * i] * up, state[j][2 * i + 1] * up));
}

// Where the thread's pair (rows g + 8 i, columns 8 j + 2 t) lies in the flat state.
template <class T, int size>
__device__ __forceinline__ int64_t state_index(const Params& p, const Place<T>& at, int j, int i) {
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    const int64_t line = (at.row * p.heads + at.head) * p.head_dim + at.tile * TILE + 16 * warp + lane / 4 + 8 * i;
    return line * size + 8 * j + lane % 4 * 2;
}

template <class T, int size>
__device__ __forceinline__ void load_state(const Params& p, const Place<T>& at, StateFragments<size>& state) {
#pragma unroll
    for (int j = 0; j < size / 8; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const float2 pair = p.state_in ? load_two(p.state_in, state_index<T, size>(p, at, j, i), p.state_dtype) : make_float2(0.0F, 0.0F);
            state[j][2 * i] = pair.x, state[j][2 * i + 1] = pair.y;
        }
}

template <class T, int size>
__device__ __forceinline__ void store_state(const Params& p, const Place<T>& at, const StateFragments<size>& state) {
#pragma unroll
    for (int j = 0; j < size / 8; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int64_t place = state_index<T, size>(p, at, j, i);
            if (!p.seed) {
                store_two(p.state_out, place, state[j][2 * i], state[j][2 * i + 1], p.state_dtype);
                continue;
            }
            const PhiloxWords random = words_of(p, place / 4);
            const bool later = place % 4 != 0;
            store_as(static_cast<uint16_t*>(p.state_out) + place,
                     half_pair_by_chance(state[j][2 * i], state[j][2 * i + 1], later ? random.word[2] : random.word[0],
                                         later ? random.word[3] : random.word[1]));
        }
}

// A state of this block among the segments' ones, a thread's four values of fragment j at [j * THREADS + thread].
template <int size>
__device__ __forceinline__ float4* segment_state(const Params& p, int slot) {
    const int64_t block = static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x;
    return reinterpret_cast<float4*>(p.segment_states + (block * p.segments + slot) * TILE * size) + threadIdx.x;
}

template <int size>
__device__ __forceinline__ void keep_segment_state(const Params& p, int slot, const StateFragments<size>& state) {
    float4* to = segment_state<size>(p, slot);
#pragma unroll
    for (int j = 0; j < size / 8; ++j) to[j * THREADS] = make_float4(state[j][0], state[j][1], state[j][2], state[j][3]);
}

// The state at a segment's start: those before it, each decayed by the ones between.
template <int size>
__device__ __forceinline__ void sum_segment_states(const Params& p, int segment, StateFragments<size>& state) {
    const int64_t block = static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x;
    for (int slot = 0; slot <= segment; ++slot) {
        const float kept = slot ? quick_exp2(p.segment_decays[block * p.segments + slot - 1]) : 0.0F;
        const float4* from = segment_state<size>(p, slot);
#pragma unroll
        for (int j = 0; j < size / 8; ++j) {
            const float4 added = from[j * THREADS];
            const float four[4] = {added.x, added.y, added.z, added.w};
#pragma unroll
            for (int i = 0; i < 4; ++i) state[j][i] = slot ? state[j][i] * kept + four[i] : four[i];
        }
    }
}

// Grid: x heads times tiles of 64 rows (the heads of a group run at the same time, and share its B and C in the cache), y batch,
// z segments: in the first pass all but the last.
template <class T, int size>
__global__ void __launch_bounds__(THREADS) scan_chunks(const __grid_constant__ Params p, bool first_pass) {
    NQ_DYNAMIC_SHARED(unsigned char, shared);
    __shared__ Decays decays[2];
    auto* const stages = reinterpret_cast<Chunk<T, size>*>(shared);
    auto& rounded = *reinterpret_cast<Rounded<T, size>*>(stages + p.stages);
    const int segment = static_cast<int>(blockIdx.z);
    const Place<T> at = place_of_block<T>(p);
    const int64_t chunks = (p.length + CHUNK - 1) / CHUNK, first = segment * p.chunks_in_segment;
    const int64_t end = first + p.chunks_in_segment < chunks ? first + p.chunks_in_segment : chunks;

    fetch(p, at, stages[0], first * CHUNK, !first_pass);
    if (threadIdx.x < 32) find_decays(p, at, decays[0], first * CHUNK);
    StateFragments<size> state = {};
    float log2_decay = 0.0F;  // of the whole segment
    if (first_pass) {
        if (segment == 0) {
            load_state<T, size>(p, at, state);
            keep_segment_state<size>(p, 0, state);
#pragma unroll
            for (int j = 0; j < size / 8; ++j)
#pragma unroll
                for (int i = 0; i < 4; ++i) state[j][i] = 0.0F;
        }
    } else {
        if (p.segments > 1)
            sum_segment_states<size>(p, segment, state);
        else
            load_state<T, size>(p, at, state);
        share_state<T, size>(state, rounded);
    }

    for (int64_t chunk = first; chunk < end; ++chunk) {
        const int turn = static_cast<int>(chunk - first) % 2;
        const Chunk<T, size>& in = stages[p.stages == 2 ? turn : 0];
        Chunk<T, size>& next = stages[p.stages == 2 ? 1 - turn : 0];
        const bool more = chunk + 1 < end;
        copy_async_wait<0>();
        __syncthreads();  // the chunk, its decays and the rounded state are there; the other stage is free
        if (more && p.stages == 2) fetch(p, at, next, (chunk + 1) * CHUNK, !first_pass);
        if (!first_pass) write_outputs<T, size>(p, at, in, decays[turn], rounded, chunk * CHUNK, turn);
        update_state<T, size>(in, decays[turn], state);
        log2_decay += decays[turn].until(CHUNK - 1);
        if (more && static_cast<int>(threadIdx.x) / 32 == (turn ? 3 : 0)) find_decays(p, at, decays[1 - turn], (chunk + 1) * CHUNK);
        __syncthreads();  // nobody reads the rounded state or the chunk any more
        if (more && p.stages == 1) fetch(p, at, next, (chunk + 1) * CHUNK, !first_pass);
        if (more && !first_pass) share_state<T, size>(state, rounded);
    }

    if (first_pass) {
        keep_segment_state<size>(p, segment + 1, state);
        const int64_t block = static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x;
        if (threadIdx.x == 0) p.segment_decays[block * p.segments + segment] = log2_decay;
    } else if (end == chunks) {
        store_state<T, size>(p, at, state);
    }
}

}  // namespace nq::mamba2
