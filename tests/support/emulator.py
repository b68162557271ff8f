"""The emulated device behind a host library: what it is, and in which order it does things."""

import ctypes
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Device:
    """The settings of plugins/common/emulator.cpp.

    Attributes:
        copies_at_issue: asynchronous copies happen when they are issued, not when they are waited for.
        downwards: the last block, warp and lane are the first.
        last_block_only: no other block of a grid runs.
        capability: 10 * major + minor; 0 is the emulator's own.
        shared_memory: bytes that a block can have; 0 is the emulator's own.
    """

    copies_at_issue: bool = False
    downwards: bool = False
    last_block_only: bool = False
    capability: int = 0
    shared_memory: int = 0


ORDERS = [Device(*both) for both in itertools.product((False, True), repeat=2)]
"""Every order of copies and of threads. A right kernel gives the same bits in all of them."""


@contextmanager
def emulated(library: Path, device: Device) -> Iterator[None]:
    """Launches through a host library run on this device."""
    loaded = ctypes.CDLL(str(library))

    def become(one: Device) -> None:
        loaded.nemoquant_host_schedule(int(one.copies_at_issue), int(one.downwards), int(one.last_block_only))
        loaded.nemoquant_host_capability(one.capability)
        loaded.nemoquant_host_shared_limit(ctypes.c_size_t(one.shared_memory))

    become(device)
    try:
        yield
    finally:
        become(Device())
