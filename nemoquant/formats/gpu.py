"""The formats on a GPU, with the same bytes: ``device="cuda"``, and tensors that stay there.

Each format's kernels, and what launches them, are in one file: ``fp8_gpu``, ``mxfp8_gpu``, ``nvfp4_gpu``.
They are loaded when a GPU is chosen, because they need Triton. Here is what they share.

A weight's bytes are copied to the GPU once (:func:`put`), and its largest magnitude and its codes are
computed from that copy; codes and block scales come back in one copy. Each thread has a lane for this: a
stream, and memory for one weight at a time, pinned on the host and on the GPU. It is kept from weight to
weight, because allocating pinned memory halts the device. A weight takes two launches and two waits; while
one thread waits, others copy.

With TRITON_INTERPRET=1 in the environment the kernels run on the CPU, slowly and for tests only, and all
memory of a lane is on the host. What a GPU has run is said in the README's Status.
"""

import importlib.util
import os
import threading
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemoquant.errors import MissingExtraError, UsageError
from nemoquant.formats import DEVICES, e4m3
from nemoquant.formats.kernel_cache import place_triton
from nemoquant.formats.rounding import Weight, weight_bits

LANES = 1024
"""Elements that one program of a kernel takes, where it takes single elements."""
# By dtype of the patterns: the signed integers of that size, because torch can do little with unsigned ones.
_SIGNED = {np.dtype(np.uint16): "int16", np.dtype(np.uint32): "int32"}


def chosen(device: str) -> bool:
    """Whether ``device`` is the GPU.

    Raises:
        ValueError, UsageError: as :func:`torch_device`.
        MissingExtraError: "cuda", and Triton is not installed.
    """
    if device == "cpu":
        return False
    torch_device(device)
    if importlib.util.find_spec("triton") is None:
        raise MissingExtraError(
            "device cuda needs Triton, which torch for CUDA brings along: pip install triton"
        )
    place_triton()
    return True


def check(device: str) -> None:
    """Make sure that ``device``, as the user gave it, can compute, before a run reads anything.

    A GPU is initialized here. This takes memory of the process, and code that plans with the rest must see
    it.

    Raises:
        UsageError: it is neither cpu nor cuda, torch finds no GPU, or the GPU can't be used, with the reason.
        MissingExtraError: as :func:`chosen`.
    """
    if device not in DEVICES:
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
        ValueError: it is neither "cpu" nor "cuda".
        UsageError: "cuda", and torch finds no GPU.
    """
    import torch

    if device not in DEVICES:
        raise ValueError(f"device: got {device!r}, expected cpu or cuda")
    if device == "cpu" or os.environ.get("TRITON_INTERPRET") == "1":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UsageError(
            f"device: got cuda, but torch finds no CUDA GPU here (torch {torch.__version__}); expected one, "
            f"or take device cpu"
        )
    return torch.device("cuda")


class _Lane:
    """The stream and the memory of one thread; see the top of this file."""

    def __init__(self) -> None:
        import torch

        self.device = torch_device("cuda")
        self.stream: Any = None
        if self.device.type == "cuda":
            self.stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch gives it no types
        self._memory: dict[tuple[str, bool], Any] = {}

    def running(self) -> AbstractContextManager[Any]:
        """A context: launches inside it run in this lane's stream."""
        import torch

        return nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    def wait(self) -> None:
        """Wait until the stream is done, so that pinned memory may be written again."""
        if self.stream is not None:
            self.stream.synchronize()

    def memory(self, name: str, nbytes: int, *, here: bool = False) -> Any:
        """The first ``nbytes`` of the buffer of that name: on the GPU, or with ``here`` pinned on the host.

        The buffer grows to the largest size requested.
        """
        import torch

        buffer = self._memory.get((name, here))
        if buffer is None or buffer.numel() < nbytes:
            with self.running():
                kind: dict[str, Any] = (
                    {"pin_memory": self.stream is not None} if here else {"device": self.device}
                )
                buffer = self._memory[name, here] = torch.empty(nbytes, dtype=torch.uint8, **kind)
        return buffer[:nbytes]

    def send(self, name: str, array: NDArray[Any]) -> Any:
        """Copy a flat array of uint16 or uint32 to the GPU, into the buffer of that name.

        Returns a tensor of signed integers with the same bits.
        """
        import torch

        staged, there = self.memory(name, array.nbytes, here=True), self.memory(name, array.nbytes)
        self.wait()
        staged.numpy()[:] = array.view(np.uint8)
        with self.running():
            there.copy_(staged, non_blocking=True)
        return there.view(getattr(torch, _SIGNED[array.dtype]))

    def receive(self, there: Any) -> NDArray[np.uint8]:
        """Copy bytes from the GPU, once all that was launched is done; valid until the next call."""
        staged = self.memory("received", there.numel(), here=True)
        with self.running():
            staged.copy_(there, non_blocking=True)
        self.wait()
        received: NDArray[np.uint8] = staged.numpy()
        return received

    def receive_into(self, there: Any, *arrays: NDArray[np.uint8]) -> None:
        """:meth:`receive` into arrays that together have as many bytes, one after the other."""
        received, start = self.receive(there), 0
        for array in arrays:
            array.reshape(-1)[:] = received[start : start + array.size]
            start += array.size


