// Checks the arguments of nemoquant_mamba2_scan, chooses the kernel, and launches it. The kernels of chunks are in files of their own,
// so that they compile at the same time.
#include "../common/overlap.hpp"
#include "abi.h"
#include "launch.cuh"

namespace {

using namespace nq;
using namespace nq::mamba2;
using Args = nemoquant_mamba2_scan_args;

// From this length on a 16-bit sequence is computed by chunks. Below, one position after the other takes less time than a chunk.
constexpr int64_t CHUNKED_FROM = 32;
// Segments are made until so many blocks run side by side (two for each multiprocessor of an H100), none shorter than this.
constexpr int64_t BLOCKS_WANTED = 256, SEGMENT_LEAST = 1024;
constexpr int64_t SEGMENTS_MOST = 64;  // each reads the states of all before it

bool is_float(int32_t dtype) { return dtype == NEMOQUANT_FLOAT32 || dtype == NEMOQUANT_FLOAT16 || dtype == NEMOQUANT_BFLOAT16; }

bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

bool has_steps(int64_t state) { return state == 16 || state == 32 || state == 64 || state == 96 || state == 128 || state == 256; }

bool has_chunks(const Args& r) {
    return r.dtype != NEMOQUANT_FLOAT32 && r.length >= CHUNKED_FROM && r.head_dim % TILE == 0 && r.state >= 64;
}

int check_sizes(const Args& r) {
    for (const auto& [name, value] : {std::pair{"batch", r.batch}, {"length", r.length}, {"heads", r.heads}, {"head_dim", r.head_dim}, {"groups", r.groups}})
        if (value < 1) return fail(NEMOQUANT_BAD_ARGUMENT, "Mamba2Scan: %s is %lld, expected at least 1", name, static_cast<long long>(value));
    if (r.heads % r.groups)
        return fail(NEMOQUANT_BAD_ARGUMENT, "Mamba2Scan: %lld heads in %lld groups, expected a multiple", static_cast<long long>(r.heads),
                    static_cast<long long>(r.groups));
    if (r.batch > 65535 || r.heads > 65535 || r.head_dim > 16384)
        return fail(NEMOQUANT_UNSUPPORTED, "Mamba2Scan: batch %lld, heads %lld, head_dim %lld; expected at most 65535, 65535, 16384",
                    static_cast<long long>(r.batch), static_cast<long long>(r.heads), static_cast<long long>(r.head_dim));
    if (!has_steps(r.state))
        return fail(NEMOQUANT_UNSUPPORTED, "Mamba2Scan: state size %lld, expected 16, 32, 64, 96, 128 or 256", static_cast<long long>(r.state));
    return NEMOQUANT_OK;
}

int check_attributes(const Args& r) {
    for (const auto& [name, dtype] : {std::pair{"x, B and C", r.dtype}, {"dt", r.dt_dtype}, {"y", r.y_dtype}, {"state", r.state_dtype}})
        if (!is_float(dtype))
            return fail(NEMOQUANT_BAD_ARGUMENT, "Mamba2Scan: dtype %d of %s, expected float32 (0), float16 (1) or bfloat16 (2)", dtype, name);
    if (!(r.dt_min <= r.dt_max) || r.dt_min < 0.0F)
        return fail(NEMOQUANT_BAD_ARGUMENT, "Mamba2Scan: dt_min %g, dt_max %g, expected 0 <= dt_min <= dt_max", static_cast<double>(r.dt_min),
                    static_cast<double>(r.dt_max));
    if (r.rounding != NEMOQUANT_NEAREST && r.rounding != NEMOQUANT_STOCHASTIC)
        return fail(NEMOQUANT_BAD_ARGUMENT, "Mamba2Scan: rounding %d, expected nearest (0) or stochastic (1)", r.rounding);
    if (r.rounding == NEMOQUANT_STOCHASTIC) {
        if (r.state_dtype != NEMOQUANT_FLOAT16)
            return fail(NEMOQUANT_BAD_ARGUMENT, "Mamba2Scan: stochastic rounding of a state of dtype %d, expected float16 (1)", r.state_dtype);
        if (!r.seed) return fail(NEMOQUANT_BAD_ARGUMENT, "Mamba2Scan: stochastic rounding without a seed, expected a pointer to one int64");
        if (r.philox_rounds < 1 || r.philox_rounds > 32)
            return fail(NEMOQUANT_BAD_ARGUMENT, "Mamba2Scan: philox_rounds %d, expected 1 to 32", r.philox_rounds);
    }
    if (r.segments < 0 || r.segments > SEGMENTS_MOST)
        return fail(NEMOQUANT_BAD_ARGUMENT, "Mamba2Scan: segments %d, expected 0 (chosen) to %d", r.segments, static_cast<int>(SEGMENTS_MOST));
    return NEMOQUANT_OK;
}

int check_pointers(const Args& r) {
    const struct {
        const char* name;
        const void* pointer;
        bool needed, aligned;
    } all[] = {{"x", r.x, true, true}, {"B", r.b, true, true}, {"C", r.c, true, true}, {"dt", r.dt, true, false}, {"A", r.a, true, false},
               {"y", r.y, true, true}, {"state_in", r.state_in, false, true}, {"state_out", r.state_out, true, true}};
    for (const auto& one : all) {
        if (one.needed && !one.pointer) return fail(NEMOQUANT_BAD_ARGUMENT, "Mamba2Scan: %s is a null pointer", one.name);
        if (one.aligned && !is_aligned(one.pointer)) return fail(NEMOQUANT_BAD_ARGUMENT, "Mamba2Scan: %s is not aligned to 16 bytes", one.name);
    }
    for (const auto& [name, stride] : {std::pair{"x_batch_stride", r.x_batch_stride}, {"x_position_stride", r.x_position_stride},
                                       {"b_batch_stride", r.b_batch_stride}, {"b_position_stride", r.b_position_stride},
                                       {"c_batch_stride", r.c_batch_stride}, {"c_position_stride", r.c_position_stride}})
        if (stride < 0 || stride % 8)
            return fail(NEMOQUANT_BAD_ARGUMENT, "Mamba2Scan: %s is %lld elements, expected a multiple of 8, 0 or more", name, static_cast<long long>(stride));
    for (const auto& [name, stride] : {std::pair{"dt_batch_stride", r.dt_batch_stride}, {"dt_position_stride", r.dt_position_stride}})
        if (stride < 0) return fail(NEMOQUANT_BAD_ARGUMENT, "Mamba2Scan: %s is %lld elements, expected 0 or more", name, static_cast<long long>(stride));
    return NEMOQUANT_OK;
}

int item_of(int32_t dtype) { return dtype == NEMOQUANT_FLOAT32 ? 4 : 2; }

// Bytes of [batch, length, columns], by the strides of its rows and positions.
Wide bytes_of(const Args& r, int64_t batch_stride, int64_t position_stride, Wide columns, int32_t dtype) {
    return strided(r.batch, batch_stride, (r.length - 1) * Wide{position_stride} + columns, item_of(dtype));
}

// The state may be written in its place: who writes a part of it is who has read it.
int check_memory(const Args& r, const void* workspace, size_t workspace_bytes) {
    const Wide inner = Wide{r.heads} * r.head_dim, shared = Wide{r.groups} * r.state, state = r.batch * inner * r.state * item_of(r.state_dtype);
    return check_apart("Mamba2Scan",
                       {{"y", r.y, r.batch * r.length * inner * item_of(r.y_dtype)},
                        {"state_out", r.state_out, state},
                        {"workspace", workspace, static_cast<Wide>(workspace_bytes)}},
                       {{"x", r.x, bytes_of(r, r.x_batch_stride, r.x_position_stride, inner, r.dtype)},
                        {"B", r.b, bytes_of(r, r.b_batch_stride, r.b_position_stride, shared, r.dtype)},
                        {"C", r.c, bytes_of(r, r.c_batch_stride, r.c_position_stride, shared, r.dtype)},
                        {"dt", r.dt, bytes_of(r, r.dt_batch_stride, r.dt_position_stride, r.heads, r.dt_dtype)},
                        {"A", r.a, Wide{r.heads} * 4},
                        {"D", r.d, Wide{r.heads} * 4},
                        {"dt_bias", r.dt_bias, Wide{r.heads} * 4},
                        {"seed", r.rounding == NEMOQUANT_STOCHASTIC ? r.seed : nullptr, 8},
                        {"state_in", r.state_in == r.state_out ? nullptr : r.state_in, state}});
}

int check(const Args& r) {
    int error = check_sizes(r);
    if (!error) error = check_attributes(r);
    if (!error) error = check_pointers(r);
    return error;
}

struct Segments {
    int64_t count, chunks;  // of them, and chunks in each but the last
};

Segments segments_of(const Args& r) {
    const int64_t chunks = (r.length + CHUNK - 1) / CHUNK, blocks = r.batch * r.heads * (r.head_dim / TILE);
    int64_t wanted = r.segments;
    if (!wanted) {
        wanted = (BLOCKS_WANTED + blocks - 1) / blocks;
        if (wanted > r.length / SEGMENT_LEAST) wanted = r.length / SEGMENT_LEAST;
        if (wanted > SEGMENTS_MOST) wanted = SEGMENTS_MOST;
    }
    if (wanted > chunks) wanted = chunks;
    if (wanted < 1) wanted = 1;
    const int64_t each = (chunks + wanted - 1) / wanted;
    return {(chunks + each - 1) / each, each};
}

// Bytes for so many blocks of one segment each: a state, and a decay (the latter behind all states).
size_t segment_bytes(int64_t blocks, int64_t state) {
    return static_cast<size_t>(blocks) * (static_cast<size_t>(TILE * state) * sizeof(float) + 16);
}

template <class State, bool wide, int size>
int launch_steps(const Params& p, int64_t batch, void* stream) {
    using R = Rows<State, size>;
    const auto blocks = static_cast<unsigned>((p.head_dim + R::of_block - 1) / R::of_block);
    const dim3 grid(blocks, static_cast<unsigned>(p.heads), static_cast<unsigned>(batch));
    return NQ_LAUNCH((scan_steps<State, wide, size>), grid, dim3(THREADS), 0, stream, p);
}

template <class State, bool wide>
int choose_steps(const Params& p, int64_t batch, void* stream) {
    switch (p.state) {
        case 16: return launch_steps<State, wide, 16>(p, batch, stream);
        case 32: return launch_steps<State, wide, 32>(p, batch, stream);
        case 64: return launch_steps<State, wide, 64>(p, batch, stream);
        case 96: return launch_steps<State, wide, 96>(p, batch, stream);
        case 128: return launch_steps<State, wide, 128>(p, batch, stream);
        default: return launch_steps<State, wide, 256>(p, batch, stream);
    }
}

template <class State>
int choose_steps(const Params& p, int64_t batch, void* stream) {
    return p.dtype == NEMOQUANT_FLOAT32 ? choose_steps<State, true>(p, batch, stream) : choose_steps<State, false>(p, batch, stream);
}

Params params_of(const Args& r) {
    Params p{};
    p.x = r.x, p.b = r.b, p.c = r.c, p.dt = r.dt, p.a = r.a, p.d = r.d, p.dt_bias = r.dt_bias;
    p.state_in = r.state_in, p.y = r.y, p.state_out = r.state_out;
    p.seed = r.rounding == NEMOQUANT_STOCHASTIC ? r.seed : nullptr;
    p.step = r.step;
    p.length = r.length;
    p.x_batch_stride = r.x_batch_stride, p.x_position_stride = r.x_position_stride;
    p.b_batch_stride = r.b_batch_stride, p.b_position_stride = r.b_position_stride;
    p.c_batch_stride = r.c_batch_stride, p.c_position_stride = r.c_position_stride;
    p.dt_batch_stride = r.dt_batch_stride, p.dt_position_stride = r.dt_position_stride;
    p.heads = static_cast<int32_t>(r.heads), p.head_dim = static_cast<int32_t>(r.head_dim);
    p.heads_in_group = static_cast<int32_t>(r.heads / r.groups), p.state = static_cast<int32_t>(r.state);
    p.dtype = r.dtype, p.dt_dtype = r.dt_dtype, p.y_dtype = r.y_dtype, p.state_dtype = r.state_dtype;
    p.philox_rounds = r.philox_rounds;
    p.dt_min = r.dt_min, p.dt_max = r.dt_max;
    return p;
}

}  // namespace

