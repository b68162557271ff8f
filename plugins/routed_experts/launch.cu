// Checks the arguments of nemoquant_routed_experts, chooses the kernels, lays out the workspace, and launches.
#include <algorithm>

#include "../common/overlap.hpp"
#include "abi.h"
#include "grouped_layer.cuh"
#include "native.cuh"
#include "sorting.cuh"

namespace {

using namespace nq;
using namespace nq::experts;
using Args = nemoquant_routed_experts_args;

constexpr int64_t CHOSEN_MOST = 4096, SIZE_MOST = 1 << 20, EXPERT_MOST = 1 << 30, ROUND = 32;
// Tokens are taken so many pairs at a time (4,468 tokens of 22 experts), which bounds the workspace. At that number the products are
// bound by arithmetic, so that reading the weights again costs little.
constexpr int64_t SLAB_PAIRS = 96 * 1024, SLAB_MOST = 400 * 1024;  // the most: so that the narrowest tiles fit a grid
// Mean pairs of an expert up to which 8 and 32 tokens are a tile.
constexpr int64_t NARROW_MEAN = 4, MIDDLE_MEAN = 32;
// Warps of a narrow block share a row's inputs until there are so many blocks, none with fewer chunks than this.
constexpr int64_t BLOCKS_WANTED = 2048, CHUNKS_LEAST = 4;

struct Format {
    Weights weights;
    Rounding rounding;
};

Format format_of(const Args& a) {
    switch (a.format) {
        case NEMOQUANT_EXPERTS_BF16: return {Weights::bf16, Rounding::none};
        case NEMOQUANT_EXPERTS_W8A16: return {Weights::e4m3, Rounding::none};
        case NEMOQUANT_EXPERTS_FP8: return {Weights::fp8, Rounding::e4m3};
        case NEMOQUANT_EXPERTS_W4A16: return {Weights::e2m1, Rounding::none};
        default: return {Weights::e2m1, Rounding::nvfp4};
    }
}

// bfloat16 that add up to any value of the dtype.
int planes_of(const Args& a) {
    if (format_of(a).rounding != Rounding::none || a.dtype == NEMOQUANT_BFLOAT16) return 1;
    return a.dtype == NEMOQUANT_FLOAT16 ? 2 : PLANES_MOST;
}

int check_sizes(const Args& a) {
    const struct {
        const char* name;
        int64_t got, least, most;
    } all[] = {{"tokens", a.tokens, 1, INT64_MAX / 2}, {"chosen", a.chosen, 1, CHOSEN_MOST}, {"experts", a.experts, 1, EXPERTS_MOST},
               {"input", a.input, ROUND, SIZE_MOST}, {"width", a.width, ROUND, SIZE_MOST}, {"slab", a.slab, 0, SLAB_MOST}};
    for (const auto& one : all)
        if (one.got < one.least || one.got > one.most)
            return fail(NEMOQUANT_BAD_ARGUMENT, "routed_experts: %s is %lld; expected %lld to %lld", one.name, static_cast<long long>(one.got),
                        static_cast<long long>(one.least), static_cast<long long>(one.most));
    for (const auto& [name, got] : {std::pair{"input", a.input}, {"width", a.width}})
        if (got % ROUND)
            return fail(NEMOQUANT_UNSUPPORTED, "routed_experts: %s is %lld; expected a multiple of 32", name, static_cast<long long>(got));
    if (a.input * a.width > EXPERT_MOST)
        return fail(NEMOQUANT_UNSUPPORTED, "routed_experts: input %lld x width %lld; expected a product of at most 2^30",
                    static_cast<long long>(a.input), static_cast<long long>(a.width));
    if (a.tokens > INT64_MAX / (a.chosen * std::max(a.input, a.width) * 16))
        return fail(NEMOQUANT_BAD_ARGUMENT, "routed_experts: %lld tokens; their inputs can't be addressed", static_cast<long long>(a.tokens));
    return NEMOQUANT_OK;
}

// Whether this library has products of FP4, and for this device.
#if defined(NQ_HAVE_NATIVE_SM120)
constexpr bool NATIVE_BUILT = true;
bool native_here() { return runs_here(NQ_NATIVE_SM120_FIRST, NQ_NATIVE_SM120_LAST); }
#else
constexpr bool NATIVE_BUILT = false;
bool native_here() { return false; }
#endif

// Grouped products want weights and inputs of one kind.
bool one_kind(const Args& a) {
    return (a.format == NEMOQUANT_EXPERTS_BF16 && a.dtype == NEMOQUANT_BFLOAT16) || format_of(a).rounding != Rounding::none;
}
Operands operands_of(const Args& a) {
    return a.format == NEMOQUANT_EXPERTS_BF16 ? Operands::bf16 : a.format == NEMOQUANT_EXPERTS_FP8 ? Operands::e4m3 : Operands::nvfp4;
}

int check_grouped(const Args& a) {
    if (!one_kind(a) || a.tile)
        return fail(NEMOQUANT_UNSUPPORTED,
                    "routed_experts: products is 3, CUTLASS, with format %d, dtype %d and tile %d; expected format 0 with dtype 2, or 2 or 4, and tile 0",
                    a.format, a.dtype, a.tile);
    if (!grouped_built(operands_of(a)))
        return fail(NEMOQUANT_UNSUPPORTED, "routed_experts: products is 3, CUTLASS, which this library was built without for format %d; "
                                           "expected 0 or 1, or a build with --gemm-arch", a.format);
    if (!grouped_products(operands_of(a)))
        return fail(NEMOQUANT_UNSUPPORTED,
                    "routed_experts: products is 3, CUTLASS, which this library does not have for format %d and compute capability %d.%d; expected 0 or 1",
                    a.format, compute_capability() / 10, compute_capability() % 10);
    return NEMOQUANT_OK;
}

int check_products(const Args& a) {
    switch (a.products) {
        case NEMOQUANT_EXPERTS_AUTO:
        case NEMOQUANT_EXPERTS_DECODED: return NEMOQUANT_OK;
        case NEMOQUANT_EXPERTS_NATIVE:
            if (a.format != NEMOQUANT_EXPERTS_NVFP4 || a.tile == NARROW_TOKENS)
                return fail(NEMOQUANT_UNSUPPORTED, "routed_experts: products is 2, native FP4, with format %d and tile %d; expected format 4 and tile 0, 32 or 64",
                            a.format, a.tile);
            if (!NATIVE_BUILT)
                return fail(NEMOQUANT_UNSUPPORTED,
                            "routed_experts: products is 2, native FP4, which this library was built without; expected 0 or 1, or a build for sm_120f");
            if (!native_here())
                return fail(NEMOQUANT_UNSUPPORTED,
                            "routed_experts: products is 2, native FP4, on a device of compute capability %d.%d; expected 12.x that this library was built for, or products 0 or 1",
                            compute_capability() / 10, compute_capability() % 10);
            return NEMOQUANT_OK;
        case NEMOQUANT_EXPERTS_GROUPED: return check_grouped(a);
        default: return fail(NEMOQUANT_BAD_ARGUMENT, "routed_experts: products is %d; expected 0 to 3", a.products);
    }
}

int check(const Args& a) {
    if (const int code = check_sizes(a)) return code;
    const auto bad = [](const char* what, int got, const char* wanted) {
        return fail(NEMOQUANT_BAD_ARGUMENT, "routed_experts: %s is %d; expected %s", what, got, wanted);
    };
    if (a.dtype != NEMOQUANT_FLOAT32 && a.dtype != NEMOQUANT_FLOAT16 && a.dtype != NEMOQUANT_BFLOAT16)
        return bad("dtype", a.dtype, "float32, float16 or bfloat16 (0, 1, 2)");
    if (a.format < NEMOQUANT_EXPERTS_BF16 || a.format > NEMOQUANT_EXPERTS_NVFP4) return bad("format", a.format, "0 to 4");
    if (a.activation != 0) return bad("activation", a.activation, "0, relu squared");
    if (a.tile != 0 && a.tile != 8 && a.tile != 32 && a.tile != 64) return bad("tile", a.tile, "0, 8, 32 or 64");
    if (const int code = check_products(a)) return code;
    const auto [weights, rounding] = format_of(a);
    const bool blocks = weights == Weights::e2m1, global = weights != Weights::bf16, inputs = rounding != Rounding::none;
    const struct {
        const char* name;
        const void* pointer;
        bool needed;
    } all[] = {{"x", a.x, true}, {"expert_ids", a.expert_ids, true}, {"expert_weights", a.expert_weights, true}, {"up", a.up, true},
               {"down", a.down, true}, {"up_block_scales", a.up_block_scales, blocks}, {"down_block_scales", a.down_block_scales, blocks},
               {"up_global_scale", a.up_global_scale, global}, {"down_global_scale", a.down_global_scale, global},
               {"up_input_scale", a.up_input_scale, inputs}, {"down_input_scale", a.down_input_scale, inputs}, {"y", a.y, true},
               {"workspace", a.workspace, true}};
    for (const auto& one : all) {
        if (!one.needed) continue;
        if (!one.pointer) return fail(NEMOQUANT_BAD_ARGUMENT, "routed_experts: %s is null; format %d needs it", one.name, a.format);
        if (reinterpret_cast<uintptr_t>(one.pointer) % 16)
            return fail(NEMOQUANT_BAD_ARGUMENT, "routed_experts: %s is at %p; expected a multiple of 16", one.name, one.pointer);
    }
    if (reinterpret_cast<uintptr_t>(a.skipped) % 4)
        return fail(NEMOQUANT_BAD_ARGUMENT, "routed_experts: skipped is at %p; expected a multiple of 4", static_cast<const void*>(a.skipped));
    return NEMOQUANT_OK;
}

int check_memory(const Args& a, size_t workspace_bytes) {
    const auto weights = format_of(a).weights;
    const Wide tokens = Wide{a.tokens} * a.input * (a.dtype == NEMOQUANT_FLOAT32 ? 4 : 2), pairs = Wide{a.tokens} * a.chosen;
    const Wide all = Wide{a.experts} * a.input * a.width, scales = Wide{a.experts} * 4;
    const Wide codes = weights == Weights::bf16 ? 2 * all : weights == Weights::e2m1 ? all / 2 : all;
    const bool blocks = weights == Weights::e2m1, global = weights != Weights::bf16, inputs = format_of(a).rounding != Rounding::none;
    return check_apart("routed_experts",
                       {{"y", a.y, tokens}, {"skipped", a.skipped, 4}, {"workspace", a.workspace, static_cast<Wide>(workspace_bytes)}},
                       {{"x", a.x, tokens},
                        {"expert_ids", a.expert_ids, pairs * 8},
                        {"expert_weights", a.expert_weights, pairs * 4},
                        {"up", a.up, codes},
                        {"down", a.down, codes},
                        {"up_block_scales", blocks ? a.up_block_scales : nullptr, all / 16},
                        {"down_block_scales", blocks ? a.down_block_scales : nullptr, all / 16},
                        {"up_global_scale", global ? a.up_global_scale : nullptr, scales},
                        {"down_global_scale", global ? a.down_global_scale : nullptr, scales},
                        {"up_input_scale", inputs ? a.up_input_scale : nullptr, scales},
                        {"down_input_scale", inputs ? a.down_input_scale : nullptr, scales}});
}

// Sizes of one slab.
struct Slab {
    int64_t tokens, pairs, blocks, tiles;

