"""The one place that knows the engines by name."""

import os
from pathlib import Path

from nemoquant.engine.base import Engine
from nemoquant.errors import UsageError


def load_engine(name: str, path: Path, threads: int | None = None) -> Engine:
    """An engine over the folder ``path``; ``threads`` None is all that this process may use.

    Raises:
        NemoquantError: a missing extra, a graph or shards that are not what they should be, no GPU where one is needed.
    """
    if name == "torch":
        import torch

        from nemoquant.engine.torch import TorchEngine

        torch.set_num_threads(threads or len(os.sched_getaffinity(0)))
        return TorchEngine(path)
    if name == "onnxruntime":
        from nemoquant.engine.onnxruntime import OnnxRuntimeEngine

        return OnnxRuntimeEngine(path, threads)
    raise UsageError(f"the engine {name} needs a GPU to run, and none is usable here; expected torch or onnxruntime")
