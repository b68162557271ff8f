// Depthwise causal convolution over time with its last inputs as state, then silu. See README.md for the layout and the floor.
//
// A thread owns four neighbouring channels and walks over the positions of one tile. The last K - 1 inputs slide
// through its registers, so a position is read once, and K - 1 positions again where a tile begins. Neighbouring threads own
// neighbouring channels: global accesses are 8 or 16 bytes a lane and contiguous over a warp. (Eight channels of 16 bits a thread
// take up to 160 registers, four at most 96, and as many bytes are under way on a multiprocessor.)
#pragma once

#include "../common/numeric.cuh"

namespace nq::conv {

constexpr int THREADS = 128;
constexpr int BLOCKS = 5;  // at least so many on a multiprocessor: 102 registers, enough for all variants without a spill
constexpr int STEP = 4;    // positions whose loads are under way at once

struct Params {
    const void* x;
    const float* weight;
    const float* bias;  // or null
    const void* state_in;
    void* y;
    void* state_out;
    int64_t length, channels, x_stride;
    uint32_t groups;   // of V channels
    uint32_t tiles;    // of a sequence
    uint32_t threads;  // batch * tiles * groups
    int32_t tile;      // positions, at least K - 1
};

// N values that lie side by side; ``wide``: at a multiple of four, so that they move by four.
template <class T, int N, bool wide>
struct alignas((wide ? 4 : 1) * sizeof(T)) Pack {
    T of[N];
};

// On the host an address that a device would refuse is an error too.
template <class Values>
__device__ __forceinline__ void expect_aligned([[maybe_unused]] const void* at) {
#if defined(NQ_HOST)
    if (reinterpret_cast<uintptr_t>(at) % alignof(Values)) throw std::runtime_error("an address that is not aligned");
#endif
}

template <class Values, class T>
__device__ __forceinline__ Values load(const T* at) {
    expect_aligned<Values>(at);
    return *reinterpret_cast<const Values*>(at);
}

template <class Values, class T>
__device__ __forceinline__ void store(T* at, const Values& values) {
    expect_aligned<Values>(at);
    *reinterpret_cast<Values*>(at) = values;
}

// x / (1 + exp(-x)). ``fast``: two approximate instructions, errors far below the rounding to 16 bits.
template <bool fast>
__device__ __forceinline__ float silu(float x) {
    if constexpr (fast)
        return __fdividef(x, 1.0F + __expf(-x));  // 0 where the divisor is above 2^126
    else
        return x / (1.0F + expf(-x));
}

// X: dtype of x and of the state; Y: of y. V: 4, or 1 where channels, rows or addresses are no multiple of that.
template <class X, class Y, int K, int V>
__global__ void __launch_bounds__(THREADS, BLOCKS) causal_conv1d(Params p) {
    const uint32_t thread = blockIdx.x * THREADS + threadIdx.x;
    if (thread >= p.threads) return;
    const uint32_t place = thread / p.groups;
    const int64_t channel = static_cast<int64_t>(thread % p.groups) * V;
    const int64_t batch = place / p.tiles;
    const int64_t begin = static_cast<int64_t>(place % p.tiles) * p.tile;
    const int64_t end = begin + p.tile < p.length ? begin + p.tile : p.length;
    const int64_t row = batch * p.length;
    const int64_t state = (batch * p.channels + channel) * (K - 1);
    const X* const x_at = static_cast<const X*>(p.x) + row * p.x_stride + channel;
    Y* const y_at = static_cast<Y*>(p.y) + row * p.channels + channel;
    using Inputs = Pack<X, V, (V > 1)>;
    using Outputs = Pack<Y, V, (V > 1)>;
    using State = Pack<X, V * (K - 1), (V > 1)>;

    float past[K - 1][V];  // oldest first
    if (begin == 0) {
        const auto kept = load<State>(static_cast<const X*>(p.state_in) + state);
#pragma unroll
        for (int j = 0; j < K - 1; ++j)
#pragma unroll
            for (int v = 0; v < V; ++v) past[j][v] = to_float(kept.of[v * (K - 1) + j]);
    } else {
#pragma unroll
        for (int j = 0; j < K - 1; ++j) {
            const auto before = load<Inputs>(x_at + (begin - (K - 1) + j) * p.x_stride);
#pragma unroll
            for (int v = 0; v < V; ++v) past[j][v] = to_float(before.of[v]);
        }
    }
    const auto weight = load<Pack<float, V * K, (V > 1)>>(p.weight + channel * K);
    Pack<float, V, (V > 1)> bias{};
    if (p.bias) bias = load<decltype(bias)>(p.bias + channel);

    for (int64_t first = begin; first < end; first += STEP) {
        Inputs now[STEP];
#pragma unroll
        for (int s = 0; s < STEP; ++s)
            if (first + s < end) now[s] = load<Inputs>(x_at + (first + s) * p.x_stride);
#pragma unroll
        for (int s = 0; s < STEP; ++s) {
            if (first + s >= end) break;
            Outputs out;
#pragma unroll
            for (int v = 0; v < V; ++v) {
                const float x = to_float(now[s].of[v]);
                float sum = bias.of[v];
#pragma unroll
                for (int j = 0; j < K - 1; ++j) sum = fmaf(weight.of[v * K + j], past[j][v], sum);
                sum = fmaf(weight.of[v * K + K - 1], x, sum);
                out.of[v] = from_float<Y>(silu<sizeof(Y) == 2>(sum));
#pragma unroll
                for (int j = 0; j + 1 < K - 1; ++j) past[j][v] = past[j + 1][v];
                past[K - 2][v] = x;
            }
            store(y_at + (first + s) * p.channels, out);
        }
    }

    if (end == p.length) {
        State kept;
#pragma unroll
        for (int j = 0; j < K - 1; ++j)
#pragma unroll
            for (int v = 0; v < V; ++v) kept.of[v * (K - 1) + j] = from_float<X>(past[j][v]);  // exact: it came from an X
        store(static_cast<X*>(p.state_out) + state, kept);
    }
}

}  // namespace nq::conv
