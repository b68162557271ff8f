"""The shipped presets on real configs: the map that each makes, and its figures by arithmetic done here."""

import functools
import json
from collections import Counter
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import yaml
from safetensors import safe_open
from support.places import CONFIGS, NANO, SUPER

from nemoquant import api
from nemoquant.errors import RecipeError
from nemoquant.planning.plan import Plan

Make = Callable[..., Path]
PUBLISHED = "super-nvfp4-published"

# docs/design.md, "Presets": routed experts, shared experts and dense MLP, attention, Mamba projections;
# weights, then GEMM inputs
COLUMNS = ("experts", "shared_experts", "mlp", "attention", "mamba")
PRESETS: dict[str, tuple[tuple[str, ...], str]] = {
    "fp8": (("fp8", "fp8", "fp8", "fp8", "fp8"), "fp8"),
    "fp8-published": (("fp8", "fp8", "fp8", "source", "fp8"), "fp8"),
    "mxfp8": (("mxfp8", "mxfp8", "mxfp8", "mxfp8", "mxfp8"), "source"),
    "nvfp4": (("nvfp4", "fp8", "nvfp4", "fp8", "fp8"), "fp8"),
    "nvfp4-full": (("nvfp4", "nvfp4", "nvfp4", "nvfp4", "nvfp4"), "fp8"),
    "nvfp4-full-w4a16": (("nvfp4", "nvfp4", "nvfp4", "nvfp4", "nvfp4"), "source"),
    "nvfp4-w4a16": (("nvfp4", "source", "nvfp4", "source", "source"), "source"),
}

SOLVED = ("fp8", "nvfp4", "nvfp4-full", "nvfp4-full-w4a16", "nvfp4-w4a16")  # the others: max
FOLDED = ("nvfp4", "nvfp4-full")
WEIGHTS_ONLY = ("nvfp4-full-w4a16", "nvfp4-w4a16")
UNSCALED = ("mxfp8", *WEIGHTS_ONLY)  # no scale comes from calibration

# role: (how many, out, in), from the published sizes
SIZES: dict[str, dict[str, tuple[int, int, int]]] = {
    "super-120b-a12b": {
        "experts.up_proj": (40 * 512, 2688, 1024),
        "experts.down_proj": (40 * 512, 1024, 2688),
        "shared_experts.up_proj": (40, 5376, 4096),
        "shared_experts.down_proj": (40, 4096, 5376),
        "attention.q_proj": (8, 4096, 4096),
        "attention.k_proj": (8, 256, 4096),
        "attention.v_proj": (8, 256, 4096),
        "attention.o_proj": (8, 4096, 4096),
        "mamba.in_proj": (40, 18560, 4096),
        "mamba.out_proj": (40, 4096, 8192),
        "latent.fc1": (40, 1024, 4096),
        "latent.fc2": (40, 4096, 1024),
    },
    "nano-30b-a3b": {
        "experts.up_proj": (23 * 128, 1856, 2688),
        "experts.down_proj": (23 * 128, 2688, 1856),
        "shared_experts.up_proj": (23, 3712, 2688),
        "shared_experts.down_proj": (23, 2688, 3712),
        "attention.q_proj": (6, 4096, 2688),
        "attention.k_proj": (6, 256, 2688),
        "attention.v_proj": (6, 256, 2688),
        "attention.o_proj": (6, 2688, 4096),
        "mamba.in_proj": (23, 10304, 2688),
        "mamba.out_proj": (23, 2688, 4096),
    },
}
TOTAL = {  # tensors, elements, elements stored as fp32, attention layers
    "super-120b-a12b": (42_683, 123_611_033_088, 41 * 512, 8),
    "nano-30b-a3b": (6_243, 31_577_940_288, 23 * 128, 6),
}


def packed(form: str, elements: int, weights_only: bool = False) -> tuple[int, int]:
    """Number of tensors and bytes that a weight of two dimensions becomes."""
    if form == "fp8":
        return 3, elements + 4 + 4  # codes, weight_scale, input_scale
    if form == "mxfp8":
        return 2, elements + elements // 32  # codes, block scales
    scalars = 4 if weights_only else 4 + 4
    return (
        3 if weights_only else 4,
        elements // 2 + elements // 16 + scalars,
    )  # codes, block scales, weight_scale_2, input_scale


@functools.cache
def planned(model: str, preset: str) -> Plan:
    return api.plan(CONFIGS / f"{model}.json", preset)


