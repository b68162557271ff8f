"""Number formats: what a plan needs to know of each, without arrays.

The arithmetic is in the modules of the same names.

    fp8    E4M3 codes in the weight's own shape, one fp32 scale
    nvfp4  E2M1 codes, two per byte; an E4M3 scale for each 16 of the input dimension; one fp32 scale

Importing this package loads neither numpy nor numba.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, NamedTuple

PartKind = Literal["codes", "block_scales", "global_scale"]
Device = Literal["cpu", "cuda"]


class PackedTensor(NamedTuple):
    """One tensor of a packed weight: its kind, its safetensors dtype, its shape (a scalar is ``()``)."""

    kind: PartKind
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Format:
    """A number format for weights.

    Attributes:
        weight_bits: bits of one code, without scales.
        block: number of inputs that share a block scale; None without block scales.
        code_dtype: safetensors dtype of the codes.
    """

    name: str
    weight_bits: int
    block: int | None
    code_dtype: str

    def indivisible(self, shape: tuple[int, ...]) -> str | None:
        """Why a weight of this shape cannot have this format, or None if it can."""
        if len(shape) != 2 or min(shape) < 1:
            return f"shape {list(shape)} is not [out, in]"
        if self.block is not None and shape[1] % self.block:
            return f"input dimension {shape[1]} is not a multiple of {self.name}'s block of {self.block}"
        return None

    def packed_tensors(self, shape: tuple[int, int]) -> tuple[PackedTensor, ...]:
        """The tensors that a weight [out, in] becomes, in the order in which they are written.

        Raises ValueError if the shape is ``indivisible``.
        """
        problem = self.indivisible(shape)
        if problem is not None:
            raise ValueError(f"format {self.name}: {problem}")
        rows, columns = shape
        codes = PackedTensor("codes", self.code_dtype, (rows, columns * self.weight_bits // 8))
        scale = PackedTensor("global_scale", "F32", ())
        if self.block is None:
            return codes, scale
        return codes, PackedTensor("block_scales", "F8_E4M3", (rows, columns // self.block)), scale


FORMATS: Mapping[str, Format] = MappingProxyType(
    {
        "fp8": Format("fp8", weight_bits=8, block=None, code_dtype="F8_E4M3"),
        "nvfp4": Format("nvfp4", weight_bits=4, block=16, code_dtype="U8"),
    }
)
