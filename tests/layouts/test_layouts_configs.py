"""The two config files: their exact content, and how engines read them.

The engines' lookup rules are implemented here a second time, from their sources (FACTS.md, "Config files"),
as plain functions on the two JSON files. An engine must find for every module what the plan gives it.
"""

import json
import re
from fnmatch import fnmatch

import pytest
from support.pack_oracle import PRESETS
from support.places import SUPER
from support.synthetic import WIDE

from nemoquant import api
from nemoquant.layouts.engines import cautions
from nemoquant.layouts.modelopt import quantization_sections

PRODUCER = {"name": "modelopt", "version": "0.47.0"}
FP8_NUMBER = {"dynamic": False, "num_bits": 8, "type": "float"}
FP4_NUMBER = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
L0, L1 = "backbone.layers.0.mixer", "backbone.layers.1.mixer"
KEPT = [  # of the two layers, by presets that quantize attention and experts
    "backbone.embeddings",
    f"{L1}.gate",
    f"{L1}.fc1_latent_proj",
    f"{L1}.fc2_latent_proj",
    "lm_head",
    "mtp*",
]
TWO_LAYERS = {"hybrid_override_pattern": "*E", "n_routed_experts": 2, "num_experts_per_tok": 1}


def files_of(out):
    """Returns quantization_config, the other keys of config.json, and hf_quant_config.json."""
    config = json.loads((out / "config.json").read_text())
    assert config.pop("mamba_n_groups") == config["n_groups"], "SGLang reads no other spelling"
    assert config.pop("torch_dtype", None) == config.get("dtype"), "older transformers read no other"
    return config.pop("quantization_config"), config, json.loads((out / "hf_quant_config.json").read_text())


@pytest.fixture
def two_layers(make_checkpoint):
    """Attention, experts, MTP: small enough to write out its config files by hand."""
    return make_checkpoint("two", **TWO_LAYERS, **WIDE, made_up_key={"kept": [1, None, 2.5]})


def test_fp8(two_layers, quantized):
    section, rest, legacy = files_of(quantized("fp8", of=two_layers))
    ignore = KEPT
    assert section == {
        "config_groups": {
            "group_0": {"input_activations": FP8_NUMBER, "weights": FP8_NUMBER, "targets": ["Linear"]}
        },
        "ignore": ignore,
        "quant_algo": "FP8",
        "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"},
        "producer": PRODUCER,
        "quant_method": "modelopt",
    }
    assert legacy == {
        "producer": PRODUCER,
        "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ignore},
    }
    source = json.loads((two_layers / "config.json").read_text())
    assert rest == source
    assert list(rest) == list(source), "keys keep their order"


def test_mxfp8(two_layers, quantized):
    """``mtp`` too: SGLang takes an exclusion from MXFP8 as a whole part of a name."""
    section, rest, legacy = files_of(quantized("mxfp8", of=two_layers))
    ignore = [*KEPT, "mtp"]
    number = {**FP8_NUMBER, "group_size": 32}
    assert section == {
        "config_groups": {"group_0": {"input_activations": number, "weights": number, "targets": ["Linear"]}},
        "group_size": 32,
        "ignore": ignore,
        "quant_algo": "MXFP8",
        "producer": PRODUCER,
        "quant_method": "modelopt",
    }
    assert legacy == {
        "producer": PRODUCER,
        "quantization": {
            "quant_algo": "MXFP8",
            "kv_cache_quant_algo": None,
            "group_size": 32,
            "exclude_modules": ignore,
        },
    }
    assert rest == json.loads((two_layers / "config.json").read_text())


def test_nvfp4_alone(two_layers, quantized):
    section, rest, legacy = files_of(quantized("nvfp4-full", of=two_layers))
    ignore = KEPT
    assert section == {
        "config_groups": {
            "group_0": {"input_activations": FP4_NUMBER, "weights": FP4_NUMBER, "targets": ["Linear"]}
        },
        "group_size": 16,
        "ignore": ignore,
        "quant_algo": "NVFP4",
        "kv_cache_scheme": FP8_NUMBER,
        "producer": PRODUCER,
        "quant_method": "modelopt",
    }
    assert legacy == {
        "producer": PRODUCER,
        "quantization": {
            "quant_algo": "NVFP4",
            "kv_cache_quant_algo": "FP8",
            "group_size": 16,
            "exclude_modules": ignore,
        },
    }
    assert rest == json.loads((two_layers / "config.json").read_text())


