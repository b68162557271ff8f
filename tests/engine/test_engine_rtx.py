"""TensorRT-RTX engines of the demo model, built without a GPU; refusals."""

import hashlib
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.commands import check_parts
from support.commands import nemoquant as command
from support.slow import mostly_slow

import nemoquant
from nemoquant.errors import EngineError

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed (extra: rtx)"
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "sm", "compute"),
    mostly_slow(
        [
            ("fp8", 89, "float16"),
            ("fp8", 120, "bfloat16"),
            ("mxfp8", 89, "float16"),
            ("mxfp8", 120, "bfloat16"),
            ("nvfp4", 120, "bfloat16"),
            ("nvfp4-full", 120, "float16"),
            ("nvfp4-w4a16", 120, "bfloat16"),
            ("bf16", 89, "bfloat16"),
        ],
        ("nvfp4", 120, "bfloat16"),
    ),
)
def test_engines_are_built(
    preset: str, sm: int, compute: str, demo: Callable[[str], Path], tmp_path: Path
) -> None:
    """One engine for prompts and single tokens; formats are kept; the facts next to the file describe it."""
    folder, out = demo(preset), tmp_path / "model.engine"
    facts = nemoquant.export_engine(folder, out, target="rtx", sm=sm, compute=compute, max_seq_len=1024)
    assert json.loads((tmp_path / "model.engine.json").read_text()) == json.loads(json.dumps(facts))
    assert facts["sha256"] == hashlib.sha256(out.read_bytes()).hexdigest()
    assert facts["bytes"] == out.stat().st_size
    types = facts["layers_by_output_type"]
    assert ("FP4" in types) == preset.startswith("nvfp4")
    assert ("E8M0" in types) == (preset == "mxfp8")
    assert ("FP8" in types) == (preset != "bf16")
    manifest = folder / "nemoquant.json"
    assert facts["plan"] == (
        json.loads(manifest.read_text())["plan"]["sha256"] if manifest.exists() else None
    )
    assert facts["inputs"]["input_ids"] == ["batch", "length"]
    assert facts["outputs"][0] == "logits"
    assert [w for w in facts["warnings"] if "Int64 binding" not in w] == [], (
        "the one left says that token ids are int64"
    )


def test_weights_stand_in_an_engine_once_and_packed(
    tmp_path: Path, make_checkpoint: Callable[..., Path]
) -> None:
    """One copy of the experts, packed.

    With a branch for few tokens and one for many, the engine held all experts twice. Unpacked they would be
    four times as large.
    """
    source = make_checkpoint(
        hybrid_override_pattern="E",
        n_routed_experts=64,
        num_experts_per_tok=4,
        moe_latent_size=256,
        moe_intermediate_size=1024,
        num_nextn_predict_layers=0,
        mtp_hybrid_override_pattern=None,
    )
    out = nemoquant.quantize(
        source, tmp_path / "out", "nvfp4-w4a16", nemoquant.RunOptions(method="max", threads=1)
    ).out
    packed = nemoquant.inspect(out)["bytes"]
    assert packed > 18e6
    facts = nemoquant.export_engine(out, tmp_path / "model.engine", target="rtx", sm=120)
    assert packed < facts["bytes"] < 1.15 * packed + 2e6, (
        facts["bytes"] / packed
    )  # measured: 1.02 times, plus kernels


def refused(*arguments: object, parts: list[str], code: int = 2) -> None:
    check_parts(parts, command("export", "trt", "--target", "rtx", *arguments, code=code).stderr)


def test_refusals(
    demo: Callable[[str], Path],
    copied: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    unread: Callable[[], None],
) -> None:
    """All of them before a shard is read."""
    monkeypatch.setattr("nemoquant.engine.targets.find_gpu", lambda: None)
    fp8, nvfp4, out, mxfp8 = demo("fp8"), demo("nvfp4"), tmp_path / "e", demo("mxfp8")
    unread()
    refused(fp8, out, parts=["--sm is needed where no GPU is found"])
    for sm in (90, 100, 103):
        refused(fp8, out, "--sm", sm, parts=[f"--sm {sm}", "data-centre", "--target trt"])
    refused(fp8, out, "--sm", 70, parts=["--sm 70", "75, 80, 86, 89, 120, 121"])
    refused(mxfp8, out, "--sm", 80, parts=["holds MXFP8", "from SM 89 on"])
    refused(nvfp4, out, "--sm", 89, parts=["holds NVFP4", "from SM 100 on"])
    refused(fp8, out, "--sm", 86, parts=["holds FP8", "from SM 89 on"])
    refused(fp8, tmp_path / "no/e", "--sm", 89, parts=["is not a folder"])
    refused(tmp_path, out, "--sm", 89, parts=["config.json does not exist"])
    for name in ("e", "e.json"):
        (tmp_path / name).write_text("mine")
        refused(fp8, out, "--sm", 89, parts=[f"{name} exists; expected a new file"])
        assert (tmp_path / name).read_text() == "mine"
        (tmp_path / name).unlink()
    lacking = copied(fp8)
    next(lacking.glob("*.safetensors")).unlink()
    refused(lacking, out, "--sm", 89, parts=["does not exist, but model.safetensors.index.json names it"])
    assert not list(tmp_path.glob("e*"))


def test_without_the_extra(
    demo: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    unread: Callable[[], None],
) -> None:
    folder = demo("fp8")
    unread()
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    refused(folder, tmp_path / "e", "--sm", 89, parts=["pip install 'nemoquant[rtx]'"], code=3)
    assert not list(tmp_path.iterdir())


def test_the_builders_own_words(demo: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph that its parser refuses: NonZero is one of the operators that it lacks."""
    from nemoquant.engine.build import EngineOptions, build
    from nemoquant.graph.dialects import DIALECTS

    monkeypatch.setitem(DIALECTS, "tensorrt_rtx", DIALECTS["onnxruntime"])
    options = EngineOptions("rtx", sm=120, compute="float32")
    with pytest.raises(EngineError, match="TensorRT-RTX can't read the graph"):
        build(demo("nvfp4-w4a16"), options, None)
