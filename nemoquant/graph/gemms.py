"""The formats that a GEMM of a graph can have: of its weight, and of its input if that is rounded."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from nemoquant.formats import FORMATS, FormatName


@dataclass(frozen=True)
class Gemm:
    """One of them; ``name`` stands in names of functions and in RoutedExperts' attribute.

    ``number`` is None where the weight is as in the source; ``rounds`` is whether inputs are rounded to it.
    """

    name: str
    number: FormatName | None
    rounds: bool

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of its weight, and the scale of its input, in the order of a function's inputs."""
        if self.number is None:
            return ("weight",)
        number = FORMATS[self.number]
        parts = ["codes"]
        if number.block is not None:
            parts.append("block_scales")
        if number.global_scale:
            parts.append("global_scale")
        if self.rounds and number.calibrated:
            parts.append("input_scale")
        return tuple(parts)


GEMMS: Mapping[str, Gemm] = MappingProxyType(
    {
        gemm.name: gemm
        for gemm in (
            Gemm("bf16", None, rounds=False),
            Gemm("fp8", "fp8", rounds=True),
            Gemm("w8a16", "fp8", rounds=False),
            Gemm("mxfp8", "mxfp8", rounds=True),
            Gemm("nvfp4", "nvfp4", rounds=True),
            Gemm("w4a16", "nvfp4", rounds=False),
        )
    }
)
_BY_FORMAT = {(gemm.number, gemm.rounds): gemm for gemm in GEMMS.values()}


def gemm_of(weight: Literal["source"] | FormatName, inputs: FormatName | None) -> Gemm:
    """The GEMM of a weight's format and its input's, which is the same or None."""
    return _BY_FORMAT[None if weight == "source" else weight, inputs is not None]
