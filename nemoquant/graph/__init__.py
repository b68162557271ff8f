"""ONNX graphs over the packed bytes of a checkpoint: what is known of them without loading anything."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from nemoquant.units import size

MODEL, MTP = "model.onnx", "mtp.onnx"  # files of the main graph, and of the multi-token-prediction module
DialectName = Literal["onnxruntime", "tensorrt_rtx", "tensorrt"]
Compute = Literal["float32", "float16", "bfloat16"]
DIALECT_NAMES: tuple[DialectName, ...] = get_args(DialectName)  # of the table in dialects.py
COMPUTES: tuple[Compute, ...] = get_args(Compute)  # of activations; each dialect has some of them


@dataclass(frozen=True, repr=False)
class Exported:
    """Result of ``export_onnx``: graphs, bytes of tensors copied, functions, number of nodes, warnings."""

    folder: Path
    graphs: list[Path]
    copied_bytes: int
    functions: list[str]
    nodes: int
    warnings: tuple[str, ...] = ()

    def __repr__(self) -> str:
        files = " and ".join(graph.name for graph in self.graphs)
        copied = f"{size(self.copied_bytes)} copied" if self.copied_bytes else "no tensor copied"
        return (
            f"Exported({str(self.folder)!r}: {files}, {self.nodes:,} nodes, "
            f"{len(self.functions)} functions, {copied})"
        )
