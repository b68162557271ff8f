"""GPUs that people serve on: compute capability and memory. Imports nothing heavy."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple


class Gpu(NamedTuple):
    """``sm``: compute capability without its dot; ``gigabytes``: memory as its maker gives it."""

    title: str
    sm: int
    gigabytes: int


GPUS: Mapping[str, Gpu] = MappingProxyType(
    {
        "t4": Gpu("T4", 75, 16),
        "a100": Gpu("A100", 80, 80),
        "a10": Gpu("A10", 86, 24),
        "l40s": Gpu("L40S", 89, 48),
        "rtx4090": Gpu("RTX 4090", 89, 24),
        "h100": Gpu("H100", 90, 80),
        "h200": Gpu("H200", 90, 141),
        "b200": Gpu("B200", 100, 180),
        "b300": Gpu("B300", 103, 288),
        "rtx5090": Gpu("RTX 5090", 120, 32),
        "rtx-pro-6000": Gpu("RTX PRO 6000", 120, 96),
        "dgx-spark": Gpu("DGX Spark", 121, 128),
    }
)
SMS = tuple(dict.fromkeys(gpu.sm for gpu in GPUS.values()))
