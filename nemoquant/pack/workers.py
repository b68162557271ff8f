"""Where packing computes: the interface that the packer uses, and the threads of this process."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from nemoquant.checkpoint.identity import PIECE_BYTES
from nemoquant.checkpoint.reader import Checkpoint
from nemoquant.formats import Device

AHEAD = 3  # results for each thread, where memory allows it
P = ParamSpec("P")
T = TypeVar("T")


class Workers(Protocol):
    """Run the pure functions of ``encode.py``; each is called with the checkpoint, wherever it runs.

    Attributes:
        ahead: results that may wait in order; this bounds the memory.
        group_bytes: of source that one task should take at least, where tasks are whole weights.
        device: where they encode.
    """

    ahead: int
    group_bytes: int
    device: Device

    def submit(
        self, function: Callable[Concatenate[Checkpoint, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> Future[T]:
        """Start ``function(checkpoint, *args)`` wherever there is room."""

    def here(
        self, function: Callable[Concatenate[Checkpoint, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> Future[T]:
        """Start it in a thread of this process: its result is a map of the source, or too cheap to send."""


class Threads:
    """Threads of this process; with a GPU each has one chunk there. Use as a context manager."""

    group_bytes = PIECE_BYTES

    def __init__(
        self, checkpoint: Checkpoint, threads: int, ahead: int | None = None, device: Device = "cpu"
    ) -> None:
        self.checkpoint, self.ahead, self.device = checkpoint, ahead or AHEAD * threads, device
        self._pool = ThreadPoolExecutor(threads, "encode")

    def submit(
        self, function: Callable[Concatenate[Checkpoint, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> Future[T]:
        return self._pool.submit(function, self.checkpoint, *args, **kwargs)

    here = submit

    def __enter__(self) -> "Threads":
        return self

    def __exit__(self, *error: Any) -> None:
        self._pool.shutdown(cancel_futures=True)
