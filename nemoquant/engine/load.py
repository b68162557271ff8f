"""The one place that knows the engines by name."""

from pathlib import Path

from nemoquant.engine.base import Engine
from nemoquant.errors import UsageError


def load_engine(name: str, path: Path) -> Engine:
    """An engine over the folder ``path``.

    Raises:
        NemoquantError: a missing extra, a graph or shards that are not what they should be, no GPU where one is needed.
    """
    if name == "torch":
        from nemoquant.engine.torch import TorchEngine

        return TorchEngine(path)
    if name == "onnxruntime":
        from nemoquant.engine.onnxruntime import OnnxRuntimeEngine

        return OnnxRuntimeEngine(path)
    raise UsageError(f"the engine {name} needs a GPU to run, and none is usable here; expected torch or onnxruntime")
