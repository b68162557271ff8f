"""Recipes of Model Optimizer: what one makes of each quantizer, and what its own export writes by it.

States are compared for every recipe that it ships and for lists made at random; files for those of this
family and the general ones, calibrated by ``max``, the only algorithm of theirs that runs on a CPU: which
algorithm a recipe has changes no format.
"""

import copy
import json
import random
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from support import modelopt_recipes, modelopt_run
from support.oracle_tensors import equal, read
from support.synthetic import CONFIG

from nemoquant.api import quantize
from nemoquant.errors import RecipeError
from nemoquant.layouts.modelopt import algorithm, kv_scale_name, tensor_name
from nemoquant.model.names import is_mtp, kv_projections
from nemoquant.model.parse import parse_config
from nemoquant.model.roles import LINEAR_ROLES, tensor_table
from nemoquant.planning.modelopt import library
from nemoquant.planning.modelopt.convert import convert
from nemoquant.planning.modelopt.entries import Theirs
from nemoquant.planning.modelopt.quantizers import Applied
from nemoquant.planning.plan import Plan
from nemoquant.planning.resolve import resolve

pytestmark = [*modelopt_run.MARKS, pytest.mark.slow]
CONFIGURED = parse_config(CONFIG)
TABLE = tensor_table(CONFIGURED)
PATTERNS = [
    "*",
    "*weight_quantizer",
    "*input_quantizer",
    "*output_quantizer",
    "*[kv]_bmm_quantizer",
    "*[qkvp]_bmm_quantizer",
    "*mixer.experts*",
    "*mixer.experts.*weight_quantizer",
    "*.experts.*input_quantizer",
    "*experts.up_proj_weight_quantizers.[0-3]",
    "*experts.down_proj_weight_quantizers.*",
    "*weight_quantizers.7",
    "*weight_quantizer[s].[!0-5]",
    "*[]e]xperts.down*",
    "*layers.2.mixer.experts.*.?",
    "*experts*_proj*weight_quantizer",
    "*shared_experts*",
    "*.mixer.up_proj.weight_quantizer",
    "*up_proj*",
    "*[qkv]_proj*",
    "model.layers.[02]*",
    "model.layers.1.mixer.?_proj.weight_quantizer",
    "*layers.4*weight_quantizer",
    "*conv1d*",
    "*embeddings*",
    "*lm_head*",
    "lm_head.weight_quantizer",
    "*latent*",
    "*in_proj*weight_quantizer*",
    "mtp.*",
    "*mlp*",
]
PARENTS = [None] * 8 + [
    "nn.Linear",
    "nn.Embedding",
    "nn.Conv1d",
    "NemotronHAttention",
    "hf.NemotronHExperts",
    "nn.BatchNorm1d",
]
NUMBERS: list[Any] = [
    {"num_bits": (4, 3)},
    {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}},
    {"num_bits": (4, 3), "block_sizes": {-1: 32, "type": "dynamic", "scale_bits": (8, 0)}},
    {"num_bits": 8, "axis": 0},
    [{"num_bits": 4, "block_sizes": {-1: 128, "type": "static"}}, {"num_bits": (4, 3)}],
]


@pytest.fixture(scope="module")
def model(runs: Any) -> Any:
    """transformers' model with Model Optimizer's quantizers in it."""
    from modelopt.torch.quantization.conversion import replace_quant_module

    loaded = modelopt_run.load(runs.source("fp8"), torch.bfloat16)
    replace_quant_module(loaded)
    return loaded


def states(model: Any, entries: list[Any]) -> dict[str, Any]:
    """Every quantizer's name -> what it has after ``quant_cfg``, by Model Optimizer."""
    from modelopt.torch.quantization.conversion import set_quantizer_by_cfg
    from modelopt.torch.quantization.nn import SequentialQuantizer, TensorQuantizer

    changed = copy.deepcopy(model)
    set_quantizer_by_cfg(changed, entries)
    found: dict[str, Any] = {}
    inside: set[int] = set()
    for name, module in changed.named_modules():
        if id(module) in inside:
            continue
        if isinstance(module, SequentialQuantizer):
            inside |= {id(one) for one in module}
            found[name] = [facts(one) for one in module]
        elif isinstance(module, TensorQuantizer):
            found[name] = [facts(module)]
    return {name: each if each[0] is not None else None for name, each in found.items()}


