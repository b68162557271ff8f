"""One operator's body in ONNX Runtime."""

from collections.abc import Callable, Mapping
from typing import Any


def single_op(
    function: Any,
    example: Mapping[str, Any],
    stored: Mapping[str, Any] | None = None,
    helpers: Any = (),
    **attributes: Any,
) -> Callable[[Mapping[str, Any]], list[Any]]:
    """A checked graph that only calls one function of the nemoquant domain; returns a function that runs it.

    ``example`` gives the inputs' dtypes and ranks; every axis is symbolic. ``stored`` are initializers by
    input. ``helpers`` are functions that the function calls.
    """
    import onnx
    import onnx_ir as ir
    import onnxruntime

    stored = stored or {}
    inputs = {
        name: ir.Value(
            name=name,
            type=ir.TensorType(ir.DataType.from_numpy(value.dtype)),
            shape=ir.Shape([f"{name}_{axis}" for axis in range(value.ndim)]),
        )
        for name, value in example.items()
    }
    kept = {
        name: ir.Value(name=name, const_value=ir.tensor(value, name=name)) for name, value in stored.items()
    }
    for value in kept.values():
        value.type, value.shape = ir.TensorType(value.const_value.dtype), value.const_value.shape
    known = inputs | kept
    results = [ir.Value(name=f"result_{i}") for i in range(len(function.outputs))]
    node = ir.Node(
        function.domain,
        function.name,
        [known[value.name] for value in function.inputs],
        outputs=results,
        attributes=[ir.convenience.convert_attribute(key, value) for key, value in attributes.items()],
    )
    imports = {"": 23, function.domain: 1}
    graph = ir.Graph(
        inputs.values(), results, nodes=[node], initializers=kept.values(), opset_imports=imports, name="one"
    )
    proto = ir.to_proto(ir.Model(graph, ir_version=11, functions=[*helpers, function]))
    inferred = onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True)
    for result, found in zip(proto.graph.output, inferred.graph.output, strict=True):
        result.type.CopyFrom(found.type)
        if not result.type.tensor_type.HasField("shape"):  # state of a Loop: as many axes as the first input
            for axis in range(next(iter(example.values())).ndim):
                result.type.tensor_type.shape.dim.add().dim_param = f"{result.name}_{axis}"
    onnx.checker.check_model(proto, full_check=True)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(),
        options,
        providers=["CPUExecutionProvider"],
        disabled_optimizers=["ConstantFolding"],
    )
    return lambda feeds: session.run(None, dict(feeds))
