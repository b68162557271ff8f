// RoutedExperts' face: spec.yaml as tables, and the way from a call to the launcher. The inputs follow from the format.
#include "../common/plugin.hpp"
#include "abi.h"

#include <cstring>
#include <stdexcept>

namespace {

using namespace nq::trt;

struct Format {
    const char* name;
    int32_t number;
    bool codes, blocks, rounded_inputs;
};

constexpr Format FORMATS[] = {
    {"bf16", NEMOQUANT_EXPERTS_BF16, false, false, false},
    {"fp8", NEMOQUANT_EXPERTS_FP8, true, false, true},
    {"w8a16", NEMOQUANT_EXPERTS_W8A16, true, false, false},
    {"nvfp4", NEMOQUANT_EXPERTS_NVFP4, true, true, true},
    {"w4a16", NEMOQUANT_EXPERTS_W4A16, true, true, false},
};

const Format& format_of(const Attributes& attributes) {
    for (const Format& format : FORMATS)
        if (attributes.text("format") == format.name) return format;
    throw std::logic_error("a format that has no row");
}

// What a projection brings, in the order of spec.yaml. INT8 are bytes of codes: TensorRT has no UINT8 inside a network.
void projection(std::vector<Port>& ports, const Format& format, const char* const (&names)[5], const char* const (&shapes)[3]) {
    if (!format.codes) return ports.push_back({names[0], shapes[0], {DataType::kBF16}});
    ports.push_back({names[1], format.blocks ? shapes[1] : shapes[0], {DataType::kINT8}});
    if (format.blocks) ports.push_back({names[2], shapes[2], {DataType::kINT8}});
    ports.push_back({names[3], "E", {DataType::kFLOAT}});
    if (format.rounded_inputs) ports.push_back({names[4], "E", {DataType::kFLOAT}});
}

std::vector<Port> inputs(const Attributes& attributes) {
    const Format& format = format_of(attributes);
    std::vector<Port> ports = {
        {"x", "T I", {DataType::kBF16, DataType::kHALF, DataType::kFLOAT}},
        {"expert_ids", "T k", {DataType::kINT64}},
        {"expert_weights", "T k", {DataType::kFLOAT}},
    };
    projection(ports, format, {"up_weight", "up_codes", "up_block_scales", "up_global_scale", "up_input_scale"},
               {"E M I", "E M I/2", "E M I/16"});
    projection(ports, format, {"down_weight", "down_codes", "down_block_scales", "down_global_scale", "down_input_scale"},
               {"E I M", "E I M/2", "E I M/16"});
    return ports;
}

nemoquant_routed_experts_args arguments(const Call& call) {
    const Format& format = format_of(call.attributes);
    nemoquant_routed_experts_args args{};
    args.x = call.inputs[0];
    args.expert_ids = static_cast<const int64_t*>(call.inputs[1]);
    args.expert_weights = static_cast<const float*>(call.inputs[2]);
    size_t next = 3;
    const auto take = [&](const void*& codes, const void*& blocks, const float*& global, const float*& input) {
        codes = call.inputs[next++];
        if (format.blocks) blocks = call.inputs[next++];
        if (format.codes) global = static_cast<const float*>(call.inputs[next++]);
        if (format.rounded_inputs) input = static_cast<const float*>(call.inputs[next++]);
    };
    take(args.up, args.up_block_scales, args.up_global_scale, args.up_input_scale);
    take(args.down, args.down_block_scales, args.down_global_scale, args.down_input_scale);
    args.y = call.outputs[0];
    args.workspace = call.workspace;
    args.tokens = call.sizes['T'];
    args.top_k = call.sizes['k'];
    args.experts = call.sizes['E'];
    args.input = call.sizes['I'];
    args.width = call.sizes['M'];
    args.dtype = call.input_types[0];
    args.format = format.number;
    return args;
}

size_t workspace(const Call& call) {
    const auto args = arguments(call);
    return nemoquant_routed_experts_workspace(&args);
}

int launch(const Call& call) {
    const auto args = arguments(call);
    return nemoquant_routed_experts(&args, call.stream);
}

const Definition definition{
    "RoutedExperts", "1",
    {text("format", "bf16", {"bf16", "fp8", "w8a16", "nvfp4", "w4a16"}), text("activation", "relu2", {"relu2"})},
    inputs,
    {{"y", "T I", {}, "x"}},
    workspace, launch,
};
const Registration registration(definition);

}  // namespace
