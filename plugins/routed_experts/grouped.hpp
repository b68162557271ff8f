// The products of RoutedExperts as CUTLASS takes them: one call multiplies the weights of all experts that have tokens. No CUTLASS type
// is here, so that what prepares the arrays (plain.cuh) and what multiplies (grouped.cuh, built on request) know nothing of each other.
#pragma once

#include <cstddef>
#include <cstdint>

namespace nq::experts {

enum class Operands { bf16, e4m3, nvfp4 };  // of weights and inputs alike; nvfp4: E2M1 codes and E4M3 scales of 16

constexpr int SCALE_ROWS = 128, SCALE_BLOCKS = 4;  // of a tile of swizzled block scales, which has 512 bytes: see ``swizzled``
constexpr int64_t LAYOUT_BYTES = 64;               // for CUTLASS's description of one operand's block scales
constexpr int64_t SCRATCH_BYTES = 1 << 20;         // for CUTLASS's own use: descriptors of TMA, some for each multiprocessor

// All arrays are on the device, an entry for each group, which is an expert with tokens; groups beyond those have no tokens and nothing
// that may be read but their sizes. Operands are row-major and contiguous along the inputs, outputs along the rows of the weight.
//
// ``squares``, of up with bf16 and e4m3: outputs are what down takes, rounded once. bf16: max(sum, 0)^2. e4m3, to the nearest code, in
// float32 with each operation rounded: max(sum * scale, 0)^2 / next_scale. Otherwise they are the sums, float32.
struct Grouped {
    Operands operands;
    bool squares;
    int32_t groups;
    int32_t rows, size;                 // of every weight; size: inputs
    const int32_t* sizes;               // [groups, 3]: rows, tokens, inputs
    const void* const* weights;         // -> [rows, size]
    const void* const* inputs;          // -> [tokens, size]
    const void* const* weight_scales;   // nvfp4 -> swizzled block scales
    const void* const* input_scales;
    void* const* outputs;               // -> [tokens, rows]
    const int64_t* operand_strides;     // [groups]: size, values from row to row of weights and inputs
    const int64_t* output_strides;      // [groups]: rows
    const float *scales, *next_scales;  // [groups], of squares in e4m3
    void* layouts;                      // [2, groups] of LAYOUT_BYTES
    void* scratch;                      // SCRATCH_BYTES, at a multiple of 128
};

// 0, or an error code with its reason kept. Only where the file of that name was built.
int grouped_sm90(const Grouped& g, void* stream);   // bf16, e4m3
int grouped_sm100(const Grouped& g, void* stream);  // all

}  // namespace nq::experts