def formats(preset: str, role: str) -> str:
    columns, _ = PRESETS[preset]
    return dict(zip(COLUMNS, columns, strict=True)).get(role.split(".")[0], "source")


@pytest.mark.parametrize("model", SIZES)
@pytest.mark.parametrize("preset", PRESETS)
def test_the_map_of_a_preset(model: str, preset: str) -> None:
    made = planned(model, preset)
    assert made.assumed
    for row in made.rows:
        expected = formats(preset, row.role)
        inputs = None if expected == "source" or preset in WEIGHTS_ONLY else expected
        method = None if expected == "source" else "gptq" if preset in SOLVED else "max"
        assert (row.format, row.activation_format, row.scale_method) == (expected, inputs, method), row.name
    assert made.recipe.kv_cache == PRESETS[preset][1]
    assert made.needs_inputs == (preset in SOLVED)
    assert made.recipe.folds == (["latent", "norm"] if preset in FOLDED else [])
    assert made.needs_calibration == (preset in SOLVED or preset not in UNSCALED)
    counts = Counter(row.role for row in made.quantized)
    assert counts == {
        role: count for role, (count, _, _) in SIZES[model].items() if formats(preset, role) != "source"
    }


@pytest.mark.parametrize("model", SIZES)
@pytest.mark.parametrize("preset", PRESETS)
def test_the_figures_of_a_preset(model: str, preset: str) -> None:
    made = planned(model, preset)
    tensors, elements, wide, attention = TOTAL[model]
    bytes_in = 2 * elements + 2 * wide
    cache_scales = 0 if preset in UNSCALED else 2 * attention
    tensors_out, bytes_out = tensors + cache_scales, bytes_in + 4 * cache_scales
    quantized_elements = quantized_bytes = 0
    for role, (count, rows, columns) in SIZES[model].items():
        form = formats(preset, role)
        if form != "source":
            parts, size = packed(form, rows * columns, weights_only=preset in WEIGHTS_ONLY)
            tensors_out += count * (parts - 1)
            bytes_out += count * (size - 2 * rows * columns)
            quantized_elements += count * rows * columns
            quantized_bytes += count * size
    assert (len(made.rows), made.bytes_in) == (tensors, bytes_in)
    assert (made.tensors_out, made.bytes_out) == (tensors_out, bytes_out)
    assert made.bits_per_weight == 8 * bytes_out / elements
    assert made.bits_per_quantized_weight == 8 * quantized_bytes / quantized_elements
    cache = attention * 2 * 2 * 128
    assert made.kv_cache_bytes_per_token() == {
        "source": 2 * cache,
        "planned": 2 * cache if preset in UNSCALED else cache,
    }


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_on_a_checkpoint(preset: str, fitting: Make) -> None:
    """A checkpoint with dense MLP layers, planned from headers; compared with safetensors' reading."""
    folder = fitting(preset, num_nextn_predict_layers=1)
    shapes: dict[str, list[int]] = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "np") as f:
            shapes |= {name: f.get_slice(name).get_shape() for name in f.keys()}  # noqa: SIM118 (it is no mapping)
    made = api.plan(folder, preset)
    assert not made.assumed
    assert {row.name: list(row.shape) for row in made.rows} == shapes
    tensors_out = bytes_out = 0
    for name, shape in shapes.items():
        elements = functools.reduce(lambda a, b: a * b, shape)
        parts = {
            ".experts.": "experts",
            ".shared_experts.": "shared_experts",
            "layers.3.mixer.": "mlp",
            "layers.1.mixer.": "attention",
            ".in_proj.": "mamba",
            ".out_proj.": "mamba",
        }
        column = next(
            (c for part, c in parts.items() if part in name and name.startswith("backbone.")), "norm"
        )
        form = formats(preset, column) if name.endswith("_proj.weight") else "source"
        tensors, size = (
            packed(form, elements, preset in WEIGHTS_ONLY) if form != "source" else (1, 2 * elements)
        )
        tensors_out += tensors
        bytes_out += size + 2 * elements * name.endswith("e_score_correction_bias")
    scales = 0 if preset in UNSCALED else 2
    assert (made.tensors_out, made.bytes_out) == (tensors_out + scales, bytes_out + 4 * scales)


# --- the published map of Super, layer by layer, from FACTS.md

