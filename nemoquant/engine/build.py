"""Building TensorRT engines, of both kinds, from a checkpoint.

The graph is built in memory in the target's dialect and given to the parser with its functions inlined: the
parser names layers after nodes, and refuses a function that contains quantization and is called twice.
Weights come from the shards of the folder. The network is strongly typed: where a precision is not
supported, the build fails and no other precision is used.
"""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from nemoquant.checkpoint.manifest import file_sha256
from nemoquant.engine import TARGETS, Target, TargetName
from nemoquant.engine.messages import logger
from nemoquant.engine.targets import (
    Gpu,
    check_formats,
    load_plugins,
    plugin_library,
    target_sm,
)
from nemoquant.errors import EngineError, UsageError
from nemoquant.files import write_named
from nemoquant.graph.build import Builder, GraphOptions
from nemoquant.graph.dialects import DIALECTS
from nemoquant.model.names import OUTPUT
from nemoquant.quantized.checkpoint import PackedCheckpoint


@dataclass(frozen=True)
class EngineOptions:
    """Options of a build.

    Attributes:
        target: ``rtx`` or ``trt``.
        sm: the GPU to build for; None is the one in the machine.
        compute: dtype of activations.
        max_seq_len: most positions of a sequence, past ones included.
        max_batch: most sequences at once.
        workspace: bytes of scratch memory, None is the builder's own choice.
        last_token_only: logits of the last position only.
        with_hidden: also output the hidden states that multi-token prediction takes.
        strip_weights: leave weights out of the file, to be refitted from the shards.
        weight_streaming: let the engine keep weights in host memory, for models larger than the GPU's memory
            (``trt``).
        timing_cache: file of measured tactics, read if it exists and written after (``trt``).
        plugins: the plugin library (``trt``); None is where ``nemoquant plugins build`` puts it.
    """

    target: TargetName = "rtx"
    sm: int | None = None
    compute: str = "bfloat16"
    max_seq_len: int = 4096
    max_batch: int = 1
    workspace: int | None = None
    last_token_only: bool = False
    with_hidden: bool = False
    strip_weights: bool = False
    weight_streaming: bool = False
    timing_cache: Path | None = None
    plugins: Path | None = None


@dataclass
class BuiltEngine:
    """An engine in memory, and facts about it."""

    data: bytes
    facts: dict[str, Any] = field(default_factory=dict)


def check_options(options: EngineOptions) -> None:
    """Raises UsageError for impossible shapes, and for options that only TensorRT has."""
    if options.max_seq_len < 2 or options.max_batch < 1:
        raise UsageError(
            f"max_seq_len is {options.max_seq_len}, max_batch {options.max_batch}; expected at least 2 and 1"
        )
    only = {
        "--weight-streaming": options.weight_streaming,
        "--timing-cache": options.timing_cache,
        "--plugins": options.plugins,
    }
    given = [name for name, value in only.items() if value]
    if options.target != "trt" and given:
        raise UsageError(f"{', '.join(given)}: only TensorRT has that, --target trt")


def build(
    path: Path,
    options: EngineOptions,
    device: Gpu | None,
    say: Callable[[str], None] = lambda text: None,
    *,
    mtp: bool = False,
    ready: Callable[[], None] = lambda: None,
) -> BuiltEngine:
    """Build an engine for the checkpoint in ``path``.

    Args:
        device: the GPU of this machine.
        say: called with a line of text at each step.
        mtp: build the multi-token-prediction module, not the main model.
        ready: called before the weights are read.
    Raises:
        UsageError: see :func:`check_options`, ``targets.target_sm``, ``targets.check_formats`` and
            ``targets.plugin_library``.
        EngineError: the parser or the builder refused; includes its message.
    """
    check_options(options)
    target = TARGETS[options.target]
    opened = PackedCheckpoint(path)
    with opened.checkpoint:
        sm = target_sm(target, options.sm, device, path)
        trt = target.package()
        check_formats(target, sm, _own_formats(target, opened), path)
        if mtp and not opened.has_mtp:
            raise UsageError(f"--mtp: {path} has no multi-token-prediction module; leave it out")
        library = plugin_library(options.plugins) if target.name == "trt" else None
        if library is not None:
            load_plugins(trt, library)
        model, shapes, proto = engine_graph(opened, options, mtp)
        messages = logger(trt)
        builder = trt.Builder(messages)
        network = builder.create_network(_strongly_typed(trt))
        parser = trt.OnnxParser(network, messages)
        ready()
        say(f"graph: {len(model.graph)} nodes")
        if not parser.parse(proto, str(path / "model.onnx")):
            errors = [parser.get_error(i).desc() for i in range(parser.num_errors)]
            raise EngineError(
                f"{target.title} can't read the graph of {path}: {'; '.join(errors) or messages.text()}"
            )
        config = _config(trt, builder, network, shapes, options, sm)
        began = time.monotonic()
        data = builder.build_serialized_network(network, config)
        seconds = time.monotonic() - began
        if data is None or messages.errors:
            raise EngineError(
                f"{target.title} can't build an engine for SM {sm} from {path}: {messages.text()}"
            )
        if options.timing_cache is not None:
            write_named(options.timing_cache, bytes(config.get_timing_cache().serialize()))
        data = bytes(data)
        facts = {
            "runtime": target.module,
            "version": trt.__version__,
            "sm": sm,
            "compute": options.compute,
            "max_seq_len": options.max_seq_len,
            "max_batch": options.max_batch,
            "last_token_only": options.last_token_only,
            "with_hidden": options.with_hidden,
            "strip_weights": options.strip_weights,
            "weight_streaming": options.weight_streaming,
            "part": "mtp" if mtp else "main",
            "plan": plan_of(opened),
            "config": file_sha256(path / "config.json"),
            "plugins": None if library is None else {"file": library.name, "sha256": file_sha256(library)},
            "layers": network.num_layers,
            "layers_by_output_type": _types(network),
            "realised": _realised(trt, target, data, messages) if device is not None else None,
            "inputs": {name: [str(d) for d in dims] for name, dims in shapes.items()},
            "outputs": [network.get_output(i).name for i in range(network.num_outputs)],
            "build_seconds": round(seconds, 2),
            "warnings": sorted(messages.warnings),
        }
    return BuiltEngine(data, facts)


