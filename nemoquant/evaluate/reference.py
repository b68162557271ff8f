"""The source's side of a diff: the residual stream after each layer, computed or read from a cache.

An earlier run wrote the cache, a safetensors file: ``hidden.I`` [rows, length, hidden] F32 before layer I
(the last one after all layers) and ``ssm_state.I`` of the Mamba-2 layers. Logits are not stored: they follow
from the last one by one product with the head, and would be larger by vocabulary / hidden size (32 times for
Super). The metadata identify what the cache was made from, by the hashes of the source's units, and have a
hash of each tensor of the cache; another source, other tokens or a damaged cache are refused.
"""

import fcntl
import json
import os
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nemoquant.checkpoint import manifest
from nemoquant.checkpoint.header import encode_header, read_header
from nemoquant.checkpoint.identity import source_groups, tensor_hash, units_of
from nemoquant.checkpoint.weights import LayerWeights
from nemoquant.checkpoint.writer import METADATA, ShardWriter
from nemoquant.errors import CheckpointError, OutputError, WeightError
from nemoquant.evaluate.layers import into, run_layer
from nemoquant.evaluate.origin import Origin
from nemoquant.files import UNFINISHED, open_regular, parse_json, rename
from nemoquant.formats import Device
from nemoquant.formats.gpu import torch_device
from nemoquant.model import names
from nemoquant.model.kinds import KINDS
from nemoquant.model.kinds.mamba import SSM_STATE
from nemoquant.model.taps import Weights, identity
from nemoquant.sources.source import Source
from nemoquant.tokens.rows import Rows

SCHEMA = "2"
TensorPlace = tuple[str, str, tuple[int, ...]]  # name, dtype, shape
UNKNOWN = "0" * 32  # a hash that is written once it is known


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


def stream(
    source: Source, rows: Rows, cache: Path | None, device: Device, origin: Origin
) -> Generator[Stage, None, None]:
    """The stages in order; a cache that does not exist is written meanwhile, and complete after the last one.

    ``origin`` must have passed a stage before the next one is asked for.

    Raises:
        CheckpointError: the cache is not of this source and these rows; WeightError where the source produces
            NaN or Inf.
        OutputError: the cache can't be written.
    """
    if cache is None:
        yield from _computed(source, rows, device)
    elif cache.exists():
        yield from _read(cache, source, rows, device, origin)
    else:
        yield from _written(cache, source, rows, device, origin)


def _computed(source: Source, rows: Rows, device: Device) -> Iterator[Stage]:
    weights = LayerWeights(source.checkpoint, f"{names.EMBEDDINGS}.")
    x = embed(weights, torch.from_numpy(rows.ids))
    weights.release()
    yield Stage(None, x, None)
    for i, kind in enumerate(source.config.layers):
        weights = LayerWeights(source.checkpoint, names.layer(i))
        y = torch.empty_like(x)
        own, on = source.config.of_layer(i), torch_device(device)
        state = run_layer(own, kind, weights, x, identity, into(y), device=on)
        weights.release()
        if not torch.isfinite(y).all():
            raise WeightError(
                f"{source.path}: layer {i} ({kind}) computes NaN or Inf; expected finite activations, is "
                f"the source damaged?"
            )
        yield Stage(i, y, state)
        x = y


def _layout(source: Source, rows: Rows) -> list[TensorPlace]:
    c, (count, length) = source.config, rows.ids.shape
    table: list[TensorPlace] = [("hidden.0", "F32", (count, length, c.hidden_size))]
    for i, kind in enumerate(c.layers):
        table.append((f"hidden.{i + 1}", "F32", (count, length, c.hidden_size)))
        states = (state for state in KINDS[kind].states(c.of_layer(i)) if state.name == SSM_STATE)
        table += [(f"{SSM_STATE}.{i}", "F32", (count, *state.shape)) for state in states]
    return table


def _made_from(source: Source, rows: Rows, device: Device) -> dict[str, str]:
    return {
        "schema": SCHEMA,
        "config": json.dumps(source.raw_config, sort_keys=True),
        "tensor_table": manifest.tensor_table_sha256(source.checkpoint.tensors),
        "tokens": rows.sha256,
        "device": device,
    }


