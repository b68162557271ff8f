"""ONNX graphs over the packed bytes of a checkpoint: what is known of them without loading anything."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from nemoquant.units import size

MODEL, MTP = "model.onnx", "mtp.onnx"  # files of the main graph, and of the multi-token-prediction module
DialectName = Literal["onnxruntime", "tensorrt_rtx", "tensorrt"]
Compute = Literal["float32", "float16", "bfloat16"]
DIALECT_NAMES: tuple[DialectName, ...] = get_args(DialectName)  # of the table in dialects.py
COMPUTES: tuple[Compute, ...] = get_args(Compute)  # of activations; each dialect has some of them


@dataclass(frozen=True)
class Trial:
    """How graphs are tried before they are written.

    Attributes:
        by: the runtime that loads them; None where none can.
        why_not: where none can, the reason.
        load: called with a graph's bytes and the path that it is to get, its shards being there; it raises
            where the runtime refuses it.
    """

    by: str | None
    why_not: str | None = None
    load: Callable[[bytes, Path], None] = lambda content, path: None


@dataclass(frozen=True, repr=False)
class Exported:
    """Result of ``export_onnx``.

    Attributes:
        copied_bytes: of tensors that were written anew.
        loaded_by: the runtime that loaded the graphs before they were written; None where none could.
        warnings: why nothing loaded them; tensors in another dtype than the source's; what is left out.
    """

    folder: Path
    graphs: list[Path]
    copied_bytes: int
    functions: list[str]
    nodes: int
    loaded_by: str | None = None
    warnings: tuple[str, ...] = ()

    def __repr__(self) -> str:
        files = " and ".join(graph.name for graph in self.graphs)
        copied = f"{size(self.copied_bytes)} copied" if self.copied_bytes else "no tensor copied"
        return (
            f"Exported({str(self.folder)!r}: {files}, {self.nodes:,} nodes, "
            f"{len(self.functions)} functions, {copied})"
        )
