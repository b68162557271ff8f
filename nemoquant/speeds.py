"""How fast this machine is at what a run consists of: a measurement of a few tenths of a second, on the source's own bytes."""

import os
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from nemoquant.calibrate.memory import RowBatch, rows_of
from nemoquant.checkpoint.reader import Checkpoint
from nemoquant.checkpoint.weights import LayerWeights
from nemoquant.formats import Device
from nemoquant.formats.amax import amax as bits_amax
from nemoquant.formats.gpu import torch_device
from nemoquant.model.config import NemotronHConfig
from nemoquant.model.reference import layer_forward
from nemoquant.model.taps import product
from nemoquant.pack.encode import pack_weights
from nemoquant.planning.plan import Plan, Row

SAMPLE_BYTES = 4 << 20
PLACES = 6  # of the source that are read
MIXER_TOKENS = 256
CPU = torch.device("cpu")
Encoding = tuple[str, str | None]  # format and scale method


@dataclass(frozen=True)
class Speeds:
    """What was measured.

    Attributes:
        read: bytes/s of the source, from the page cache or from disk, as it lies now, one thread.
        write: bytes/s into a file beside OUT; ``sync`` the same with the disk waited for.
        hash: bytes/s of sha256.
        encode: bytes/s of source, one thread, by format and scale method; with a GPU a thread's share of what they all get out of it.
        product, expert: flop/s of a matrix product with all tokens of a batch, and with an expert's share of them.
        mixer: seconds a token of a Mamba-2 layer beside its products.
    """

    read: float
    write: float
    sync: float
    hash: float
    encode: dict[Encoding, float]
    product: float
    expert: float
    mixer: float


def measure(
    checkpoint: Checkpoint, plan: Plan, folder: Path, tokens: int, row_batch: RowBatch, dtype: torch.dtype, device: Device = "cpu"
) -> Speeds:
    """Measure on this machine, with torch's threads as they are set.

    Args:
        folder: an existing one on OUT's disk; a file without a name is written there.
        tokens: of a calibration row, 0 where nothing is calibrated.
        row_batch, dtype: of the calibration.
        device: where that computes, and packing encodes.
    """
    read = _read(checkpoint, plan.rows)
    write, sync, digest = _write(folder)
    encode = {key: _encode(checkpoint, row, device) for key, row in _encodings(plan).items()}
    if not tokens:
        return Speeds(read, write, sync, digest, encode, 1.0, 1.0, 0.0)
    c = plan.config
    together = min(2048, tokens * min(rows_of(row_batch, kind) for kind in set(c.layers)))
    on = torch_device(device)
    fast = _product(together, c.hidden_size, min(2048, 2 * c.hidden_size), 2, dtype, on)
    expert = fast
    if c.count("moe"):
        share = max(1, tokens * rows_of(row_batch, "moe") * c.num_experts_per_tok // c.n_routed_experts)
        expert = _product(share, c.moe_latent_size or c.hidden_size, c.moe_intermediate_size, 8, dtype, on)
    mixer = _mixer(checkpoint, c, min(tokens, MIXER_TOKENS), fast, dtype, on) if c.count("mamba") else 0.0
    return Speeds(read, write, sync, digest, encode, fast, expert, mixer)


def _seconds(work: Callable[[], object], on: torch.device = CPU) -> float:
    began = time.perf_counter()
    work()
    if on.type == "cuda":
        torch.cuda.synchronize(on)
    return max(time.perf_counter() - began, 1e-7)


def _read(checkpoint: Checkpoint, rows: Iterable[Row]) -> float:
    """From the middle of large tensors all over the source."""
    large = sorted((row for row in rows if row.elements >= 1024), key=lambda row: -row.bytes_in)[:512]
    names = [row.name for row in sorted(large, key=lambda row: row.name)][:: max(1, len(large) // PLACES)]
    total, took = 0, 0.0
    for name in names:
        raw = checkpoint.raw(name)
        part = raw[: SAMPLE_BYTES // 4 * 4][: raw.size // 4 * 4]
        took += _seconds(lambda part=part: bits_amax(part.view(np.uint16)[None]))  # type: ignore[misc]
        total += part.size
        checkpoint.release([name])
    return total / took if total else 1e9


def _write(folder: Path) -> tuple[float, float, float]:
    """bytes/s of writing, of writing with the disk, and of sha256."""
    import hashlib

    data = np.random.default_rng(0).integers(0, 256, 4 * SAMPLE_BYTES, np.uint8)
    with tempfile.TemporaryFile(dir=folder) as f:
        write = _seconds(lambda: os.write(f.fileno(), data.data))
        sync = write + _seconds(lambda: os.fsync(f.fileno()))
    return data.size / write, data.size / sync, data.size / _seconds(lambda: hashlib.sha256(data.data).digest())


def _encodings(plan: Plan) -> dict[Encoding, Row]:
    """For each way of encoding the plan has, the largest weight that is small enough to be a sample."""
    found: dict[Encoding, Row] = {}
    for row in plan.quantized:
        key = (row.format, row.scale_method)
        best = found.get(key)
        if best is None or abs(row.bytes_in - SAMPLE_BYTES) < abs(best.bytes_in - SAMPLE_BYTES):
            found[key] = row
    return found


def _encode(checkpoint: Checkpoint, row: Row, device: Device) -> float:
    """bytes/s of source; the first rows of a large weight stand for it. A GPU gets one from each thread, as in packing."""
    from dataclasses import replace

    count = max(1, min(row.shape[0], SAMPLE_BYTES * row.shape[0] // max(1, row.bytes_in)))
    sample = replace(row, shape=(count, row.shape[1]))
    pack_weights(checkpoint, [replace(row, shape=(1, row.shape[1]))], device)  # compiled, or loaded, by now
    if device == "cpu":
        return sample.bytes_in / _seconds(lambda: pack_weights(checkpoint, [sample]))
    count = torch.get_num_threads()
    with ThreadPoolExecutor(count) as pool:

        def all_at_once() -> None:
            list(pool.map(lambda _: pack_weights(checkpoint, [sample], device), range(count)))

        all_at_once()  # each thread has its memory by now
        return sample.bytes_in / _seconds(all_at_once)


def _product(tokens: int, width: int, out: int, weights: int, dtype: torch.dtype, on: torch.device) -> float:
    """flop/s over a few weights, so that they do not all lie in a cache."""
    x = torch.ones(tokens, width, dtype=dtype, device=on)
    matrices = torch.ones(weights, out, width, dtype=dtype, device=on)
    _seconds(lambda: product(x, matrices[0]), on)  # compiled for this shape
    return 2 * x.numel() * out * weights / _seconds(lambda: [product(x, m) for m in matrices], on)


def _mixer(
    checkpoint: Checkpoint, config: NemotronHConfig, tokens: int, rate: float, dtype: torch.dtype, on: torch.device
) -> float:
    """Seconds a token of the first Mamba-2 layer, without its products."""
    layer = config.layers.index("mamba")
    weights = LayerWeights(checkpoint, f"backbone.layers.{layer}.")
    x = torch.ones(1, tokens, config.hidden_size, dtype=dtype, device=on)
    _seconds(lambda: layer_forward(config, "mamba", weights, x), on)
    took = _seconds(lambda: layer_forward(config, "mamba", weights, x), on)
    weights.release()
    elements = config.hidden_size * (2 * config.mamba_inner + config.conv_channels + config.mamba_num_heads)
    return max(0.0, took - 2 * tokens * elements / rate) / tokens
