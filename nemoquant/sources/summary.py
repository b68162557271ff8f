"""The figures that ``inspect`` shows: from the config, and from headers if there are any."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nemoquant.checkpoint.header import ITEM_SIZE, TensorInfo
from nemoquant.checkpoint.intact import open_settings
from nemoquant.checkpoint.reader import Checkpoint
from nemoquant.checkpoint.towers import beside_unknown, parts, towers
from nemoquant.errors import CheckpointError, TensorTableError, listing
from nemoquant.layouts.choose import Reading, described, is_read
from nemoquant.layouts.modelopt import quantized_by
from nemoquant.model.config import NemotronHConfig
from nemoquant.model.kinds import KINDS, kv_values_per_token, ssm_state_bytes
from nemoquant.model.names import is_mtp
from nemoquant.model.nested import TOWER, sections
from nemoquant.model.parse import layer_pattern, load_config, parse_config
from nemoquant.model.roles import TensorSpec, tensor_table
from nemoquant.sources.fitting import fit
from nemoquant.sources.source import FLOAT_DTYPES


def summarize(path: Path, context: int | None) -> dict[str, Any]:
    """See :func:`nemoquant.inspect`."""
    open_settings(path)
    config, raw = load_config(path)
    table = tensor_table(config)
    layout, quantization, cache = described(path, raw)
    if path.is_dir():
        with Checkpoint(path) as checkpoint:
            stored = [(t.dtype, t.nbytes) for t in checkpoint.tensors.values()]
            beside = towers(config, checkpoint.tensors)
            apart = {spec.name for spec in beside}
            tensors = {name: t for name, t in checkpoint.tensors.items() if name not in apart}
            labels = [(t.dtype, layout.weight_format(tensors, name)) for name, t in tensors.items()]
            weights = Counter((dtype, label) for dtype, label in labels if label is not None)
            undeclared = quantization is None and {d for d, _ in weights} - set(FLOAT_DTYPES)
            if undeclared:
                quantization = f"none declared, but weights are {listing(sorted(undeclared))}"
            if quantization is None:
                config, table, warnings = _fitted(path, raw, checkpoint)
                table = [spec for spec in table if spec.role != TOWER]
            else:
                warnings = list(_not_stored(path, raw, table, layout, tensors))
    else:
        beside = []
        weights = Counter((spec.dtype, spec.dtype) for spec in table if spec.name.endswith(".weight"))
        stored = [(spec.dtype, math.prod(spec.shape) * ITEM_SIZE[spec.dtype]) for spec in table]
        evidence = quantized_by(path, raw)
        warnings = [*beside_unknown(config)]
        warnings += [f"bytes and dtypes are those of the bf16 model, not of this one: {evidence}"] * bool(
            evidence
        )
    sizes = [math.prod(spec.shape) for spec in table]
    main = [(spec, n) for spec, n in zip(table, sizes, strict=True) if not spec.role.startswith("mtp.")]
    per_token = kv_values_per_token(config) * (16 if cache is None else cache.bits) // 8
    tokens = context or config.max_position_embeddings
    counts, bytes_by_dtype = Counter(d for d, _ in stored), Counter[str]()
    for dtype, size in stored:
        bytes_by_dtype[dtype] += size
    return {
        "source": "headers" if path.is_dir() else "the config alone (dtypes assumed)",
        "layers": {
            "total": len(config.layers),
            "kinds": dict(Counter(config.layers)),
            "pattern": layer_pattern(config.layers),
            "mtp_modules": config.mtp_modules,
            "mtp_pattern": layer_pattern(config.mtp_layers),
            "sizes": _own_sizes(config),
        },
        "parameters": sum(sizes),
        "parameters_without_mtp": sum(n for _, n in main),
        "active_parameters": sum(_active(config, spec, n) for spec, n in main),
        "tensors": len(stored),
        "bytes": sum(size for _, size in stored),
        "dtypes": {d: {"tensors": counts[d], "bytes": bytes_by_dtype[d]} for d in sorted(counts)},
        "beside": _beside(config, raw, beside),
        "quantization": quantization,
        "warnings": warnings,
        "weights": {label: weights[dtype, label] for dtype, label in sorted(weights)},
        "kv_cache": {"bytes_per_token": per_token, "context": tokens, "bytes_at_context": per_token * tokens},
        "ssm_state_bytes_per_sequence": ssm_state_bytes(config),
    }


def _beside(config: NemotronHConfig, raw: dict[str, Any], beside: list[TensorSpec]) -> dict[str, Any] | None:
    """Where the language model stands in the config, and what there is beside it; None of one alone."""
    if not config.prefix:
        return None
    nbytes = sum(math.prod(spec.shape) * ITEM_SIZE[spec.dtype] for spec in beside)
    return {"section": sections(raw)[0], "tensors": len(beside), "bytes": nbytes, "parts": parts(beside)}


def _own_sizes(config: NemotronHConfig) -> dict[str, dict[str, int]]:
    """Sizes in which layers of a kind differ: ``moe_intermediate_size`` -> the number of layers with each."""
    found: dict[str, Counter[str]] = {}
    for field in sorted({field for sizes in config.layer_sizes for field, _ in sizes}):
        for i, kind in enumerate(config.layers):
            if field in KINDS[kind].sizes:
                value = getattr(config.of_layer(i), field)
                found.setdefault(field, Counter())[str(value)] += 1
    return {field: dict(counts) for field, counts in found.items()}


def _fitted(
    path: Path, raw: dict[str, Any], checkpoint: Checkpoint
) -> tuple[NemotronHConfig, list[TensorSpec], list[str]]:
    """Config, table and warnings of what is not quantized; where tensors don't fit, of the config alone."""
    try:
        fitted = fit(path, raw, checkpoint)
    except TensorTableError as error:
        config = parse_config(raw)
        return config, tensor_table(config), [f"parameters are those of the config: {error}"]
    return fitted.config, fitted.table, fitted.warnings