    // ``pairs`` bounds those of any slab, and grows with every size.
    explicit Slab(const Args& a)
        : tokens(std::min(a.tokens, std::max<int64_t>(1, most(a) / a.chosen))),
          pairs(std::min(a.tokens * a.chosen, std::max(most(a), a.chosen))),
          blocks((pairs + SORT - 1) / SORT),
          tiles(std::min(pairs, pairs / NARROW_TOKENS + a.experts)) {}

    static int64_t most(const Args& a) { return a.slab ? a.slab : SLAB_PAIRS; }
};

bool is_grouped(const Args& a) { return a.products == NEMOQUANT_EXPERTS_GROUPED; }

struct Workspace {
    int32_t *counts, *order, *tile_count;
    Tile* tiles;
    unsigned char *inputs, *hidden;
    float* results;  // where the inputs were: they are read before
    unsigned char* grouped;  // GroupedArea, in the place of the three
    size_t bytes;

    Workspace(const Args& a, const Slab& slab) {
        auto* at = static_cast<unsigned char*>(a.workspace);
        size_t used = 0;
        const auto take = [&](int64_t bytes) {
            unsigned char* const here = at + used;
            used += (static_cast<size_t>(bytes) + 255) / 256 * 256;
            return here;
        };
        const int64_t planes = planes_of(a), rows = format_of(a).rounding == Rounding::none ? slab.tokens : slab.pairs;
        const int64_t bytes_each = format_of(a).weights == Weights::fp8 ? BYTES<Weights::fp8> : BYTES<Weights::bf16>;
        const auto padded = [&](int64_t size) { return (size + CHUNK - 1) / CHUNK * CHUNK * bytes_each; };
        counts = reinterpret_cast<int32_t*>(take(slab.blocks * a.experts * 4));
        order = reinterpret_cast<int32_t*>(take(slab.pairs * 4));
        tile_count = reinterpret_cast<int32_t*>(take(4));
        tiles = reinterpret_cast<Tile*>(take(slab.tiles * static_cast<int64_t>(sizeof(Tile))));
        const size_t sorted = used;
        grouped = at + sorted;
        hidden = take(slab.pairs * planes * padded(a.width));  // as bfloat16; FP4's groups take less
        inputs = take(std::max(rows * planes * padded(a.input), slab.pairs * a.input * 4));
        results = reinterpret_cast<float*>(inputs);
        bytes = used;
        if (is_grouped(a) && one_kind(a))
            bytes = std::max(bytes, sorted + GroupedArea(nullptr, operands_of(a), slab.pairs, a.experts, a.input, a.width).bytes);
    }
};

int tile_of(const Args& a, int64_t tokens) {
    if (a.tile) return a.tile;
    const int64_t mean = tokens * a.chosen / a.experts;
    return mean <= NARROW_MEAN && a.products != NEMOQUANT_EXPERTS_NATIVE ? NARROW_TOKENS : mean <= MIDDLE_MEAN ? 32 : 64;
}


template <Weights F>
int multiply(Projection p, int tile, int64_t pairs, int64_t experts, void* stream) {
    const int64_t tiles = std::min(pairs, pairs / tile + experts);
    if (tile != NARROW_TOKENS) {
        const dim3 grid(static_cast<unsigned>((p.rows + WIDE_ROWS - 1) / WIDE_ROWS), static_cast<unsigned>(tiles));
        if (tile == 32) return NQ_LAUNCH((wide<F, 4>), grid, dim3(WIDE_WARPS * 32), STAGES * STAGE_BYTES<F, 4>, stream, p);
        return NQ_LAUNCH((wide<F, 8>), grid, dim3(WIDE_WARPS * 32), STAGES * STAGE_BYTES<F, 8>, stream, p);
    }
    const int64_t chunks = static_cast<int64_t>(p.planes) * ((p.size + CHUNK - 1) / CHUNK);
    const auto blocks = [&](int split) { return (static_cast<int64_t>(p.rows) * split + NARROW_WARPS * 16 - 1) / (NARROW_WARPS * 16); };
    p.split = 1;
    while (p.split < NARROW_WARPS && blocks(p.split) * tiles < BLOCKS_WANTED && chunks >= 2 * p.split * CHUNKS_LEAST) p.split *= 2;
    const dim3 grid(static_cast<unsigned>(blocks(p.split)), static_cast<unsigned>(tiles));
    return NQ_LAUNCH((narrow<F>), grid, dim3(NARROW_WARPS * 32), 0, stream, p);
}

#if defined(NQ_HAVE_NATIVE_SM120)
template <>
int multiply<Weights::fp4>(Projection p, int tile, int64_t pairs, int64_t experts, void* stream) {
    return multiply_native(p, tile, std::min(pairs, pairs / tile + experts), stream);
}
#endif

int multiply_grouped(const Args& a, const Workspace& w, const GroupedArea& area, const void* x, int64_t pairs, void* stream) {
    GroupedLayer layer{};
    layer.operands = operands_of(a);
    layer.pairs = pairs, layer.x = x, layer.dtype = a.dtype;
    layer.input = static_cast<int32_t>(a.input), layer.width = static_cast<int32_t>(a.width), layer.chosen = static_cast<int32_t>(a.chosen);
    layer.up = a.up, layer.down = a.down, layer.up_block_scales = a.up_block_scales, layer.down_block_scales = a.down_block_scales;
    if (layer.operands != Operands::bf16) {
        layer.up_global_scale = a.up_global_scale, layer.down_global_scale = a.down_global_scale;
        layer.up_input_scale = a.up_input_scale, layer.down_input_scale = a.down_input_scale;
    }
    layer.groups = {w.tiles, w.tile_count}, layer.order = w.order;
    return grouped_layer(layer, area, grouped_products(layer.operands), stream);
}

template <class Y>
int sum(const Sum& p, void* stream) {
    const int64_t threads = p.tokens * (p.size / 4);
    return NQ_LAUNCH((combine<Y>), dim3(static_cast<unsigned>((threads + COMBINE_THREADS - 1) / COMBINE_THREADS)), dim3(COMBINE_THREADS), 0,
                     stream, p);
}

int sum_of(int32_t dtype, const Sum& p, void* stream) {
    switch (dtype) {
        case NEMOQUANT_FLOAT32: return sum<float>(p, stream);
        case NEMOQUANT_FLOAT16: return sum<__half>(p, stream);
        default: return sum<__nv_bfloat16>(p, stream);
    }
}

// ``tokens`` tokens from ``first`` on.
template <Weights F>
int launch(const Args& a, const Workspace& w, int64_t first, int64_t tokens, void* stream) {
    const Rounding rounding = format_of(a).rounding;
    const bool rounded = rounding != Rounding::none;
    const auto experts = static_cast<int32_t>(a.experts), chosen = static_cast<int32_t>(a.chosen);
    const auto input = static_cast<int32_t>(a.input), width = static_cast<int32_t>(a.width);
    const int64_t pairs = tokens * chosen, row_bytes = a.input * (a.dtype == NEMOQUANT_FLOAT32 ? 4 : 2);
    const bool grouped = is_grouped(a);
    const int planes = planes_of(a), tile = grouped ? static_cast<int>(pairs) : tile_of(a, tokens);  // grouped: a tile is an expert

    const Routing r{a.expert_ids + first * chosen, w.counts, w.order, w.tiles, w.tile_count, a.skipped, static_cast<int32_t>(pairs), experts, tile,
                    static_cast<int32_t>((pairs + SORT - 1) / SORT)};
    const Inputs in{static_cast<const unsigned char*>(a.x) + first * row_bytes, a.up_input_scale, w.inputs, a.dtype, input, planes, chosen,
                    rounded ? pairs : tokens, rounding};
    const int64_t writers = grouped ? 0 : (in.rows * blocks_of<F>(input) + SORT - 1) / SORT;
    if (const int code = NQ_LAUNCH((begin<F>), dim3(static_cast<unsigned>(r.blocks + writers)), dim3(SORT), 0, stream, r, in)) return code;
    if (r.blocks > 1) {
        if (const int code = NQ_LAUNCH((arrange), dim3(1), dim3(SORT), 0, stream, r)) return code;
        if (const int code = NQ_LAUNCH((scatter), dim3(static_cast<unsigned>(r.blocks)), dim3(SORT), 0, stream, r)) return code;
    }

    Sum s{w.results, r.ids, a.expert_weights + first * chosen, static_cast<unsigned char*>(a.y) + first * row_bytes, tokens, chosen, experts, input};
    if (grouped) {
        const GroupedArea area(w.grouped, operands_of(a), pairs, experts, input, width);
        if (const int code = multiply_grouped(a, w, area, in.x, pairs, stream)) return code;
        s.results = area.sums, s.slots = area.slots;
        if (rounded) s.global_scale = a.down_global_scale, s.input_scale = a.down_input_scale;
        return sum_of(a.dtype, s, stream);
    }

    Projection p{};
    p.order = w.order, p.tiles = w.tiles, p.tile_count = w.tile_count, p.planes = planes, p.chosen = chosen;
    p.weight = a.up, p.block_scales = a.up_block_scales, p.global_scale = a.up_global_scale;
    p.input_scale = rounded ? a.up_input_scale : nullptr, p.inputs = w.inputs;
    p.rows = width, p.size = input, p.is_up = true, p.hidden = w.hidden;
    p.chosen = rounded ? 1 : chosen;  // rows of inputs are pairs, or tokens
    p.next_scale = a.down_input_scale, p.next_rounding = rounding;
    if (const int code = multiply<F>(p, tile, pairs, experts, stream)) return code;
    p.weight = a.down, p.block_scales = a.down_block_scales, p.global_scale = a.down_global_scale;
    p.input_scale = rounded ? a.down_input_scale : nullptr, p.inputs = w.hidden;
    p.rows = input, p.size = width, p.is_up = false, p.results = w.results;
    if (const int code = multiply<F>(p, tile, pairs, experts, stream)) return code;

    return sum_of(a.dtype, s, stream);
}

}  // namespace

