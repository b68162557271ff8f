"""The formats' kernels on a GPU, the same bytes. Behind ``device="cuda"`` of ``fp8``, ``nvfp4`` and ``amax``.

What a weight costs: its bytes go up once (:func:`put`), and its largest magnitude and its codes are made of
that one copy; codes and block scales come back in one piece. Each thread has a lane for this: a stream,
pinned memory here and memory there for one weight at a time, kept from weight to weight, because asking for
pinned memory halts the device. Two launches and two waits a weight; while one thread waits, others copy.

With the variable TRITON_INTERPRET=1 in the environment the kernels run on the CPU, slowly and for tests
alone, and a lane's memory is all here. (They were run in that interpreter only, and compiled for SM 80, 90
and 120; no GPU was at hand so far: streams and pinned memory have not been run at all.)
"""

import importlib.util
import os
import threading
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from nemoquant.errors import MissingExtraError, UsageError
from nemoquant.formats import Device, e4m3, nvfp4_blocks
from nemoquant.formats.rounding import Codes, Weight, weight_bits

_METHODS = {"max": 0, "four_over_six": 1, "mse": 2, "activations": 3}
_LANES, _BLOCK_LANES = 1024, 128
_SIGNED = {
    np.dtype(np.uint16): "int16",
    np.dtype(np.uint32): "int32",
}  # with unsigned ones torch can do little


def chosen(device: str) -> bool:
    """Whether ``device`` is the GPU.

    Raises:
        ValueError: it is neither "cpu" nor "cuda".
        UsageError: "cuda", and torch finds no GPU.
        MissingExtraError: "cuda", and Triton is not installed.
    """
    if device == "cpu":
        return False
    if device != "cuda":
        raise ValueError(f"device: got {device!r}, expected cpu or cuda")
    torch_device(device)
    if importlib.util.find_spec("triton") is None:
        raise MissingExtraError(
            "device cuda needs Triton, which torch for CUDA brings along: pip install triton"
        )
    return True


def check(device: str) -> None:
    """Make sure that ``device``, a user's word, can compute, before a run reads anything.

    A GPU is woken up: what that takes of this process's memory is there from now on, and seen by whoever
    plans with the rest.

    Raises:
        UsageError, MissingExtraError: it is neither cpu nor cuda, or as :func:`chosen`; or the GPU can't be
            used, with the reason.
    """
    if device not in get_args(Device):
        raise UsageError(f"device is {device!r}; expected cpu or cuda")
    if not chosen(device):
        return
    import torch

    try:
        torch.empty(1, device=torch_device(device))
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UsageError(
            f"device: got cuda, but torch can't use the GPU ({reason}); free it, or take device cpu"
        ) from None


def torch_device(device: str) -> Any:
    """The torch.device that ``device`` stands for; the CPU for "cuda" where Triton is interpreted.

    Raises:
        UsageError: "cuda", and torch finds no GPU.
    """
    import torch

    if device == "cpu" or os.environ.get("TRITON_INTERPRET") == "1":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UsageError(
            f"device: got cuda, but torch finds no CUDA GPU here (torch {torch.__version__}); expected one, "
            f"or take device cpu"
        )
    return torch.device("cuda")


class _Lane:
    """One thread's stream and memory; see the top of this file."""

    def __init__(self) -> None:
        import torch

        self.device = torch_device("cuda")
        self.stream: Any = None
        if self.device.type == "cuda":
            self.stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch gives it no types
        self._memory: dict[tuple[str, bool], Any] = {}

    def running(self) -> AbstractContextManager[Any]:
        """What is launched inside runs in this lane's stream."""
        import torch

        return nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    def wait(self) -> None:
        """Until the stream is done, and the pinned memory free to be written again."""
        if self.stream is not None:
            self.stream.synchronize()

    def memory(self, name: str, nbytes: int, *, here: bool = False) -> Any:
        """The first ``nbytes`` of the buffer of that name, on the GPU, or pinned ``here``. It grows to the
        largest that was asked for."""
        import torch

        found = self._memory.get((name, here))
        if found is None or found.numel() < nbytes:
            with self.running():
                kind: dict[str, Any] = (
                    {"pin_memory": self.stream is not None} if here else {"device": self.device}
                )
                found = self._memory[name, here] = torch.empty(nbytes, dtype=torch.uint8, **kind)
        return found[:nbytes]

    def send(self, name: str, array: NDArray[Any]) -> Any:
        """A flat array's copy on the GPU, in the buffer of that name: uint16 or uint32 as signed integers of
        the same bits."""
        import torch

        staged, there = self.memory(name, array.nbytes, here=True), self.memory(name, array.nbytes)
        self.wait()
        staged.numpy()[:] = array.view(np.uint8)
        with self.running():
            there.copy_(staged, non_blocking=True)
        return there.view(getattr(torch, _SIGNED[array.dtype]))

    def receive(self, there: Any) -> NDArray[np.uint8]:
        """Bytes from the GPU, when all that was launched is done; good until the next ones come."""
        staged = self.memory("received", there.numel(), here=True)
        with self.running():
            staged.copy_(there, non_blocking=True)
        self.wait()
        found: NDArray[np.uint8] = staged.numpy()
        return found


