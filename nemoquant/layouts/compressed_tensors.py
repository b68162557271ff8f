"""The compressed-tensors layout (llm-compressor, vLLM, transformers), written and read: names and config.

These names are in no other file. Scales of a whole tensor have shape [1]; those of NVFP4 are reciprocals,
where ours are decode scales:

    ours            FP8             MXFP8           NVFP4
    codes           weight          weight          weight_packed         (two a byte, the even column low)
    block_scales                    weight_scale    weight_scale          (MXFP8: U8, E8M0; NVFP4: F8_E4M3)
    global_scale    weight_scale                    weight_global_scale   (FP8: BF16, F16 or F32; NVFP4: F32)
    input_scale     input_scale                     input_global_scale    (as the line above)
    K, V cache      mixer.k_scale, mixer.v_scale

What the config says of modules it says by patterns, ``targets`` and ``ignore``; here they are resolved into
what ``modelopt.py`` declares, an algorithm for each module. The source is the package compressed-tensors 0.20
(``quantization/quant_scheme.py``, ``utils/match.py``, ``compressors/``), which tests compare with.
"""

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ValidationError

from nemoquant.checkpoint.header import TensorInfo
from nemoquant.errors import CheckpointError, brief, field_problem, listing
from nemoquant.formats import FORMATS, FormatName
from nemoquant.layouts.beside import MOST_PATTERN
from nemoquant.layouts.modelopt import LAYOUT, MIXED, SECTION, Stored, section_of
from nemoquant.model import names
from nemoquant.model.roles import TensorSpec

METHOD = "compressed-tensors"
READABLE = (
    "FP8 per tensor with static input scales, MXFP8, NVFP4, or FP8 or NVFP4 weights only"  # in messages
)
SCALE_DTYPES = ("BF16", "F16", "F32")  # of FP8's scales: that of the model which they were made in
REGEX = "re:"  # begins a target that is a regular expression; others are names, or classes of modules
LINEAR = "Linear"  # the class of every projection
MOST_REGEXES = 64  # of one config: each is tried on every module
# Repeats that a regular expression may have before its end: three would take a minute on a name made for it.
MOST_REPEATS, MOST_GROUPS = 2, 2
KV_SUFFIX = {"k_proj": "k_scale", "v_proj": "v_scale"}


class _Numbers(BaseModel):
    """How weights, or inputs, are quantized; the defaults are compressed-tensors' own."""

    num_bits: int = 8
    type: str = "int"
    symmetric: bool = True
    group_size: int | None = None
    strategy: str | None = None
    dynamic: bool | str = False

    @property
    def kind(self) -> tuple[str, int, str, int | None, bool | str]:
        """What tells one scheme from another: type, bits, strategy, group, static or not."""
        implied = "tensor" if not self.group_size else "group" if self.group_size > 0 else "channel"
        strategy = self.strategy or implied
        return (
            self.type,
            self.num_bits,
            strategy,
            self.group_size if "group" in strategy else None,
            self.dynamic,
        )

    def __str__(self) -> str:
        kind, bits, strategy, group, dynamic = self.kind
        words = [f"{brief(kind)[1:-1]}{bits} by {brief(strategy)[1:-1]}", f"of {group}" if group else ""]
        words += ["asymmetric" * (not self.symmetric), "at run time" * bool(dynamic)]
        return " ".join(filter(None, words))


def _bounded(patterns: list[str]) -> list[str]:
    """Refuse what could take for ever to match: these patterns come from a file."""
    regexes = [text.removeprefix(REGEX) for text in patterns if text.startswith(REGEX)]
    if len(regexes) > MOST_REGEXES:
        raise ValueError(f"it has {len(regexes):,} regular expressions; expected at most {MOST_REGEXES}")
    for text in regexes:
        bare = re.sub(r"\.[*+]\$?$", "", text).replace("(?:", "(")
        repeats, groups = (len(re.findall(rf"(?<!\\)[{marks}]", bare)) for marks in ("*+{?", "("))
        hard = re.search(r"\)[*+{?]|\(\?|\\\d", bare)
        if len(text) > MOST_PATTERN or repeats > MOST_REPEATS or groups > MOST_GROUPS or hard:
            raise ValueError(
                f"the regular expression {brief(text)} is not plain; expected at most {MOST_PATTERN} "
                f"characters, {MOST_REPEATS} repeats before its end and {MOST_GROUPS} groups, not repeated"
            )
        try:
            re.compile(text)
        except re.error as error:
            raise ValueError(f"{brief(text)} is no regular expression ({error})") from None
    return patterns


