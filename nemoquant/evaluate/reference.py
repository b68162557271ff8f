"""The source's side of a diff: the residual stream after each layer, computed or read from a cache.

An earlier run wrote the cache, a safetensors file: ``hidden.I`` [rows, length, hidden] F32 before layer I
(the last one after all layers) and ``ssm_state.I`` of the Mamba-2 layers. Logits are not stored: they follow
from the last one by one product with the head, and would be larger by vocabulary / hidden size (32 times for
Super). The metadata identify what the cache was made from; another source or other tokens are refused.
"""

import json
from collections.abc import Generator, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nemoquant.checkpoint import manifest
from nemoquant.checkpoint.header import read_header
from nemoquant.checkpoint.weights import LayerWeights
from nemoquant.checkpoint.writer import METADATA, ShardWriter
from nemoquant.errors import CheckpointError, OutputError, WeightError
from nemoquant.evaluate.layers import into, run_layer
from nemoquant.files import rename
from nemoquant.formats import Device
from nemoquant.formats.gpu import torch_device
from nemoquant.model import names
from nemoquant.model.kinds import KINDS
from nemoquant.model.kinds.mamba import SSM_STATE
from nemoquant.model.taps import Weights, identity
from nemoquant.sources.source import Source
from nemoquant.tokens.rows import Rows

SCHEMA = "1"


@dataclass(frozen=True)
class Stage:
    """The stream after a layer, or after the embedding (``layer`` None).

    ``ssm_state`` is that of a Mamba-2 layer after the last position.
    """

    layer: int | None
    hidden: Tensor
    ssm_state: Tensor | None


def embed(weights: Weights, ids: Tensor) -> Tensor:
    """Token ids [rows, length] -> [rows, length, hidden] float32."""
    return F.embedding(ids, weights["weight"]).float()


def stream(source: Source, rows: Rows, cache: Path | None, device: Device) -> Generator[Stage, None, None]:
    """The stages in order; a cache that does not exist is written meanwhile, and complete after the last one.

    Raises:
        CheckpointError: the cache is not of this source and these rows; WeightError where the source produces
            NaN or Inf.
        OutputError: the cache can't be written.
    """
    if cache is None:
        yield from _computed(source, rows, device)
    elif cache.exists():
        yield from _read(cache, source, rows, device)
    else:
        yield from _written(cache, source, rows, device)


def _computed(source: Source, rows: Rows, device: Device) -> Iterator[Stage]:
    weights = LayerWeights(source.checkpoint, f"{names.EMBEDDINGS}.")
    x = embed(weights, torch.from_numpy(rows.ids))
    weights.release()
    yield Stage(None, x, None)
    for i, kind in enumerate(source.config.layers):
        weights = LayerWeights(source.checkpoint, names.layer(i))
        y = torch.empty_like(x)
        state = run_layer(source.config, kind, weights, x, identity, into(y), device=torch_device(device))
        weights.release()
        if not torch.isfinite(y).all():
            raise WeightError(
                f"{source.path}: layer {i} ({kind}) computes NaN or Inf; expected finite activations, is "
                f"the source damaged?"
            )
        yield Stage(i, y, state)
        x = y


def _layout(source: Source, rows: Rows) -> list[tuple[str, str, tuple[int, ...]]]:
    c, (count, length) = source.config, rows.ids.shape
    table: list[tuple[str, str, tuple[int, ...]]] = [("hidden.0", "F32", (count, length, c.hidden_size))]
    for i, kind in enumerate(c.layers):
        table.append((f"hidden.{i + 1}", "F32", (count, length, c.hidden_size)))
        states = (state for state in KINDS[kind].states(c) if state.name == SSM_STATE)
        table += [(f"{SSM_STATE}.{i}", "F32", (count, *state.shape)) for state in states]
    return table


def _made_from(source: Source, rows: Rows, device: Device) -> dict[str, str]:
    return {
        "schema": SCHEMA,
        "config": json.dumps(source.raw_config, sort_keys=True),
        "tensor_table": manifest.tensor_table_sha256(source.checkpoint.tensors),
        "weights": manifest.content_fingerprint(source.checkpoint),
        "tokens": rows.sha256,
        "device": device,
    }


def _written(cache: Path, source: Source, rows: Rows, device: Device) -> Iterator[Stage]:
    partial = cache.parent / (cache.name + ".partial")
    try:
        with ShardWriter(
            partial, _layout(source, rows), METADATA | _made_from(source, rows, device)
        ) as writer:
            for stage in _computed(source, rows, device):
                writer.write(stage.hidden.numpy())
                if stage.ssm_state is not None:
                    writer.write(stage.ssm_state.numpy())
                yield stage
        rename(partial, cache)
    except FileExistsError:
        raise OutputError(
            f"{partial} exists, left by a run that was killed or still writing; remove it, or give another "
            f"cache"
        ) from None
    except OSError as error:
        _remove(partial)
        raise OutputError(
            f"{cache}: {error.strerror or error}; give another place for the reference cache"
        ) from None
    except BaseException:
        _remove(partial)
        raise


def _remove(partial: Path) -> None:
    with suppress(OSError):
        partial.unlink()


def check_cache(cache: Path, source: Source, rows: Rows, device: Device) -> None:
    """Make sure that an existing cache fits this run, or that a new one can be written.

    It must be of this source, these rows and this device, so that a model against itself has no error.

    Raises:
        CheckpointError, HeaderError: it is not a cache, or not of these; the message names what differs.
        OutputError: its folder does not exist.
    """
    if not cache.exists():
        if not cache.parent.is_dir():
            raise OutputError(
                f"{cache}: {cache.parent} is not a folder; make it, or give another place for the reference "
                f"cache"
            )
        return
    tensors, metadata = read_header(cache)
    expected = _made_from(source, rows, device)
    for key, value in expected.items():
        if metadata.get(key) != value:
            what = {
                "schema": "is not one of this version",
                "tokens": "was made from other rows (--data, --rows, --seq-len)",
                "device": "was computed on another device (--device)",
            }
            raise CheckpointError(
                f"{cache} {what.get(key, f'was made from another source than {source.path}')}: its "
                f"{key.replace('_', ' ')} differ; "
                "expected a reference cache of this source and these rows, give another file or remove this "
                "one"
            )
    if {t.name: (t.dtype, t.shape) for t in tensors.values()} != {
        n: (d, s) for n, d, s in _layout(source, rows)
    }:
        raise CheckpointError(f"{cache} lacks tensors that a reference cache has; remove it")


def _read(cache: Path, source: Source, rows: Rows, device: Device) -> Iterator[Stage]:
    check_cache(cache, source, rows, device)
    tensors, _ = read_header(cache)

    def load(name: str) -> Tensor:
        info: Any = tensors[name]
        values = np.fromfile(cache, np.float32, info.nbytes // 4, offset=info.start)
        return torch.from_numpy(values).view(info.shape)

    yield Stage(None, load("hidden.0"), None)
    for i in range(len(source.config.layers)):
        state = f"{SSM_STATE}.{i}"
        yield Stage(i, load(f"hidden.{i + 1}"), load(state) if state in tensors else None)
