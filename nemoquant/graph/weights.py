"""A checkpoint's tensors as external data of a graph: offsets into its shards, no byte copied."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import onnx_ir as ir

from nemoquant.checkpoint.header import TensorInfo
from nemoquant.errors import CheckpointError
from nemoquant.formats import FormatName
from nemoquant.graph.dialects import Dialect, unpacked
from nemoquant.layouts.modelopt import kv_scale_name
from nemoquant.model.names import member
from nemoquant.quantized.checkpoint import PackedCheckpoint

SCALARS = ("global_scale", "input_scale")


def stacked(infos: Sequence[TensorInfo]) -> bool:
    """Whether tensors lie back to back in one file, in one dtype, so that they can be read as one."""
    return all(
        a.file == b.file and a.end == b.start and a.dtype == b.dtype for a, b in itertools.pairwise(infos)
    )


class GraphWeights:
    """Initializers of one graph, made at the first request; ``values`` holds them all."""

    def __init__(self, opened: PackedCheckpoint, dialect: Dialect) -> None:
        self.opened, self.dialect = opened, dialect
        self.values: dict[str, ir.Value] = {}

    def plain(self, name: str) -> ir.Value:
        """An unquantized tensor, by its published name."""
        return self._value(name, "weight", None, [self.opened.checkpoint.tensors[name]], None)

    def part(self, module: str, part: str) -> ir.Value:
        """One part of a GEMM's weight."""
        name = self._part_name(module, part)
        return self._value(name, part, self._number(module), [self.opened.checkpoint.tensors[name]], None)

    def experts(self, mixer: str, stack: str, part: str, routed: int) -> ir.Value:
        """One part of all experts of a layer and projection, [E, ...].

        Args:
            stack: the projection's name in the mixer.
            routed: the layer's number of experts.
        """
        count: int | None = routed
        infos = [
            self.opened.checkpoint.tensors[self._part_name(mixer + member(stack, e), part)]
            for e in range(routed)
        ]
        name = f"{mixer}{stack}.{part}"
        if not stacked(infos):
            raise CheckpointError(
                f"{self.opened.path}: the experts of {name} do not lie back to back in one dtype, so that no "
                f"view of them exists; "
                "export to another folder, where they are written anew"
            )
        if part == "input_scale" and self.dialect.one_input_scale:
            values = {float(self.opened.scalar(info.name)) for info in infos}
            if len(values) > 1:
                raise CheckpointError(
                    f"{self.opened.path}: the experts of {name} have {len(values)} input scales; the "
                    f"{self.dialect.name} dialect takes one "
                    "for all, quantize without --no-scale-groups"
                )
            infos, count = infos[:1], None
        return self._value(name, part, self._number(mixer + member(stack, 0)), infos, count)

    def cache_scale(self, module: str) -> ir.Value:
        """The scale of a ``k_proj``'s or ``v_proj``'s cache."""
        name = kv_scale_name(module)
        if name not in self.opened.checkpoint.tensors:
            raise CheckpointError(
                f"{self.opened.path}: {name} is missing, and a graph reads the scale of its cache from the "
                f"file; expected one, quantize again, or take the cache's declaration out of the config files"
            )
        return self._value(name, SCALARS[0], None, [self.opened.checkpoint.tensors[name]], None)

    def _part_name(self, module: str, part: str) -> str:
        return self.opened.stored[f"{module}.weight"].parts["source" if part == "weight" else part]

    def _number(self, module: str) -> FormatName | None:
        format, _ = self.opened.formats(module)
        return None if format == "source" else format

    def _value(
        self, name: str, part: str, number: FormatName | None, infos: list[TensorInfo], count: int | None
    ) -> ir.Value:
        value = self.values.get(name)
        if value is not None:
            return value
        first = infos[0]
        dtype = self.dialect.stored(part, first.dtype, number, count is not None)
        shape = unpacked([] if part in SCALARS else first.shape, dtype)
        dims = ir.Shape(shape if count is None else [count, *shape])
        tensor = ir.ExternalTensor(
            Path(first.file).name,
            first.start,
            infos[-1].end - first.start,
            dtype,
            shape=dims,
            name=name,
            base_dir=self.opened.path,
        )
        value = self.values[name] = ir.Value(
            name=name, type=ir.TensorType(dtype), shape=dims, const_value=tensor
        )
        return value
