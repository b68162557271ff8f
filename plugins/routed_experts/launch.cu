// The launcher of RoutedExperts: checks the arguments, lays out the workspace, and starts for at most ROWS_AT_ONCE ids at a time
//
//   route           ids sorted by expert: positions, and tiles of them
//   quantize_rows   (fp8, nvfp4) each position's input through its expert's format
//   split_rows      (w4a16; float16 and float32 in bf16 and w8a16) each token's input as bfloat16 parts
//   product up      relu squared, and rounded to what down reads
//   product down    float32
//   combine         the weighted sum, in the order of j
#include <limits>
#include <type_traits>
#include <utility>

#include "abi.h"
#include "launch.cuh"
#include "route.cuh"

namespace {

using namespace nq;
using namespace nq::experts;
using Args = nemoquant_routed_experts_args;

constexpr int64_t ROWS_AT_ONCE = 98304;  // ids of a pass: bounds the workspace; 4,469 tokens of 22
constexpr double FEW = 2, SOME_ROWS = 24;  // ids an expert, on average: up to here the kernels for few and for some tokens

bool is_quantized(const Args& a) { return a.format == NEMOQUANT_EXPERTS_FP8 || a.format == NEMOQUANT_EXPERTS_NVFP4; }
bool has_blocks(const Args& a) { return a.format == NEMOQUANT_EXPERTS_W4A16 || a.format == NEMOQUANT_EXPERTS_NVFP4; }
bool is_plain(const Args& a) { return a.format == NEMOQUANT_EXPERTS_BF16; }

// bfloat16 parts that hold a value of the dtype: of all its bits, or of 16 where 11 count.
int planes_of(const Args& a) {
    if (is_quantized(a) || a.dtype == NEMOQUANT_BFLOAT16) return 1;
    return a.dtype == NEMOQUANT_FLOAT16 ? 2 : 3;
}

// Whether split_rows makes the inputs: where one bfloat16 array does not hold them, or E2M1 weights want them interleaved.
bool is_copied(const Args& a) { return !is_quantized(a) && (planes_of(a) > 1 || has_blocks(a)); }

int64_t divisor(const Args& a) { return is_plain(a) ? Bfloat16::VALUES : has_blocks(a) ? E2m1::VALUES : E4m3::VALUES; }

int check_sizes(const Args& a) {
    constexpr int64_t MOST = std::numeric_limits<int32_t>::max();
    const auto bad = [](const char* what, int64_t got, const char* wanted) {
        return fail(NEMOQUANT_BAD_ARGUMENT, "routed_experts: %s is %lld; expected %s", what, static_cast<long long>(got), wanted);
    };
    if (a.dtype != NEMOQUANT_FLOAT32 && a.dtype != NEMOQUANT_FLOAT16 && a.dtype != NEMOQUANT_BFLOAT16)
        return bad("dtype", a.dtype, "float32, float16 or bfloat16 (0, 1, 2)");
    if (a.format < NEMOQUANT_EXPERTS_BF16 || a.format > NEMOQUANT_EXPERTS_W4A16)
        return bad("format", a.format, "bf16, fp8, w8a16, nvfp4 or w4a16 (0 to 4)");
    if (a.activation != 0) return bad("activation", a.activation, "0, relu2");
    if (a.tokens < 1) return bad("tokens", a.tokens, "1 or more");
    if (a.top_k < 1 || a.top_k > ROWS_AT_ONCE) return bad("top_k", a.top_k, "1 to 98304");
    if (a.experts < 1 || a.experts > 8192) return bad("experts", a.experts, "1 to 8192");
    for (const auto& [name, size] : {std::pair{"input", a.input}, std::pair{"width", a.width}}) {
        if (size < 1 || size > MOST / 64) return bad(name, size, "1 to 33554431");
        if (size % divisor(a))
            return fail(NEMOQUANT_UNSUPPORTED, "routed_experts: %s is %lld; expected a multiple of %lld for this format", name,
                        static_cast<long long>(size), static_cast<long long>(divisor(a)));
    }
    return NEMOQUANT_OK;
}

int check_pointers(const Args& a) {
    struct Named {
        const char* name;
        const void* at;
        bool needed;
        uintptr_t alignment;
    };
    const bool scaled = !is_plain(a);
    const Named all[] = {
        {"x", a.x, true, 16}, {"expert_ids", a.expert_ids, true, 8}, {"expert_weights", a.expert_weights, true, 4},
        {"up", a.up, true, 16}, {"up_block_scales", a.up_block_scales, has_blocks(a), 16},
        {"up_global_scale", a.up_global_scale, scaled, 4}, {"up_input_scale", a.up_input_scale, is_quantized(a), 4},
        {"down", a.down, true, 16}, {"down_block_scales", a.down_block_scales, has_blocks(a), 16},
        {"down_global_scale", a.down_global_scale, scaled, 4}, {"down_input_scale", a.down_input_scale, is_quantized(a), 4},
        {"y", a.y, true, 4}, {"workspace", a.workspace, true, 16},
    };
    for (const Named& one : all) {
        if (!one.needed) continue;
        if (!one.at) return fail(NEMOQUANT_BAD_ARGUMENT, "routed_experts: %s is null; this format needs it", one.name);
        if (reinterpret_cast<uintptr_t>(one.at) % one.alignment)
            return fail(NEMOQUANT_BAD_ARGUMENT, "routed_experts: %s is at an address that is no multiple of %d", one.name,
                        static_cast<int>(one.alignment));
    }
    return NEMOQUANT_OK;
}

struct Workspace {
    Routes routes;
    __nv_bfloat16 *inputs, *parts;
    float* sums;
    size_t size;
};

int64_t tokens_of_a_pass(const Args& a) { return a.tokens < ROWS_AT_ONCE / a.top_k ? a.tokens : ROWS_AT_ONCE / a.top_k; }

// Tiles of ``tile`` positions, at most: every expert may have one that is not full.
int64_t most_tiles(int64_t rows, int64_t experts, int64_t tile) { return rows < experts + rows / tile ? rows : experts + rows / tile; }

Workspace lay_out(const Args& a, void* base) {
    const int64_t tokens = tokens_of_a_pass(a), rows = tokens * a.top_k, tiles = most_tiles(rows, a.experts, tile_of(Size::few));
    Workspace w{};
    const auto take = [&](auto*& pointer, int64_t count) {
        pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(static_cast<unsigned char*>(base) + w.size);
        w.size += (static_cast<size_t>(count) * sizeof *pointer + 255) / 256 * 256;
    };
    take(w.sums, rows * a.input);
    take(w.parts, planes_of(a) * rows * a.width);
    if (is_quantized(a))
        take(w.inputs, rows * a.input);
    else if (is_copied(a))
        take(w.inputs, planes_of(a) * tokens * a.input);
    take(w.routes.place, rows);
    take(w.routes.token, rows);
    take(w.routes.offsets, a.experts + 1);
    take(w.routes.tile_expert, tiles);
    take(w.routes.tile_first, tiles);
    take(w.routes.tiles, 1);
    return w;
}

int run_route(const Args& a, const Workspace& w, const int64_t* ids, int rows, bool first, int tile, void* stream) {
    const size_t most = shared_limit() > 1024 ? shared_limit() - 1024 : 47 * 1024;  // beside what the kernel has by itself
    int warps = ROUTE_WARPS;
    while (warps > 1 && route_shared(a.experts, warps) > most) warps /= 2;
    return NQ_LAUNCH(route, dim3(1), dim3(static_cast<unsigned>(32 * warps)), route_shared(a.experts, warps), stream, ids, w.routes, a.skipped,
                     first, rows, static_cast<int>(a.top_k), static_cast<int>(a.experts), tile);
}

// Both products; ``p`` has all but the matrices.
template <class W>
int run_products(const Args& a, const Workspace& w, Product p, Size size, int64_t rows, void* stream) {
    const int64_t tiles = most_tiles(rows, a.experts, tile_of(size));
    p.weights = a.up;
    p.block_scales = has_blocks(a) ? static_cast<const uint8_t*>(a.up_block_scales) : nullptr;
    p.global_scale = is_plain(a) ? nullptr : a.up_global_scale;
    p.input_scale = is_quantized(a) ? a.up_input_scale : nullptr;
    p.in = static_cast<int32_t>(a.input);
    p.out = static_cast<int32_t>(a.width);
    p.into = !is_quantized(a) ? Into::planes : has_blocks(a) ? Into::e2m1 : Into::e4m3;
    p.parts = w.parts;
    p.parts_plane = rows * a.width;
    p.planes_out = planes_of(a);
    p.next_scale = a.down_input_scale;
    if (const int error = run_product<W>(p, size, tiles, stream)) return error;

    p.weights = a.down;
    p.block_scales = has_blocks(a) ? static_cast<const uint8_t*>(a.down_block_scales) : nullptr;
    p.global_scale = is_plain(a) ? nullptr : a.down_global_scale;
    p.input_scale = is_quantized(a) ? a.down_input_scale : nullptr;
    p.x = w.parts;
    p.x_plane = p.parts_plane;
    p.row_of = nullptr;
    p.in = static_cast<int32_t>(a.width);
    p.out = static_cast<int32_t>(a.input);
    p.into = Into::sums;
    p.sums = w.sums;
    return run_product<W>(p, size, tiles, stream);
}

// ``tokens`` tokens from ``start`` on.
template <class X>
int run_pass(const Args& a, const Workspace& w, int64_t start, int64_t tokens, void* stream) {
    const int64_t rows = tokens * a.top_k;
    const int in = static_cast<int>(a.input), top_k = static_cast<int>(a.top_k);
    const X* const x = static_cast<const X*>(a.x) + start * a.input;
    const int64_t* const ids = a.expert_ids + start * a.top_k;
    const double average = static_cast<double>(rows) / static_cast<double>(a.experts);
    const Size size = average <= FEW ? Size::few : average <= SOME_ROWS ? Size::some : Size::many;
    int error = run_route(a, w, ids, static_cast<int>(rows), start == 0, tile_of(size), stream);
    if (error) return error;

    Product p{};
    p.routes = w.routes;
    p.planes = planes_of(a);
    if (is_quantized(a)) {
        const unsigned threads = in >= 16 * 128 ? 128 : static_cast<unsigned>((in / 16 + 31) / 32 * 32);
        error = NQ_LAUNCH((quantize_rows<X>), dim3(static_cast<unsigned>(rows)), dim3(threads), 0, stream, x, ids, w.routes.place, a.up_input_scale,
                          w.inputs, has_blocks(a), top_k, in);
        p.x = w.inputs;
    } else if (is_copied(a)) {
        p.x = w.inputs;
        p.x_plane = tokens * a.input;
        p.row_of = w.routes.token;
        error = NQ_LAUNCH((split_rows<X>), dim3(static_cast<unsigned>(tokens)), dim3(128), 0, stream, x, w.inputs, p.x_plane, p.planes, in,
                          has_blocks(a));
    } else {
        p.x = reinterpret_cast<const __nv_bfloat16*>(x);
        p.row_of = w.routes.token;
    }
    if (error) return error;
    if (is_plain(a))
        error = run_products<Bfloat16>(a, w, p, size, rows, stream);
    else if (has_blocks(a))
        error = run_products<E2m1>(a, w, p, size, rows, stream);
    else
        error = run_products<E4m3>(a, w, p, size, rows, stream);
    if (error) return error;
    const unsigned threads = in >= 4 * 128 ? 128 : static_cast<unsigned>((in / 4 + 31) / 32 * 32);
    return NQ_LAUNCH((combine<X>), dim3(static_cast<unsigned>(tokens)), dim3(threads), 0, stream, w.sums, w.routes.place,
                     a.expert_weights + start * a.top_k, static_cast<X*>(a.y) + start * a.input, top_k, in);
}

template <class X>
int run(const Args& a, void* stream) {
    const Workspace w = lay_out(a, a.workspace);
    const int64_t most = tokens_of_a_pass(a);
    for (int64_t start = 0; start < a.tokens; start += most)
        if (const int error = run_pass<X>(a, w, start, a.tokens - start < most ? a.tokens - start : most, stream)) return error;
    return NEMOQUANT_OK;
}

}  // namespace

extern "C" int nemoquant_routed_experts(const nemoquant_routed_experts_args* args, void* stream) {
    if (!args) return fail(NEMOQUANT_BAD_ARGUMENT, "routed_experts: args is null");
    if (const int code = check_sizes(*args)) return code;
    if (const int code = check_pointers(*args)) return code;
    switch (args->dtype) {
        case NEMOQUANT_FLOAT32: return run<float>(*args, stream);
        case NEMOQUANT_FLOAT16: return run<__half>(*args, stream);
        default: return run<__nv_bfloat16>(*args, stream);
    }
}

extern "C" size_t nemoquant_routed_experts_workspace(const nemoquant_routed_experts_args* args) {
    if (!args || check_sizes(*args)) return 0;
    return lay_out(*args, nullptr).size;
}
