"""The figures that ``inspect`` shows: from the config, and from headers if there are any."""

import math
from collections import Counter
from pathlib import Path
from typing import Any

from nemoquant.checkpoint.header import ITEM_SIZE
from nemoquant.checkpoint.intact import open_settings
from nemoquant.checkpoint.reader import Checkpoint
from nemoquant.layouts.choose import described
from nemoquant.model.config import NemotronHConfig
from nemoquant.model.kinds import KINDS, kv_values_per_token, ssm_state_bytes
from nemoquant.model.parse import layer_pattern, load_config
from nemoquant.model.roles import TensorSpec, tensor_table


def summarize(path: Path, context: int | None) -> dict[str, Any]:
    """See :func:`nemoquant.inspect`."""
    open_settings(path)
    config, raw = load_config(path)
    table = tensor_table(config)
    layout, quantization, cache = described(path, raw)
    if path.is_dir():
        with Checkpoint(path) as checkpoint:
            stored = [(t.dtype, t.nbytes) for t in checkpoint.tensors.values()]
            tensors = checkpoint.tensors
            labels = [(t.dtype, layout.weight_format(tensors, name)) for name, t in tensors.items()]
            weights = Counter((dtype, label) for dtype, label in labels if label is not None)
    else:
        weights = Counter((spec.dtype, spec.dtype) for spec in table if spec.name.endswith(".weight"))
        stored = [(spec.dtype, math.prod(spec.shape) * ITEM_SIZE[spec.dtype]) for spec in table]
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
        "quantization": quantization,
        "weights": {label: weights[dtype, label] for dtype, label in sorted(weights)},
        "kv_cache": {"bytes_per_token": per_token, "context": tokens, "bytes_at_context": per_token * tokens},
        "ssm_state_bytes_per_sequence": ssm_state_bytes(config),
    }


def _own_sizes(config: NemotronHConfig) -> dict[str, dict[str, int]]:
    """Sizes in which layers of a kind differ: ``moe_intermediate_size`` -> the number of layers with each."""
    found: dict[str, Counter[str]] = {}
    for field in sorted({field for sizes in config.layer_sizes for field, _ in sizes}):
        for i, kind in enumerate(config.layers):
            if field in KINDS[kind].sizes:
                value = getattr(config.of_layer(i), field)
                found.setdefault(field, Counter())[str(value)] += 1
    return {field: dict(counts) for field, counts in found.items()}


def _active(config: NemotronHConfig, spec: TensorSpec, elements: int) -> int:
    """Parameters of the main model that one token uses: of routed experts, the share of the top k."""
    if spec.expert is None or spec.layer is None:
        return elements
    own = config.of_layer(spec.layer)
    return elements * own.num_experts_per_tok // own.n_routed_experts
