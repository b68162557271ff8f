// RoutedExperts' face: spec.yaml as tables, and the way from a call to the launcher.
#include <stdexcept>

#include "../common/plugin.hpp"
#include "abi.h"

namespace {

using namespace nq::trt;

const std::vector<const char*> FORMATS = {"bf16", "fp8", "w8a16", "nvfp4", "w4a16"};

int32_t format_of(const Attributes& attributes) {
    const std::string& name = attributes.text("format");
    if (name == "fp8") return NEMOQUANT_EXPERTS_FP8;
    if (name == "w8a16") return NEMOQUANT_EXPERTS_W8A16;
    if (name == "nvfp4") return NEMOQUANT_EXPERTS_NVFP4;
    if (name == "w4a16") return NEMOQUANT_EXPERTS_W4A16;
    return NEMOQUANT_EXPERTS_BF16;
}

struct Parts {
    bool codes, block_scales, input_scale;
};

Parts parts_of(int32_t format) {
    const bool fp4 = format == NEMOQUANT_EXPERTS_NVFP4 || format == NEMOQUANT_EXPERTS_W4A16;
    return {format != NEMOQUANT_EXPERTS_BF16, fp4, format == NEMOQUANT_EXPERTS_NVFP4 || format == NEMOQUANT_EXPERTS_FP8};
}

// Codes and block scales are bytes: TensorRT has no UINT8 inside a network, and takes neither FP8 nor FP4 into a plugin.
std::vector<Port> inputs(const Attributes& attributes) {
    const Parts parts = parts_of(format_of(attributes));
    std::vector<Port> all = {
        {"x", "T I", {DataType::kBF16, DataType::kHALF, DataType::kFLOAT}},
        {"expert_ids", "T k", {DataType::kINT64}},
        {"expert_weights", "T k", {DataType::kFLOAT}},
    };
    const auto projection = [&](const char* weight, const char* weight_shape, const char* codes, const char* codes_shape, const char* blocks,
                                const char* blocks_shape, const char* global, const char* input) {
        if (!parts.codes) {
            all.push_back({weight, weight_shape, {DataType::kBF16}});
            return;
        }
        all.push_back({codes, codes_shape, {DataType::kINT8}});
        if (parts.block_scales) all.push_back({blocks, blocks_shape, {DataType::kINT8}});
        all.push_back({global, "E", {DataType::kFLOAT}});
        if (parts.input_scale) all.push_back({input, "E", {DataType::kFLOAT}});
    };
    projection("up_weight", "E M I", "up_codes", parts.block_scales ? "E M I/2" : "E M I", "up_block_scales", "E M I/16", "up_global_scale",
               "up_input_scale");
    projection("down_weight", "E I M", "down_codes", parts.block_scales ? "E I M/2" : "E I M", "down_block_scales", "E I M/16",
               "down_global_scale", "down_input_scale");
    return all;
}

nemoquant_routed_experts_args arguments(const Call& call) {
    nemoquant_routed_experts_args args{};
    args.format = format_of(call.attributes);
    const Parts parts = parts_of(args.format);
    args.x = call.inputs[0];
    args.expert_ids = static_cast<const int64_t*>(call.inputs[1]);
    args.expert_weights = static_cast<const float*>(call.inputs[2]);
    size_t next = 3;
    const auto projection = [&](const void*& weight, const void*& blocks, const float*& global, const float*& input) {
        weight = call.inputs[next++];
        if (parts.block_scales) blocks = call.inputs[next++];
        if (parts.codes) global = static_cast<const float*>(call.inputs[next++]);
        if (parts.input_scale) input = static_cast<const float*>(call.inputs[next++]);
    };
    projection(args.up, args.up_block_scales, args.up_global_scale, args.up_input_scale);
    projection(args.down, args.down_block_scales, args.down_global_scale, args.down_input_scale);
    args.y = call.outputs[0];
    args.workspace = call.workspace;
    args.tokens = call.sizes['T'];
    args.chosen = call.sizes['k'];
    args.experts = call.sizes['E'];
    args.input = call.sizes['I'];
    args.width = call.sizes['M'];
    args.dtype = call.input_types[0];
    return args;
}

size_t workspace(const Call& call) {
    const auto args = arguments(call);
    const size_t bytes = nemoquant_routed_experts_workspace(&args);
    if (!bytes) throw std::invalid_argument(nemoquant_last_error());
    return bytes;
}

int launch(const Call& call) {
    const auto args = arguments(call);
    return nemoquant_routed_experts(&args, call.stream);
}

const Definition definition{
    "RoutedExperts", "1",
    {text("format", "bf16", FORMATS), text("activation", "relu2", {"relu2"})},
    inputs,
    {{"y", "T I", {}, "x"}},
    workspace, launch,
};
const Registration registration(definition);

}  // namespace