extern "C" size_t nemoquant_routed_experts_workspace(const nemoquant_routed_experts_args* args) {
    if (!args || check_sizes(*args)) return 0;
    return Workspace(*args, Slab(*args)).bytes;
}

extern "C" int nemoquant_routed_experts(const nemoquant_routed_experts_args* args, void* stream) {
    if (!args) return fail(NEMOQUANT_BAD_ARGUMENT, "routed_experts: args is null");
    if (const int code = check(*args)) return code;
    const Slab slab(*args);
    const Workspace workspace(*args, slab);
    if (const int code = check_memory(*args, workspace.bytes)) return code;
    for (int64_t first = 0; first < args->tokens; first += slab.tokens) {
        const int64_t tokens = std::min(slab.tokens, args->tokens - first);
        int code = NEMOQUANT_OK;
        switch (args->products == NEMOQUANT_EXPERTS_NATIVE ? Weights::fp4 : format_of(*args).weights) {
            case Weights::bf16: code = launch<Weights::bf16>(*args, workspace, first, tokens, stream); break;
            case Weights::e4m3: code = launch<Weights::e4m3>(*args, workspace, first, tokens, stream); break;
            case Weights::fp8: code = launch<Weights::fp8>(*args, workspace, first, tokens, stream); break;
            case Weights::e2m1: code = launch<Weights::e2m1>(*args, workspace, first, tokens, stream); break;
            case Weights::fp4:
#if defined(NQ_HAVE_NATIVE_SM120)
                code = launch<Weights::fp4>(*args, workspace, first, tokens, stream);
#endif
                break;
        }
        if (code) return code;
    }
    return NEMOQUANT_OK;
}