_Patterns = Annotated[list[str], AfterValidator(_bounded)]


class _Scheme(BaseModel):
    targets: _Patterns
    weights: _Numbers | None = None
    input_activations: _Numbers | None = None
    output_activations: _Numbers | None = None
    format: str | None = None

    def __str__(self) -> str:
        """The scheme in words, for messages."""
        inputs = (
            "inputs not quantized" if self.input_activations is None else f"inputs {self.input_activations}"
        )
        outputs = "" if self.output_activations is None else f", outputs {self.output_activations}"
        return f"weights {self.weights or 'not quantized'}, {inputs}{outputs}"


class _Section(BaseModel):
    """The keys of ``SECTION`` that are read here."""

    config_groups: dict[str, _Scheme]
    ignore: _Patterns | None = None
    kv_cache_scheme: dict[str, Any] | None = None
    sparsity_config: dict[str, Any] | None = None


@dataclass(frozen=True)
class Parts:
    """What this layout has for a number format.

    Attributes:
        format: its name in the config.
        weights, inputs: see ``_Numbers.kind``.
        suffix: of the names of a module's parts, by kind.
        reciprocal: whether scales of the whole tensor are stored as 1 / scale.
        scalars: dtypes that they may have.
    """

    format: str
    weights: tuple[str, int, str, int | None, bool | str]
    inputs: tuple[str, int, str, int | None, bool | str]
    suffix: Mapping[str, str]
    reciprocal: bool = False
    scalars: tuple[str, ...] = ("F32",)


LAYOUTS: Mapping[FormatName, Parts] = MappingProxyType(
    {
        "fp8": Parts(
            "float-quantized",
            weights=("float", 8, "tensor", None, False),
            inputs=("float", 8, "tensor", None, False),
            suffix={"codes": "weight", "global_scale": "weight_scale", "input_scale": "input_scale"},
            scalars=SCALE_DTYPES,
        ),
        "mxfp8": Parts(
            "mxfp8-quantized",
            weights=("float", 8, "group", 32, False),
            inputs=("float", 8, "group", 32, True),
            suffix={"codes": "weight", "block_scales": "weight_scale"},
        ),
        "nvfp4": Parts(
            "nvfp4-pack-quantized",
            weights=("float", 4, "tensor_group", 16, False),
            inputs=("float", 4, "tensor_group", 16, "local"),
            suffix={
                "codes": "weight_packed",
                "block_scales": "weight_scale",
                "global_scale": "weight_global_scale",
                "input_scale": "input_global_scale",
            },
            reciprocal=True,
        ),
    }
)


def is_in(raw_config: Mapping[str, Any]) -> bool:
    """Whether a config.json declares this layout."""
    section = section_of(raw_config)
    return isinstance(section, dict) and section.get("quant_method") == METHOD


def kv_scale_name(module: str) -> str:
    """``....mixer.k_proj`` -> ``....mixer.k_scale``."""
    return f"{names.mixer_of(module)}{KV_SUFFIX[module.rsplit('.', 1)[1]]}"


def _algorithm(scheme: _Scheme) -> str | None:
    """The algorithm of a group, in ModelOpt's terms; None if it is none that can be decoded."""
    weights, inputs = scheme.weights, scheme.input_activations
    plain = all(numbers is None or numbers.symmetric for numbers in (weights, inputs))
    if weights is None or not plain or scheme.output_activations is not None:
        return None
    for name, parts in LAYOUTS.items():
        if weights.kind != parts.weights:
            continue
        if inputs is None:
            return LAYOUT[name].weights_only
        return LAYOUT[name].algorithm if inputs.kind == parts.inputs else None
    return None


