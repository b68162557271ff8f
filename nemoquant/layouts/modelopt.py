"""The ModelOpt unified layout, written and read: names of tensors, and the two config files for engines.

These names are in no other file. In this layout every stored scale is a decode scale:

    ours            FP8             MXFP8           NVFP4
    codes           weight          weight          weight          (NVFP4: U8, two a byte, the even column
                                                                    in the low nibble)
    block_scales                    weight_scale    weight_scale    (MXFP8: U8, E8M0; NVFP4: F8_E4M3)
    global_scale    weight_scale                    weight_scale_2  (F32, shape [])
    input_scale     input_scale                     input_scale     (F32, shape [])
    K, V cache      k_proj.k_scale, v_proj.v_scale                  (F32, shape [])

What the layout has for each number format is one row of ``LAYOUT``.

FP8 weights whose inputs are not quantized (W8A16) have no name of their own: Model Optimizer declares them
FP8 and leaves ``input_scale`` out. Here they are ``W8A16_FP8``, a name that no file has; files say it by a
group of modules without ``input_activations``.
"""

import json
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import translate
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ValidationError

from nemoquant.checkpoint.header import TensorInfo
from nemoquant.errors import CheckpointError, field_problem, listing
from nemoquant.files import MOST_SETTINGS, read_json
from nemoquant.formats import CACHE_FORMATS, FORMATS, CacheFormat, CacheName, FormatName
from nemoquant.layouts.beside import (
    MOST_PATTERN,
    MOST_WILDCARDS,
    Rename,
    RenameAll,
    adding,
    removing,
    tower_patterns,
)
from nemoquant.model.names import experts_of
from nemoquant.model.nested import TOWER, language_model, prefix_of, sections, without_key
from nemoquant.model.parse import layer_pattern, plain_value
from nemoquant.model.roles import TensorSpec
from nemoquant.planning.plan import Plan
from nemoquant.planning.recipe import has_wildcard
from nemoquant.planning.row import Row
from nemoquant.words import MOST_NAME, plain

LEGACY = "hf_quant_config.json"  # the older of the two config files
SECTION = "quantization_config"  # of config.json, the newer one
PRODUCER = "modelopt"  # vLLM and SGLang read the producer's name first; our own name is in nemoquant.json
LAYOUT_VERSION = "0.47.0"  # the Model Optimizer that has this layout; tests compare the bytes
MIXED = "MIXED_PRECISION"  # the algorithm of a checkpoint with several
SPELLINGS = {  # key of config.json -> the only spelling that an engine reads: SGLang takes 8 groups and a
    # float32 state without the first two, transformers before 4.56 float32 without the last
    "n_groups": "mamba_n_groups",
    "mamba_ssm_cache_dtype": "mamba_ssm_dtype",
    "dtype": "torch_dtype",
}
_OTHER_SECTIONS = {
    "quantization": "mlx",
    "compression_config": "an old compressed-tensors",
}  # where other tools say in config.json that a model is quantized
_OTHER_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
SCHEDULES = {  # list of layers -> the pattern that every engine reads
    "layers_block_type": "hybrid_override_pattern",
    "mtp_layers_block_type": "mtp_hybrid_override_pattern",
}
# Roles of tensors that no exclusion names: they are in no GEMM, or in a tower, which is excluded as a whole.
_UNNAMED = ("norm", "ssm.A_log", "ssm.D", "ssm.dt_bias", "router.bias", TOWER)
KV_SUFFIX = {"k_proj": "k_scale", "v_proj": "v_scale"}


@dataclass(frozen=True)
class Layout:
    """What this layout has for a number format.

    Attributes:
        algorithm: Model Optimizer's name, where inputs are quantized too.
        weights_only: that where they are not; None if the layout has no such weights.
        declared: what files call ``weights_only``, where that is a name of ours; they list such modules.
        suffix: of the names of a module's parts, by kind.
        plain_exclusions: SGLang takes an exclusion from this algorithm as a whole part between dots, without
            wildcards, so one without them is written too.
    """

    algorithm: str
    weights_only: str | None
    suffix: Mapping[str, str]
    plain_exclusions: bool = False
    declared: str | None = None


