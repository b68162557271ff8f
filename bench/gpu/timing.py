"""What the benchmarks share: time by CUDA events, the device's limits, a row of the table."""

import ctypes
from collections.abc import Callable

import torch

# Bytes that are written between calls, so that nothing is left in the L2 cache; meanwhile the host is ahead with the launch.
FLUSH = 1 << 30


def seconds(call: Callable[[], object], repeats: int = 50, warm: int = 10) -> float:
    """The median time of a call on the device, its inputs not in the cache."""
    flush = torch.empty(FLUSH, dtype=torch.uint8, device="cuda")
    for _ in range(warm):
        call()
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, end in pairs:
        flush.zero_()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    times = sorted(start.elapsed_time(end) for start, end in pairs)
    return times[len(times) // 2] / 1e3


def bandwidth() -> float:
    """Bytes a second, from the memory's clock and width as the driver has them: two transfers a clock."""
    driver, value = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()

    def attribute(number: int) -> int:
        code = driver.cuDeviceGetAttribute(ctypes.byref(value), number, torch.cuda.current_device())
        if code:
            raise RuntimeError(f"cuDeviceGetAttribute({number}) gave error {code}")
        return value.value

    clock = attribute(36)  # CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE, kHz
    width = attribute(37)  # CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH, bits
    return 2 * clock * 1e3 * width / 8


def title(what: str) -> None:
    """Device, versions and the head of the table, as bench/RESULTS.md keeps them."""
    properties = torch.cuda.get_device_properties(0)
    print(
        f"{what} on {properties.name}, SM {properties.major}{properties.minor}, torch {torch.__version__}, CUDA {torch.version.cuda};"
    )
    print(f"memory {bandwidth() / 1e12:.2f} TB/s by its clock; medians of 50 calls by CUDA events, the L2 cache flushed\n")


def row(name: str, ours: float, floor: float, others: dict[str, float], bound: str = "") -> None:
    """Microseconds: ours, the floor, what it is made of (``bound``) and its share, and others."""
    rest = "".join(f", {other} {1e6 * time:.1f} us" for other, time in others.items())
    made_of = f" by {bound}" if bound else ""
    print(f"{name}: {1e6 * ours:.1f} us, floor {1e6 * floor:.1f} us{made_of} ({floor / ours:.0%}){rest}")