def test_nvfp4_weights_only(two_layers, quantized):
    """Listed by module: SGLang would run a file of this algorithm alone as W4A4 on Blackwell."""
    section, rest, legacy = files_of(quantized("nvfp4-w4a16", of=two_layers))
    ignore = [
        "backbone.embeddings",
        f"{L0}.q_proj",
        f"{L0}.k_proj",
        f"{L0}.v_proj",
        f"{L0}.o_proj",
        f"{L1}.gate",
        f"{L1}.fc1_latent_proj",
        f"{L1}.fc2_latent_proj",
        f"{L1}.shared_experts.up_proj",
        f"{L1}.shared_experts.down_proj",
        "lm_head",
        "mtp*",
    ]
    targets = [f"{L1}.experts.{e}.{p}_proj" for e in (0, 1) for p in ("down", "up")]
    layers = {module: {"quant_algo": "W4A16_NVFP4", "group_size": 16} for module in targets}
    assert section == {
        "config_groups": {"group_0": {"weights": FP4_NUMBER, "targets": targets}},
        "quantized_layers": layers,
        "ignore": ignore,
        "quant_algo": "MIXED_PRECISION",
        "producer": PRODUCER,
        "quant_method": "modelopt",
    }
    assert legacy == {
        "producer": PRODUCER,
        "quantization": {
            "quant_algo": "MIXED_PRECISION",
            "kv_cache_quant_algo": None,
            "exclude_modules": ignore,
            "quantized_layers": layers,
        },
    }
    assert rest == json.loads((two_layers / "config.json").read_text())


def test_mixed(two_layers, quantized):
    section, rest, legacy = files_of(quantized("nvfp4", of=two_layers))
    ignore = KEPT
    fp8 = [
        f"{L0}.k_proj",
        f"{L0}.o_proj",
        f"{L0}.q_proj",
        f"{L0}.v_proj",
        f"{L1}.shared_experts.down_proj",
        f"{L1}.shared_experts.up_proj",
    ]
    nvfp4 = [
        f"{L1}.experts.0.down_proj",
        f"{L1}.experts.0.up_proj",
        f"{L1}.experts.1.down_proj",
        f"{L1}.experts.1.up_proj",
    ]
    layers = {m: {"quant_algo": "FP8"} for m in fp8} | {
        m: {"quant_algo": "NVFP4", "group_size": 16} for m in nvfp4
    }
    assert section == {
        "config_groups": {
            "group_0": {"input_activations": FP8_NUMBER, "weights": FP8_NUMBER, "targets": fp8},
            "group_1": {"input_activations": FP4_NUMBER, "weights": FP4_NUMBER, "targets": nvfp4},
        },
        "quantized_layers": layers,
        "ignore": ignore,
        "quant_algo": "MIXED_PRECISION",
        "kv_cache_scheme": FP8_NUMBER,
        "producer": PRODUCER,
        "quant_method": "modelopt",
    }
    assert legacy == {
        "producer": PRODUCER,
        "quantization": {
            "quant_algo": "MIXED_PRECISION",
            "kv_cache_quant_algo": "FP8",
            "exclude_modules": ignore,
            "quantized_layers": layers,
        },
    }
    assert rest == json.loads((two_layers / "config.json").read_text())


# How engines read them.

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj")}


def renamed(name):
    """Both engines call the published ``backbone`` ``model``."""
    return re.sub(r"^backbone\b", "model", name)


def vllm_excluded(prefix, excluded):
    """Exact, then as a substring, then by fnmatch.

    Fused modules match by their parts; experts also by the modules inside them.
    """
    base, _, last = prefix.rpartition(".")
    if last in FUSED and prefix not in excluded:
        parts = {f"{base}.{part}" in excluded for part in FUSED[last]}
        assert len(parts) == 1, f"{prefix}: some of its parts are excluded, some are not"
        if parts == {True}:
            return True
    if "experts" in prefix and any(prefix in name for name in excluded if "experts" in name):
        return True
    return (
        prefix in excluded
        or any(name in prefix for name in excluded)
        or any(fnmatch(prefix, name) for name in excluded)
    )


def as_engines_read(algorithm, excluded, layers):
    """The description with the engines' names: (algorithm, exclusions, module -> algorithm)."""
    return (
        algorithm,
        [renamed(name) for name in excluded],
        {renamed(name): entry["quant_algo"] for name, entry in layers.items()},
    )


