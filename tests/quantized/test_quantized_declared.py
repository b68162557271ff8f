"""Two config files declare how a checkpoint is quantized, and engines read one of them: they must agree."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.commands import refusal
from support.files import edit_json
from support.tampering import changed_copy

from nemoquant.checkpoint.manifest import FILE
from nemoquant.errors import CheckpointError
from nemoquant.quantized.checkpoint import PackedCheckpoint

NEW, OLD = "config.json", "hf_quant_config.json"
IN_PROJ, EXPERT = "backbone.layers.0.mixer.in_proj", "backbone.layers.2.mixer.experts.3.up_proj"

Change = Callable[[dict[str, Any]], object]


def declare(out: Path, file: str, change: Change) -> None:
    """Changes what a file declares; without a manifest, as another tool would have written it."""
    (out / FILE).unlink(missing_ok=True)
    edit_json(out / file, lambda data: change(data["quantization_config" if file == NEW else "quantization"]))


def algorithm(name: str | None) -> Change:
    return lambda d: d.update(quant_algo=name)


CONTRADICTIONS: dict[str, tuple[str, str, Change, str]] = {
    "algorithm": (
        "fp8",
        OLD,
        algorithm("NVFP4"),
        f"config.json declares the algorithm FP8, {OLD} NVFP4",
    ),
    "no algorithm": (
        "fp8",
        OLD,
        algorithm(None),
        f"config.json declares the algorithm FP8, {OLD} None",
    ),
    "algorithm of a layer": (
        "nvfp4",
        OLD,
        lambda d: d["quantized_layers"][IN_PROJ].update(quant_algo="NVFP4"),
        f"config.json and {OLD} list other algorithms for {IN_PROJ}",
    ),
    "a layer less": (
        "nvfp4",
        OLD,
        lambda d: d["quantized_layers"].pop(IN_PROJ),
        f"config.json and {OLD} list other algorithms for {IN_PROJ}",
    ),
    "an exclusion less": (
        "fp8",
        OLD,
        lambda d: d["exclude_modules"].remove("lm_head"),
        f"only one of config.json and {OLD} excludes lm_head",
    ),
    "a quantized module excluded": (
        "fp8",
        NEW,
        lambda d: d["ignore"].append(IN_PROJ),
        f"config.json excludes in `ignore` modules that are quantized: {IN_PROJ}",
    ),
    "quantized experts excluded": (
        "nvfp4",
        OLD,
        lambda d: d["exclude_modules"].append("backbone.layers.2.mixer.experts"),
        f"{OLD} excludes in `exclude_modules` modules that are quantized: backbone.layers.2.mixer.experts.0.",
    ),
    "a pattern over quantized modules": (
        "fp8",
        OLD,
        lambda d: d["exclude_modules"].append("*.in_proj"),
        f"{OLD} excludes in `exclude_modules` modules that are quantized: {IN_PROJ}",
    ),
    "the size of blocks": (
        "nvfp4-full",
        OLD,
        lambda d: d.update(group_size=32),
        f"{OLD} has the group_size 32, its tensors have blocks of 16",
    ),
    "MXFP8's blocks": (
        "mxfp8",
        OLD,
        lambda d: d.update(group_size=16),
        f"{OLD} has the group_size 16, its tensors have blocks of 32",
    ),
    "the size of a group's blocks": (
        "nvfp4-full",
        NEW,
        lambda d: d["config_groups"]["group_0"]["weights"].update(group_size=128),
        "config.json, group_0.weights has the group_size 128, its tensors have blocks of 16",
    ),
    "the size of blocks in a layer": (
        "nvfp4",
        NEW,
        lambda d: d["quantized_layers"][EXPERT].update(group_size=32),
        "config.json, `quantized_layers` of NVFP4 has the group_size 32, its tensors have blocks of 16",
    ),
    "no cache": (
        "fp8",
        OLD,
        lambda d: d.update(kv_cache_quant_algo=None),
        f"config.json declares a KV cache of FP8, {OLD} None",
    ),
}


@pytest.mark.parametrize("what", CONTRADICTIONS)
def test_a_contradiction_is_refused(what: str, quantized: Callable[..., Path], fitting: Any) -> None:
    preset, file, change, message = CONTRADICTIONS[what]
    out = quantized(preset)
    declare(out, file, change)
    line = refusal("export", "onnx", out)
    assert line.startswith(f"error: {out}: its config files contradict each other, or its tensors: ")
    assert message in line
    assert line.endswith("; engines would read them in different ways, quantize again")
    refusal("diff", fitting(preset), out, "--data", out.parent / "rows.npy", parts=[message])


SILENCES: dict[str, tuple[str, str, Change]] = {
    "no group size": ("nvfp4-full", OLD, lambda d: d.pop("group_size")),
    "a group size of null": ("nvfp4-full", OLD, lambda d: d.update(group_size=None)),
    "a group size where there are no blocks": ("fp8", OLD, lambda d: d.update(group_size=128)),
    "no groups": ("nvfp4", NEW, lambda d: d.pop("config_groups")),
    "no exclusions in one": ("fp8", OLD, lambda d: d.pop("exclude_modules")),
    "no exclusions in the other": ("fp8", NEW, lambda d: d.pop("ignore")),
    "exclusions in other words": (
        "fp8",
        OLD,
        lambda d: d.update(exclude_modules=[*(f"*{name}" for name in d["exclude_modules"]), "nothing*"]),
    ),
    "no list of layers": ("nvfp4", OLD, lambda d: d.pop("quantized_layers")),
    "no cache in the newer file": ("fp8", NEW, lambda d: d.pop("kv_cache_scheme")),
    "keys of another tool": ("fp8", NEW, lambda d: d.update(observer="minmax", producer=None)),
}


@pytest.mark.parametrize("what", SILENCES)
def test_what_is_left_out_or_said_otherwise_is_no_contradiction(
    what: str, quantized: Callable[..., Path]
) -> None:
    preset, file, change = SILENCES[what]
    out = quantized(preset)
    declare(out, file, change)
    with PackedCheckpoint(out).checkpoint:
        pass


@pytest.mark.parametrize("preset", ["fp8", "mxfp8", "nvfp4", "nvfp4-full", "nvfp4-w4a16", "fp8-published"])
@pytest.mark.parametrize("absent", [None, NEW, OLD])
def test_either_file_alone_is_enough(absent: str | None, preset: str, quantized: Callable[..., Path]) -> None:
    out = quantized(preset)
    (out / FILE).unlink()
    if absent == OLD:
        (out / OLD).unlink()
    elif absent == NEW:
        edit_json(out / NEW, lambda data: data.pop("quantization_config"))
    with PackedCheckpoint(out).checkpoint:
        pass


def test_a_source_and_a_file_that_declares_nothing(source: Path, tmp_path: Path) -> None:
    """The files of a model that is not quantized: exclusions alone say nothing."""
    out = changed_copy(source, tmp_path / "out", lambda tensors: None)
    (out / OLD).write_text(json.dumps({"quantization": {"quant_algo": None, "exclude_modules": ["lm_head"]}}))
    with PackedCheckpoint(out).checkpoint:
        pass
    edit_json(out / NEW, lambda data: data.update(quantization_config={"quant_algo": "FP8"}))
    with pytest.raises(CheckpointError, match=r"declares the algorithm FP8, hf_quant_config.json None"):
        PackedCheckpoint(out)