def plan_of(opened: PackedCheckpoint) -> str | None:
    """The hash of the plan that a checkpoint was written from; None where nemoquant did not write it."""
    return opened.manifest["plan"]["sha256"] if opened.manifest else None


def engine_graph(
    opened: PackedCheckpoint, options: EngineOptions, mtp: bool
) -> tuple[ir.Model, dict[str, list[Any]], bytes]:
    """The inlined graph, its inputs' shapes, and its bytes.

    Building and refitting both use it, so that names agree.
    """
    graph = GraphOptions(
        options.compute, last_token_only=options.last_token_only, with_hidden=options.with_hidden
    )
    recorder = Builder(opened, DIALECTS[TARGETS[options.target].dialect], graph)
    model = recorder.mtp() if mtp else recorder.main()
    shapes = {str(value.name): list(value.shape or ()) for value in model.graph.inputs}
    InlinePass()(model)
    for number, node in enumerate(ir.traversal.RecursiveGraphIterator(model.graph)):
        node.name = f"{node.op_type}_{number}"
    return model, shapes, ir.to_proto(model).SerializeToString()


def _own_formats(target: Target, opened: PackedCheckpoint) -> set[str]:
    """Formats that the runtime itself multiplies in.

    Experts in plugins are left out: plugins decode them in registers where the GPU lacks a format.
    """
    own = {
        spec.module
        for spec in opened.table
        if spec.name in opened.stored and not (target.name == "trt" and spec.expert is not None)
    }
    formats = {stored.format for name, stored in opened.stored.items() if name.removesuffix(".weight") in own}
    return formats | {
        name for module, (name, _) in opened.inputs.items() if module.removesuffix(OUTPUT) in own
    }


def _strongly_typed(trt: Any) -> int:
    # TensorRT 11 has no other kind of network, and so no flag
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _config(
    trt: Any, builder: Any, network: Any, shapes: dict[str, list[Any]], options: EngineOptions, sm: int
) -> Any:
    config = builder.create_builder_config()
    if options.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace)
    if options.strip_weights:
        config.set_flag(trt.BuilderFlag.STRIP_PLAN)
    if options.weight_streaming:
        config.set_flag(trt.BuilderFlag.WEIGHT_STREAMING)
    most, batch = options.max_seq_len, options.max_batch
    prefill = {"batch": (1, 1, batch), "length": (1, max(1, most // 4), most), "past": (0, 0, most - 1)}
    decode = {"batch": (1, 1, batch), "length": (1, 1, 1), "past": (0, most // 2, most - 1)}
    if options.target == "rtx":
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{sm}"), 0)
        # one profile: kernels are specialised to the shapes at run time, and a second profile would hold all
        # weights again
        profiles = [{**decode, "length": (1, 1, most)}]
    else:
        # so that the engine can be inspected for the dtypes that it computes in
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        profiles = [decode, prefill]
        if options.timing_cache is not None:
            known = options.timing_cache.read_bytes() if options.timing_cache.exists() else b""
            cache = config.create_timing_cache(known)
            if cache is None or not config.set_timing_cache(cache, False):
                raise UsageError(
                    f"{options.timing_cache} was made by another TensorRT or for another GPU; name another "
                    f"file"
                )
    for sizes in profiles:
        profile = builder.create_optimization_profile()
        for i in range(network.num_inputs):
            name = network.get_input(i).name
            dims = [
                [sizes[str(d.value)][k] if isinstance(d, ir.SymbolicDim) else d for d in shapes[name]]
                for k in range(3)
            ]
            profile.set_shape(name, *dims)
        config.add_optimization_profile(profile)
    return config


def _types(network: Any) -> dict[str, int]:
    """Number of layers by output dtype; in a strongly typed network these are the compute dtypes."""
    counts: Counter[str] = Counter()
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        if layer.num_outputs:
            counts[str(layer.get_output_type(0)).removeprefix("DataType.")] += 1
    return dict(sorted(counts.items()))


def _realised(trt: Any, target: Target, data: bytes, messages: Any) -> list[str] | None:
    """The layers of a finished engine as the runtime describes them, each as JSON; None where it can't."""
    if target.name != "trt":
        return None  # TensorRT-RTX compiles kernels when an engine runs
    engine = trt.Runtime(messages).deserialize_cuda_engine(data)
    if engine is None:
        raise EngineError(f"{target.title} can't load the engine that it built: {messages.text()}")
    inspector = engine.create_engine_inspector()
    return [
        inspector.get_layer_information(i, trt.LayerInformationFormat.JSON) for i in range(engine.num_layers)
    ]