IN_PROJ = "0,2,4,6,9,11,13,15,18,20,27,29,31,40,49,51,53,55,57,60,62,66,68,71,73,82,84,86"
OUT_PROJ = "0,2,4,9,11,13,18,38,40,42,44,49,51,53,55,57,60,62,64,66,68,71,73,75,77,80,82,84,86"
PATTERN = "MEMEMEM*EMEMEMEM*EMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEM*EMEMEMEME"
MOE = {i for i, letter in enumerate(PATTERN) if letter == "E"}


def numbers(text: str) -> set[int]:
    return {int(n) for n in text.split(",")}


FP8: dict[str, set[int]] = {
    "mamba.in_proj": numbers(IN_PROJ),
    "mamba.out_proj": numbers(OUT_PROJ),
    "shared_experts.up_proj": MOE - {41},
    "shared_experts.down_proj": MOE - {1, 8, 76},
    "latent.fc1": {1, 3, 5},
    "latent.fc2": {3},
    "attention.o_proj": {69, 78},
}
NVFP4: dict[str, set[int]] = {
    "experts.up_proj": MOE,
    "experts.down_proj": MOE,
    "shared_experts.down_proj": {1},
}


def test_the_published_map_layer_by_layer() -> None:
    made = planned("super-120b-a12b", PUBLISHED)
    assert (len(MOE), len(FP8["mamba.in_proj"]), len(FP8["mamba.out_proj"])) == (40, 28, 29)

    def found(form: str) -> dict[str, set[int]]:
        layers: dict[str, set[int]] = {}
        for row in made.rows:
            if row.format == form:
                assert row.layer is not None
                layers.setdefault(row.role, set()).add(row.layer)
        return layers

    assert found("fp8") == FP8
    assert found("nvfp4") == NVFP4
    experts = Counter(
        (row.role, row.layer) for row in made.rows if row.format == "nvfp4" and row.expert is not None
    )
    assert experts == {
        (role, layer): 512 for role in ("experts.up_proj", "experts.down_proj") for layer in MOE
    }
    assert {row.scale_method for row in made.rows if row.format == "nvfp4"} == {
        "mse"
    }  # max for activations, MSE for weights
    assert all(row.activation_format == row.format for row in made.quantized)
    assert made.kv_layers == [7, 16, 25, 36, 47, 58, 69, 78]
    assert made.needs_calibration


def test_the_published_figures() -> None:
    made = planned("super-120b-a12b", PUBLISHED)
    sizes = SIZES["super-120b-a12b"]
    tensors_out, bytes_out = 42_683 + 16, 247_222_108_160 + 16 * 4
    elements = size_of_all = 0
    for form, layers_by_role in (("fp8", FP8), ("nvfp4", NVFP4)):
        for role, layers in layers_by_role.items():
            count = len(layers) * (512 if role.startswith("experts.") else 1)
            _, rows, columns = sizes[role]
            parts, size = packed(form, rows * columns)
            tensors_out += count * (parts - 1)
            bytes_out += count * (size - 2 * rows * columns)
            elements += count * rows * columns
            size_of_all += count * size
    assert (made.tensors_out, made.bytes_out) == (tensors_out, bytes_out)
    assert made.bits_per_weight == 8 * bytes_out / 123_611_033_088
    assert made.bits_per_quantized_weight == 8 * size_of_all / elements
    assert 4.5 < made.bits_per_quantized_weight < 4.75  # the budget of the search that produced this map


def test_the_published_map_is_for_super_only(source: Path) -> None:
    for model, message in ((NANO, "layers 76 have no"), (source, "layers 1 have no")):
        with pytest.raises(RecipeError) as error:
            api.plan(model, PUBLISHED)
        text = str(error.value)
        assert text.startswith(f"recipe {PUBLISHED}: rule ")
        assert message in text
        assert text.endswith("expected layers that have them, is the recipe for another model?")


# --- the published maps of Nano and Lightning

NANO_PATTERN = "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"
NANO_LEFT = (4, 11, 18, 25, 32, 41)
NANO_MAPS = {"nano-fp8-published": "fp8", "nano-nvfp4-published": "nvfp4"}


def test_the_layers_that_the_maps_of_nano_leave_stand_before_attention() -> None:
    attention = [i for i, letter in enumerate(NANO_PATTERN) if letter == "*"]
    assert [i - 1 for i in attention] == list(NANO_LEFT)
    assert all(NANO_PATTERN[i] == "M" for i in NANO_LEFT)


