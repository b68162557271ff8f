"""The ModelOpt unified layout, written and read: names of tensors, and the two config files for engines.

These names are in no other file. In this layout every stored scale is a decode scale:

    ours            FP8             NVFP4
    codes           weight          weight            (U8, two codes a byte, even column in the low nibble)
    block_scales                    weight_scale      (F8_E4M3)
    global_scale    weight_scale    weight_scale_2    (F32, shape [])
    input_scale     input_scale     input_scale       (F32, shape [])
    K, V cache      k_proj.k_scale, v_proj.v_scale    (F32, shape [])
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemoquant.checkpoint.header import TensorInfo
from nemoquant.errors import CheckpointError
from nemoquant.formats import FORMATS
from nemoquant.model.names import experts_of
from nemoquant.model.roles import TensorSpec
from nemoquant.planning.plan import Plan, Row

LEGACY = "hf_quant_config.json"  # the older of the two config files
SECTION = "quantization_config"  # of config.json, the newer one
PRODUCER = "modelopt"  # vLLM and SGLang read the producer's name first; our own name is in nemoquant.json
LAYOUT_VERSION = "0.47.0"  # the Model Optimizer that has this layout; tests compare the bytes
_SUFFIX = {
    ("fp8", "codes"): "weight",
    ("fp8", "global_scale"): "weight_scale",
    ("nvfp4", "codes"): "weight",
    ("nvfp4", "block_scales"): "weight_scale",
    ("nvfp4", "global_scale"): "weight_scale_2",
    ("fp8", "input_scale"): "input_scale",
    ("nvfp4", "input_scale"): "input_scale",
}
KV_SUFFIX = {"k_proj": "k_scale", "v_proj": "v_scale"}
WEIGHT_FORMATS = {"F8_E4M3": "FP8", "U8": "NVFP4"}  # by dtype of a `weight`


def tensor_name(row: Row, kind: str) -> str:
    """Name in the written file of one part of a row (see ``Row.parts``)."""
    return row.name if kind == "source" else f"{row.module}.{_SUFFIX[row.format, kind]}"


@dataclass(frozen=True)
class Stored:
    """How one tensor of the model is stored in a file of this layout.

    Attributes:
        format: ``source``, ``fp8`` or ``nvfp4``.
        parts: names of its parts in the file, by kind.
    """

    format: str
    parts: dict[str, str]


def find_stored(tensors: Mapping[str, TensorInfo], spec: TensorSpec) -> Stored:
    """The reverse of ``tensor_name``: how the tensor ``spec`` is stored.

    It is derived from dtypes and shapes, whichever program wrote the file.

    Raises:
        CheckpointError: it is missing, or its parts are not those of FP8 per tensor or NVFP4 in this layout.
    """
    info = tensors.get(spec.name)
    if info is None:
        raise CheckpointError(f"{spec.name} is missing")
    format = {"F8_E4M3": "fp8", "U8": "nvfp4"}.get(info.dtype, "source")
    expected: list[tuple[str, str, tuple[int, ...]]] = [("source", info.dtype, spec.shape)]
    if format != "source":
        problem = FORMATS[format].indivisible(spec.shape)
        if problem:
            raise CheckpointError(f"{spec.name} is {info.dtype}: {problem}")
        expected = list(FORMATS[format].packed_tensors((spec.shape[0], spec.shape[1])))
        if f"{spec.module}.input_scale" in tensors:
            expected.append(("input_scale", "F32", ()))
    parts = {}
    for kind, dtype, shape in expected:
        name = spec.name if kind == "source" else f"{spec.module}.{_SUFFIX[format, kind]}"
        part = tensors.get(name)
        if part is None:
            raise CheckpointError(f"{name} is missing; {spec.name} is {info.dtype} and needs it")
        if dtype != part.dtype or (part.shape or (1,)) != (shape or (1,)):
            raise CheckpointError(
                f"{name} is {part.dtype} {list(part.shape)}, expected {dtype} {list(shape)}"
            )
        parts[kind] = name
    return Stored(format, parts)


def kv_scale_name(module: str) -> str:
    """``....k_proj`` -> ``....k_proj.k_scale``."""
    return f"{module}.{KV_SUFFIX[module.rsplit('.', 1)[1]]}"


def algorithm(row: Row) -> str:
    """ModelOpt's name for the quantization of a row's module."""
    if row.format == "nvfp4":
        return "NVFP4" if row.activation_format else "W4A16_NVFP4"
    return {"fp8": "FP8", "source": ""}[row.format]


def quantization_sections(plan: Plan) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """``SECTION`` of config.json (None if nothing is quantized), and the whole ``LEGACY`` file."""
    by_module = {row.module: algorithm(row) for row in plan.quantized}
    kinds = sorted(set(by_module.values()))
    kv = "FP8" if plan.kv_layers else None
    ignore = excluded_modules(plan)
    producer = {"name": PRODUCER, "version": LAYOUT_VERSION}
    if not kinds:
        return None, {
            "producer": producer,
            "quantization": {"quant_algo": None, "kv_cache_quant_algo": kv, "exclude_modules": ignore},
        }
    mixed = len(kinds) > 1
    named = {"quant_algo": "MIXED_PRECISION" if mixed else kinds[0]}
    layers = {module: _entry(kind) for module, kind in sorted(by_module.items())} if mixed else {}
    legacy: dict[str, Any] = {**named, "kv_cache_quant_algo": kv}
    if not mixed and kinds[0] != "FP8":
        legacy["group_size"] = 16
    legacy["exclude_modules"] = ignore
    section: dict[str, Any] = {
        "config_groups": {
            f"group_{i}": _group(kind)
            | {"targets": sorted(m for m, k in by_module.items() if k == kind) if mixed else ["Linear"]}
            for i, kind in enumerate(kinds)
        }
    }
    if mixed:
        legacy["quantized_layers"] = section["quantized_layers"] = layers
    section |= {"ignore": ignore, **named}
    if kv:
        section["kv_cache_scheme"] = {"dynamic": False, "num_bits": 8, "type": "float"}
    section |= {"producer": producer, "quant_method": "modelopt"}
    return section, {"producer": producer, "quantization": legacy}


def _entry(kind: str) -> dict[str, Any]:
    return {"quant_algo": kind} if kind == "FP8" else {"quant_algo": kind, "group_size": 16}


def _group(kind: str) -> dict[str, Any]:
    number = {"dynamic": False, "num_bits": 8, "type": "float"}
    if kind != "FP8":
        number = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
    return {"weights": number} if kind == "W4A16_NVFP4" else {"input_activations": number, "weights": number}


def excluded_modules(plan: Plan) -> list[str]:
    """Modules that are not quantized, by names that match nothing else in any engine.

    vLLM matches an entry as a substring too, so there are no layer prefixes (``layers.1`` would match 10
    to 19): whole module names, one for all experts of a layer. ``mtp*`` stands for the multi-token-prediction
    modules.
    """
    names: dict[str, None] = {}
    for row in plan.rows:
        if row.format != "source" or row.role in ("norm", "ssm.A_log", "ssm.D", "ssm.dt_bias", "router.bias"):
            continue
        if row.role.startswith("mtp."):
            names["mtp*"] = None
        elif row.expert is not None:
            experts = experts_of(row.module)
            names[experts] = names[f"{experts}.*"] = None
        else:
            names[row.module.removesuffix(".bias")] = None
    return list(names)


def config_files(plan: Plan, raw_config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Both config files by name, as JSON data; ``raw_config`` is the source's config.json."""
    section, legacy = quantization_sections(plan)
    return {"config.json": {**raw_config, **({SECTION: section} if section else {})}, LEGACY: legacy}


