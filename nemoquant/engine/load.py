"""Loads an engine by its name."""

from pathlib import Path
from typing import assert_never

from nemoquant.arguments import check_word
from nemoquant.checkpoint.intact import Say, silent
from nemoquant.engine import ENGINES, TARGETS, EngineName
from nemoquant.engine.base import Admit, Engine, admit_any
from nemoquant.engine.targets import find_gpu
from nemoquant.errors import UsageError
from nemoquant.machine import usable_threads
from nemoquant.progress import Progress, no_progress


def load_engine(
    name: EngineName,
    path: Path,
    threads: int | None = None,
    file: Path | None = None,
    plugins: Path | None = None,
    say: Say = silent,
    progress: Progress = no_progress,
    admit: Admit = admit_any,
) -> Engine:
    """An engine over the folder ``path``.

    Args:
        threads: None is all that this process may use.
        file: the engine file of ``rtx`` and ``trt``, which the others do not have.
        plugins: the plugin library of ``trt``; None is where ``nemoquant plugins build`` puts it.
        say, progress: of hashing the shards, where they are held against a manifest.
        admit: see :data:`Admit`.
    Raises:
        NemoquantError: a name that no engine has; a missing extra; a graph, shards or an engine file that are
            damaged or for another checkpoint; no GPU where one is needed.
    """
    check_word("engine", name, ENGINES)
    if (file is not None) != (name in TARGETS):
        raise UsageError(
            f"--engine {name} needs the engine file that `nemoquant export trt {path} FILE` wrote: "
            f"--engine-file FILE"
            if file is None
            else f"--engine-file {file}: the engine {name} reads none; it goes with --engine rtx or "
            f"--engine trt"
        )
    if plugins is not None and name != "trt":
        raise UsageError(f"--plugins {plugins}: the engine {name} has none; it goes with --engine trt")
    if name == "torch":
        from nemoquant.engine.torch import TorchEngine

        return TorchEngine(path, threads or usable_threads(), say, progress, admit)
    if name == "onnxruntime":
        from nemoquant.engine.onnxruntime import OnnxRuntimeEngine

        return OnnxRuntimeEngine(path, threads, say, progress, admit)
    if name == "rtx" or name == "trt":
        from nemoquant.engine.gpu import TensorRTEngine

        assert file is not None
        return TensorRTEngine(
            name, file, path, find_gpu(), plugins, say=say, progress=progress, threads=threads, admit=admit
        )
    assert_never(name)