_lanes = threading.local()


def _lane() -> _Lane:
    """This thread's."""
    if not hasattr(_lanes, "one"):
        _lanes.one = _Lane()
    found: _Lane = _lanes.one
    return found


@dataclass(frozen=True)
class OnGpu:
    """A weight [out, in] on the GPU, in its thread's lane: as good as the array, until that thread puts the
    next one there.

    ``bits`` are flat patterns, int16 or int32; see ``rounding.weight_bits`` for ``shift``.
    """

    bits: Any
    shift: int
    shape: tuple[int, ...]
    lane: _Lane


def put(weight: "Weight | OnGpu") -> OnGpu:
    """A weight's copy on the GPU; raises ValueError for a wrong dtype or layout."""
    if isinstance(weight, OnGpu):
        return weight
    bits, shift = weight_bits(weight)
    lane = _lane()
    return OnGpu(lane.send("weight", bits), int(shift), weight.shape, lane)


_launching = (
    threading.Lock()
)  # the first launch compiles, and the interpreter changes Triton's own module while it runs


def _launch(kernel: Any, count: int, lanes: int, **arguments: Any) -> None:
    """``lanes`` of ``count`` a program, arguments by the kernel's names.

    Never with fused multiply-add, which would round once where the definitions round twice.
    """
    if count:
        with _launching:
            kernel[(-(-count // lanes),)](**arguments, count=count, LANES=lanes, enable_fp_fusion=False)


def amax(weight: OnGpu) -> np.float32:
    import torch

    from nemoquant.formats import triton_kernels

    lane, size = weight.lane, weight.bits.numel()
    largest = lane.memory("largest", 4)
    with lane.running():
        largest.zero_()
        _launch(
            triton_kernels.amax_kernel,
            size,
            _LANES,
            weight=weight.bits,
            shift=weight.shift,
            largest=largest.view(torch.int32),
        )
    found: np.float32 = lane.receive(largest).view(np.float32)[0]
    return found


def fp8_encode(weight: OnGpu, decode_scale: np.float32, codes: Codes) -> None:
    from nemoquant.formats import triton_kernels

    lane = weight.lane
    found = lane.memory("codes", codes.size)
    with lane.running():
        _launch(
            triton_kernels.fp8_encode_kernel,
            codes.size,
            _LANES,
            weight=weight.bits,
            shift=weight.shift,
            decode_scale=float(decode_scale),
            codes=found,
        )
    codes.reshape(-1)[:] = lane.receive(found)


def nvfp4_encode(
    weight: OnGpu, global_scale: np.float32, method: str, packed: Codes, block_scales: Codes
) -> None:
    import torch

    from nemoquant.formats import triton_kernels

    lane, size = weight.lane, packed.size
    tables = lane.send("tables", _tables(global_scale))
    found = lane.memory("codes", size + block_scales.size)
    with lane.running():
        _launch(
            triton_kernels.nvfp4_encode_kernel,
            block_scales.size,
            _BLOCK_LANES,
            weight=weight.bits,
            shift=weight.shift,
            onto=float(np.float32(6) * global_scale),
            reached=tables[:1024],
            scales=tables[1024:].view(torch.float32),
            packed=found[:size],
            block_scales=found[size:],
            METHOD=_METHODS[method],
        )
    got = lane.receive(found)
    packed.reshape(-1)[:], block_scales.reshape(-1)[:] = got[:size], got[size:]


def _tables(global_scale: np.float32) -> NDArray[np.uint32]:
    """What depends on the scale alone: ``nvfp4_blocks.thresholds`` [128, 8] without their signs, at which the
    kernel looks itself, then d by E4M3 code [128] as bits."""
    reached = np.empty((128, 8), np.uint32)
    nvfp4_blocks.thresholds(np.uint32(0), global_scale, reached)
    scales = (e4m3.VALUES[:128] * global_scale).view(np.uint32)
    return np.concatenate([(reached & 0x7FFFFFFF).reshape(-1), scales])


# For computing: what is decoded or rounded stays on the GPU, in torch's current stream.


def computes(device: Any) -> bool:
    """Whether these kernels are for tensors on that torch.device."""
    there: bool = device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
    return there


def fp8_decoded(codes: Codes, decode_scale: np.float32) -> Any:
    """``fp8.decode`` as a tensor on the GPU, to which the codes cross as they are."""
    return _fp8_values(_copied(codes), decode_scale).view(codes.shape)


def nvfp4_decoded(packed: Codes, block_scales: Codes, global_scale: np.float32) -> Any:
    """``nvfp4.decode`` as a tensor on the GPU, to which codes and block scales cross as they are."""
    return _nvfp4_values(_copied(packed), _copied(block_scales), global_scale).view(packed.shape[0], -1)


def fp8_rounded(values: Any, decode_scale: np.float32) -> Any:
    """A float32 tensor on the GPU through E4M3 codes and back: ``fp8.encode`` and ``decode``."""
    import torch

    from nemoquant.formats import triton_kernels

    bits = values.contiguous().view(torch.int32).view(-1)
    codes = torch.empty(bits.shape, dtype=torch.uint8, device=bits.device)
    _launch(
        triton_kernels.fp8_encode_kernel,
        bits.numel(),
        _LANES,
        weight=bits,
        shift=0,
        decode_scale=float(decode_scale),
        codes=codes,
    )
    return _fp8_values(codes, decode_scale).view(values.shape)


def nvfp4_rounded(values: Any, global_scale: np.float32) -> Any:
    """A float32 tensor [..., in] on the GPU through codes and back, with block scales of its own:
    ``nvfp4.encode_activations`` and ``decode``."""
    import torch

    from nemoquant.formats import triton_kernels

    bits = values.contiguous().view(torch.int32).view(-1)
    blocks = bits.numel() // nvfp4_blocks.BLOCK
    packed, scales = (torch.empty(n, dtype=torch.uint8, device=bits.device) for n in (8 * blocks, blocks))
    onto, (reached, by_code) = float(np.float32(6) * global_scale), _tables_there(global_scale)
    _launch(
        triton_kernels.nvfp4_encode_kernel,
        blocks,
        _BLOCK_LANES,
        weight=bits,
        shift=0,
        onto=onto,
        reached=reached,
        scales=by_code,
        packed=packed,
        block_scales=scales,
        METHOD=_METHODS["activations"],
    )
    return _nvfp4_values(packed, scales, global_scale).view(values.shape)


def _copied(array: NDArray[np.uint8]) -> Any:
    """Bytes on the GPU, flat."""
    import torch

    row = np.ascontiguousarray(array).reshape(-1)
    return torch.from_numpy(row if row.flags.writeable else row.copy()).to(torch_device("cuda"))


@cache
def _e4m3_values() -> Any:
    import torch

    return torch.from_numpy(e4m3.VALUES.copy()).to(torch_device("cuda"))


@lru_cache(maxsize=64)  # experts of a layer share the scale of their inputs
def _tables_there(global_scale: np.float32) -> tuple[Any, Any]:
    """The two :func:`_tables` on the GPU; for one stream only, which is the one that they are dropped in."""
    import torch

    tables = torch.from_numpy(_tables(global_scale).view(np.int32)).to(torch_device("cuda"))
    return tables[:1024], tables[1024:].view(torch.float32)


def _fp8_values(codes: Any, decode_scale: np.float32) -> Any:
    import torch

    from nemoquant.formats import triton_kernels

    found = torch.empty(codes.shape, device=codes.device)
    _launch(
        triton_kernels.fp8_decode_kernel,
        codes.numel(),
        _LANES,
        codes=codes,
        table=_e4m3_values(),
        decode_scale=float(decode_scale),
        values=found,
    )
    return found


def _nvfp4_values(packed: Any, block_scales: Any, global_scale: np.float32) -> Any:
    import torch

    from nemoquant.formats import triton_kernels

    found = torch.empty(2 * packed.numel(), device=packed.device)
    scales = _e4m3_values() * float(global_scale)
    _launch(
        triton_kernels.nvfp4_decode_kernel,
        packed.numel(),
        _LANES,
        packed=packed,
        block_scales=block_scales,
        scales=scales,
        values=found,
    )
    return found
