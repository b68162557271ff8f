"""What the timings share: time by CUDA events over captured graphs, the device's limits, a table of rows."""

import datetime
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

CACHE = 256 << 20  # bytes that together no L2 cache holds
SIDE = 8192  # of the product that gives a rate
WARM_S = 1.0  # seconds of products before anything is timed: an idle device's clocks are low
BUSY = 200_000  # cycles, about 0.1 ms, that the device waits while the host launches what is timed

Call = Callable[[], object]


def timed(calls: Sequence[Call], repeats: int = 15) -> float:
    """Microseconds of one call: all of them captured in a graph, the median of its replays.

    The calls should work on different memory, more than ``CACHE`` together: then neither launches nor the
    cache flatter them.
    """
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(BUSY)  # so that launching takes no time between the events
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / len(calls) * 1e3)
    return statistics.median(times)


@dataclass(frozen=True)
class Limits:
    """Of this device, measured: what floors are made of.

    Attributes:
        copy: bytes a second of a large copy, read and written.
        products: operations a second of a large bf16 matrix product.
        empty: microseconds of a kernel that does next to nothing.
    """

    copy: float
    products: float
    empty: float

    def floor(self, moved: float, operations: float = 0.0) -> float:
        """Microseconds that bytes to be moved, or operations, take at least; the larger of both."""
        return max(moved / self.copy, operations / self.products) * 1e6

    def json(self) -> dict[str, float]:
        return {
            "copy_TB_s": round(self.copy / 1e12, 3),
            "bf16_TFLOP_s": round(self.products / 1e12, 1),
            "empty_kernel_us": round(self.empty, 2),
        }


def measured_limits() -> Limits:
    """Takes a few seconds and, for their time, 2 GB."""
    warm_up()
    one = torch.empty(1, device="cuda")
    return Limits(_copy_rate(), _product_rate(), timed([one.zero_] * 20))


def warm_up() -> None:
    """Products until the clocks are those of work."""
    a = torch.randn(SIDE, SIDE, device="cuda").to(torch.bfloat16)
    until = time.time() + WARM_S
    while time.time() < until:
        a @ a
        torch.cuda.synchronize()


def _copy_rate() -> float:
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / timed([lambda: target.copy_(source)]) * 1e6


def _product_rate() -> float:
    a, b = (torch.randn(SIDE, SIDE, device="cuda").to(torch.bfloat16) for _ in range(2))
    return 2 * SIDE**3 / timed([lambda: a @ b]) * 1e6


def narrow_rate(kind: str) -> float:
    """Operations a second of torch's product of fp8 (with fast sums) or fp4 (with block scales)."""
    fast = kind == "fp8"
    dtype, columns = (torch.float8_e4m3fn, SIDE) if fast else (torch.float4_e2m1fn_x2, SIDE // 2)
    shape = (SIDE, columns)
    a, b = (torch.randint(0, 0x50, shape, device="cuda", dtype=torch.uint8).view(dtype) for _ in range(2))
    ones = torch.ones(() if fast else SIDE * SIDE // 16, device="cuda")
    scale = ones if fast else ones.to(torch.float8_e4m3fn)

    def product() -> object:
        return torch._scaled_mm(a, b.t(), scale, scale, out_dtype=torch.bfloat16, use_fast_accum=fast)

    return 2 * SIDE**3 / timed([product]) * 1e6


class Table:
    """Rows, written after each, so that a crash leaves those before it."""

    def __init__(self, out: Path, seconds: float) -> None:
        """Measures the limits. ``seconds`` from now on the rest of the rows is listed as skipped."""
        self.out, self.seconds = out, seconds
        self.began = time.time()
        self.limits = measured_limits()
        self.limits_after: Limits | None = None
        self.rows: list[dict[str, Any]] = []

    def elapsed(self) -> float:
        return time.time() - self.began

    def row(self, name: str, us: float, floor: float, **more: Any) -> None:
        """Microseconds and the floor; ``more`` are others' times, or why there are none."""
        rest = {key: round(value, 2) if isinstance(value, float) else value for key, value in more.items()}
        ours = {"us": round(us, 2), "floor_us": round(floor, 2), "of_floor": round(floor / us, 3)}
        self._add({"case": name, **ours, **rest})

    def beside(self, name: str, **more: float) -> None:
        """Others' times, added to a row that is there."""
        for row in self.rows:
            if row["case"] == name:
                row.update({key: round(value, 2) for key, value in more.items()})
                self.write()
                print(json.dumps(row), flush=True)

    def guarded(self, name: str, measure: Callable[[], Any]) -> Any:
        """What ``measure`` returns; None where it failed, or time is up, which becomes a row of its own."""
        if self.elapsed() > self.seconds:
            self._add({"case": name, "skipped": "time"})
            return None
        try:
            return measure()
        except Exception as error:
            self._add({"case": name, "error": f"{type(error).__name__}: {error}"[:200]})
            torch.cuda.synchronize()
            return None

    def _add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        self.write()
        print(json.dumps(row), flush=True)

    def finish(self) -> None:
        """Measures the limits once more: if they differ much from the first ones, so did the clocks."""
        self.limits_after = measured_limits()
        self.write()

    def write(self) -> None:
        found = {
            "device": torch.cuda.get_device_name(),
            "date": str(datetime.date.today()),
            "limits": self.limits.json(),
            "limits_after": self.limits_after.json() if self.limits_after else None,
            "rows": self.rows,
        }
        self.out.write_text(json.dumps(found, indent=0))
