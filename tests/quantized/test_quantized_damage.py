"""A damaged checkpoint is never computed with: every verb that would, one kind of damage after another."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.commands import invoke, refusal
from support.files import edit_json, tree
from support.pack_oracle import read
from support.tampering import overwrite, sign

from nemoquant.api import diff, export_engine, export_onnx, verify
from nemoquant.checkpoint import intact, manifest
from nemoquant.checkpoint.manifest import FILE
from nemoquant.engine.build import BuiltEngine
from nemoquant.errors import CheckpointError
from nemoquant.evaluate import card
from nemoquant.quantized.checkpoint import PackedCheckpoint

SHARD = "model-00001-of-00001.safetensors"
WEIGHT = "backbone.layers.0.mixer.in_proj.weight"
VERBS = ["generate", "generate onnxruntime", "diff", "export onnx", "export onnx copy"]


def flipped(out: Path, name: str, at: int) -> None:
    raw = bytearray((out / name).read_bytes())
    raw[at] ^= 1
    (out / name).write_bytes(raw)


def dangling(path: Path) -> None:
    path.unlink()
    path.symlink_to("../../blobs/0123")


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "bits of a weight": lambda out: overwrite(out, WEIGHT, lambda data: bytes(b ^ 128 for b in data)),
    "one bit at the end": lambda out: flipped(out, SHARD, -1),
    "NaN": lambda out: overwrite(out, "backbone.norm_f.weight", lambda data: b"\xc0\x7f" * (len(data) // 2)),
    "norm_eps": lambda out: edit_json(out / "config.json", lambda data: data.update(layer_norm_epsilon=1e-3)),
    "hf_quant_config": lambda out: flipped(out, "hf_quant_config.json", 100),
    "the index": lambda out: flipped(out, "model.safetensors.index.json", -20),
    "scales": lambda out: flipped(out, "nemoquant_scales.json", -5),
    "the tokenizer": lambda out: flipped(out, "tokenizer.json", -100),
    "a shard that is cut": lambda out: (out / SHARD).write_bytes((out / SHARD).read_bytes()[:-1]),
    "no shard": lambda out: (out / SHARD).unlink(),
    "the manifest": lambda out: flipped(out, FILE, 100),
    "a manifest whose blob is missing": lambda out: dangling(out / FILE),
}


@pytest.fixture
def call(demo: Callable[[str], Path], tmp_path: Path) -> Callable[[str, Path], Any]:
    """Runs a verb on a folder; returns its exit code and standard error."""
    rows = tmp_path / "few.npy"
    np.save(rows, np.random.default_rng(0).integers(3, 90, (2, 8)))
    source = demo("bf16")

    def run(verb: str, out: Path) -> Any:
        return {
            "generate": lambda: invoke("generate", out, "--prompt", "The king", "--max-tokens", 2),
            "generate onnxruntime": lambda: invoke(
                "generate", out, "--prompt", "The king", "--max-tokens", 2, "--engine", "onnxruntime"
            ),
            "diff": lambda: invoke("diff", source, out, "--data", rows, "--json", tmp_path / "report.json"),
            "export onnx": lambda: invoke("export", "onnx", out),
            "export onnx copy": lambda: invoke("export", "onnx", out, tmp_path / "copied"),
        }[verb]()

    return run


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_refuses_every_damage(
    verb: str,
    call: Callable[..., Any],
    demo: Callable[[str], Path],
    copied: Callable[..., Path],
    tmp_path: Path,
) -> None:
    whole = demo("nvfp4")
    for what, damage in DAMAGE.items():
        out = copied(whole, what)
        damage(out)
        before = tree(tmp_path)
        result = call(verb, out)
        assert result.exit_code == 2, (what, result.output)
        assert isinstance(result.exception, SystemExit)
        (line,) = (line for line in result.stderr.splitlines() if line.startswith("error: "))
        assert str(out) in line or SHARD in line, (what, line)
        assert result.stdout == "", "nothing was computed"
        assert tree(tmp_path) == before, f"{what}: no report, no card, no graph, no folder"


SMALL = {
    "norm_eps": "config.json",
    "hf_quant_config": "hf_quant_config.json",
    "the index": "model.safetensors.index.json",
    "the tokenizer": "tokenizer.json",
    "scales": "nemoquant_scales.json",
}


@pytest.mark.parametrize("what", SMALL)
def test_damage_of_a_small_file_is_called_damage(
    what: str, demo: Callable[[str], Path], copied: Callable[..., Path]
) -> None:
    """Not by what it would lead to, such as a tokenizer that can't be read."""
    out = copied(demo("nvfp4"))
    DAMAGE[what](out)
    for verb in (("inspect", out), ("generate", out, "--prompt", "x")):
        refusal(
            *verb, parts=[f"{out} is damaged: {SMALL[what]} was changed: its sha256 is not the manifest's"]
        )


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_takes_what_is_whole(
    verb: str, call: Callable[..., Any], demo: Callable[[str], Path], copied: Callable[..., Path]
) -> None:
    out = copied(demo("nvfp4"))
    (out / "README.md").write_text("my own words")  # everybody edits the card
    result = call(verb, out)
    assert result.exit_code == 0, result.output
    report = verify(out)
    assert (report["ok"], report["edited"]) == (True, ["README.md"])


