// Both products of RoutedExperts by groups, as the launcher sees them: whether they are there, what they take, and their workspace.
//
//     gather, describe, swizzle*, product    up, which squares and rounds too but for NVFP4
//     square*, describe, swizzle*, product   down                                                 * NVFP4 alone
//
// The sort before them, and the weighted sum after them, are those of every other way. The kernels are in plain.cuh, their launches in
// plain.cu, the products in grouped_sm90.cu and grouped_sm100.cu.
#pragma once

#include <algorithm>
#include <type_traits>

#include "grouped.hpp"
#include "routing.cuh"

namespace nq::experts {

__host__ __device__ constexpr int block_bytes(Operands o) { return o == Operands::bf16 ? 32 : o == Operands::e4m3 ? 16 : 8; }  // codes alone

__host__ __device__ constexpr int64_t up_to(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// Where a row's block scale stands among those of an operand, and how many bytes ``rows`` take. Tiles of 128 rows by 4 blocks, those
// along the blocks first; in a tile, row r and block b at r % 32 * 16 + r / 32 * 4 + b: the layout that cuBLAS's documents call that of
// 1D block scaling, and CUTLASS's SfKMajorAtom. What lies in a tile but beyond the inputs must be zero: codes there are zero, and their
// product with a scale that is NaN is not.
__host__ __device__ constexpr int64_t swizzled(int64_t row, int block, int size) {
    const int64_t tiles = (size / BLOCK + SCALE_BLOCKS - 1) / SCALE_BLOCKS;
    const int64_t tile = row / SCALE_ROWS * tiles + block / SCALE_BLOCKS;
    return tile * (SCALE_ROWS * SCALE_BLOCKS) + row % 32 * 16 + row % SCALE_ROWS / 32 * 4 + block % SCALE_BLOCKS;
}
__host__ __device__ constexpr int64_t swizzled_bytes(int64_t rows, int size) {
    return up_to(rows, SCALE_ROWS) * up_to(size / BLOCK, SCALE_BLOCKS);
}

// Group ``g``, whose first slot is ``first``, has its tokens' block scales from this row on: at a multiple of 128, as each group must,
// and beyond those of the groups before it, without a sum over them.
__host__ __device__ constexpr int64_t scale_row(int64_t g, int64_t first) { return (first / SCALE_ROWS + g) * SCALE_ROWS; }
__host__ __device__ constexpr int64_t scale_rows(int64_t groups, int64_t pairs) { return (pairs / SCALE_ROWS + groups) * SCALE_ROWS; }

// The experts that have tokens: tiles of the sort, one an expert, in the order of their slots.
struct Groups {
    const Tile* tiles;
    const int32_t* count;
};

using Multiply = int (*)(const Grouped&, void* stream);

// Whether this library has products of such operands, for whatever device.
constexpr bool grouped_built([[maybe_unused]] Operands operands) {
#if defined(NQ_HAVE_GROUPED_SM100)
    return true;
#elif defined(NQ_HAVE_GROUPED_SM90)
    return operands != Operands::nvfp4;
#else
    return false;
#endif
}

// What multiplies them on the current device; null where nothing that was built does.
inline Multiply grouped_products([[maybe_unused]] Operands operands) {
#if defined(NQ_HAVE_GROUPED_SM90)
    if (runs_here(NQ_GROUPED_SM90_FIRST, NQ_GROUPED_SM90_LAST)) return operands == Operands::nvfp4 ? nullptr : grouped_sm90;
#endif
#if defined(NQ_HAVE_GROUPED_SM100)
    if (runs_here(NQ_GROUPED_SM100_FIRST, NQ_GROUPED_SM100_LAST)) return grouped_sm100;
#endif
    return nullptr;
}

// One layer, or a slab of its tokens.
struct GroupedLayer {
    Operands operands;
    int64_t pairs;
    int32_t input, width, chosen, dtype;
    const void* x;
    const void *up, *down, *up_block_scales, *down_block_scales;
    const float *up_global_scale, *down_global_scale, *up_input_scale, *down_input_scale;  // null for bf16
    Groups groups;  // of the sort
    const int32_t* order;
};

// Where its intermediate results go; ``bytes`` from ``at`` on. Grows with every size.
struct GroupedArea {
    unsigned char *inputs, *input_scales, *hidden, *hidden_scales, *weight_scales;
    float* sums;     // [pairs, rows] of down; before, with nvfp4, of up
    int32_t* slots;  // [pairs] pair -> slot
    int32_t* sizes;
    const unsigned char **weight_at, **input_at, **weight_scale_at, **input_scale_at;
    void** output_at;
    int64_t *operand_strides, *output_strides;
    float *scales, *next_scales;
    unsigned char *layouts, *scratch;
    int64_t groups;
    size_t bytes;

    GroupedArea(void* at, Operands operands, int64_t pairs, int64_t experts, int64_t input, int64_t width) : groups(std::min(pairs, experts)) {
        constexpr size_t LINE = 256;  // block scales and descriptors of TMA want 128; the workspace promises 16
        size_t used = (LINE - reinterpret_cast<uintptr_t>(at) % LINE) % LINE;
        const auto take = [&](auto*& to, int64_t count) {
            to = reinterpret_cast<std::remove_reference_t<decltype(to)>>(static_cast<unsigned char*>(at) + used);
            used += static_cast<size_t>(up_to(count * static_cast<int64_t>(sizeof *to), LINE));
        };
        const int64_t scaled = operands == Operands::nvfp4 ? scale_rows(groups, pairs) : 0;
        const auto in = static_cast<int32_t>(input), out = static_cast<int32_t>(width);
        take(inputs, pairs * (input / BLOCK) * block_bytes(operands));
        take(input_scales, swizzled_bytes(scaled, in));
        take(hidden, pairs * (width / BLOCK) * block_bytes(operands));
        take(hidden_scales, swizzled_bytes(scaled, out));
        take(weight_scales, scaled ? experts * std::max(swizzled_bytes(width, in), swizzled_bytes(input, out)) : 0);
        take(sums, pairs * (scaled ? std::max(input, width) : input));
        take(slots, pairs);
        take(sizes, 3 * groups);
        take(weight_at, groups);
        take(input_at, groups);
        take(weight_scale_at, groups);
        take(input_scale_at, groups);
        take(output_at, groups);
        take(operand_strides, groups);
        take(output_strides, groups);
        take(scales, groups);
        take(next_scales, groups);
        take(layouts, 2 * groups * LAYOUT_BYTES);
        take(scratch, SCRATCH_BYTES);
        bytes = used + LINE;  // wherever it begins
    }
};

// Both products: their sums for ``combine``, [slots, input] of area.sums, not dequantized, and area.slots. 0, or an error code.
int grouped_layer(const GroupedLayer& layer, const GroupedArea& area, Multiply multiply, void* stream);

}  // namespace nq::experts
