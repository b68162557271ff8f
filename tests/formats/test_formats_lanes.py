"""The GPU memory that a packing thread keeps, its lane: one buffer for each use, here on the CPU."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch

from nemoquant.formats import gpu


@pytest.fixture
def lane(monkeypatch: pytest.MonkeyPatch) -> gpu._Lane:
    """A thread's memory, with the GPU's part on the CPU."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(gpu, "_lanes", type("Lanes", (), {})())
    return gpu._lane()


def test_a_lane_keeps_its_memory_and_grows_to_the_largest_weight(lane: gpu._Lane) -> None:
    rng = np.random.default_rng(0)

    def weight(*shape: int) -> np.ndarray[Any, Any]:
        return rng.integers(0, 1 << 16, shape, np.uint16)

    large, small = weight(48, 32), weight(4, 16)
    first = gpu.put(large)
    assert first.shape == (48, 32)
    np.testing.assert_array_equal(first.bits.numpy().view(np.uint16), large.reshape(-1))
    assert gpu.put(first) is first, "what is there already stays"
    second = gpu.put(small)
    np.testing.assert_array_equal(second.bits.numpy().view(np.uint16), small.reshape(-1))
    assert second.bits.data_ptr() == first.bits.data_ptr(), "one weight at a time, in the same memory"
    third = gpu.put(weight(49, 32).astype(np.float32))
    assert third.bits.dtype == torch.int32
    assert {(name, here): m.numel() for (name, here), m in lane._memory.items()} == {
        ("weight", True): 4 * 49 * 32,
        ("weight", False): 4 * 49 * 32,
    }
    assert lane.receive(third.bits.view(torch.uint8)).tobytes() == third.bits.numpy().tobytes()


def test_pinned_memory_is_not_written_before_it_was_read(
    lane: gpu._Lane, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stream runs nothing until it is waited for, like a GPU that is far behind."""

    class Late:
        def __init__(self) -> None:
            self.work: list[Callable[[], object]] = []

        def synchronize(self) -> None:
            while self.work:
                self.work.pop(0)()

    stream = lane.stream = Late()
    copy, empty = torch.Tensor.copy_, torch.empty
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch, "empty", lambda *sizes, pin_memory=False, **options: empty(*sizes, **options))
    monkeypatch.setattr(
        torch.Tensor,
        "copy_",
        lambda there, here, non_blocking: (
            stream.work.append(lambda: copy(there, here)) if non_blocking else None
        ),
    )
    there = gpu.put(np.full((2, 16), 7, np.uint16)).bits.view(torch.uint8)
    gpu.put(np.full((2, 16), 9, np.uint16))
    assert set(there.view(torch.int16).tolist()) == {7}, (
        "the second one is on its way, the first one has come"
    )
    assert set(lane.receive(there).view(np.uint16).tolist()) == {9}
    gpu.put(np.full((4, 16), 5, np.uint16))
    assert set(lane.receive(lane.memory("weight", 128)).view(np.uint16).tolist()) == {5}, "and when it grew"
