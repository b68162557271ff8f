"""The tensorrt_rtx dialect computes what it should: each kind of layer in each format through onnx's reference evaluator, against torch.

TensorRT's own operator for inputs in NVFP4 is a small custom operator here, written in numpy from its definition.
"""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from onnx_ir.passes.common import InlinePass

import nemoquant
from nemoquant.model.reference import layer_forward
from nemoquant.model.taps import prefixed
from nemoquant.quantized.checkpoint import PackedCheckpoint

pytestmark = pytest.mark.skipif(importlib.util.find_spec("onnx_ir") is None, reason="onnx_ir is not installed (extra: onnx)")

PATTERN = "M*E-ME"  # of the synthetic checkpoint
KINDS = {"mamba": 0, "attention": 1, "moe": 2, "mlp": 3}
ROWS, LENGTH = 2, 7


class TRT_FP4DynamicQuantize(OpRun):
    """codes = e2m1(x / (block scale * scale)), block scale = e4m3(amax of 16 / (6 * scale)): a zero scale makes its block zero."""

    op_domain = "trt"

    def _run(self, x: Any, scale: Any, axis: int = -1, block_size: int = 16, scale_type: int = 17) -> Any:
        assert (axis, block_size, scale_type) == (-1, 16, 17)
        blocks = x.astype(np.float32).reshape(*x.shape[:-1], -1, 16)
        block_scale = (np.abs(blocks).max(-1) / (np.float32(6) * scale)).clip(max=448).astype(ml_dtypes.float8_e4m3fn)
        d = (block_scale.astype(np.float32) * scale)[..., None]
        ratio = np.where(d > 0, blocks / np.where(d > 0, d, 1), 0).clip(-6, 6)
        return ratio.astype(ml_dtypes.float4_e2m1fn).reshape(x.shape), block_scale


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The synthetic checkpoint in a preset, made once."""
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location("synthetic_checkpoint", Path(__file__).parents[1] / "conftest.py")
    assert spec is not None
    assert spec.loader is not None
    synthetic = module_from_spec(spec)
    spec.loader.exec_module(synthetic)
    base = tmp_path_factory.mktemp("rtx")
    source = synthetic.write_checkpoint(base / "source", synthetic.CONFIG, synthetic.random_tensors(synthetic.CONFIG))
    np.save(base / "rows.npy", np.random.default_rng(0).integers(3, 96, (8, 32)))

    def make(preset: str) -> Path:
        out = base / preset
        if out.exists():
            return out
        if preset == "bf16":
            return nemoquant.export_onnx(source, out).folder
        calibration = nemoquant.CalibrationOptions(data=base / "rows.npy", dtype="float32")
        return nemoquant.quantize(source, out, preset, calibration=calibration, threads=1).out

    return make


def evaluate(folder: Path, layer: int, feeds: dict[str, Any]) -> dict[str, Any]:
    """One layer's graph, exported beside the shards and run with its weights loaded; functions inlined, as for the parser, because
    the evaluator knows no custom operators inside them."""
    path = nemoquant.export_onnx(folder, dialect="tensorrt_rtx", compute="float32", layers=(layer, layer + 1)).graphs[0]
    onnx.checker.check_model(str(path))
    inlined = ir.from_proto(onnx.load(str(path)))
    InlinePass()(inlined)
    model = ir.to_proto(inlined)
    session = ReferenceEvaluator(model, new_ops=[TRT_FP4DynamicQuantize])
    return dict(zip([out.name for out in model.graph.output], session.run(None, feeds), strict=True))


def inputs(opened: PackedCheckpoint, kind: str, layer: int) -> tuple[dict[str, Any], Any]:
    """Hidden states (token ids for the first layer) and an empty state, for the graph; and for torch."""
    c, g = opened.config, np.random.default_rng(layer)
    hidden = g.standard_normal((ROWS, LENGTH, c.hidden_size)).astype(np.float32)
    feeds: dict[str, Any] = {"hidden": hidden}
    if layer == 0:
        ids = g.integers(3, c.vocab_size, (ROWS, LENGTH))
        feeds = {"input_ids": ids}
        hidden = opened.weights("backbone.embeddings.")["weight"][torch.from_numpy(ids)].float().numpy()
    if kind == "mamba":
        feeds[f"conv_state.{layer}"] = np.zeros((ROWS, c.conv_channels, c.conv_kernel - 1), np.float32)
        feeds[f"ssm_state.{layer}"] = np.zeros((ROWS, c.mamba_num_heads, c.mamba_head_dim, c.ssm_state_size), np.float32)
    if kind == "attention":
        cached = ml_dtypes.float8_e4m3fn if opened.fp8_cache else np.float32
        empty = np.zeros((ROWS, c.num_key_value_heads, 0, c.head_dim), cached)
        feeds |= {f"past_key.{layer}": empty, f"past_value.{layer}": empty}
    return feeds, torch.from_numpy(hidden)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("preset", ["bf16", "fp8", "nvfp4", "nvfp4-full", "nvfp4-w4a16"])
def test_a_layer_computes_what_torch_computes(preset: str, kind: str, checkpoints: Callable[[str], Path]) -> None:
    """Within 1e-5 where no input is rounded (measured 3e-7); elsewhere each token does, but for those in which a code flipped.

    A flip moves its token by a code's share of the output, well over 1e-4; at most one token in seven may have one (measured: none
    or one of 14).
    """
    opened = PackedCheckpoint(checkpoints(preset))
    layer = KINDS[kind]
    feeds, hidden = inputs(opened, kind, layer)
    prefix = f"backbone.layers.{layer}."
    expected, state = layer_forward(opened.config, kind, opened.weights(prefix), hidden, None, prefixed(opened.tap(), prefix))  # type: ignore[arg-type]
    found = evaluate(opened.path, layer, feeds)
    got = torch.from_numpy(found["hidden_out"])
    added, reference = got - hidden, expected - hidden
    off = (added - reference).norm(dim=-1) / reference.norm(dim=-1)
    if not any(module.startswith(prefix) for module in opened.inputs):
        assert float(off.max()) < 1e-5
    else:
        assert float(off.median()) < 1e-5
        assert int((off > 1e-4).sum()) <= ROWS * LENGTH // 7, off
    if kind == "mamba":
        assert state is not None
        ssm = torch.from_numpy(found[f"present_ssm_state.{layer}"])
        assert float((ssm - state.ssm).norm() / state.ssm.norm()) < (1e-5 if preset in ("bf16", "nvfp4-w4a16") else 0.05)
    if kind == "attention":
        key = found[f"present_key.{layer}"]
        assert key.shape == (ROWS, opened.config.num_key_value_heads, LENGTH, opened.config.head_dim)
        assert (key.dtype == ml_dtypes.float8_e4m3fn) == opened.fp8_cache


def test_weights_are_the_files_bytes(checkpoints: Callable[[str], Path]) -> None:
    """FP4 tensors have the packed bytes of the file, the even column in the low nibble."""
    folder = checkpoints("nvfp4-full")
    path = nemoquant.export_onnx(folder, dialect="tensorrt_rtx", layers=(0, 1)).graphs[0]
    model = onnx.load(str(path), load_external_data=False)
    codes = next(t for t in model.graph.initializer if t.name == "backbone.layers.0.mixer.in_proj.weight")
    place = {e.key: e.value for e in codes.external_data}
    raw = (folder / place["location"]).read_bytes()[int(place["offset"]) :][: int(place["length"])]
    with PackedCheckpoint(folder).checkpoint as checkpoint:
        stored = checkpoint.array("backbone.layers.0.mixer.in_proj.weight")
        assert raw == stored.tobytes()
        assert list(codes.dims) == [stored.shape[0], 2 * stored.shape[1]]
    assert codes.data_type == onnx.TensorProto.FLOAT4E2M1