LAYOUT: Mapping[FormatName, Layout] = MappingProxyType(
    {
        "fp8": Layout(
            "FP8",
            weights_only="W8A16_FP8",
            suffix={"codes": "weight", "global_scale": "weight_scale", "input_scale": "input_scale"},
            declared="FP8",
        ),
        "mxfp8": Layout(
            "MXFP8",
            weights_only=None,
            suffix={"codes": "weight", "block_scales": "weight_scale"},
            plain_exclusions=True,
        ),
        "nvfp4": Layout(
            "NVFP4",
            weights_only="W4A16_NVFP4",
            suffix={
                "codes": "weight",
                "block_scales": "weight_scale",
                "global_scale": "weight_scale_2",
                "input_scale": "input_scale",
            },
        ),
    }
)
CACHES: Mapping[CacheName, str] = MappingProxyType({"fp8": "FP8"})  # Model Optimizer's names
FORMAT_OF: Mapping[str, FormatName] = MappingProxyType(
    {
        algorithm: name
        for name, layout in LAYOUT.items()
        for algorithm in (layout.algorithm, layout.weights_only)
        if algorithm is not None
    }
)
"""Number format by algorithm."""
DECLARED: Mapping[str, str] = MappingProxyType(
    {
        layout.weights_only: layout.declared
        for layout in LAYOUT.values()
        if layout.weights_only and layout.declared
    }
)
"""Algorithm -> what files call it, where that is another one's name."""
READABLE = "FP8 per tensor, MXFP8 or NVFP4"  # in messages


def tensor_name(row: Row, kind: str) -> str:
    """Name in the written file of one part of a row (see ``Row.parts``)."""
    return row.name if row.format == "source" else f"{row.module}.{LAYOUT[row.format].suffix[kind]}"


@dataclass(frozen=True)
class Stored:
    """How one tensor of the model is stored in a file of this layout.

    Attributes:
        format: ``source`` or a number format.
        parts: names of its parts in the file, by kind.
        reciprocal: the kinds of which the file has 1 / value; none in this layout.
    """

    format: Literal["source", FormatName]
    parts: dict[str, str]
    reciprocal: frozenset[str] = frozenset()


def find_stored(tensors: Mapping[str, TensorInfo], spec: TensorSpec) -> Stored:
    """The reverse of ``tensor_name``: how the tensor ``spec`` is stored.

    It is derived from dtypes and shapes, whichever program wrote the file.

    Raises:
        CheckpointError: it is missing, or its parts are not those of a number format in this layout.
    """
    info = tensors.get(spec.name)
    if info is None:
        raise CheckpointError(f"{spec.name} is missing")
    format = stored_format(tensors, spec.module, info)
    expected: list[tuple[str, str, tuple[int, ...]]] = [("source", info.dtype, spec.shape)]
    names = {"source": spec.name}
    if format != "source":
        number, layout = FORMATS[format], LAYOUT[format]
        problem = number.indivisible(spec.shape)
        if problem:
            raise CheckpointError(f"{spec.name} is {info.dtype}: {problem}")
        expected = list(number.packed_tensors((spec.shape[0], spec.shape[1])))
        names = {kind: f"{spec.module}.{suffix}" for kind, suffix in layout.suffix.items()}
        if number.calibrated and names["input_scale"] in tensors:
            expected.append(("input_scale", "F32", ()))
    parts = {}
    for kind, dtype, shape in expected:
        name = names[kind]
        part = tensors.get(name)
        if part is None:
            raise CheckpointError(f"{name} is missing; {spec.name} is {info.dtype} and needs it")
        if dtype != part.dtype or (part.shape or (1,)) != (shape or (1,)):
            raise CheckpointError(
                f"{name} is {part.dtype} {list(part.shape)}, expected {dtype} {list(shape)}"
            )
        parts[kind] = name
    return Stored(format, parts)