def vllm(prefix, algorithm, excluded, layers):
    """The algorithm that vLLM gives the module ``prefix``; None for unquantized."""
    if vllm_excluded(prefix, excluded):
        return None
    if algorithm != "MIXED_PRECISION":
        return algorithm
    if prefix in layers:
        return layers[prefix]
    base, _, last = prefix.rpartition(".")
    if last in FUSED:
        parts = {layers[f"{base}.{part}"] for part in FUSED[last] if f"{base}.{part}" in layers}
        assert len(parts) <= 1, f"{prefix}: its parts disagree"
        if parts:
            return parts.pop()
    under = prefix.removesuffix("experts") if last == "experts" else prefix + "."
    return next(
        (kind for start in (prefix + ".", under) for name, kind in layers.items() if name.startswith(start)),
        None,
    )


def tensorrt_llm_experts(layer, algorithm, excluded, layers):
    """TensorRT-LLM: the first expert key of a layer decides for all its experts."""
    prefix = f"model.layers.{layer}.mixer.experts."
    if algorithm != "MIXED_PRECISION":
        return None if any(fnmatch(f"{prefix}0.up_proj", name) for name in excluded) else algorithm
    return next((kind for name, kind in layers.items() if name.startswith(prefix)), None)


def engine_modules(plan):
    """Module as vLLM names it -> the algorithm that the plan gives it.

    Contains every module that multiplies, convolves or routes.
    """
    algorithms = {
        ("source", None): None,
        ("fp8", "fp8"): "FP8",
        ("mxfp8", "mxfp8"): "MXFP8",
        ("nvfp4", "nvfp4"): "NVFP4",
        ("nvfp4", None): "W4A16_NVFP4",
    }
    result = {}
    for row in plan.rows:
        if not row.name.endswith(".weight") or row.role.removeprefix("mtp.") in ("norm", "embedding"):
            continue
        module = renamed(row.name.removesuffix(".weight"))
        module = re.sub(r"\.mixer\.[qkv]_proj$", ".mixer.qkv_proj", module)
        module = re.sub(r"\.mixer\.experts\..+", ".mixer.experts", module)
        result.setdefault(module, set()).add(algorithms[row.format, row.activation_format])
    assert all(len(kinds) == 1 for kinds in result.values()), "what engines fuse has one format"
    return {module: kinds.pop() for module, kinds in result.items()}


def check_engines(plan):
    """Checks every module, in both files and both engines; returns the modules."""
    section, legacy = quantization_sections(plan)
    quantization = legacy["quantization"]
    by_file = {
        "config.json": as_engines_read(
            section["quant_algo"], section["ignore"], section.get("quantized_layers", {})
        ),
        "hf_quant_config.json": as_engines_read(
            quantization["quant_algo"],
            quantization["exclude_modules"],
            quantization.get("quantized_layers", {}),
        ),
    }
    modules = engine_modules(plan)
    for file, description in by_file.items():
        wrong = {m: (got, want) for m, want in modules.items() if (got := vllm(m, *description)) != want}
        assert wrong == {}, f"vLLM by {file}: (got, planned)"
        experts = {
            int(m[1]): kind
            for name, kind in modules.items()
            if (m := re.fullmatch(r"model\.layers\.(\d+)\.mixer\.experts", name))
        }
        wrong = {
            n: (got, want)
            for n, want in experts.items()
            if (got := tensorrt_llm_experts(n, *description)) != want
        }
        assert wrong == {}, f"TensorRT-LLM by {file}: (got, planned)"
    return modules


@pytest.mark.parametrize("preset", PRESETS)
def test_engines_find_what_the_plan_says(preset, fitting):
    modules = check_engines(api.plan(fitting(preset) / "config.json", preset))
    assert (
        set(modules.values()) - {None}
        == {
            "fp8": {"FP8"},
            "fp8-published": {"FP8"},
            "mxfp8": {"MXFP8"},
            "nvfp4": {"NVFP4", "FP8"},
            "nvfp4-full": {"NVFP4"},
            "nvfp4-full-w4a16": {"W4A16_NVFP4"},
            "nvfp4-w4a16": {"W4A16_NVFP4"},
        }[preset]
    )
    assert modules["model.layers.2.mixer.gate"] is None
    assert modules["model.layers.0.mixer.conv1d"] is None
    assert modules["mtp.layers.1.mixer.experts"] is None


