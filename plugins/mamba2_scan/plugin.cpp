// Mamba2Scan's face: spec.yaml as tables, and the way from a call to the launcher.
#include "../common/plugin.hpp"
#include "abi.h"

namespace {

using namespace nq::trt;

constexpr const char* STOCHASTIC = "stochastic";

std::vector<Port> inputs(const Attributes& attributes) {
    const bool stochastic = attributes.text("rounding") == STOCHASTIC;
    const std::vector<DataType> any = {DataType::kBF16, DataType::kHALF, DataType::kFLOAT};
    const std::vector<DataType> state = stochastic ? std::vector{DataType::kHALF} : std::vector{DataType::kFLOAT, DataType::kHALF, DataType::kBF16};
    return {
        {"x", "B L H P", any},
        {"dt", "B L H", any},
        {"A", "H", {DataType::kFLOAT}},
        {"B", "B L G N", {}, "x"},
        {"C", "B L G N", {}, "x"},
        {"D", "H", {DataType::kFLOAT}},
        {"dt_bias", "H", {DataType::kFLOAT}},
        {"state_in", "B H P N", state},
        {"seed", "1", {DataType::kINT64}, nullptr, !stochastic},
    };
}

nemoquant_mamba2_scan_args arguments(const Call& call) {
    nemoquant_mamba2_scan_args args{};
    const Sizes& size = call.sizes;
    args.x = call.inputs[0];
    args.dt = call.inputs[1];
    args.a = static_cast<const float*>(call.inputs[2]);
    args.b = call.inputs[3];
    args.c = call.inputs[4];
    args.d = static_cast<const float*>(call.inputs[5]);
    args.dt_bias = static_cast<const float*>(call.inputs[6]);
    args.state_in = call.inputs[7];
    args.seed = static_cast<const int64_t*>(call.inputs[8]);
    args.y = call.outputs[0];
    args.state_out = call.outputs[1];
    args.workspace = call.workspace;
    args.batch = size['B'];
    args.length = size['L'];
    args.heads = size['H'];
    args.head_dim = size['P'];
    args.groups = size['G'];
    args.state = size['N'];
    args.x_position_stride = args.heads * args.head_dim;
    args.b_position_stride = args.c_position_stride = args.groups * args.state;
    args.dt_position_stride = args.heads;
    args.x_batch_stride = args.length * args.x_position_stride;
    args.b_batch_stride = args.c_batch_stride = args.length * args.b_position_stride;
    args.dt_batch_stride = args.length * args.dt_position_stride;
    args.dtype = call.input_types[0];
    args.dt_dtype = call.input_types[1];
    args.state_dtype = call.input_types[7];
    args.y_dtype = call.output_types[0];
    args.rounding = call.attributes.text("rounding") == STOCHASTIC ? NEMOQUANT_STOCHASTIC : NEMOQUANT_NEAREST;
    args.philox_rounds = call.attributes.integer("philox_rounds");
    args.dt_min = call.attributes.real("dt_min");
    args.dt_max = call.attributes.real("dt_max");
    return args;
}

size_t workspace(const Call& call) {
    const auto args = arguments(call);
    return nemoquant_mamba2_scan_workspace(&args);
}

int launch(const Call& call) {
    const auto args = arguments(call);
    return nemoquant_mamba2_scan(&args, call.stream);
}

const Definition definition{
    "Mamba2Scan", "1",
    {integer("chunk_size", 64, 1, 1024),  // of the ONNX function: the kernels have their own
     real("dt_min", 0.0, 0.0), real("dt_max", infinity, 0.0), text("rounding", "nearest", {"nearest", STOCHASTIC}),
     integer("philox_rounds", 5, 1, 32)},
    inputs,
    {{"y", "B L H P", {}, "x"}, {"state_out", "B H P N", {}, "state_in"}},
    workspace, launch,
};
const Registration registration(definition);

}  // namespace