def _header(
    source: Source, rows: Rows, device: Device, units: Mapping[str, str], tensors: Mapping[str, str]
) -> tuple[list[TensorPlace], dict[str, str]]:
    """Tensors and metadata of a cache, with hashes of what it was made from, and of what is in it."""
    layout = _layout(source, rows)
    hashes = {
        "units": {name: units.get(name, UNKNOWN) for name in _units(source)},
        "tensors": {name: tensors.get(name, UNKNOWN) for name, _, _ in layout},
    }
    known = {key: json.dumps(value) for key, value in hashes.items()}
    return layout, METADATA | _made_from(source, rows, device) | known


def _units(source: Source) -> list[str]:
    """The units that the stream depends on."""
    groups = source_groups(source.table)
    passed = ["begin", *range(len(source.config.layers))]
    return [unit for key in passed for unit in units_of(groups[key])]


def _written(cache: Path, source: Source, rows: Rows, device: Device, origin: Origin) -> Iterator[Stage]:
    partial = cache.parent / (cache.name + UNFINISHED)
    found: dict[str, str] = {}
    try:
        _remove_dead(partial)
        writer = ShardWriter(partial, *_header(source, rows, device, {}, {}))
        with _held(partial):
            with writer:

                def write(name: str, tensor: Tensor) -> None:
                    found[name] = tensor_hash(tensor.numpy())
                    writer.write(tensor.numpy())

                for stage in _computed(source, rows, device):
                    write(f"hidden.{0 if stage.layer is None else stage.layer + 1}", stage.hidden)
                    if stage.ssm_state is not None:
                        write(f"{SSM_STATE}.{stage.layer}", stage.ssm_state)
                    yield stage
            # All hashes have one length, so the header with them takes the place of the one without.
            with partial.open("r+b") as f:
                f.write(encode_header(*_header(source, rows, device, origin.units, found)))
                f.flush()
                os.fsync(f.fileno())
            rename(partial, cache)
    except (FileExistsError, BlockingIOError):
        raise OutputError(
            f"{partial} is being written by another run; wait for it, or give another cache"
        ) from None
    except OSError as error:
        _remove(partial)
        raise OutputError(
            f"{cache}: {error.strerror or error}; give another place for the reference cache"
        ) from None
    except BaseException:
        _remove(partial)
        raise


@contextmanager
def _held(partial: Path) -> Iterator[None]:
    """Holds the lock of a file, as long as this process lives."""
    handle = open_regular(partial, follow=False, write=True)  # NFS gives no such lock to one who only reads
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def _remove_dead(partial: Path) -> None:
    """Remove what a killed run left; raises BlockingIOError where a run still writes it."""
    with suppress(FileNotFoundError), _held(partial):
        partial.unlink()


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
    layout = _layout(source, rows)
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
    if {t.name: (t.dtype, t.shape) for t in tensors.values()} != {n: (d, s) for n, d, s in layout}:
        raise CheckpointError(f"{cache} lacks tensors that a reference cache has; remove it")
    for key, members in (("units", _units(source)), ("tensors", [name for name, _, _ in layout])):
        _hashes(cache, metadata, key, members)


def _hashes(cache: Path, metadata: Mapping[str, str], key: str, expected: Iterable[str]) -> dict[str, str]:
    """The hashes that a cache's metadata have under ``key``; raises CheckpointError where they can't be."""
    try:
        found = parse_json(metadata.get(key, ""))
    except ValueError:
        found = None
    if not isinstance(found, dict) or set(found) != set(expected):
        raise CheckpointError(f"{cache}: its metadata lack the hashes of its {key}; it is damaged, remove it")
    return found


def _read(cache: Path, source: Source, rows: Rows, device: Device, origin: Origin) -> Iterator[Stage]:
    check_cache(cache, source, rows, device)
    tensors, metadata = read_header(cache)
    digests = _hashes(cache, metadata, "tensors", tensors)
    origin.of_cache(cache, _hashes(cache, metadata, "units", _units(source)))

    def load(name: str) -> Tensor:
        info = tensors[name]
        values = np.fromfile(cache, np.float32, info.nbytes // 4, offset=info.start)
        if 4 * values.size != info.nbytes or tensor_hash(values) != digests[name]:
            raise CheckpointError(
                f"{cache} is damaged: {name} does not have the hash that was written with it; remove it, it "
                f"is computed again"
            )
        return torch.from_numpy(values).view(info.shape)

    yield Stage(None, load("hidden.0"), None)
    for i in range(len(source.config.layers)):
        state = f"{SSM_STATE}.{i}"
        yield Stage(i, load(f"hidden.{i + 1}"), load(state) if state in tensors else None)
