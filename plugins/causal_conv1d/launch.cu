// The launcher of CausalConv1d: checks the arguments, chooses tile and kernel.
#include "../common/overlap.hpp"
#include "abi.h"
#include "kernel.cuh"

namespace {

using namespace nq;
using Args = nemoquant_causal_conv1d_args;

constexpr int64_t TILE_LIMIT = 64;          // positions: beyond it the halo of K - 1 is below a twentieth
constexpr int64_t THREADS_WANTED = 2048;    // a multiprocessor
constexpr uint64_t GRID_LIMIT = (1ULL << 32) - conv::THREADS;  // threads, counted in 32 bits

// The state may be written in its place where one tile has all positions: else the last tile may write it before the first has read it.
int check_memory(const Args& a) {
    const bool in_place = a.state_in == a.state_out;
    if (in_place && a.length > conv::STEP)
        return fail(NEMOQUANT_BAD_ARGUMENT, "causal_conv1d: state_in is state_out with %lld positions; expected another place, or at most %d positions",
                    static_cast<long long>(a.length), conv::STEP);
    const int item = a.dtype == NEMOQUANT_FLOAT32 ? 4 : 2, y_item = a.y_dtype == NEMOQUANT_FLOAT32 ? 4 : 2;
    const Wide rows = Wide{a.batch} * a.length, state = Wide{a.batch} * a.channels * (a.kernel - 1) * item;
    return check_apart("causal_conv1d", {{"y", a.y, rows * a.channels * y_item}, {"state_out", a.state_out, state}},
                       {{"x", a.x, strided(rows, a.x_stride ? a.x_stride : a.channels, a.channels, item)},
                        {"weight", a.weight, Wide{a.channels} * a.kernel * 4},
                        {"bias", a.bias, Wide{a.channels} * 4},
                        {"state_in", in_place ? nullptr : a.state_in, state}});
}

int check(const Args& a) {
    const auto bad = [](const char* what, int64_t got, const char* wanted) {
        return fail(NEMOQUANT_BAD_ARGUMENT, "causal_conv1d: %s is %lld; expected %s", what, static_cast<long long>(got), wanted);
    };
    if (a.batch < 1) return bad("batch", a.batch, "1 or more");
    if (a.length < 1) return bad("length", a.length, "1 or more");
    if (a.channels < 1) return bad("channels", a.channels, "1 or more");
    if (a.kernel < 2 || a.kernel > 4) return bad("kernel", a.kernel, "2, 3 or 4 taps");
    if (a.x_stride != 0 && a.x_stride < a.channels) return bad("x_stride", a.x_stride, "0, or channels or more");
    if (a.dtype != NEMOQUANT_FLOAT32 && a.dtype != NEMOQUANT_FLOAT16 && a.dtype != NEMOQUANT_BFLOAT16)
        return bad("dtype", a.dtype, "float32, float16 or bfloat16 (0, 1, 2)");
    if (a.y_dtype != NEMOQUANT_FLOAT32 && a.y_dtype != a.dtype) return bad("y_dtype", a.y_dtype, "float32 or dtype");
    if (a.activation != 0) return bad("activation", a.activation, "0, silu");
    if (!a.x || !a.weight || !a.state_in || !a.y || !a.state_out)
        return fail(NEMOQUANT_BAD_ARGUMENT, "causal_conv1d: x, weight, state_in, y or state_out is null; only bias may be");
    return NEMOQUANT_OK;
}

constexpr int WIDTH = 4;  // channels of a thread

bool aligned(const Args& a, int64_t stride) {
    for (const void* at : {a.x, static_cast<const void*>(a.weight), static_cast<const void*>(a.bias), a.state_in,
                           static_cast<const void*>(a.y), static_cast<const void*>(a.state_out)})
        if (reinterpret_cast<uintptr_t>(at) % 16) return false;
    return a.channels % WIDTH == 0 && stride % WIDTH == 0;
}

template <class X, class Y, int V>
int launch(const Args& a, int64_t stride, void* stream) {
    conv::Params p{a.x, a.weight, a.bias, a.state_in, a.y, a.state_out, a.length, a.channels, stride, 0, 0, 0, 0};
    const int64_t groups = a.channels / V;
    int64_t tile = conv::STEP;
    if (a.length > tile) {  // as many positions a thread as leave every multiprocessor full
        const int64_t lanes = THREADS_WANTED * (multiprocessors() > 0 ? multiprocessors() : 1);
        const double work = static_cast<double>(a.batch) * static_cast<double>(a.length) * static_cast<double>(groups);
        const double share = work / static_cast<double>(lanes) / conv::STEP + 1;
        tile = share < TILE_LIMIT / conv::STEP ? static_cast<int64_t>(share) * conv::STEP : TILE_LIMIT;
    }
    const int64_t tiles = (a.length + tile - 1) / tile;
    const double threads = static_cast<double>(a.batch) * static_cast<double>(tiles) * static_cast<double>(groups);
    if (threads > static_cast<double>(GRID_LIMIT))
        return fail(NEMOQUANT_UNSUPPORTED,
                    "causal_conv1d: batch %lld x length %lld x channels %lld is more than a launch can count; expected %g times less",
                    static_cast<long long>(a.batch), static_cast<long long>(a.length), static_cast<long long>(a.channels),
                    threads / static_cast<double>(GRID_LIMIT));
    if (const int code = check_memory(a)) return code;
    p.groups = static_cast<uint32_t>(groups);
    p.tiles = static_cast<uint32_t>(tiles);
    p.threads = static_cast<uint32_t>(a.batch * tiles * groups);
    p.tile = static_cast<int32_t>(tile);
    const unsigned blocks = (p.threads + conv::THREADS - 1) / conv::THREADS;
    switch (a.kernel) {
        case 2: return NQ_LAUNCH((conv::causal_conv1d<X, Y, 2, V>), dim3(blocks), dim3(conv::THREADS), 0, stream, p);
        case 3: return NQ_LAUNCH((conv::causal_conv1d<X, Y, 3, V>), dim3(blocks), dim3(conv::THREADS), 0, stream, p);
        default: return NQ_LAUNCH((conv::causal_conv1d<X, Y, 4, V>), dim3(blocks), dim3(conv::THREADS), 0, stream, p);
    }
}

template <class X, class Y>
int launch(const Args& a, void* stream) {
    const int64_t stride = a.x_stride ? a.x_stride : a.channels;
    return aligned(a, stride) ? launch<X, Y, WIDTH>(a, stride, stream) : launch<X, Y, 1>(a, stride, stream);
}

template <class X>
int launch_for(const Args& a, void* stream) {
    return a.y_dtype == NEMOQUANT_FLOAT32 ? launch<X, float>(a, stream) : launch<X, X>(a, stream);
}

}  // namespace

extern "C" int nemoquant_causal_conv1d(const nemoquant_causal_conv1d_args* args, void* stream) {
    if (!args) return fail(NEMOQUANT_BAD_ARGUMENT, "causal_conv1d: args is null");
    if (const int code = check(*args)) return code;
    switch (args->dtype) {
        case NEMOQUANT_FLOAT32: return launch<float, float>(*args, stream);
        case NEMOQUANT_FLOAT16: return launch_for<__half>(*args, stream);
        default: return launch_for<__nv_bfloat16>(*args, stream);
    }
}

extern "C" size_t nemoquant_causal_conv1d_workspace(const nemoquant_causal_conv1d_args*) { return 0; }
