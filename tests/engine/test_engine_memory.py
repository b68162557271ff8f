"""Sessions keep weights packed: memory of the process follows the file's size, not the unpacked size."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
from support.measured import child, needs_proc

import nemoquant

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("onnxruntime") is None, reason="onnxruntime is not installed (extra: ort)"
    ),
    needs_proc,
]

CHILD = """
import numpy as np
from nemoquant.engine.onnxruntime import OnnxRuntimeEngine
import onnx, onnxruntime, onnx_ir

before = memory()
engine = OnnxRuntimeEngine(Path(sys.argv[1]), threads=1)
loaded = memory()
engine.forward(np.arange(3, 35)[None])
print([before, loaded, memory()])
"""


RECIPE = """
name: weights-only
summary: All experts and dense MLPs NVFP4, weights only.
rules:
- {roles: [experts.*, mlp.*], format: nvfp4, activations: none}
- {roles: ["*"], format: source}
"""


def test_weights_stay_packed(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """A dense MLP and 64 experts, 100 million weights in NVFP4: 57 MB packed, 403 MB in float32.

    Measured above the idle process: 11 MB with the session (the rest is mapped), and 640 MB at the peak of a
    prompt. At that peak one matrix of the MLP at a time (134 MB in float32) is unpacked in a few steps. With
    constant folding the session alone takes 1,523 MB.
    """
    source = make_checkpoint(
        hybrid_override_pattern="-E",
        hidden_size=512,
        intermediate_size=65536,
        n_routed_experts=64,
        num_experts_per_tok=4,
        moe_latent_size=512,
        moe_intermediate_size=512,
        num_nextn_predict_layers=0,
        mtp_hybrid_override_pattern=None,
    )
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    out = nemoquant.quantize(
        source, tmp_path / "out", str(tmp_path / "recipe.yaml"), nemoquant.RunOptions(threads=2)
    ).out
    nemoquant.export_onnx(out)
    packed = nemoquant.inspect(out)["bytes"]
    before, loaded, ran = child(CHILD, out)
    print(
        f"packed {packed / 1e6:.0f} MB; above idle {(loaded - before) / 1e6:.0f}, "
        f"{(ran - before) / 1e6:.0f} MB"
    )
    assert packed < 60e6
    assert loaded - before < 1.5 * packed
