"""Graphs and engines of a checkpoint."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from nemoquant import arguments
from nemoquant.api.model import found
from nemoquant.arguments import MOST_BYTES, PathLike
from nemoquant.bars import shown
from nemoquant.engine import TARGETS, TargetName
from nemoquant.graph import COMPUTES, DIALECT_NAMES, Compute, DialectName
from nemoquant.progress import Progress

if TYPE_CHECKING:
    from nemoquant.graph import Exported


def export_onnx(
    source: PathLike,
    out: PathLike | None = None,
    *,
    dialect: DialectName = "onnxruntime",
    compute: Compute | None = None,
    last_token_only: bool = False,
    layers: tuple[int, int] | None = None,
    mtp: bool = False,
    copy: bool = True,
    download: bool = False,
    progress: Progress | Literal[False] | None = None,
    say: Callable[[str], None] | None = None,
) -> "Exported":
    """Write ``model.onnx`` (and ``mtp.onnx``) beside a checkpoint's shards, or with a copy of it in ``out``.

    A checkpoint that nemoquant wrote is held against its manifest first; a damaged one is refused. A graph is
    loaded once before it is written, by ONNX Runtime where that is installed and runs the dialect.

    Args:
        source: its folder, or a model's name on the hub, which needs ``out``.
        dialect: ``onnxruntime``, ``tensorrt_rtx`` or ``tensorrt``.
        compute: ``float32``, ``float16`` or ``bfloat16``; None is the dialect's own.
        layers: first layer, and the index after the last one; None is the whole model.
        mtp: also the multi-token-prediction module; the main graph then outputs the hidden states for it.
        copy: False refuses where tensors would have to be copied.
        download: of a name on the hub, fetch what its cache lacks; without it nothing reaches a network.
        progress: of hashing and of a copy. None shows it in a terminal or notebook; False shows nothing; a
            function is called with it.
        say: called with a line of text before the shards are hashed.
    Raises:
        NemoquantError: any of its kinds; see errors.py. EngineError where ONNX Runtime can't load the graph.
    """
    arguments.check_word("dialect", dialect, DIALECT_NAMES)
    if compute is not None:
        arguments.check_word("compute", compute, COMPUTES)
    arguments.check_flags(last_token_only=last_token_only, mtp=mtp, copy=copy)
    arguments.check_functions(say=say)
    bars = shown(progress)
    if layers is not None:
        layers = _layers(layers)
    out = arguments.optional_path("out", out)
    from nemoquant.engine.files import onnx_package

    onnx_package()
    source = found("source", source, download=download, say=say, progress=progress)
    from nemoquant.engine.onnxruntime import trial
    from nemoquant.graph.build import GraphOptions
    from nemoquant.graph.dialects import DIALECTS
    from nemoquant.graph.export import export_onnx as export

    options = GraphOptions(compute or DIALECTS[dialect].computes[0], last_token_only, layers, with_hidden=mtp)
    with bars as report:
        return export(
            source,
            out,
            dialect,
            options,
            trial(dialect),
            mtp=mtp,
            copy=copy,
            say=say or (lambda text: None),
            progress=report,
        )


def _layers(given: Any) -> tuple[int, int]:
    expected = "two whole numbers, the first layer and the index after the last one"
    if not isinstance(given, tuple | list) or len(given) != 2:
        raise arguments.refuse("layers", given, expected)
    return arguments.whole("layers[0]", given[0], 0), arguments.whole("layers[1]", given[1], 0)


def export_engine(
    source: PathLike,
    out: PathLike,
    *,
    target: TargetName | None = None,
    sm: int | None = None,
    compute: Compute = "bfloat16",
    max_seq_len: int = 4096,
    max_batch: int = 1,
    workspace: int | None = None,
    last_token_only: bool = False,
    mtp: bool = False,
    strip_weights: bool = False,
    weight_streaming: bool = False,
    timing_cache: PathLike | None = None,
    plugins: PathLike | None = None,
    download: bool = False,
    progress: Progress | Literal[False] | None = None,
    say: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Build a TensorRT engine of a checkpoint into the new file ``out``, with ``out.json`` beside it.

    Args:
        source: its folder, or a model's name on the hub.
        target: ``rtx``, TensorRT-RTX, builds on any machine; ``trt``, TensorRT, on the GPU that the engine is
            for. None is ``rtx`` where no GPU is found, else ``trt``.
        sm: the GPU to build for; None is the one in this machine.
        compute: ``float32``, ``float16`` or ``bfloat16``, the dtype of activations.
        max_seq_len, max_batch: most positions of a sequence, past ones included, and most sequences at once.
        workspace: bytes of scratch memory; None is the builder's own choice.
        last_token_only: logits of the last position only.
        mtp: also build the multi-token-prediction module, into a second file beside ``out``.
        strip_weights: leave the weights out of the file; they are taken from the shards when it is loaded.
        weight_streaming, timing_cache, plugins: see ``nemoquant.engine.build.EngineOptions``; ``trt`` only.
        download: of a name on the hub, fetch what its cache lacks; without it nothing reaches a network.
        progress: of hashing the shards. None shows it in a terminal or notebook; False shows nothing; a
            function is called with it.
        say: called with a line of text at each step.
    Returns:
        the content of ``out.json``.
    Raises:
        NemoquantError: any of its kinds; see errors.py.
    """
    if target is not None:
        arguments.check_word("target", target, list(TARGETS))
    arguments.check_word("compute", compute, COMPUTES)
    arguments.check_flags(
        last_token_only=last_token_only,
        mtp=mtp,
        strip_weights=strip_weights,
        weight_streaming=weight_streaming,
    )
    arguments.check_functions(say=say)
    bars = shown(progress)
    sm = None if sm is None else arguments.whole("sm", sm, 1)
    max_seq_len = arguments.whole("max_seq_len", max_seq_len, 2)
    max_batch = arguments.whole("max_batch", max_batch, 1)
    workspace = None if workspace is None else arguments.whole("workspace", workspace, 1, MOST_BYTES)
    out = arguments.path("out", out)
    cache = arguments.optional_path("timing_cache", timing_cache)
    library = arguments.optional_path("plugins", plugins)
    from nemoquant.engine.files import onnx_package

    onnx_package()
    from nemoquant.engine.build import EngineOptions
    from nemoquant.engine.export import export_engine as export
    from nemoquant.engine.targets import default_target, find_gpu

    source = found("source", source, download=download, say=say, progress=progress)
    gpu = find_gpu()
    options = EngineOptions(
        target or default_target(gpu),
        sm,
        compute,
        max_seq_len,
        max_batch,
        workspace,
        last_token_only=last_token_only,
        strip_weights=strip_weights,
        weight_streaming=weight_streaming,
        timing_cache=cache,
        plugins=library,
    )
    with bars as report:
        return export(source, out, options, gpu, say or (lambda text: None), mtp=mtp, progress=report)
