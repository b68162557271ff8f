"""Operators alone as small graphs, and the trained demo model in each preset with its graphs, made once in a session."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from nemoquant.api import CalibrationOptions, export_onnx, quantize

DEMO = Path(__file__).resolve().parents[2] / "calib/demo_model"


@pytest.fixture(scope="session")
def single_op() -> Callable[..., Callable[[Mapping[str, Any]], list[Any]]]:
    """Wraps one function of the nemoquant domain in a graph that only calls it, checks that, and returns what runs it.

    ``example`` gives the inputs' dtypes and ranks; every axis is symbolic. ``stored`` are initializers by input. ``helpers`` are
    functions that it calls.
    """
    import onnx
    import onnx_ir as ir
    import onnxruntime

    def make(
        function: Any, example: Mapping[str, Any], stored: Mapping[str, Any] | None = None, helpers: Any = (), **attributes: Any
    ) -> Callable[[Mapping[str, Any]], list[Any]]:
        stored = stored or {}
        inputs = {
            name: ir.Value(
                name=name,
                type=ir.TensorType(ir.DataType.from_numpy(value.dtype)),
                shape=ir.Shape([f"{name}_{axis}" for axis in range(value.ndim)]),
            )
            for name, value in example.items()
        }
        kept = {name: ir.Value(name=name, const_value=ir.tensor(value, name=name)) for name, value in stored.items()}
        for value in kept.values():
            value.type, value.shape = ir.TensorType(value.const_value.dtype), value.const_value.shape
        known = inputs | kept
        results = [ir.Value(name=f"result_{i}") for i in range(len(function.outputs))]
        node = ir.Node(
            function.domain, function.name, [known[value.name] for value in function.inputs], outputs=results,
            attributes=[ir.convenience.convert_attribute(key, value) for key, value in attributes.items()],
        )  # fmt: skip
        imports = {"": 23, function.domain: 1}
        graph = ir.Graph(inputs.values(), results, nodes=[node], initializers=kept.values(), opset_imports=imports, name="one")
        proto = ir.to_proto(ir.Model(graph, ir_version=11, functions=[*helpers, function]))
        inferred = onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True)
        for result, found in zip(proto.graph.output, inferred.graph.output, strict=True):
            result.type.CopyFrom(found.type)
            if not result.type.tensor_type.HasField("shape"):  # what a Loop carries: as many axes as the first input
                for axis in range(next(iter(example.values())).ndim):
                    result.type.tensor_type.shape.dim.add().dim_param = f"{result.name}_{axis}"
        onnx.checker.check_model(proto, full_check=True)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(
            proto.SerializeToString(), options, providers=["CPUExecutionProvider"], disabled_optimizers=["ConstantFolding"]
        )
        return lambda feeds: session.run(None, dict(feeds))

    return make


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The demo model's folder in a preset (``bf16`` is a copy of the source), with model.onnx and mtp.onnx; calibrated once.

    What changes such a folder must copy it first.
    """
    base = tmp_path_factory.mktemp("demo")

    def make(preset: str) -> Path:
        out = base / preset
        if out.exists():
            return out
        if preset == "bf16":
            return export_onnx(DEMO, out, mtp=True).folder
        options = None
        if preset != "nvfp4-w4a16":
            scales = None if preset == "nvfp4" else make("nvfp4") / "nemoquant_scales.json"
            options = CalibrationOptions(rows=4, seq_len=128, dtype="float32", scales=scales)
        quantize(DEMO, out, preset, calibration=options, threads=1)
        return export_onnx(out, mtp=True).folder

    return make


@pytest.fixture
def copied(tmp_path: Path) -> Callable[..., Path]:
    """A folder of one's own with the same files; ``graphs`` False leaves these out (and out of no manifest)."""

    def make(folder: Path, name: str = "copy", graphs: bool = True) -> Path:
        ignored = shutil.ignore_patterns() if graphs else shutil.ignore_patterns("*.onnx")
        return Path(shutil.copytree(folder, tmp_path / name, ignore=ignored))

    return make
