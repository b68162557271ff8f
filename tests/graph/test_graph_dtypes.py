"""Graphs of sources in float16, float32 and several dtypes at once: ONNX Runtime loads and runs them.

A graph is loaded before it is written: where it would not load nothing is left, and where nothing can load it
the result says so.
"""

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from support.commands import error_line, nemoquant
from support.files import tree
from support.measured import child, needs_proc
from support.oracle_tensors import read
from support.synthetic import Tensors, random_rows

from nemoquant.api import export_onnx
from nemoquant.engine import onnxruntime as engine
from nemoquant.engine.torch import TorchEngine
from nemoquant.errors import EngineError

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("onnxruntime") is None, reason="onnxruntime is not installed (extra: ort)"
)

ROUNDING = 1e-5  # of the largest logit: float32 sums of up to 96 terms in another order, over six layers


def in_dtype(dtype: torch.dtype) -> Callable[[Tensors], None]:
    """Casts all tensors but the router's bias, as ``save_pretrained`` of a model in that dtype does."""

    def edit(tensors: Tensors) -> None:
        kept = [name for name in tensors if name.endswith("e_score_correction_bias")]
        tensors |= {name: t.to(dtype) for name, t in tensors.items() if name not in kept}

    return edit


def mixed(tensors: Tensors) -> None:
    """Each dtype where another expert, or another projection, has another one."""
    for name, tensor in tensors.items():
        if name.endswith(("A_log", ".D", "dt_bias", "norm.weight", "gate.weight")) or ".experts.3." in name:
            tensors[name] = tensor.float()
        elif ".k_proj." in name or ".experts.5." in name:
            tensors[name] = tensor.half()


EDITS = {"fp16": in_dtype(torch.float16), "fp32": in_dtype(torch.float32), "mixed": mixed}


def agrees(folder: Path) -> None:
    """The graphs give what torch gives for the same folder; MTP too."""
    rows = random_rows((2, 24))
    ort, reference = engine.OnnxRuntimeEngine(folder, threads=1), TorchEngine(folder, threads=1)
    expected, found = reference.forward(rows), ort.forward(rows)
    assert np.abs(found.logits - expected.logits).max() < ROUNDING * np.abs(expected.logits).max()
    assert ort.has_mtp
    draft = reference.draft(rows, expected.hidden).logits
    assert np.abs(ort.draft(rows, expected.hidden).logits - draft).max() < ROUNDING * np.abs(draft).max()


@pytest.mark.parametrize("dtype", EDITS)
def test_a_source_of_that_dtype_runs(
    dtype: str, make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    source = make_checkpoint(edit=EDITS[dtype])
    made = export_onnx(source, tmp_path / "out", mtp=True)
    assert made.loaded_by is not None and made.loaded_by.startswith("ONNX Runtime ")
    agrees(made.folder)
    half = export_onnx(made.folder, mtp=True, compute="float16")
    assert half.loaded_by == made.loaded_by and half.warnings == ()


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_a_quantized_one_runs(
    dtype: str, make_checkpoint: Callable[..., Path], quantized: Callable[..., Path]
) -> None:
    out = quantized("nvfp4-w4a16", of=make_checkpoint(edit=EDITS[dtype]))
    assert export_onnx(out, mtp=True).copied_bytes == 0
    agrees(out)


def test_default_sessions_load_them(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """What somebody else's program does, all optimizers on."""
    import onnxruntime

    made = export_onnx(make_checkpoint(edit=EDITS["fp16"]), tmp_path / "out", mtp=True)
    for graph in made.graphs:
        session = onnxruntime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
        assert session.get_outputs()[0].name == "logits"


def test_experts_of_several_dtypes_are_widened_in_a_copy(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Experts 3 and 5 differ from the others: a stack of them is float32, with exactly their values."""
    source = make_checkpoint(edit=mixed)
    made = export_onnx(source, tmp_path / "out", mtp=True)
    old, new = read(source), read(made.folder)
    assert sorted(new) == sorted(old)
    for name, tensor in old.items():
        assert torch.equal(new[name].double(), tensor.double())
        assert new[name].dtype == (torch.float32 if ".experts." in name else tensor.dtype)
    assert made.copied_bytes == sum(tensor.nbytes for tensor in new.values())
    count = sum(".experts." in name and t.dtype != torch.float32 for name, t in old.items())
    assert len(made.warnings) == 1
    assert made.warnings[0].startswith(f"{count} tensors are F32 in the copy, exactly their values")
    result = nemoquant("export", "onnx", source, tmp_path / "again")
    assert f"warning: {made.warnings[0]}" in " ".join(result.stderr.split())


def test_in_place_only_what_the_graph_reads_counts(
    make_checkpoint: Callable[..., Path], quantized: Callable[..., Path]
) -> None:
    """MTP's experts are of several dtypes, and the main graph does not read them."""
    out = quantized("nvfp4-w4a16", of=make_checkpoint(edit=mixed))
    assert export_onnx(out).copied_bytes == 0
    before = tree(out)
    line = error_line(nemoquant("export", "onnx", out, "--mtp", code=2).stderr, [str(out)])
    assert "its experts have several dtypes" in line and "give an OUT folder" in line
    assert tree(out) == before


def test_a_graph_that_does_not_load_is_not_written(
    make_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime

    source = make_checkpoint(edit=EDITS["fp16"])
    before = tree(tmp_path)

    def session(*_: object, **__: object) -> None:
        raise RuntimeError("no kernel")

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    with pytest.raises(EngineError, match=r"not written, because it would not load: .*can't load it"):
        export_onnx(source, tmp_path / "out")
    assert tree(tmp_path) == before


def test_without_onnxruntime_it_is_written_and_said(
    make_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    made = export_onnx(make_checkpoint(), tmp_path / "out")
    assert made.loaded_by is None
    assert len(made.warnings) == 1 and "not loaded to try it: " in made.warnings[0]
    assert "extra `ort`" in made.warnings[0]


@pytest.mark.parametrize("dialect", ["tensorrt_rtx", "tensorrt"])
def test_a_dialect_that_it_does_not_run(
    dialect: str, make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    result = nemoquant("export", "onnx", make_checkpoint(), tmp_path / "out", "--dialect", dialect, "--json")
    found = json.loads(result.stdout)
    assert found["loaded_by"] is None
    assert found["warnings"] == [
        f"the graph was not loaded to try it: ONNX Runtime runs no graph of the {dialect} dialect"
    ]


TRY = """
import onnxruntime, nemoquant.graph.dialects
from nemoquant.engine.onnxruntime import trial

path = Path(sys.argv[1])
content, before = path.read_bytes(), memory()
trial("onnxruntime").load(content, path)
print(memory() - before)
"""


@needs_proc
@pytest.mark.slow
def test_the_trial_maps_weights(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """33.5 million float32 weights, 134 MB, of which products would get copies in another layout."""
    source = make_checkpoint(
        edit=EDITS["fp32"],
        hybrid_override_pattern="--",
        hidden_size=512,
        intermediate_size=16384,
        num_nextn_predict_layers=0,
        mtp_hybrid_override_pattern=None,
    )
    made = export_onnx(source, tmp_path / "out")
    used = child(TRY, made.folder / "model.onnx")
    print(f"{used / 1e6:.0f} MB")
    assert used < 40e6