def _read(path: Path, raw: Mapping[str, Any]) -> _Section:
    place = f"{path}: `{SECTION}` of its config"
    try:
        section = _Section.model_validate(section_of(raw), strict=True)
    except ValidationError as error:
        raise CheckpointError(
            f"{place} can't be read ({field_problem(error)}); expected what {METHOD} writes"
        ) from None
    regexes = sum(
        text.startswith(REGEX)
        for patterns in (section.ignore or [], *(scheme.targets for scheme in section.config_groups.values()))
        for text in patterns
    )
    if regexes > MOST_REGEXES:
        raise CheckpointError(f"{place} has {regexes:,} regular expressions; expected at most {MOST_REGEXES}")
    return section


def describe(path: Path, raw: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The quantization for people: its algorithms, or the schemes that are none of ours, in words.

    With it what is declared about the cache, in the form of :func:`declared_quantization`.
    """
    section = _read(path, raw)
    schemes = section.config_groups.values()
    found = dict.fromkeys(_algorithm(scheme) or str(scheme) for scheme in schemes)
    return f"{METHOD}: {'; '.join(found)}", {"kv_cache_scheme": section.kv_cache_scheme}


def declared_quantization(path: Path, raw: Mapping[str, Any], modules: Iterable[str]) -> dict[str, Any]:
    """What a checkpoint declares of its quantization, in the form of ``modelopt.declared_quantization``.

    Args:
        modules: the projections that could be quantized, by their published names.
    Raises:
        CheckpointError: the config can't be read, or has a scheme that can't be decoded; names the scheme.
    """
    section = _read(path, raw)
    algorithms: dict[str, str] = {}
    for name, scheme in section.config_groups.items():
        algorithm = _algorithm(scheme)
        if algorithm is None:
            raise CheckpointError(
                f"{path}: {brief(name)} of its {METHOD} config is {scheme}; expected {READABLE}"
            )
        algorithms[name] = algorithm
    cache = section.kv_cache_scheme
    if cache is not None and (cache.get("strategy") != "tensor" or cache.get("dynamic")):
        raise CheckpointError(
            f"{path}: its KV cache has scales by {brief(cache.get('strategy'))}"
            f"{', found at run time' if cache.get('dynamic') else ''}; expected a stored one a tensor"
        )
    if section.sparsity_config and section.sparsity_config.get("format") not in (None, "dense"):
        raise CheckpointError(f"{path}: its {METHOD} config has sparse weights; expected dense ones")
    ignored = _Matcher(section.ignore or [])
    groups = [(algorithms[name], _Matcher(scheme.targets)) for name, scheme in section.config_groups.items()]
    layers = {}
    for module in modules:
        if not ignored.level(module):
            level, algorithm = max(
                ((targets.level(module), algorithm) for algorithm, targets in groups),
                key=lambda found: found[0],
                default=(0, ""),
            )
            if level:
                layers[module] = {"quant_algo": algorithm}
    return {"quant_algo": MIXED, "quantized_layers": layers, "kv_cache_scheme": cache}


class _Matcher:
    """A list of patterns: names, regular expressions, classes of modules."""

    def __init__(self, patterns: list[str]) -> None:
        self._names = set(patterns)
        regexes = [text.removeprefix(REGEX) for text in patterns if text.startswith(REGEX)]
        self._regex = re.compile("|".join(f"(?:{text})" for text in regexes) or r"(?!)")

    def level(self, module: str) -> int:
        """How closely a module is meant: 3 by its name, 2 by an expression, 1 by its class, 0 not at all.

        Its name may begin with ``model.`` instead of ``backbone.``: transformers and vLLM call it so.
        """
        spellings = {module, names.in_transformers(module)}
        if spellings & self._names:
            return 3
        if any(self._regex.match(spelling) for spelling in spellings):
            return 2
        return int(LINEAR in self._names)


def contradictions(
    path: Path, raw: Mapping[str, Any], formats: Mapping[str, Literal["source", FormatName]]
) -> list[str]:
    """What the config declares against the tensors: modules that are quantized and not meant by it.

    Args:
        formats: module of a GEMM -> the format of its weight in the file.
    """
    listed = declared_quantization(path, raw, formats)["quantized_layers"]
    lost = [module for module, format in formats.items() if format != "source" and module not in listed]
    return [
        f"config.json targets no such module, or ignores it, and it is quantized: {listing(lost)}"
    ] * bool(lost)


def _format_of(tensors: Mapping[str, TensorInfo], module: str) -> FormatName | None:
    """The number format of a module's parts, by the names and dtypes of its codes and block scales."""
    for name, parts in LAYOUTS.items():
        codes = tensors.get(f"{module}.{parts.suffix['codes']}")
        kind = "block_scales" if FORMATS[name].block else "global_scale"
        scales = tensors.get(f"{module}.{parts.suffix[kind]}")
        dtypes = (FORMATS[name].scale_dtype,) if FORMATS[name].block else parts.scalars
        if codes is None or scales is None:
            continue
        if codes.dtype == FORMATS[name].code_dtype and scales.dtype in dtypes:
            return name
    return None


def find_stored(tensors: Mapping[str, TensorInfo], spec: TensorSpec) -> Stored:
    """How the tensor ``spec`` is stored in a file of this layout.

    Raises:
        CheckpointError: it is missing, or its parts are not those of a number format in this layout.
    """
    format = _format_of(tensors, spec.module)
    if format is None:
        return _plain(tensors, spec)
    number, layout = FORMATS[format], LAYOUTS[format]
    problem = number.indivisible(spec.shape)
    if problem:
        raise CheckpointError(f"{spec.name}: {problem}")
    suffix = {kind: f"{spec.module}.{end}" for kind, end in layout.suffix.items()}
    expected: list[tuple[str, tuple[str, ...], tuple[int, ...]]] = [
        (kind, layout.scalars if kind == "global_scale" else (dtype,), shape)
        for kind, dtype, shape in number.packed_tensors((spec.shape[0], spec.shape[1]))
    ]
    if suffix.get("input_scale") in tensors:
        expected.append(("input_scale", layout.scalars, ()))
    parts: dict[str, str] = {}
    for kind, dtypes, shape in expected:
        name = suffix[kind]
        part = tensors.get(name)
        if part is None:
            raise CheckpointError(f"{name} is missing; {spec.name} is quantized and needs it")
        if part.dtype not in dtypes or (part.shape or (1,)) != (shape or (1,)):
            raise CheckpointError(
                f"{name} is {part.dtype} {list(part.shape)}, expected {' or '.join(dtypes)} "
                f"{list(shape or (1,))}"
            )
        parts[kind] = name
    scalars = frozenset(parts) & {"global_scale", "input_scale"}
    return Stored(format, parts, scalars if layout.reciprocal else frozenset())


def _plain(tensors: Mapping[str, TensorInfo], spec: TensorSpec) -> Stored:
    info = tensors.get(spec.name)
    if info is None:
        packed = [name for name in (f"{spec.name}_packed",) if name in tensors]
        what = f"{packed[0]} is {tensors[packed[0]].dtype}" if packed else f"{spec.name} is missing"
        raise CheckpointError(what)
    if info.shape != spec.shape:
        raise CheckpointError(f"{spec.name} is {info.dtype} {list(info.shape)}, expected {list(spec.shape)}")
    return Stored("source", {"source": spec.name})


def weight_format(tensors: Mapping[str, TensorInfo], name: str) -> str | None:
    """What a module's weight is, for people: the algorithm of its format, or its dtype; None for other parts.

    Args:
        name: of any tensor in the file.
    """
    module, _, end = name.rpartition(".")
    if end not in ("weight", "weight_packed"):
        return None
    format = _format_of(tensors, module)
    scale = tensors.get(f"{module}.weight_scale")
    if format is None:
        return tensors[name].dtype
    if FORMATS[format].block is None and scale is not None and math.prod(scale.shape) > 1:
        return f"{LAYOUT[format].algorithm} by {'channel' if scale.shape[1:] == (1,) else 'block'}"
    return LAYOUT[format].algorithm


def section(
    quantized: Collection[str], weights_only: Collection[str], plain: Collection[str], format: FormatName
) -> dict[str, Any]:
    """``SECTION`` of config.json for a checkpoint whose modules have one format.

    transformers fuses experts and vLLM fuses q, k and v, both under names that begin with ``model.``: so
    modules are meant by the end of their names. What is of another kind in some layers only is named layer by
    layer.

    Args:
        quantized, weights_only, plain: modules with a weight, by their published names: those whose inputs
            are quantized too, those whose are not, and of the others those that an engine could take for a
            projection.
    Raises:
        CheckpointError: experts of one layer are of several kinds, or multi-token prediction is quantized.
    """
    parts = LAYOUTS[format]
    ends = {_end(module) for module in quantized}
    whole = {_end(module) for module in weights_only}
    patterns: dict[str, None] = {}
    for module in plain:
        if names.is_mtp(module):
            patterns[f"{REGEX}^mtp.*"] = None
        elif _end(module) not in ends | whole:
            patterns[f"{REGEX}.*{_end(module)}$"] = None
        else:
            patterns[f"{REGEX}.*{_end(module, with_layer=True)}$"] = None
    _check_sections(quantized, weights_only, plain)
    groups = {
        f"group_{i}": {
            "targets": sorted({f"{REGEX}.*{_end(m, with_layer=_end(m) in ends & whole)}$" for m in modules}),
            "weights": _written(parts.weights),
            "input_activations": inputs,
            "output_activations": None,
            "format": parts.format,
        }
        for i, (modules, inputs) in enumerate(
            (modules, inputs)
            for modules, inputs in ((quantized, _written(parts.inputs)), (weights_only, None))
            if modules
        )
    }
    return {
        "quant_method": METHOD,
        "format": parts.format,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": list(patterns),
    }


def _end(module: str, *, with_layer: bool = False) -> str:
    """A regular expression for the end of a module's name, of all routed experts of a layer at once."""
    whole = names.experts_of(module) if names.is_expert(module) else module
    end = whole.rpartition(names.MIXER)[2] if names.MIXER in whole else whole
    if names.MIXER in whole:
        end = names.MIXER + end
        if with_layer:
            end = f"{'.'.join(whole.split('.')[1:3])}.{end}"
    return re.escape(end) + (r"\..*" if names.is_expert(module) else "")


def _check_sections(
    quantized: Collection[str], weights_only: Collection[str], plain: Collection[str]
) -> None:
    mtp = [module for module in (*quantized, *weights_only) if names.is_mtp(module)]
    if mtp:
        raise CheckpointError(
            f"{len(mtp)} multi-token-prediction modules are quantized ({listing(mtp)}); expected none: "
            f"transformers drops them, and vLLM was not looked at"
        )
    kinds = Counter(
        experts
        for modules in (quantized, weights_only, plain)
        for experts in {names.experts_of(module) for module in modules if names.is_expert(module)}
    )
    several = sorted(experts for experts, count in kinds.items() if count > 1)
    if several:
        raise CheckpointError(
            f"only some experts of {listing(several)} are quantized, or have quantized inputs; expected all "
            f"of a layer or none: engines run them as one operation"
        )


def _written(kind: tuple[str, int, str, int | None, bool | str]) -> dict[str, Any]:
    type_, bits, strategy, group, dynamic = kind
    numbers = {"num_bits": bits, "type": type_, "symmetric": True, "strategy": strategy, "dynamic": dynamic}
    return numbers if group is None else numbers | {"group_size": group}


def tensor_names(module: str, format: FormatName) -> dict[str, str]:
    """Names in the written file of the parts of a quantized module, by kind."""
    return {kind: f"{module}.{end}" for kind, end in LAYOUTS[format].suffix.items()}