_lanes = threading.local()


def _lane() -> _Lane:
    """The lane of this thread."""
    if not hasattr(_lanes, "one"):
        _lanes.one = _Lane()
    lane: _Lane = _lanes.one
    return lane


@dataclass(frozen=True)
class OnGpu:
    """A weight [out, in] on the GPU, in its thread's lane; it is used instead of the array.

    Valid until that thread puts the next weight there. ``bits`` are flat patterns, int16 or int32; see
    ``rounding.weight_bits`` for ``shift``.
    """

    bits: Any
    shift: int
    shape: tuple[int, ...]
    lane: _Lane


def put(weight: "Weight | OnGpu") -> OnGpu:
    """Copy a weight to the GPU, unless it is there. Raises ValueError for a wrong dtype or layout."""
    if isinstance(weight, OnGpu):
        return weight
    bits, shift = weight_bits(weight)
    lane = _lane()
    return OnGpu(lane.send("weight", bits), int(shift), weight.shape, lane)


# One launch at a time: the first one compiles, and the interpreter changes Triton's own module while it runs.
_launching = threading.Lock()


def launch(kernel: Any, count: int, lanes: int, **arguments: Any) -> None:
    """Launch a kernel on ``count`` elements, ``lanes`` per program; ``arguments`` by the kernel's names.

    Never with fused multiply-add, which would round once where the definitions round twice.
    """
    if count:
        with _launching:
            kernel[(-(-count // lanes),)](**arguments, count=count, LANES=lanes, enable_fp_fusion=False)


def amax(weight: OnGpu) -> np.float32:
    """``amax.amax`` of a weight on the GPU."""
    import torch

    from nemoquant.formats import triton_shared

    lane, size = weight.lane, weight.bits.numel()
    largest = lane.memory("largest", 4)
    with lane.running():
        largest.zero_()
        launch(
            triton_shared.amax_kernel,
            size,
            LANES,
            weight=weight.bits,
            shift=weight.shift,
            largest=largest.view(torch.int32),
        )
    value: np.float32 = lane.receive(largest).view(np.float32)[0]
    return value


# For computing: decoded or rounded tensors stay on the GPU, in torch's current stream.


def computes(device: Any) -> bool:
    """Whether these kernels can compute on tensors of that torch.device."""
    usable: bool = device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
    return usable


def copied(array: NDArray[np.uint8]) -> Any:
    """Bytes as a flat tensor on the GPU."""
    import torch

    row = np.ascontiguousarray(array).reshape(-1)
    return torch.from_numpy(row if row.flags.writeable else row.copy()).to(torch_device("cuda"))


def decoded_bytes(kernel: Any, codes: Any, **arguments: Any) -> Any:
    """Codes of one byte each, a flat tensor on the GPU -> float32, by a kernel that takes ``table``."""
    import torch

    values = torch.empty(codes.shape, device=codes.device)
    launch(kernel, codes.numel(), LANES, codes=codes, table=e4m3_values(), values=values, **arguments)
    return values


@cache
def e4m3_values() -> Any:
    """``e4m3.VALUES`` on the GPU."""
    import torch

    return torch.from_numpy(e4m3.VALUES.copy()).to(torch_device("cuda"))