def _not_stored(
    path: Path,
    raw: dict[str, Any],
    table: list[TensorSpec],
    layout: Reading,
    tensors: Mapping[str, TensorInfo],
) -> Iterator[str]:
    """What a quantized checkpoint lacks of the tensors that its config calls for."""
    if not is_read(path, raw):
        yield "no tensor was compared with the config: the layout is not read here"
        return
    missing, known = [], {layout.kv_scale_name(module) for module in _kv_modules(table)}
    for spec in table:
        try:
            stored = layout.find_stored(tensors, spec)
        except CheckpointError:
            missing.append(spec.name)
            continue
        known |= set(stored.parts.values())
        if stored.format == "source" and tensors[spec.name].dtype not in FLOAT_DTYPES:
            missing.append(spec.name)
    predictors = [name for name in missing if is_mtp(name)]
    others = [name for name in missing if not is_mtp(name)]
    if others:
        yield (
            f"{len(others):,} tensors that its config calls for are not there, or not as {layout.expected}: "
            f"{listing(others)}"
        )
    if predictors:
        yield f"{len(predictors):,} tensors of multi-token prediction are not there"
    known |= {
        name
        for name in tensors
        if name.startswith(tuple(f"{name.removesuffix('.weight')}." for name in missing))
    }
    extra = [name for name in tensors if name not in known]
    if extra:
        yield f"{len(extra):,} tensors are there that its config has no use for: {listing(extra)}"


def _kv_modules(table: list[TensorSpec]) -> Iterator[str]:
    return (spec.module for spec in table if spec.role in ("attention.k_proj", "attention.v_proj"))


def _active(config: NemotronHConfig, spec: TensorSpec, elements: int) -> int:
    """Parameters of the main model that one token uses: of routed experts, the share of the top k."""
    if spec.expert is None or spec.layer is None:
        return elements
    own = config.of_layer(spec.layer)
    return elements * own.num_experts_per_tok // own.n_routed_experts
