"""``quantization_config`` and ``hf_quant_config.json`` against Model Optimizer's files.

The mark that Model Optimizer leaves on names is removed first. Equal are: algorithm, KV cache scheme, groups
with their numbers and targets, group size, producer. These differ, on purpose:

- Exclusions. Theirs are prefixes with a star where a whole branch stays (``backbone.layers.1*``; vLLM matches
  by fnmatch, so this also matches layers 10 to 19); ours are whole module names. Ours add ``mtp*``, since we
  keep MTP and they drop it. With MXFP8 also ``mtp``: SGLang takes no wildcard there.
- The group of ``mxfp8``. Their config.json has none if it is the only algorithm, ours has the one that they
  write for it in a mixed map. The code of vLLM, SGLang and TensorRT-LLM that parses MXFP8 reads no groups.
- Mixed maps. They write no ``ignore``; vLLM takes any entry of the same mixer for an expert, so ours lists
  the modules that stay.
- Mixed maps, again: they name a layer's experts by one key, we name each expert's projections: TensorRT-LLM
  reads the first of them, vLLM any.
- Keys of the model. They write transformers' spelling, without the schedule string; we keep the source's keys
  unchanged.
"""

import json
import re
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
from support import modelopt_run
from support.oracle_tensors import is_scale, read

pytestmark = modelopt_run.MARKS

UNIFORM = {"fp8": "FP8", "mxfp8": "MXFP8", "nvfp4-full": "NVFP4"}
WEIGHTS_ONLY = "nvfp4-w4a16"  # ours lists its modules


def load(folder: Path, file: str) -> dict[str, Any]:
    return modelopt_run.strip_sentinel(json.loads((folder / file).read_text()))


