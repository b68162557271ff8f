// The launches of grouped products in their order.
#include "plain.cuh"

namespace nq::experts {

namespace {

dim3 grid_of(int64_t threads, int64_t groups = 1) {
    return dim3(static_cast<unsigned>((threads + PLAIN_THREADS - 1) / PLAIN_THREADS), static_cast<unsigned>(groups));
}

// One product of all groups; its inputs are there.
int product(const GroupedLayer& layer, const GroupedArea& area, Multiply multiply, bool is_up, void* stream) {
    const int32_t rows = is_up ? layer.width : layer.input, size = is_up ? layer.input : layer.width;
    const bool scaled = layer.operands == Operands::nvfp4, squares = is_up && !scaled;
    const int bytes = block_bytes(layer.operands);
    Describe d{};
    d.groups = layer.groups, d.most = static_cast<int32_t>(area.groups), d.rows = rows, d.size = size;
    d.input_bytes = static_cast<int64_t>(size / BLOCK) * bytes, d.weight_bytes = rows * d.input_bytes;
    d.weights = static_cast<const unsigned char*>(is_up ? layer.up : layer.down);
    d.inputs = is_up ? area.inputs : area.hidden;
    d.weight_scales = scaled ? area.weight_scales : nullptr;
    d.input_scales = is_up ? area.input_scales : area.hidden_scales;
    d.outputs = squares ? area.hidden : reinterpret_cast<unsigned char*>(area.sums);
    d.output_bytes = squares ? static_cast<int64_t>(rows / BLOCK) * bytes : rows * static_cast<int64_t>(sizeof(float));
    if (squares && layer.operands == Operands::e4m3)
        d.global_scale = layer.up_global_scale, d.input_scale = layer.up_input_scale, d.next_scale = layer.down_input_scale;
    d.sizes = area.sizes, d.weight_at = area.weight_at, d.input_at = area.input_at, d.output_at = area.output_at;
    d.weight_scale_at = area.weight_scale_at, d.input_scale_at = area.input_scale_at;
    d.operand_strides = area.operand_strides, d.output_strides = area.output_strides;
    d.scales = area.scales, d.next_scales = area.next_scales;
    if (const int code = NQ_LAUNCH((describe), grid_of(area.groups), dim3(PLAIN_THREADS), 0, stream, d)) return code;
    if (scaled) {
        const Swizzle s{layer.groups, static_cast<const unsigned char*>(is_up ? layer.up_block_scales : layer.down_block_scales),
                        area.weight_scales, rows, size};
        const dim3 grid = grid_of(swizzled_bytes(rows, size) / SCALE_BLOCKS, area.groups);
        if (const int code = NQ_LAUNCH((swizzle), grid, dim3(PLAIN_THREADS), 0, stream, s)) return code;
    }
    Grouped g{};
    g.operands = layer.operands, g.squares = squares, g.groups = d.most, g.rows = rows, g.size = size, g.sizes = area.sizes;
    g.weights = reinterpret_cast<const void* const*>(area.weight_at), g.inputs = reinterpret_cast<const void* const*>(area.input_at);
    g.weight_scales = reinterpret_cast<const void* const*>(area.weight_scale_at);
    g.input_scales = reinterpret_cast<const void* const*>(area.input_scale_at);
    g.outputs = area.output_at, g.operand_strides = area.operand_strides, g.output_strides = area.output_strides;
    g.scales = area.scales, g.next_scales = area.next_scales;
    g.layouts = area.layouts, g.scratch = area.scratch;
    return multiply(g, stream);
}

template <Operands O>
int run(const GroupedLayer& layer, const GroupedArea& area, Multiply multiply, void* stream) {
    const Gather in{layer.groups, layer.order, area.slots, layer.x, layer.up_input_scale, {area.inputs, area.input_scales, layer.input},
                    layer.pairs, layer.dtype, layer.chosen};
    if (const int code = NQ_LAUNCH((gather<O>), grid_of(layer.pairs * (layer.input / BLOCK)), dim3(PLAIN_THREADS), 0, stream, in)) return code;
    if (const int code = product(layer, area, multiply, true, stream)) return code;
    if (O == Operands::nvfp4) {
        const Square hidden{layer.groups, area.sums, layer.up_global_scale, layer.up_input_scale, layer.down_input_scale,
                            {area.hidden, area.hidden_scales, layer.width}, layer.pairs};
        const dim3 grid = grid_of(layer.pairs * (layer.width / BLOCK));
        if (const int code = NQ_LAUNCH((square), grid, dim3(PLAIN_THREADS), 0, stream, hidden)) return code;
    }
    return product(layer, area, multiply, false, stream);
}

}  // namespace

int grouped_layer(const GroupedLayer& layer, const GroupedArea& area, Multiply multiply, void* stream) {
    switch (layer.operands) {
        case Operands::bf16: return run<Operands::bf16>(layer, area, multiply, stream);
        case Operands::e4m3: return run<Operands::e4m3>(layer, area, multiply, stream);
        default: return run<Operands::nvfp4>(layer, area, multiply, stream);
    }
}

}  // namespace nq::experts
