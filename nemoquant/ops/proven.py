"""Which operators a GPU has run with the right results: the only kernels that are a default.

A row is added together with its results, which `bench/gpu/all.sh` writes on the device; a test holds that
each row's folder shows it. Without a row a library serves where the user names it, and nowhere else.
"""

from dataclasses import dataclass

OPERATORS = ("causal_conv1d", "mamba2_scan", "routed_experts")
"""Of ``torch.ops.nemoquant``."""


@dataclass(frozen=True)
class Proof:
    """An operator that was right on a device.

    Attributes:
        operator: one of ``OPERATORS``.
        capability: the device's compute capability, (9, 0) for SM 90.
        results: folder under ``bench/gpu/results/`` whose ``correct.json`` shows it.
    """

    operator: str
    capability: tuple[int, int]
    results: str


PROVEN: tuple[Proof, ...] = ()


def proven_on(capability: tuple[int, int]) -> frozenset[str]:
    """The operators that were right on a device of exactly this compute capability."""
    return frozenset(row.operator for row in PROVEN if row.capability == capability)