@pytest.mark.parametrize("preset", NANO_MAPS)
def test_the_published_maps_of_nano(preset: str) -> None:
    made, form = planned("nano-30b-a3b", preset), NANO_MAPS[preset]
    for row in made.rows:
        kind = row.role.split(".")[0]
        expected = form if kind in ("experts", "shared_experts", "mamba") else "source"
        if kind == "mamba" and row.layer in NANO_LEFT:
            expected = "source"
        inputs = None if expected == "source" else form
        method = None if expected == "source" else "max"
        assert (row.format, row.activation_format, row.scale_method) == (expected, inputs, method), row.name
    assert Counter(row.role for row in made.quantized) == {
        "experts.up_proj": 23 * 128,
        "experts.down_proj": 23 * 128,
        "shared_experts.up_proj": 23,
        "shared_experts.down_proj": 23,
        "mamba.in_proj": 17,
        "mamba.out_proj": 17,
    }
    assert made.kv_layers == [5, 12, 19, 26, 33, 42]
    elements = {role: count * out * inner for role, (count, out, inner) in SIZES["nano-30b-a3b"].items()}
    elements |= {role: elements[role] * 17 // 23 for role in ("mamba.in_proj", "mamba.out_proj")}
    quantized = sum(elements[row] for row in elements if not row.startswith("attention."))
    modules = 46 * 128 + 46 + 34
    bytes_in = 2 * 31_577_940_288 + 2 * 23 * 128
    size = quantized if form == "fp8" else quantized * 9 // 16
    assert made.bytes_out == bytes_in - 2 * quantized + size + 8 * modules + 4 * 2 * 6
    for other in (SUPER, CONFIGS / "nano-9b-v2.json"):  # the latter's Mamba layers are at these places too
        with pytest.raises(RecipeError, match=r"layers .* have no tensor of the roles attention"):
            api.plan(other, preset)


@pytest.fixture
def lightning(tmp_path: Path) -> Path:
    """Lightning's config, as far as a plan goes: Nano's layers and a prediction module."""
    raw = json.loads(NANO.read_text())
    raw |= {"num_nextn_predict_layers": 1, "mtp_layers_block_type": ["attention", "moe"]}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    return tmp_path / "config.json"


def test_the_map_of_lightning_is_model_optimizers_recipe(lightning: Path) -> None:
    """Its rules are read plainly here: patterns over quantizers' names, the last match wins."""
    recipes = pytest.importorskip("modelopt_recipes", reason="extra: modelopt")
    file = "models/nvidia/NVIDIA-Nemotron-3.5-Lightning-30B-A3B-BF16/ptq/w4a16_nvfp4_4o6.yaml"
    theirs = yaml.safe_load((Path(next(iter(recipes.__path__))) / file).read_text())
    rules = theirs["quantize"]["quant_cfg"]

    def numbers(quantizer: str) -> str | None:
        found = None
        for rule in rules:
            if fnmatchcase(quantizer, rule["quantizer_name"]):
                found = rule.get("cfg", found) if rule["enable"] else None
        return None if found is None else found.get("$import", found.get("num_bits"))

    made = api.plan(lightning, "lightning-published")
    ours = {"fp8": "fp8_default", "nvfp4": "nvfp4_four_over_six", "source": None}
    for row in made.rows:
        if row.name == row.module:  # no weight of a module
            continue
        expected = ours[row.format], ours[row.activation_format or "source"]
        got = tuple(numbers(f"{row.module}.{kind}_quantizer") for kind in ("weight", "input"))
        assert got == expected, row.name
    assert {row.scale_method for row in made.quantized if row.format == "nvfp4"} == {"four_over_six"}
    assert numbers("backbone.layers.5.mixer.k_bmm_quantizer") == "e4m3"
    assert made.kv_layers == [5, 12, 19, 26, 33, 42]
    assert {row.format for row in made.rows if row.role.startswith("mtp.")} == {"source"}
    assert Counter(row.role.split(".")[0] for row in made.quantized) == {
        "experts": 2 * 23 * 128,
        "shared_experts": 46,
        "lm_head": 1,
        "mamba": 46,
    }


# --- tensors that no preset changes


def untouched(plan: Plan) -> Iterable[str]:
    kept = ("ssm.", "norm", "conv1d", "router", "embedding", "lm_head", "mtp.")
    return (
        row.name
        for row in plan.rows
        if row.role.startswith(kept) and row.parts() != [("source", row.source_dtype, row.shape)]
    )


@pytest.mark.parametrize("preset", [*PRESETS, PUBLISHED])
def test_what_no_preset_touches(preset: str) -> None:
    assert list(untouched(planned("super-120b-a12b", preset))) == []