def quantized_by(path: Path, raw_config: Mapping[str, Any]) -> str | None:
    """The evidence that the checkpoint in ``path`` is already quantized, in words; None if there is none."""
    if raw_config.get(SECTION) is not None:
        return f"config.json has `{SECTION}`"
    return f"it has {LEGACY}" if (path / LEGACY).exists() else None


def declared_quantization(path: Path, raw: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint declares about its quantization; empty if nothing.

    It has the form of ``SECTION`` in config.json.
    """
    declared = raw.get(SECTION)
    return declared if isinstance(declared, dict) and declared else _legacy_quantization(path)


def declares_fp8_cache(quantization: Mapping[str, Any]) -> bool:
    """Whether :func:`declared_quantization` has an FP8 KV cache."""
    cache = quantization.get("kv_cache_scheme")
    return isinstance(cache, dict) and cache.get("num_bits") == 8


def _legacy_quantization(path: Path) -> dict[str, Any]:
    """What ``LEGACY`` declares, in the form of ``SECTION``; for checkpoints whose config.json has none."""
    try:
        legacy = json.loads((path / LEGACY).read_text(encoding="utf-8"))["quantization"]
        bits = {"kv_cache_scheme": {"num_bits": 8}} if legacy.get("kv_cache_quant_algo") == "FP8" else {}
        return {
            "quant_algo": legacy.get("quant_algo"),
            "quantized_layers": legacy.get("quantized_layers"),
            **bits,
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def declared_algorithm(declared: Mapping[str, Any]) -> Any:
    """The algorithm of the whole checkpoint in :func:`declared_quantization`; None if there is none."""
    return declared.get("quant_algo")


def declares_quantized_input(declared: Mapping[str, Any], module: str) -> bool:
    """Whether :func:`declared_quantization` has a quantized input for a module's GEMM.

    If so, the module needs an input scale.
    """
    entry = (declared.get("quantized_layers") or {}).get(module)
    return declared_algorithm(entry if isinstance(entry, dict) else declared) in ("FP8", "NVFP4")
