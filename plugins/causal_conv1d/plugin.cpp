// CausalConv1d's face: spec.yaml as tables, and the way from a call to the launcher.
#include "../common/plugin.hpp"
#include "abi.h"

namespace {

using namespace nq::trt;

std::vector<Port> inputs(const Attributes&) {
    return {
        {"x", "B L C", {DataType::kBF16, DataType::kHALF, DataType::kFLOAT}},
        {"weight", "C K", {DataType::kFLOAT}},
        {"bias", "C", {DataType::kFLOAT}},
        {"state_in", "B C K-1", {}, "x"},
    };
}

nemoquant_causal_conv1d_args arguments(const Call& call) {
    nemoquant_causal_conv1d_args args{};
    args.x = call.inputs[0];
    args.weight = static_cast<const float*>(call.inputs[1]);
    args.bias = static_cast<const float*>(call.inputs[2]);
    args.state_in = call.inputs[3];
    args.y = call.outputs[0];
    args.state_out = call.outputs[1];
    args.batch = call.sizes['B'];
    args.length = call.sizes['L'];
    args.channels = call.sizes['C'];
    args.kernel = call.sizes['K'];
    args.dtype = call.input_types[0];
    args.y_dtype = call.output_types[0];
    return args;
}

size_t workspace(const Call& call) {
    const auto args = arguments(call);
    return nemoquant_causal_conv1d_workspace(&args);
}

int launch(const Call& call) {
    const auto args = arguments(call);
    return nemoquant_causal_conv1d(&args, call.stream);
}

const Definition definition{
    "CausalConv1d", "1",
    {text("activation", "silu", {"silu"})},
    inputs,
    {{"y", "B L C", {}, "x"}, {"state_out", "B C K-1", {}, "x"}},
    workspace, launch,
};
const Registration registration(definition);

}  // namespace
