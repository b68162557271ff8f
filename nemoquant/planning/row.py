"""A row of a plan: what becomes of one tensor."""

import math
from dataclasses import dataclass
from typing import Any, Literal

from nemoquant.checkpoint.header import ITEM_SIZE
from nemoquant.formats import FORMATS, SOLVED, Format, FormatName, Method, ScaleMethod, SolvedMethod


@dataclass(frozen=True)
class Row:
    """What becomes of one tensor of the source.

    ``format`` is ``source`` (kept bit for bit) or a number format. ``activation_format`` is the format of
    the GEMM's input at run time, None if it is not quantized. Rows that share ``weight_group`` share their
    per-tensor weight scale, rows that share ``input_group`` their input scale; None means a scale of its own.
    ``reason`` names the recipe's rule.
    """

    name: str
    role: str
    layer: int | None
    expert: int | None
    shape: tuple[int, ...]
    source_dtype: str
    format: Literal["source", FormatName]
    scale_method: Method | None
    activation_format: FormatName | None
    weight_group: str | None
    input_group: str | None
    reason: str

    @property
    def module(self) -> str:
        """Name of the module that the tensor belongs to."""
        return self.name.removesuffix(".weight")

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes_in(self) -> int:
        return self.elements * ITEM_SIZE[self.source_dtype]

    @property
    def number(self) -> Format | None:
        """The number format of a quantized row; None of one that is kept."""
        return None if self.format == "source" else FORMATS[self.format]

    @property
    def calibrated(self) -> bool:
        """Whether the GEMM's input has a scale that comes from calibration."""
        return self.activation_format is not None and FORMATS[self.activation_format].calibrated

    @property
    def input_headroom(self) -> bool:
        """Whether the recipe's ``headroom`` multiplies the scale of the GEMM's input."""
        return self.activation_format is not None and FORMATS[self.activation_format].input_headroom

    @property
    def solved(self) -> bool:
        """Whether its codes are solved for with the GEMM's inputs."""
        return self.scale_method in SOLVED

    @property
    def weighed(self) -> bool:
        """Whether errors in its outputs can count by the loss: the head's outputs are the loss's own."""
        return self.solved and self.layer is not None

    @property
    def solved_method(self) -> SolvedMethod:
        """The method of a row that is solved."""
        return next(known for known in SOLVED if known == self.scale_method)

    @property
    def plain_method(self) -> ScaleMethod:
        """The method of a quantized row that needs the weight alone; see :meth:`Format.alone`."""
        assert self.number is not None and self.scale_method is not None
        return self.number.alone(self.scale_method)

    def parts(self) -> list[tuple[str, str, tuple[int, ...]]]:
        """The tensors that are written for this row: (kind, safetensors dtype, shape).

        ``kind`` is one of ``source``, ``codes``, ``block_scales``, ``global_scale``, ``input_scale``.
        """
        if self.number is None:
            return [("source", self.source_dtype, self.shape)]
        parts: list[tuple[str, str, tuple[int, ...]]] = list(
            self.number.packed_tensors((self.shape[0], self.shape[1]))
        )
        return parts + [("input_scale", "F32", ())] * self.calibrated

    @property
    def bytes_out(self) -> int:
        return sum(math.prod(shape) * ITEM_SIZE[dtype] for _, dtype, shape in self.parts())


def row_json(row: Row) -> dict[str, Any]:
    """A row as JSON data, with both scale groups under one key."""
    data: dict[str, Any] = {**vars(row), "shape": list(row.shape)}
    data["scale_group"] = {"weight": data.pop("weight_group"), "input": data.pop("input_group")}
    return data