def test_diff_does_not_measure_damage_into_the_card(
    call: Callable[..., Any], demo: Callable[[str], Path], copied: Callable[..., Path]
) -> None:
    """Damage that computes: finite figures would come out."""
    out = copied(demo("nvfp4"))
    overwrite(out, WEIGHT, lambda data: bytes(b ^ 128 for b in data))
    result = call("diff", out)
    assert result.exit_code == 2
    assert f"{out} is damaged: {SHARD} was changed: its sha256 is not the manifest's" in result.stderr
    assert "not measured" in (out / "README.md").read_text()
    sign(out)
    assert call("diff", out).exit_code == 0, "it would compute"


def test_damage_that_computes_nan_is_called_damage(
    call: Callable[..., Any],
    demo: Callable[[str], Path],
    copied: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The shards are hashed to the end, if layers can't be computed before that."""
    out = copied(demo("nvfp4"))
    DAMAGE["NaN"](out)
    monkeypatch.setattr(intact.Reading, "check", lambda self: None)
    assert f"{out} is damaged: {SHARD} was changed" in call("diff", out).stderr


def test_a_foreign_checkpoint_is_opened_as_before(
    call: Callable[..., Any], demo: Callable[[str], Path], copied: Callable[..., Path]
) -> None:
    out = copied(demo("nvfp4"))
    (out / FILE).unlink()
    overwrite(out, WEIGHT, lambda data: data[:-1] + bytes([data[-1] ^ 1]))
    for verb in ("generate", "diff", "export onnx"):
        result = call(verb, out)
        assert (result.exit_code, "reading its shards" in result.stderr) == (0, False), result.output


def test_a_graph_that_was_changed(demo: Callable[[str], Path], copied: Callable[..., Path]) -> None:
    out = copied(demo("nvfp4"))
    flipped(out, "model.onnx", -10)
    refusal(
        *("generate", out, "--prompt", "x", "--engine", "onnxruntime"),
        parts=[f"{out}: model.onnx was changed: its sha256 is not the manifest's; export it again"],
    )
    export_onnx(out, mtp=True)
    assert verify(out)["ok"]


def test_export_reads_the_shards_once(
    call: Callable[..., Any],
    demo: Callable[[str], Path],
    copied: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(intact, "SETTLED", 0.0)
    out = copied(demo("nvfp4"))
    told = f"{out}: reading its shards, "
    first = call("export onnx", out)
    assert first.stderr.startswith(told) and "MB, to hold them against nemoquant.json\n" in first.stderr
    for verb in ("export onnx", "generate", "generate onnxruntime"):
        assert told not in call(verb, out).stderr, "although the export changed the manifest"
    hashed = []
    monkeypatch.setattr(
        intact,
        "file_sha256",
        lambda path, count: hashed.append(path.name) or manifest.file_sha256(path, count),
    )
    assert verify(out)["ok"] and SHARD in hashed, "verify always reads"


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The shards that are hashed, in their order."""
    paths: list[Path] = []
    whole = intact.file_sha256

    def noted(path: Path, count: Any) -> str:
        if path.name == SHARD:
            paths.append(path)
            time.sleep(0.1)  # long enough to be seen
        return whole(path, count)

    monkeypatch.setattr(intact, "file_sha256", noted)
    return paths


def test_a_copy_is_not_hashed_again(
    demo: Callable[[str], Path], copied: Callable[..., Path], tmp_path: Path, hashed: list[Path]
) -> None:
    out = copied(demo("nvfp4"))
    export_onnx(out, tmp_path / "made")
    assert hashed == [out / SHARD]
    assert verify(tmp_path / "made")["ok"]


def test_a_diff_with_an_engine_reads_the_shards_once(
    demo: Callable[[str], Path],
    copied: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    hashed: list[Path],
) -> None:
    """To load the engine, in sight, and not a second time in the background."""
    monkeypatch.setattr(intact, "SHOWN_EVERY", 0.001)
    source, out, rows, stages = demo("bf16"), copied(demo("nvfp4")), tmp_path / "few.npy", []
    np.save(rows, np.random.default_rng(0).integers(3, 90, (1, 8)))
    hashed.clear()
    diff(source, out, data=rows, engine="onnxruntime", progress=lambda *given: stages.append(given[0]))
    assert (hashed, stages[0]) == ([out / SHARD], "hash")


def test_the_export_of_an_engine_shows_that_it_hashes(
    demo: Callable[[str], Path],
    copied: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    hashed: list[Path],
) -> None:
    """Once for both of its parts."""
    monkeypatch.setattr(intact, "SHOWN_EVERY", 0.001)
    out, seen = copied(demo("nvfp4"), graphs=False), []

    def built(*given: Any, ready: Callable[[], None], mtp: bool = False) -> BuiltEngine:  # noqa: ARG001
        ready()
        return BuiltEngine(b"engine", {"part": "mtp" if mtp else "main"})

    monkeypatch.setattr("nemoquant.engine.export.build", built)
    export_engine(
        out,
        tmp_path / "e",
        target="rtx",
        sm=120,
        mtp=True,
        say=seen.append,
        progress=lambda *x: seen.append(x[0]),
    )
    assert hashed == [out / SHARD]
    assert seen[0].startswith(f"{out}: reading its shards, ") and set(seen[1:]) == {"hash"}


@pytest.mark.parametrize("name", [SHARD, "config.json", FILE])
def test_nothing_is_signed_into_a_folder_that_changed_meanwhile(
    name: str, demo: Callable[[str], Path], copied: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between hashing and writing."""
    out = copied(demo("nvfp4"), graphs=False)
    before: dict[str, Any] = {}
    once = intact.hash_once

    def then_changed(folder: Path, *given: Any) -> Any:
        found = once(folder, *given)
        flipped(folder, name, -3) if name != FILE else resigned(folder)
        before.update(tree(folder))
        return found

    def resigned(folder: Path) -> None:
        data = json.loads((folder / FILE).read_text())
        data["files"][SHARD] = "0" * 64
        manifest.write_manifest(folder, data)

    monkeypatch.setattr("nemoquant.graph.export.hash_once", then_changed)
    with pytest.raises(CheckpointError, match=rf"{name} (changed since the checkpoint was read|was changed)"):
        export_onnx(out)
    assert tree(out) == before


def test_a_card_is_not_written_into_a_folder_that_changed_meanwhile(
    demo: Callable[[str], Path],
    copied: Callable[..., Path],
    token_rows: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = copied(demo("nvfp4"))
    update = card.update_card

    def changed_before(*given: Any) -> Any:
        flipped(out, SHARD, -3)
        return update(*given)

    monkeypatch.setattr(card, "update_card", changed_before)
    (warning,) = diff(demo("bf16"), out, data=token_rows).warnings
    assert warning.startswith(f"{out}: {SHARD} changed since the checkpoint was read; nothing was written")
    assert "not measured" in (out / "README.md").read_text()


def test_shards_that_change_after_they_were_hashed(
    demo: Callable[[str], Path], copied: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a session reads them; and later, because it has them mapped."""
    from nemoquant.engine import onnxruntime

    out, tokens = copied(demo("nvfp4")), np.array([[5, 6]])
    engine = onnxruntime.OnnxRuntimeEngine(out, 1)
    step = engine.forward(tokens)
    flipped(out, SHARD, -3)
    changed = f"{SHARD} changed since the checkpoint was read"
    with pytest.raises(CheckpointError, match=changed):
        engine.forward(tokens)
    with pytest.raises(CheckpointError, match=changed):
        engine.draft(tokens, step.hidden)
    flipped(out, SHARD, -3)
    graph = onnxruntime.Graph

    def reads_another(path: Path, threads: int) -> Any:
        flipped(path.parent, SHARD, -3)
        return graph(path, threads)

    monkeypatch.setattr(onnxruntime, "Graph", reads_another)
    with pytest.raises(CheckpointError, match=changed):
        onnxruntime.OnnxRuntimeEngine(out, 1)


@pytest.mark.parametrize("engine", ["torch", "onnxruntime"])
@pytest.mark.parametrize("options", [(), ("--mtp", 1)], ids=["plain", "drafts"])
@pytest.mark.parametrize("value", [b"\xc0\x7f", b"\x80\x7f"], ids=["NaN", "Inf"])
def test_a_model_that_computes_nan_says_so(
    value: bytes,
    options: tuple[Any, ...],
    engine: str,
    demo: Callable[[str], Path],
    copied: Callable[..., Path],
) -> None:
    """A model that is as it was written, or another tool's: no manifest tells."""
    out = copied(demo("nvfp4"))
    (out / FILE).unlink()
    overwrite(out, "lm_head.weight", lambda data: data[:-2] + value)
    export_onnx(out, mtp=True)
    result = invoke("generate", out, "--prompt", "The king", "--engine", engine, *options)
    assert result.exit_code == 2
    assert result.stdout == "The king\n", "no token of it"
    assert (
        "error: the model computes NaN or Inf: 1 of the 2,048 logits of new token 1; expected "
        in result.stderr
    )


def test_nan_in_a_routers_bias(demo: Callable[[str], Path], copied: Callable[..., Path]) -> None:
    """Experts would be chosen by it, without a NaN in any output."""
    out = copied(demo("nvfp4"))
    name = next(name for name in read(out) if name.endswith("e_score_correction_bias"))
    overwrite(out, name, np.float32(np.nan).tobytes(), at=4)
    sign(out)
    with pytest.raises(CheckpointError, match=f"1 of 16 values of {name} are NaN or Inf"):
        PackedCheckpoint(out)


def test_a_shard_that_is_cut_while_tokens_are_made(
    demo: Callable[[str], Path], copied: Callable[..., Path]
) -> None:
    from nemoquant.engine.torch import TorchEngine

    out = copied(demo("nvfp4"))
    engine = TorchEngine(out)
    step = engine.forward(np.array([[5, 6]]))
    with (out / SHARD).open("r+b") as f:
        f.truncate(5_000_000)
    with pytest.raises(CheckpointError, match=SHARD):
        engine.forward(np.array([[7]]), step.state)