@pytest.mark.slow
@pytest.mark.parametrize("preset", [*PRESETS, "super-nvfp4-published"])
def test_engines_find_what_the_plan_says_of_super(preset):
    modules = check_engines(api.plan(SUPER, preset))
    assert len(modules) == 40 * 3 + 8 * 2 + 40 * 6 + 1 + (1 + 2 + 6)  # Mamba, attention, MoE, head, MTP
    if preset == "super-nvfp4-published":
        assert modules["model.layers.0.mixer.in_proj"] == "FP8"
        assert modules["model.layers.6.mixer.out_proj"] is None
        assert modules["model.layers.1.mixer.shared_experts.down_proj"] == "NVFP4"
        assert modules["model.layers.8.mixer.shared_experts.down_proj"] is None
        assert modules["model.layers.69.mixer.o_proj"] == "FP8"
        assert modules["model.layers.69.mixer.qkv_proj"] is None
        assert modules["model.layers.3.mixer.fc2_latent_proj"] == "FP8"


RECIPES = {
    # vLLM takes any key under the mixer for `.experts`: those modules must be ignored by name
    "bf16 experts beside FP8 shared "
    "experts": "- {roles: [shared_experts.*], format: fp8}\n- {roles: [mamba.*], format: nvfp4}",
    "experts of one layer "
    "only": "- {roles: [experts.*], layers: [2], format: nvfp4}\n- {roles: [shared_experts.*], format: fp8}",
    "W4A16 beside "
    "FP8": "- {roles: [experts.*], format: nvfp4, activations: none}\n- {roles: [attention.*], format: fp8}",
    "half a Mamba layer": "- {roles: [mamba.in_proj], format: fp8}",
    "the head": "- {roles: [lm_head], format: fp8}",
    "MXFP8 beside NVFP4": "- {roles: [mamba.*], format: mxfp8}\n- {roles: [experts.*], format: nvfp4}",
}


@pytest.mark.parametrize("rules", RECIPES.values(), ids=RECIPES.keys())
def test_engines_find_what_other_recipes_say(rules, fitting, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"name: r\nsummary: s\nrules:\n{rules}\n- {{roles: ['*'], format: source}}\n")
    modules = check_engines(api.plan(fitting("mxfp8"), str(recipe)))
    assert None in modules.values()
    assert set(modules.values()) != {None}


def test_the_rules_here_have_teeth():
    """The functions above do detect the traps that our lists avoid."""
    assert vllm("model.layers.11.mixer.in_proj", *as_engines_read("FP8", ["backbone.layers.1"], {})) is None
    assert (
        vllm("model.layers.11.mixer.in_proj", *as_engines_read("FP8", ["backbone.layers.1.mixer"], {}))
        == "FP8"
    )
    shared = {"backbone.layers.1.mixer.shared_experts.up_proj": {"quant_algo": "FP8"}}
    experts = "model.layers.1.mixer.experts"
    assert vllm(experts, *as_engines_read("MIXED_PRECISION", [], shared)) == "FP8"
    assert (
        vllm(experts, *as_engines_read("MIXED_PRECISION", ["backbone.layers.1.mixer.experts*"], shared))
        is None
    )
    with pytest.raises(AssertionError, match="some of its parts"):
        vllm("model.layers.1.mixer.qkv_proj", *as_engines_read("FP8", ["backbone.layers.1.mixer.q_proj"], {}))


def recipe(tmp_path, *rules):
    path = tmp_path / "mixture.yaml"
    lines = [*rules, "{roles: ['*'], format: source}"]
    path.write_text("name: r\nsummary: s\nrules:\n" + "".join(f"- {line}\n" for line in lines))
    return str(path)


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        (["{roles: [experts.*], format: mxfp8}"], []),
        (["{roles: [experts.*], format: nvfp4}", "{roles: [mamba.*], format: fp8}"], []),
        (
            ["{roles: [experts.*], format: mxfp8}", "{roles: [mamba.*], format: fp8}"],
            ["modules are MXFP8 beside other formats: vLLM before 0.25.0"],
        ),
        (["{roles: [lm_head, mamba.*], format: mxfp8}"], ["lm_head is MXFP8: SGLang 0.5.23"]),
    ],
    ids=["one format", "a known mixture", "MXFP8 in a mixture", "the head"],
)
def test_where_engines_are_silently_wrong(rules, words, fitting, tmp_path):
    plan = api.plan(fitting("mxfp8"), recipe(tmp_path, *rules))
    assert len(cautions(plan)) == len(words)
    assert all(word in text for word, text in zip(words, cautions(plan), strict=True))
