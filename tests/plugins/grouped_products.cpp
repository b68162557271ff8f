// Replaces CUTLASS in the tests: the products of grouped.hpp by plain loops in double, so that all code around them runs on the host.
// It reads the same memory as CUTLASS and checks what CUTLASS relies on. Codes and the order of block scales are implemented here a second
// time, from the formats' definitions and NVIDIA's description of block scales for tensor cores.
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "../../plugins/common/numeric.cuh"
#include "../../plugins/routed_experts/grouped.hpp"

namespace {

using nq::experts::Grouped;
using nq::experts::Operands;

int calls = 0;

double bf16(uint16_t bits) {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
}

double e4m3(uint8_t code) {
    const int exponent = code >> 3 & 15, mantissa = code & 7;
    if ((code & 127) == 127) return std::numeric_limits<double>::quiet_NaN();
    const double size = exponent ? std::ldexp(8 + mantissa, exponent - 10) : std::ldexp(mantissa, -9);
    return code & 128 ? -size : size;
}

double e2m1(int code) {
    const double sizes[] = {0, 0.5, 1, 1.5, 2, 3, 4, 6};
    return code & 8 ? -sizes[code & 7] : sizes[code & 7];
}

// A scale of [rows, inputs / 16]. Tiles of 128 rows by 4 scales have 512 bytes and lie row by row. A tile has 32 lines of 16 bytes: line r
// has the 4 scales of the rows r, r + 32, r + 64, r + 96.
double scale_at(const unsigned char* scales, int row, int block, int inputs) {
    const int across = (inputs + 63) / 64, tile = row / 128 * across + block / 4;
    return e4m3(scales[tile * 512 + row % 32 * 16 + row % 128 / 32 * 4 + block % 4] & 127);  // UE4M3 has no sign
}

// A row as double. NVFP4 rows are padded to a multiple of 64 with zero codes; if their scales are not zero too, the result is NaN.
std::vector<double> row_of(Operands operands, const void* codes, const void* scales, int row, int inputs) {
    const auto* const bytes = static_cast<const unsigned char*>(codes);
    std::vector<double> values(static_cast<size_t>(operands == Operands::nvfp4 ? (inputs + 63) / 64 * 64 : inputs));
    for (int i = 0; i < static_cast<int>(values.size()); ++i) {
        const int64_t at = static_cast<int64_t>(row) * inputs + i;
        double& value = values[static_cast<size_t>(i)];
        if (operands == Operands::bf16) {
            uint16_t bits;
            std::memcpy(&bits, bytes + 2 * at, 2);
            value = bf16(bits);
        } else if (operands == Operands::e4m3) {
            value = e4m3(bytes[at]);
        } else {
            const double scale = scale_at(static_cast<const unsigned char*>(scales), row, i / 16, inputs);
            if (i < inputs) {
                value = e2m1(bytes[at / 2] >> at % 2 * 4 & 15) * scale;
            } else {
                value = scale == 0 ? 0 : std::numeric_limits<double>::quiet_NaN();
            }
        }
    }
    return values;
}

// Output ``at`` of a group: the sum in float32, or the input of down that is made from it.
void store(const Grouped& g, int group, int64_t at, double exact) {
    auto* const to = static_cast<unsigned char*>(g.outputs[group]);
    const float sum = static_cast<float>(exact);
    if (!g.squares) {
        std::memcpy(to + 4 * at, &sum, 4);
        return;
    }
    const float value = g.operands == Operands::e4m3 ? sum * g.scales[group] : sum, positive = value < 0 ? 0 : value, square = positive * positive;
    if (g.operands == Operands::e4m3) {
        to[at] = nq::float_to_e4m3(square / g.next_scales[group]);
    } else {
        const __nv_bfloat16 rounded = nq::from_float<__nv_bfloat16>(square);
        std::memcpy(to + 2 * at, &rounded, 2);
    }
}

bool aligned(const void* at, uintptr_t to) { return at && reinterpret_cast<uintptr_t>(at) % to == 0; }

int multiply(const Grouped& g) {
    ++calls;
    const bool scaled = g.operands == Operands::nvfp4;
    const auto wrong = [](const char* what, int group) { return nq::fail(NEMOQUANT_BAD_ARGUMENT, "stand-in: %s of group %d", what, group); };
    if (g.squares && scaled) return wrong("squares in NVFP4", -1);
    if (!aligned(g.scratch, 128) || !aligned(g.layouts, 16)) return wrong("scratch", -1);
    std::memset(g.scratch, 0x77, nq::experts::SCRATCH_BYTES);  // CUTLASS may use all of it
    std::memset(g.layouts, 0x77, static_cast<size_t>(2 * g.groups * nq::experts::LAYOUT_BYTES));
    bool ended = false;
    for (int group = 0; group < g.groups; ++group) {
        const int32_t* const size = g.sizes + 3 * group;
        if (size[0] != g.rows || size[2] != g.size || size[1] < 0) return wrong("sizes", group);
        if (ended && size[1]) return wrong("tokens behind a group without any", group);
        ended = !size[1];
        if (ended) continue;
        if (g.operand_strides[group] != g.size || g.output_strides[group] != g.rows) return wrong("strides", group);
        if (!aligned(g.weights[group], 16) || !aligned(g.inputs[group], 16) || !aligned(g.outputs[group], 16)) return wrong("addresses", group);
        if (scaled && (!aligned(g.weight_scales[group], 128) || !aligned(g.input_scales[group], 128))) return wrong("scales", group);
        const void* const weight_scales = scaled ? g.weight_scales[group] : nullptr;
        const void* const input_scales = scaled ? g.input_scales[group] : nullptr;
        std::vector<std::vector<double>> inputs;
        for (int token = 0; token < size[1]; ++token) inputs.push_back(row_of(g.operands, g.inputs[group], input_scales, token, g.size));
        for (int row = 0; row < g.rows; ++row) {
            const std::vector<double> weight = row_of(g.operands, g.weights[group], weight_scales, row, g.size);
            for (int token = 0; token < size[1]; ++token) {
                double sum = 0;
                for (size_t i = 0; i < weight.size(); ++i) sum += weight[i] * inputs[static_cast<size_t>(token)][i];
                store(g, group, static_cast<int64_t>(token) * g.rows + row, sum);
            }
        }
    }
    return NEMOQUANT_OK;
}

}  // namespace

namespace nq::experts {

int grouped_sm90(const Grouped& g, void*) {
    return g.operands == Operands::nvfp4 ? fail(NEMOQUANT_BAD_ARGUMENT, "stand-in: SM90 has no products of FP4") : multiply(g);
}

int grouped_sm100(const Grouped& g, void*) { return multiply(g); }

}  // namespace nq::experts

// Number of grouped products since the last call.
extern "C" NEMOQUANT_API int test_grouped_calls(void) {
    const int count = calls;
    calls = 0;
    return count;
}