int nq::mamba2::run_steps(const Params& p, int64_t batch, void* stream) {
    if (p.state_dtype == NEMOQUANT_FLOAT32) return choose_steps<float>(p, batch, stream);
    if (p.state_dtype == NEMOQUANT_FLOAT16) return choose_steps<__half>(p, batch, stream);
    return choose_steps<__nv_bfloat16>(p, batch, stream);
}

extern "C" size_t nemoquant_mamba2_scan_workspace(const nemoquant_mamba2_scan_args* args) {
    if (!args || check_sizes(*args) || !has_chunks(*args)) return 0;
    const int64_t blocks = args->batch * args->heads * (args->head_dim / TILE);
    if (args->segments) {
        const Segments segments = segments_of(*args);
        return segments.count > 1 ? segment_bytes(blocks * segments.count, args->state) : 0;
    }
    // The most that any size up to these wants: segments times blocks is below BLOCKS_WANTED + blocks, and there is one segment
    // where the blocks alone are enough.
    if (args->length < 2 * SEGMENT_LEAST) return 0;
    return segment_bytes(BLOCKS_WANTED + (blocks < BLOCKS_WANTED ? blocks : BLOCKS_WANTED), args->state);
}

extern "C" int nemoquant_mamba2_scan(const nemoquant_mamba2_scan_args* args, void* stream) {
    if (!args) return fail(NEMOQUANT_BAD_ARGUMENT, "Mamba2Scan: args is a null pointer");
    if (const int error = check(*args)) return error;
    Params p = params_of(*args);
    const bool by_chunks = has_chunks(*args);
    const Segments segments = by_chunks ? segments_of(*args) : Segments{1, 0};
    const int64_t all = args->batch * args->heads * (args->head_dim / TILE) * segments.count;
    const size_t wanted = segments.count > 1 ? segment_bytes(all, args->state) : 0;
    if (wanted && (!args->workspace || !is_aligned(args->workspace)))
        return fail(NEMOQUANT_BAD_ARGUMENT, "Mamba2Scan: workspace %p, expected %zu bytes aligned to 16", args->workspace, wanted);
    if (const int error = check_memory(*args, args->workspace, wanted)) return error;
    if (!by_chunks) return run_steps(p, args->batch, stream);
    p.segments = static_cast<int32_t>(segments.count);
    p.chunks_in_segment = segments.chunks;
    if (wanted) {
        p.segment_states = static_cast<float*>(args->workspace);
        p.segment_decays = p.segment_states + all * TILE * args->state;
    }
    return args->dtype == NEMOQUANT_FLOAT16 ? run_chunks<__half>(p, args->batch, stream)
                                            : run_chunks<__nv_bfloat16>(p, args->batch, stream);
}