def facts(quantizer: Any) -> Any:
    return (quantizer.num_bits, blocks(quantizer.block_sizes)) if quantizer.is_enabled else None


def blocks(sizes: Any) -> Any:
    """Block sizes for comparing, the key ``type`` aside where it is what it is without."""
    return {str(key): tuple(v) if isinstance(v, list) else v for key, v in (sizes or {}).items()}


def ours(theirs: Theirs) -> dict[str, Any]:
    """The same by nemoquant."""
    found: dict[str, Any] = {}
    for q in Applied(theirs, CONFIGURED, TABLE).quantizers:
        for number, name in enumerate(q.members() if q.separate else [q.name]):
            state = q.others.get(number, q.state)
            found[name] = None
            if state.enabled:
                found[name] = [
                    (bits(one.get("num_bits", 8)), blocks(one.get("block_sizes"))) for one in state.cfg
                ]
    return found


def bits(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def check_states(model: Any, entries: list[Any]) -> None:
    """Where a pattern means nothing by transformers' names, ours takes the checkpoint's: none here does."""
    theirs = modelopt_recipes.made(entries)
    expected = states(model, entries)
    expected.pop("model.embeddings.input_quantizer", None)  # never on, whatever a recipe says
    assert ours(theirs) == expected, entries


def random_entries(seed: int) -> Iterator[dict[str, Any]]:
    chosen = random.Random(seed)
    if chosen.random() < 0.8:
        yield {"quantizer_name": "*", "enable": False}
    for _ in range(chosen.randrange(1, 12)):
        entry: dict[str, Any] = {"quantizer_name": chosen.choice(PATTERNS)}
        parent = chosen.choice(PARENTS)
        if parent:
            entry["parent_class"] = parent
        if chosen.random() < 0.6:
            entry["cfg"] = copy.deepcopy(chosen.choice(NUMBERS))
        if "cfg" not in entry or chosen.random() < 0.2:
            entry["enable"] = chosen.random() < 0.5
        yield entry


@pytest.mark.parametrize("seed", range(40))
def test_states_of_random_lists(seed: int, model: Any) -> None:
    check_states(model, list(random_entries(seed)))


def exported(source: Path, out: Path, entries: Any) -> Path:
    """Model Optimizer's checkpoint by these entries, calibrated by ``max``."""
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint

    rows = torch.randint(3, CONFIG["vocab_size"], (4, 32), generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def calibrate(model: Any) -> None:
        for row in rows:
            model(row[None], use_cache=False)

    loaded = modelopt_run.load(source, torch.bfloat16)
    mtq.quantize(loaded, {"quant_cfg": entries, "algorithm": "max"}, calibrate)
    export_hf_checkpoint(loaded, export_dir=out)
    return out


def planned(plan: Plan) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> dtype and shape of the tensors that a plan's checkpoint has, those of MTP aside."""
    found = {
        tensor_name(row, kind): (dtype, shape)
        for row in plan.rows
        for kind, dtype, shape in row.parts()
        if not is_mtp(row.module)
    }
    for layer in plan.kv_layers:
        found |= {kv_scale_name(module): ("F32", ()) for module in kv_projections(layer)}
    return found


def written(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The same of a folder's tensors."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  it is no mapping
                part = tensors.get_slice(name)
                found[name] = (part.get_dtype(), tuple(part.get_shape()))
    return found


def declared(folder: Path, module: str) -> str:
    """The algorithm that their ``hf_quant_config.json`` declares for a module; empty if it is excluded."""
    raw = json.loads((folder / "hf_quant_config.json").read_text())
    quantization = modelopt_run.strip_sentinel(raw)["quantization"]
    if quantization["quant_algo"] == "MIXED_PRECISION":
        layers = quantization["quantized_layers"]
        names = (module, module.rpartition(".experts.")[0] + ".experts")
        return next((layers[name]["quant_algo"] for name in names if name in layers), "")
    excluded = any(fnmatchcase(module, pattern) for pattern in quantization["exclude_modules"])
    return "" if excluded else quantization["quant_algo"]


# Of this family, and the general ones of each kind; in all others the same parts stand.
FILES = [
    "models/nvidia/NVIDIA-Nemotron-3-Super-120B-A12B-BF16/ptq/nvfp4-max-calib",
    "models/nvidia/NVIDIA-Nemotron-3-Super-120B-A12B-BF16/ptq/nvfp4-mse",
    "models/nvidia/NVIDIA-Nemotron-3-Ultra-550B-A55B-BF16/ptq/nvfp4-4o6",
    "models/nvidia/NVIDIA-Nemotron-3.5-Lightning-30B-A3B-BF16/ptq/w4a16_nvfp4_4o6",
    "configs/ptq/presets/model/mamba_moe_fp8_aggressive",
    "configs/ptq/presets/model/mamba_moe_fp8_conservative",
    "configs/ptq/presets/model/mamba_moe_nvfp4_aggressive",
    "configs/ptq/presets/model/mamba_moe_nvfp4_conservative",
    "configs/ptq/presets/model/nvfp4_omlp_only",
    "general/ptq/fp8_default-kv_fp8",
    "general/ptq/nvfp4_default-kv_fp8_cast",
    "general/ptq/nvfp4_experts_only-kv_fp8",
    "general/ptq/nvfp4_mlp_only-kv_fp8",
    "general/ptq/nvfp4_weight_only-kv_fp16",
    "huggingface/qwen3_5/ptq/w4a16_nvfp4-fp8_attn-kv_fp8_cast",
]


@pytest.mark.parametrize("name", FILES)
def test_files(name: str, tmp_path: Path, runs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor's name, dtype and shape, and what the configs say of each module."""
    monkeypatch.setattr(library, "ask", modelopt_recipes.ask)
    theirs = library.load(f"modelopt:{name}")
    made = convert(theirs, CONFIGURED, TABLE)
    plan = resolve(made.recipe, CONFIGURED, TABLE, assumed=True)
    out = exported(runs.source("fp8"), tmp_path / "theirs", modelopt_recipes.entries(theirs))
    expected, got = written(out), planned(plan)
    cast = any("use_constant_amax" in note for note in made.notes)
    got = {key: value for key, value in got.items() if not (cast and key.endswith(("k_scale", "v_scale")))}
    assert got == expected
    for row in plan.rows:
        if row.role in LINEAR_ROLES:
            assert declared(out, row.module) == algorithm(row), row.name
    raw = json.loads((out / "hf_quant_config.json").read_text())
    assert raw["quantization"]["kv_cache_quant_algo"] == (None if plan.cache is None else "FP8")


def test_bytes(tmp_path: Path, runs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a recipe with ``max``, given to both: NVFP4 codes, and all scales of weights."""
    monkeypatch.setattr(library, "ask", modelopt_recipes.ask)
    name = f"modelopt:{FILES[0]}"
    theirs = read(
        exported(runs.source("fp8"), tmp_path / "theirs", modelopt_recipes.entries(library.load(name)))
    )
    np.save(tmp_path / "rows.npy", runs.token_rows)
    quantize(runs.source("fp8"), tmp_path / "ours", name, data=tmp_path / "rows.npy", progress=False)
    ours = read(tmp_path / "ours")
    compared = [
        key
        for key, tensor in theirs.items()
        if key.endswith(("weight_scale", "weight_scale_2")) or tensor.dtype == torch.uint8
    ]
    assert len(compared) > 100
    assert [key for key in compared if not equal(ours[key], theirs[key])] == []


def test_states_of_all_that_it_ships(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of its recipes and presets for quantizing, for whatever model."""
    monkeypatch.setattr(library, "ask", modelopt_recipes.ask)
    seen = 0
    for name in modelopt_recipes.shipped():
        try:
            theirs = library.load(f"modelopt:{name}")
        except RecipeError:
            continue  # no recipe for quantizing
        check_states(model, modelopt_recipes.entries(theirs))
        seen += 1
    assert seen > 80