def stored_format(
    tensors: Mapping[str, TensorInfo], module: str, weight: TensorInfo
) -> Literal["source", FormatName]:
    """The number format that a module's ``weight`` has, by its dtype and the block scales beside it.

    ``source`` where its dtype is that of no codes.
    """
    candidates = [name for name, number in FORMATS.items() if number.code_dtype == weight.dtype]
    for name in candidates:
        number, suffix = FORMATS[name], LAYOUT[name].suffix.get("block_scales")
        scales = tensors.get(f"{module}.{suffix}") if suffix else None
        if scales is None or number.block is None:
            continue
        blocks = (weight.shape[0], math.prod(weight.shape[1:]) * 8 // number.weight_bits // number.block)
        if number.scale_dtype == scales.dtype or scales.shape == blocks:  # one may be wrong, and is refused
            return name
    if not candidates:
        return "source"
    return next((name for name in candidates if FORMATS[name].block is None), candidates[0])


def weight_format(tensors: Mapping[str, TensorInfo], name: str) -> str:
    """What the tensor ``name``, a ``...weight``, is for people: its format's algorithm, or its dtype."""
    weight = tensors[name]
    format = stored_format(tensors, name.removesuffix(".weight"), weight)
    return weight.dtype if format == "source" else LAYOUT[format].algorithm


def kv_scale_name(module: str) -> str:
    """``....k_proj`` -> ``....k_proj.k_scale``."""
    return f"{module}.{KV_SUFFIX[module.rsplit('.', 1)[1]]}"


def algorithm(row: Row) -> str:
    """ModelOpt's name for the quantization of a row's module, or ours; "" where it is not quantized."""
    if row.format == "source":
        return ""
    layout = LAYOUT[row.format]
    if row.activation_format:
        return layout.algorithm
    assert layout.weights_only is not None  # a recipe leaves inputs alone only where the format admits it
    return layout.weights_only


def declared_name(algorithm: str) -> str:
    """What files call an algorithm."""
    return DECLARED.get(algorithm, algorithm)


def is_listed(algorithms: Collection[str]) -> bool:
    """Whether a file of these algorithms is ``MIXED``, its modules listed one by one.

    One that is W4A16_NVFP4 throughout is too: SGLang would run it as W4A4 on Blackwell, with an input scale
    of 1.0. With its modules listed, as in published files, it is right in every engine that loads it. A file
    of one declared name is not: SGLang takes a listed one without NVFP4 for another method.
    """
    names = {declared_name(name) for name in algorithms}
    return len(names) > 1 or any(name == LAYOUT[FORMAT_OF[name]].weights_only for name in names)


def quantization_sections(plan: Plan) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """``SECTION`` of config.json (None if nothing is quantized), and the whole ``LEGACY`` file.

    Names are those of the file; see ``beside.py``.
    """
    section, legacy = _sections(plan)
    patterns = tower_patterns(plan, _reads_no_patterns(plan))

    def in_files(declared: Mapping[str, Any], key: str) -> dict[str, Any]:
        result = _renamed(declared, *adding(plan.config.prefix))
        return result | {key: result[key] + patterns}

    legacy["quantization"] = in_files(legacy["quantization"], "exclude_modules")
    return None if section is None else in_files(section, "ignore"), legacy


def _sections(plan: Plan) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """The same by published names, without towers."""
    by_module = {row.module: algorithm(row) for row in plan.quantized}
    kinds = sorted(set(by_module.values()))
    kv = CACHES[plan.cache.name] if plan.cache is not None and plan.kv_layers else None
    ignore = excluded_modules(plan)
    producer = {"name": PRODUCER, "version": LAYOUT_VERSION}
    if not kinds:
        return None, {
            "producer": producer,
            "quantization": {"quant_algo": None, "kv_cache_quant_algo": kv, "exclude_modules": ignore},
        }
    mixed = is_listed(kinds)
    by_name = mixed or any(kind in DECLARED for kind in kinds)
    named = {"quant_algo": MIXED if mixed else declared_name(kinds[0])}
    layers = {module: _entry(kind) for module, kind in sorted(by_module.items())} if mixed else {}
    legacy: dict[str, Any] = {**named, "kv_cache_quant_algo": kv}
    if not mixed:
        legacy |= _group_size(kinds[0])
    legacy["exclude_modules"] = ignore
    section: dict[str, Any] = {
        "config_groups": {
            f"group_{i}": _group(kind)
            | {"targets": sorted(m for m, k in by_module.items() if k == kind) if by_name else ["Linear"]}
            for i, kind in enumerate(kinds)
        }
    }
    if mixed:
        legacy["quantized_layers"] = section["quantized_layers"] = layers
    else:  # in both files, or TensorRT-LLM warns
        section |= _group_size(kinds[0])
    section |= {"ignore": ignore, **named}
    if kv and plan.cache is not None:
        section["kv_cache_scheme"] = {"dynamic": False, "num_bits": plan.cache.bits, "type": "float"}
    section |= {"producer": producer, "quant_method": "modelopt"}
    return section, {"producer": producer, "quantization": legacy}


def _group_size(kind: str) -> dict[str, int]:
    size = FORMATS[FORMAT_OF[kind]].block
    return {} if size is None else {"group_size": size}


def _entry(kind: str) -> dict[str, Any]:
    return {"quant_algo": declared_name(kind), **_group_size(kind)}


def _group(kind: str) -> dict[str, Any]:
    bits = FORMATS[FORMAT_OF[kind]].weight_bits
    number = {"dynamic": False, "num_bits": bits, "type": "float", **_group_size(kind)}
    quantized = kind == LAYOUT[FORMAT_OF[kind]].algorithm
    return {"input_activations": number, "weights": number} if quantized else {"weights": number}


def excluded_modules(plan: Plan) -> list[str]:
    """Modules that are not quantized, by names that match nothing else in any engine.

    vLLM matches an entry as a substring too, so there are no layer prefixes (``layers.1`` would match 10
    to 19): whole module names, one for all experts of a layer. ``mtp*`` stands for the multi-token-prediction
    modules.
    """
    names: dict[str, None] = {}
    mtp = ["mtp*", "mtp"] if _reads_no_patterns(plan) else ["mtp*"]
    for row in plan.rows:
        if row.format != "source" or row.role in _UNNAMED:
            continue
        if row.role.startswith("mtp."):
            names |= dict.fromkeys(mtp)
        elif row.expert is not None:
            experts = experts_of(row.module)
            names[experts] = names[f"{experts}.*"] = None
        else:
            names[row.module.removesuffix(".bias")] = None
    return list(names)


def _reads_no_patterns(plan: Plan) -> bool:
    """Whether an engine reads exclusions of a plan's output without wildcards."""
    return any(row.format != "source" and LAYOUT[row.format].plain_exclusions for row in plan.quantized)


def config_files(plan: Plan, raw_config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Both config files by name, as JSON data; ``raw_config`` is the source's config.json."""
    section, legacy = quantization_sections(plan)
    return {
        "config.json": {**spelled_for_engines(raw_config), **({SECTION: section} if section else {})},
        LEGACY: legacy,
    }


def _renamed(declared: Mapping[str, Any], one: Rename, several: RenameAll) -> dict[str, Any]:
    """What ``SECTION``, or ``quantization`` of ``LEGACY``, declares, with other names of modules."""
    result = dict(declared)
    for key in ("ignore", "exclude_modules"):
        if isinstance(declared.get(key), list):
            result[key] = several(declared[key])
    layers, groups = declared.get("quantized_layers"), declared.get("config_groups")
    if isinstance(layers, dict):
        result["quantized_layers"] = {one(module): entry for module, entry in layers.items()}
    if isinstance(groups, dict):
        result["config_groups"] = {
            name: {**group, "targets": [one(target) for target in group["targets"]]}
            if isinstance(group, dict) and isinstance(group.get("targets"), list)
            else group
            for name, group in groups.items()
        }
    return result


def section_of(raw_config: Mapping[str, Any]) -> Any:
    """``SECTION`` of a config.json: at its top, or else where its language model stands, as engines look."""
    top = raw_config.get(SECTION)
    return language_model(raw_config).get(SECTION) if top is None else top


def spelled_for_engines(raw_config: Mapping[str, Any]) -> dict[str, Any]:
    """The source's config.json as all engines read it, or the section of it that has the language model.

    A ``quantization_config`` of null goes: a quantized output has its own, another one none.
    """
    raw_config = without_key(raw_config, SECTION)
    inner = {key: _spelled(raw_config[key]) for key in sections(raw_config)}
    return {**raw_config, **inner} if inner else _spelled(raw_config)


def _spelled(raw_config: Mapping[str, Any]) -> dict[str, Any]:
    """Other spellings of keys beside those that are there.

    A list of layers in the words of transformers 5.12 and later (``linear_attention``) becomes a pattern:
    SGLang 0.5.23 and transformers up to 5.11 refuse the words, even beside a pattern, and 5.14 refuses the
    older ones. ``{"__float__": "Infinity"}`` becomes a number.
    """
    config = {key: _numbers(value) for key, value in raw_config.items()}
    for listed, pattern in SCHEDULES.items():
        layers = raw_config.get(listed)
        if isinstance(layers, list) and layers != plain_value(layers):
            del config[listed]
            config.setdefault(pattern, layer_pattern(plain_value(layers)))
    if "num_hidden_layers" not in config and "hybrid_override_pattern" in config:
        config["num_hidden_layers"] = len(config["hybrid_override_pattern"])
    for key, theirs in SPELLINGS.items():
        if key in config:
            config.setdefault(theirs, config[key])
    return config


def _numbers(value: Any) -> Any:
    """A value of a key, or the list that it is, with numbers in place of ``{"__float__": ...}``."""
    if isinstance(value, list):
        return [_numbers(inner) for inner in value]
    return plain_value(value) if isinstance(value, dict) else value


def quantized_by(path: Path, raw_config: Mapping[str, Any]) -> str | None:
    """The evidence that a checkpoint, or the one of a bare config, is quantized, in words; None without."""
    for key in (SECTION, *_OTHER_SECTIONS):
        if raw_config.get(key) is not None or language_model(raw_config).get(key) is not None:
            return f"config.json has `{key}`"
    folder = path if path.is_dir() else path.parent
    return next((f"it has {name}" for name in (LEGACY, *_OTHER_FILES) if (folder / name).exists()), None)


def names_no_method(raw_config: Mapping[str, Any]) -> bool:
    """Whether there is a ``SECTION`` that does not say which tool's it is; ModelOpt's older ones do not."""
    section = section_of(raw_config)
    return isinstance(section, dict) and section.get("quant_method") is None


def other_method(path: Path, raw_config: Mapping[str, Any]) -> str | None:
    """The method of a quantized checkpoint where it is not ModelOpt's; None where it is, or none is named."""
    section = section_of(raw_config)
    method = section.get("quant_method") if isinstance(section, dict) else None
    if method is not None:
        return None if str(method).startswith(PRODUCER) else plain(method, MOST_NAME)
    if section is not None or (path / LEGACY).exists():
        return None
    found = [tool for key, tool in _OTHER_SECTIONS.items() if raw_config.get(key) is not None]
    found += [tool for name, tool in _OTHER_FILES.items() if (path / name).exists()]
    return found[0] if found else None


class _Listed(BaseModel):
    quant_algo: str | None = None
    group_size: int | None = None


class _Number(BaseModel):
    num_bits: Any = None
    group_size: int | None = None


class _Group(BaseModel):
    weights: _Number | None = None
    input_activations: _Number | None = None
    targets: list[str] | None = None


def _bounded(names: list[str]) -> list[str]:
    patterns = [name for name in names if has_wildcard(name)]
    wildcards = sum(pattern.count(mark) for pattern in patterns for mark in "*?[")
    if wildcards > MOST_WILDCARDS or any(len(pattern) > MOST_PATTERN for pattern in patterns):
        raise ValueError(
            f"its patterns have {wildcards:,} wildcards; expected at most {MOST_WILDCARDS:,}, and at most "
            f"{MOST_PATTERN} characters in a pattern"
        )
    return names


_Names = Annotated[list[str], AfterValidator(_bounded)]  # and patterns


class _Declared(BaseModel):
    """The keys of ``SECTION`` that are read here; there may be others, of this tool or another."""

    quant_algo: str | None = None
    quantized_layers: dict[str, _Listed] | None = None
    kv_cache_scheme: dict[str, Any] | str | None = None
    config_groups: dict[str, _Group | list[str]] | None = None  # a list: targets, by the name of a preset
    ignore: _Names | None = None


class _Legacy(BaseModel):
    """The keys of ``LEGACY`` that are read here."""

    quant_algo: str | None = None
    group_size: int | None = None
    quantized_layers: dict[str, _Listed] | None = None
    kv_cache_quant_algo: str | None = None
    exclude_modules: _Names | None = None


def declared_quantization(path: Path, raw: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint declares about its quantization; empty if nothing.

    It has the form of ``SECTION`` in config.json.

    Raises:
        CheckpointError: what it declares can't be read; names the key, what it held, and why.
    """
    declared, prefix = section_of(raw), prefix_of(raw)
    if declared is None or declared == {}:
        return _renamed(_legacy_quantization(path), *removing(prefix))
    _check(declared, _Declared, f"{path}: `{SECTION}` of its config")
    return _renamed(_told_apart(declared), *removing(prefix))


def _told_apart(declared: Mapping[str, Any]) -> dict[str, Any]:
    """The same, with our names for modules that are declared by another's: their group has no inputs."""
    ours = {theirs: name for name, theirs in DECLARED.items()}
    layers = dict(declared.get("quantized_layers") or {})
    for group in (declared.get("config_groups") or {}).values():
        if isinstance(group, dict) and group.get("weights") and group.get("input_activations") is None:
            for module in group.get("targets") or []:
                name = ours.get(layers.get(module, declared).get("quant_algo"))
                if name is not None:
                    layers[module] = {**layers.get(module, {}), "quant_algo": name}
    return {**declared, **({"quantized_layers": layers} if layers else {})}


def _check(data: object, schema: type[BaseModel], place: str) -> None:
    try:
        schema.model_validate(data, strict=True)
    except ValidationError as error:
        raise CheckpointError(
            f"{place} can't be read ({field_problem(error)}); expected what {READABLE} checkpoints have"
        ) from None


def declared_cache(quantization: Mapping[str, Any]) -> CacheFormat | None:
    """The KV cache's format in :func:`declared_quantization`; None if none that is known is declared."""
    cache = quantization.get("kv_cache_scheme")
    if not isinstance(cache, dict) or cache.get("type", "float") != "float":
        return None
    return next((known for known in CACHE_FORMATS.values() if cache.get("num_bits") == known.bits), None)


def unknown_cache(quantization: Mapping[str, Any]) -> str | None:
    """The KV cache in :func:`declared_quantization`, as JSON, where its format is none that is known."""
    cache = quantization.get("kv_cache_scheme")
    return None if cache is None or declared_cache(quantization) is not None else json.dumps(cache)[:200]


def _legacy_quantization(path: Path) -> dict[str, Any]:
    """What ``LEGACY`` declares, in the form of ``SECTION``; for checkpoints whose config.json has none."""
    legacy = _read_legacy(path)
    if not legacy:
        return {}
    algorithm = legacy.get("kv_cache_quant_algo")
    return {
        "quant_algo": legacy.get("quant_algo"),
        "quantized_layers": legacy.get("quantized_layers"),
        "kv_cache_scheme": _scheme(algorithm),
    }


def _scheme(algorithm: Any) -> Any:
    """``kv_cache_scheme`` for the name of a cache in ``LEGACY``; an unknown name, and none, as it is."""
    known = {theirs: {"num_bits": CACHE_FORMATS[name].bits} for name, theirs in CACHES.items()}
    return known.get(algorithm, algorithm)


def _read_legacy(path: Path) -> Mapping[str, Any]:
    """``quantization`` of ``LEGACY``; empty where there is no such file."""
    file = path / LEGACY
    try:
        content = read_json(file, MOST_SETTINGS)
    except (FileNotFoundError, NotADirectoryError):  # no such file, or ``path`` is a bare config
        return {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}); expected JSON with `quantization`") from None
    legacy: Any = content.get("quantization") if isinstance(content, dict) else None
    _check(legacy, _Legacy, f"{file}: `quantization`")
    return dict(legacy)


def declared_algorithm(declared: Mapping[str, Any]) -> Any:
    """The algorithm of the whole checkpoint in :func:`declared_quantization`; None if there is none."""
    return declared.get("quant_algo")


def _listed(declared: Mapping[str, Any], module: str) -> Mapping[str, Any] | None:
    """The entry of a module that :func:`declared_quantization` lists by its name."""
    entry = (declared.get("quantized_layers") or {}).get(module)
    return entry if isinstance(entry, dict) else None


def listed_algorithm(declared: Mapping[str, Any], module: str) -> str | None:
    """The algorithm that :func:`declared_quantization` lists for a module by its name; None if none."""
    entry = _listed(declared, module)
    return None if entry is None else str(declared_algorithm(entry))


def module_algorithm(declared: Mapping[str, Any], module: str) -> Any:
    """The algorithm of one module in :func:`declared_quantization`; None if there is none for it."""
    entry = _listed(declared, module)
    algorithm = declared_algorithm(declared if entry is None else entry)
    return None if algorithm == MIXED else algorithm


def contradictions(
    path: Path, raw: Mapping[str, Any], formats: Mapping[str, Literal["source", FormatName]]
) -> list[str]:
    """What the config files declare against each other or against the tensors; engines read one of them.

    What one of them leaves out is no contradiction.

    Args:
        formats: module of a GEMM -> the format of its weight in the file.
    Returns:
        a phrase for each.
    """
    removed = removing(prefix_of(raw))
    section, legacy = (_renamed(d, *removed) for d in (section_of(raw) or {}, _read_legacy(path)))
    quantized = {module: format for module, format in formats.items() if format != "source"}
    ignored = _excluded(formats, section.get("ignore") or [])
    older = _excluded(formats, legacy.get("exclude_modules") or [])
    found = _disagreements(section, legacy) if section and legacy else []
    if section.get("ignore") is not None and legacy.get("exclude_modules") is not None:
        differing = [module for module in formats if (module in ignored) != (module in older)]
        if differing:
            found.append(f"only one of config.json and {LEGACY} excludes {listing(differing)}")
    for file, key, excluded in (("config.json", "ignore", ignored), (LEGACY, "exclude_modules", older)):
        wrong = [module for module in quantized if module in excluded]
        if wrong:
            found.append(f"{file} excludes in `{key}` modules that are quantized: {listing(wrong)}")
    for where, sizes, blocks in _group_sizes(section, legacy, quantized):
        wrong_sizes = sorted({size for size in sizes if size is not None} - blocks)
        if wrong_sizes and None not in blocks:
            found.append(
                f"{where} has the group_size {listing(wrong_sizes)}, its tensors have blocks of "
                f"{listing(sorted(blocks))}"
            )
    return found


def _disagreements(section: Mapping[str, Any], legacy: Mapping[str, Any]) -> list[str]:
    """Where both files declare something, and not the same."""
    found = []
    ours, theirs = section.get("quant_algo"), legacy.get("quant_algo")
    if "quant_algo" in section and "quant_algo" in legacy and ours != theirs:
        found.append(f"config.json declares the algorithm {ours}, {LEGACY} {theirs}")
    layers, older = section.get("quantized_layers"), legacy.get("quantized_layers")
    if layers and older:
        algorithms = [
            {module: entry.get("quant_algo") for module, entry in listed.items()}
            for listed in (layers, older)
        ]
        differing = sorted(
            module
            for module in algorithms[0].keys() | algorithms[1].keys()
            if algorithms[0].get(module) != algorithms[1].get(module)
        )
        if differing:
            found.append(f"config.json and {LEGACY} list other algorithms for {listing(differing)}")
    cache = declared_cache(section)
    if cache is not None and "kv_cache_quant_algo" in legacy:
        name = legacy["kv_cache_quant_algo"]
        if name != CACHES[cache.name]:
            found.append(f"config.json declares a KV cache of {CACHES[cache.name]}, {LEGACY} {name}")
    return found


def _excluded(modules: Iterable[str], patterns: Collection[str]) -> set[str]:
    """The names that are excluded: itself, by a pattern with wildcards, or with all that is below a name."""
    names = set(patterns)
    wild = re.compile("|".join(translate(p) for p in names if has_wildcard(p)) or r"(?!)")
    return {
        module
        for module in modules
        if module in names
        or any(module[: dot.start()] in names for dot in re.finditer(r"\.", module))
        or wild.match(module)
    }


def _group_sizes(
    section: Mapping[str, Any], legacy: Mapping[str, Any], quantized: Mapping[str, FormatName]
) -> Iterator[tuple[str, list[int | None], set[Any]]]:
    """Each place that declares sizes of groups: its name, the sizes, and the blocks that are in the file.

    Of a format without blocks nothing is said: None is among the blocks then.
    """
    present = set(quantized.values())
    if len(present) == 1:
        yield LEGACY, [legacy.get("group_size")], {FORMATS[name].block for name in present}
    for name, group in (section.get("config_groups") or {}).items():
        if isinstance(group, list):  # a preset's name says no size here
            continue
        for key in ("weights", "input_activations"):
            number = group.get(key) or {}
            blocks = {FORMATS[f].block for f in present if FORMATS[f].weight_bits == number.get("num_bits")}
            if blocks:
                yield f"config.json, {name}.{key}", [number.get("group_size")], blocks
    for file, layers in (("config.json", section), (LEGACY, legacy)):
        by_format: dict[FormatName, list[int | None]] = {}
        for module, entry in (layers.get("quantized_layers") or {}).items():
            if module in quantized:
                by_format.setdefault(quantized[module], []).append(entry.get("group_size"))
        for format, sizes in by_format.items():
            yield f"{file}, `quantized_layers` of {LAYOUT[format].algorithm}", sizes, {FORMATS[format].block}