def sections(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """``quantization_config`` of config.json, and ``quantization`` of hf_quant_config.json."""
    return load(folder, "config.json")["quantization_config"], load(folder, "hf_quant_config.json")[
        "quantization"
    ]


def modules(folder: Path) -> set[str]:
    """Every module of the main model that has a matrix or a convolution, by the names that configs use."""
    names = {
        name.rsplit(".", 1)[0] for name in read(folder) if name.endswith(".weight") and not is_scale(name)
    }
    return {name for name in names if not re.search(r"norm(_f)?$|^mtp\.", name)}


def excluded(module: str, patterns: list[str]) -> bool:
    return any(fnmatchcase(module, pattern) for pattern in patterns)


def by_layer(names: Any) -> Any:
    """Module names (of a list, or the keys of a dict), with all experts of a layer as one name."""

    def short(name: str) -> str:
        return re.sub(r"(\.experts)\..*", r"\1", name)

    return (
        {short(k): v for k, v in names.items()}
        if isinstance(names, dict)
        else {short(name) for name in names}
    )


def converted(layers: dict[str, Any]) -> dict[str, Any]:
    """What Model Optimizer's config.json has for such ``quantized_layers`` in its older file."""
    from modelopt.torch.export.convert_hf_config import convert_hf_quant_config_format

    legacy = {"quantization": {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}}
    section: dict[str, Any] = convert_hf_quant_config_format(legacy)
    return section


def group_in_a_mixed_map(algorithm: str, group_size: int) -> dict[str, Any]:
    """What Model Optimizer's config.json has for an algorithm that stands beside others, without targets."""
    group = converted({"one": {"quant_algo": algorithm, "group_size": group_size}})["config_groups"][
        "group_0"
    ]
    assert group.pop("targets") == ["one"]
    return group


@pytest.mark.slow
@pytest.mark.parametrize("preset", UNIFORM)
def test_one_format(preset, runs) -> None:
    ours, theirs = sections(runs.ours(preset)), sections(runs.theirs(preset))
    ignored = (
        [ours[0].pop("ignore"), ours[1].pop("exclude_modules")],
        [theirs[0].pop("ignore"), theirs[1].pop("exclude_modules")],
    )
    if preset == "mxfp8":
        assert "config_groups" not in theirs[0]
        theirs[0]["config_groups"] = {"group_0": group_in_a_mixed_map("MXFP8", 32) | {"targets": ["Linear"]}}
    if "group_size" in theirs[1]:  # in its older file alone, of which TensorRT-LLM warns
        theirs[0]["group_size"] = theirs[1]["group_size"]
    assert ours == theirs
    assert ignored[0][0] == ignored[0][1]  # both files have the same list
    assert set(ignored[1][0]) == set(ignored[1][1])
    assert ours[0]["quant_algo"] == UNIFORM[preset]
    mtp = {"mtp*", "mtp"} if preset == "mxfp8" else {"mtp*"}
    assert set(ignored[0][0]) == set(ignored[1][0]) | mtp


def test_weights_only(runs) -> None:
    """Ours lists the modules that theirs quantizes, as Model Optimizer's own converter writes such a list."""
    (ours, legacy), (theirs, _) = sections(runs.ours(WEIGHTS_ONLY)), sections(runs.theirs(WEIGHTS_ONLY))
    assert theirs["quant_algo"] == "W4A16_NVFP4"
    layers = legacy["quantized_layers"]
    assert {entry["quant_algo"] for entry in layers.values()} == {"W4A16_NVFP4"}
    assert ours["quantized_layers"] == layers
    expected = converted(layers)
    assert ours["config_groups"] == expected["config_groups"]
    assert ours["quant_algo"] == legacy["quant_algo"] == expected["quant_algo"] == "MIXED_PRECISION"


def test_numbers_are_those_of_its_own_presets() -> None:
    """The map in ``modelopt_run`` takes them for weights and inputs alike; ours has fewer modules."""
    import modelopt.torch.quantization as mtq

    for name, numbers in modelopt_run.NUMBERS.items():
        entries = getattr(mtq, f"{name.upper()}_DEFAULT_CFG")["quant_cfg"]
        found = {e["quantizer_name"]: e["cfg"] for e in entries if e.get("cfg")}
        assert found.keys() == {"*weight_quantizer", "*input_quantizer"}
        for cfg in found.values():
            assert {key: value for key, value in cfg.items() if key != "effective_bits"} == numbers


@pytest.mark.parametrize("preset", [*UNIFORM, WEIGHTS_ONLY])
def test_exclusions_mean_the_same(preset, runs) -> None:
    """Both exclude the same modules of the main model; the others are quantized."""
    ours, theirs = (sections(out)[0]["ignore"] for out in (runs.ours(preset), runs.theirs(preset)))
    quantized = {
        name.removesuffix(".weight_scale")
        for name in read(runs.ours(preset))
        if name.endswith(".weight_scale")
    }
    for module in modules(runs.source(preset)):
        assert excluded(module, ours) == excluded(module, theirs) == (module not in quantized), module


def test_mixed_formats(runs) -> None:
    (ours, ours_legacy), (theirs, theirs_legacy) = (
        sections(runs.ours("nvfp4")),
        sections(runs.theirs("nvfp4")),
    )
    assert by_layer(ours_legacy["quantized_layers"]) == theirs_legacy["quantized_layers"]
    assert ours["quantized_layers"] == ours_legacy["quantized_layers"]
    for name, group in theirs["config_groups"].items():
        assert by_layer(ours["config_groups"][name].pop("targets")) == set(group.pop("targets"))
    assert ours["config_groups"] == theirs["config_groups"]
    ignore = ours.pop("ignore")
    assert ours_legacy.pop("exclude_modules") == ignore
    assert not theirs.pop("ignore", None)
    assert not theirs_legacy.pop("exclude_modules", None)
    for section in (ours, theirs, ours_legacy, theirs_legacy):
        section.pop("config_groups", None)
        section.pop("quantized_layers", None)
    assert ours == theirs
    assert ours_legacy == theirs_legacy
    quantized = {
        name.removesuffix(".weight_scale")
        for name in read(runs.ours("nvfp4"))
        if name.endswith(".weight_scale")
    }
    assert all(
        excluded(module, ignore) == (module not in quantized) for module in modules(runs.source("nvfp4"))
    )


@pytest.mark.parametrize("preset", modelopt_run.MAPS)
def test_keys_of_the_model(preset, runs) -> None:
    ours, theirs = load(runs.ours(preset), "config.json"), load(runs.theirs(preset), "config.json")
    ours.pop("quantization_config")
    raw = json.loads((runs.source(preset) / "config.json").read_text())
    beside = {"mamba_n_groups": raw["n_groups"], "torch_dtype": raw["dtype"]}  # what older readers look for
    assert ours == raw | beside
    respelled = {"hybrid_override_pattern", "mtp_hybrid_override_pattern", "num_hidden_layers"}
    assert raw.keys() - theirs.keys() == respelled
    assert {key: theirs[key] for key in raw.keys() - respelled} == {
        key: raw[key] for key in raw.keys() - respelled
    }


@pytest.mark.parametrize("preset", modelopt_run.MAPS)
def test_names_that_engines_read(preset, runs) -> None:
    """Our names need no mark removed, and each, less its star, is an existing module or branch."""
    tensors, (section, _) = read(runs.ours(preset)), sections(runs.ours(preset))
    named = [*section["ignore"], *section.get("quantized_layers", ())]
    branches = [name.removesuffix("*").removesuffix(".") + "." for name in named]
    assert [branch for branch in branches if not any(name.startswith(branch) for name in tensors)] == []
    for file in ("config.json", "hf_quant_config.json"):
        assert "\\u0000" not in (runs.ours(preset) / file).read_text()
    assert section["producer"] == load(runs.ours(preset), "hf_quant_config.json")["producer"]
