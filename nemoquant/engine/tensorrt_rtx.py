"""TensorRT-RTX engines: built on any machine for a GPU that need not be there. Running one needs that GPU.

The graph is built in memory in the ``tensorrt_rtx`` dialect and given to the parser with its functions inlined: the parser names layers
after nodes, and refuses a function with quantization in it that is called twice. Weights come from the shards of the folder.
The network is strongly typed: nothing falls back to another precision, it fails instead.
"""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from nemoquant.errors import EngineError, MissingExtraError, UsageError
from nemoquant.graph.build import Builder, GraphOptions
from nemoquant.graph.dialects import DIALECTS
from nemoquant.quantized.checkpoint import PackedCheckpoint

DIALECT = "tensorrt_rtx"
SMS = (75, 80, 86, 89, 120, 121)
NEEDS = {"fp8": (89, "FP8"), "nvfp4": (100, "NVFP4")}  # the least SM that has the format
IGNORED = ("cudaError 35",)  # no driver: a builder without a GPU says so once for each layer, and builds


@dataclass(frozen=True)
class RtxOptions:
    """How to build: target SM, dtype of activations, and what shapes to admit.

    Attributes:
        max_seq_len: most positions of a sequence, past ones included.
        max_batch: most sequences at once.
        workspace: bytes of scratch memory, None is the builder's own choice.
        strip_weights: leave weights out of the file, to be refitted from the shards.
    """

    sm: int
    compute: str = "bfloat16"
    max_seq_len: int = 4096
    max_batch: int = 1
    workspace: int | None = None
    strip_weights: bool = False


@dataclass
class Built:
    """An engine in memory, and what is known of it."""

    data: bytes
    facts: dict[str, Any] = field(default_factory=dict)


def package() -> Any:
    """The tensorrt_rtx module.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import tensorrt_rtx
    except ImportError:
        raise MissingExtraError("TensorRT-RTX engines need the extra `rtx`: pip install 'nemoquant[rtx]'") from None
    return tensorrt_rtx


def check_target(opened: PackedCheckpoint, options: RtxOptions) -> None:
    """Raises UsageError for an SM that TensorRT-RTX does not build for, one that lacks a format, or shapes that make no sense."""
    sm = options.sm
    if sm in (90, 100, 103):
        raise UsageError(f"--sm {sm}: TensorRT-RTX does not build for data-centre GPUs; they need TensorRT, --target trt")
    if sm not in SMS:
        raise UsageError(f"--sm {sm}: TensorRT-RTX builds for SM {', '.join(map(str, SMS))}")
    formats = {stored.format for stored in opened.stored.values()} | {name for name, _ in opened.inputs.values()}
    for name, (least, title) in NEEDS.items():
        if name in formats and sm < least:
            raise UsageError(
                f"--sm {sm}: {opened.path} holds {title}, which GPUs have from SM {least} on; choose another GPU or format"
            )
    if options.max_seq_len < 2 or options.max_batch < 1:
        raise UsageError(f"max_seq_len is {options.max_seq_len}, max_batch {options.max_batch}; expected at least 2 and 1")


def build(path: Path, options: RtxOptions, say: Callable[[str], None] = lambda text: None) -> Built:
    """Build an engine for the checkpoint in ``path``.

    Args:
        say: told what is going on, in a line.
    Raises:
        UsageError: see :func:`check_target`. EngineError: the parser or the builder refused, with its own words.
    """
    trt = package()
    opened = PackedCheckpoint(path)
    with opened.checkpoint:
        check_target(opened, options)
        began = time.monotonic()
        model = Builder(opened, DIALECTS[DIALECT], GraphOptions(compute=options.compute)).main()
        shapes = {str(value.name): list(value.shape or ()) for value in model.graph.inputs}
        functions = len(model.functions)
        InlinePass()(model)
        for number, node in enumerate(ir.traversal.RecursiveGraphIterator(model.graph)):
            node.name = f"{node.op_type}_{number}"
        graph_seconds = time.monotonic() - began
        logger = _logger(trt)
        builder = trt.Builder(logger)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, logger)
        say(f"graph: {functions} functions, {len(model.graph)} nodes inlined, {graph_seconds:.1f} s")
        if not parser.parse(ir.to_proto(model).SerializeToString(), str(path / "model.onnx")):
            errors = [parser.get_error(i).desc() for i in range(parser.num_errors)]
            raise EngineError(f"TensorRT-RTX can't read the graph of {path}: {'; '.join(errors) or logger.text()}")
        config = _config(trt, builder, network, shapes, options)
        began = time.monotonic()
        data = builder.build_serialized_network(network, config)
        seconds = time.monotonic() - began
        if data is None or logger.errors:
            raise EngineError(f"TensorRT-RTX can't build an engine for SM {options.sm} from {path}: {logger.text()}")
        facts = {
            "runtime": "tensorrt_rtx",
            "version": trt.__version__,
            "sm": options.sm,
            "compute": options.compute,
            "max_seq_len": options.max_seq_len,
            "max_batch": options.max_batch,
            "strip_weights": options.strip_weights,
            "plan": opened.manifest["plan"]["sha256"] if opened.manifest else None,
            "layers": network.num_layers,
            "layers_by_output_type": _types(network),
            "inputs": {name: [str(d) for d in dims] for name, dims in shapes.items()},
            "outputs": [network.get_output(i).name for i in range(network.num_outputs)],
            "build_seconds": round(seconds, 2),
            "warnings": sorted(logger.warnings),
        }
    return Built(bytes(data), facts)


def _config(trt: Any, builder: Any, network: Any, shapes: dict[str, list[Any]], options: RtxOptions) -> Any:
    """One engine for prompts and single tokens."""
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{options.sm}"), 0)
    if options.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace)
    if options.strip_weights:
        config.set_flag(trt.BuilderFlag.STRIP_PLAN)
    # one profile: kernels are specialised to the shapes that come when the engine runs, and a second one would hold all weights again
    most, batch = options.max_seq_len, options.max_batch
    sizes = {"batch": (1, 1, batch), "length": (1, 1, most), "past": (0, most // 2, most - 1)}
    profile = builder.create_optimization_profile()
    for i in range(network.num_inputs):
        name = network.get_input(i).name
        dims = [[sizes[str(d.value)][k] if isinstance(d, ir.SymbolicDim) else d for d in shapes[name]] for k in range(3)]
        profile.set_shape(name, *dims)
    config.add_optimization_profile(profile)
    return config


def _types(network: Any) -> dict[str, int]:
    """Layers of the strongly typed network by the dtype that they put out: what the engine computes in."""
    counts: Counter[str] = Counter()
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        if layer.num_outputs:
            counts[str(layer.get_output_type(0)).removeprefix("DataType.")] += 1
    return dict(sorted(counts.items()))


def _logger(trt: Any) -> Any:
    """A logger that keeps errors and warnings; told apart from the complaint that there is no GPU."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []
            self.warnings: set[str] = set()

        def log(self, severity: Any, message: str) -> None:
            if any(text in message for text in IGNORED):
                return
            if severity <= trt.ILogger.ERROR:
                self.errors.append(message)
            elif severity == trt.ILogger.WARNING:
                self.warnings.add(message.split("] ", 1)[-1])

        def text(self) -> str:
            return "; ".join(self.errors[:3])[:1500] or "it gives no reason"

    return Logger()
