"""The graph of a whole model, of some of its layers, or of its multi-token-prediction module.

Inputs: ``input_ids`` [batch, length] int64, or ``hidden`` [batch, length, hidden] where the layers do not
start with the first one. MTP takes both: the token after each position, and the main model's ``hidden`` of
the position. For each layer i, by its index in the checkpoint, there are also ``conv_state.i`` and
``ssm_state.i``, or ``past_key.i`` and ``past_value.i``. Outputs: ``logits``; ``hidden_out`` where the layers
do not end with the last one, and on request; ``present_...`` for each state. The same graph serves a prompt
and single tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass

import onnx_ir as ir

from nemoquant._version import __version__
from nemoquant.errors import UsageError, listing
from nemoquant.graph.dialects import Dialect
from nemoquant.graph.gemms import GEMMS, gemm_of
from nemoquant.graph.layers import LAYER_GRAPHS, LAYERS, Variant, layer_function, rms_norm, weight_names
from nemoquant.graph.tape import FLOAT, INT64, IR_VERSION, OPSET, Tape
from nemoquant.graph.weights import GraphWeights
from nemoquant.model import mtp, names
from nemoquant.model.config import LayerKind, NemotronHConfig, Sizes
from nemoquant.model.kinds import KINDS
from nemoquant.model.kinds.record import PAST, StateTensor
from nemoquant.quantized.checkpoint import PackedCheckpoint

ALL = 2**62


@dataclass(frozen=True)
class GraphOptions:
    """Options of a graph.

    Attributes:
        compute: float32, float16 or bfloat16, the dtype of activations; norms, router and scan are always
            float32.
        last_token_only: logits of the last position only.
        layers: first layer, and the index after the last one; None is all.
        with_hidden: also output the hidden states that the head and MTP take.
    """

    compute: str = "float32"
    last_token_only: bool = False
    layers: tuple[int, int] | None = None
    with_hidden: bool = False


@dataclass(frozen=True)
class Layer:
    """One layer of the main model or of MTP: its own config, and what in it differs from the model's."""

    config: NemotronHConfig
    kind: LayerKind
    prefix: str
    sizes: Sizes

    @property
    def mixer(self) -> str:
        """The prefix of its mixer."""
        return self.prefix + names.MIXER


class Builder:
    """Records one graph over an opened checkpoint."""

    def __init__(self, opened: PackedCheckpoint, dialect: Dialect, options: GraphOptions) -> None:
        """Raises UsageError for what the dialect (a dtype, experts' format) or the model (layers) lacks.

        Also for a layout whose scales a graph can't point to.
        """
        if not opened.layout.engine_bytes:
            raise UsageError(
                f"{opened.path} is in the {opened.layout.name} layout, whose scales are bf16 or reciprocals: "
                f"no graph can point to them; export the ModelOpt checkpoint that it was converted from, or "
                f"`nemoquant convert --to bf16` and quantize that"
            )
        self.opened, self.config, self.dialect, self.options = opened, opened.config, dialect, options
        self.compute = dialect.compute(options.compute)
        count = len(self.config.layers)
        self.first, self.end = options.layers or (0, count)
        if not 0 <= self.first < self.end <= count:
            raise UsageError(
                f"--layers {self.first}:{self.end}: expected 0 <= first < end <= {count}, the model's layers"
            )
        for i in range(self.first, self.end):
            self.check_layer(self.main_layer(i))
        self.tape = Tape()
        self.weights = GraphWeights(opened, dialect)
        self.functions: dict[str, ir.Function] = {}
        self.inputs: list[ir.Value] = []
        self.states: list[ir.Value] = []

    def main_layer(self, i: int) -> Layer:
        c = self.config
        return Layer(c.of_layer(i), c.layers[i], names.layer(i), c.layer_sizes[i] if c.layer_sizes else ())

    def mtp_layers(self) -> list[Layer]:
        """The layers of the first module."""
        c = self.config
        sizes = c.mtp_layer_sizes or ((),) * len(c.mtp_layers)
        prefixes = mtp.layer_prefixes(c, 0)
        return [Layer(c.of_mtp_layer(j), kind, prefixes[j], sizes[j]) for j, kind in enumerate(c.mtp_layers)]

    def check_layer(self, layer: Layer) -> None:
        """Raises UsageError for a layer that a graph, or the dialect, has no function for.

        It may be routed experts of a format that the dialect can't run. Or a layer with a state whose sizes
        are its own: the functions for the convolution and the scan are shared by all layers.
        """
        if layer.sizes and KINDS[layer.kind].states(layer.config):
            raise UsageError(
                f"{self.opened.path}: {layer.prefix[:-1]} ({layer.kind}) differs from other layers of its "
                f"kind in {listing([field for field, _ in layer.sizes])}; a graph has one size for all "
                f"states of a kind: run this model in a serving engine"
            )
        known = self.dialect.expert_gemms
        for projection in filter(names.is_stack, KINDS[layer.kind].projections(layer.config)):
            expert = layer.mixer + names.member(projection, 0)
            gemm = gemm_of(*self.opened.formats(expert))
            if gemm.name not in known:
                raise UsageError(
                    f"{self.opened.path}: {names.stack_of(expert)} are {gemm.name}, for which the "
                    f"{self.dialect.name} dialect has no kernel; it has {listing(list(known))}: take another "
                    f"dialect, or quantize the experts to another format"
                )

    def main(self) -> ir.Model:
        """The main model, or the requested layers."""
        whole_start, whole_end = self.first == 0, self.end == len(self.config.layers)
        x = (
            self.embedded()
            if whole_start
            else self.input("hidden", self.compute, "batch", "length", self.config.hidden_size)
        )
        for i in range(self.first, self.end):
            x = self.layer(self.main_layer(i), x, i)
        outputs = []
        if whole_end:
            x = self.norm(x, f"{names.FINAL_NORM}.weight")
            outputs.append(self.logits(x))
        if self.options.with_hidden or not whole_end:
            outputs.append(
                self.output(x, "hidden_out", self.compute, "batch", "length", self.config.hidden_size)
            )
        return self.model("nemotron_h", outputs)

    def mtp(self) -> ir.Model:
        """The first multi-token-prediction module; states are numbered by its own layers."""
        assert self.opened.has_mtp
        layers = self.mtp_layers()
        first, last = layers[0].prefix, layers[-1].prefix
        for layer in layers:
            self.check_layer(layer)
        embedded = self.embedded()
        hidden = self.input("hidden", self.compute, "batch", "length", self.config.hidden_size)
        parts = [
            self.norm(embedded, f"{first}enorm.weight"),
            self.norm(hidden, f"{first}hnorm.weight"),
        ]
        joined = self.tape.reshape(self.tape.op("Concat", *parts, axis=-1), -1, 2 * self.config.hidden_size)
        x = self.tape.reshape_to(self.gemm(f"{first}eh_proj", joined), self.tape.op("Shape", hidden))
        for j, layer in enumerate(layers):
            x = self.layer(layer, x, j)
        x = self.norm(x, f"{last}final_layernorm.weight")
        outputs = [
            self.logits(x),
            self.output(x, "hidden_out", self.compute, "batch", "length", self.config.hidden_size),
        ]
        return self.model("nemotron_h_mtp", outputs)

    # Pieces.

    def input(self, name: str, dtype: ir.DataType, *shape: int | str) -> ir.Value:
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
        self.inputs.append(value)
        return value

    def output(self, value: ir.Value, name: str, dtype: ir.DataType, *shape: int | str) -> ir.Value:
        value = self.tape.op("Identity", value)
        value.name, value.type, value.shape = name, ir.TensorType(dtype), ir.Shape(shape)
        return value

    def embedded(self) -> ir.Value:
        ids = self.input("input_ids", INT64, "batch", "length")
        return self.tape.cast(
            self.tape.op("Gather", self.weights.plain(f"{names.EMBEDDINGS}.weight"), ids, axis=0),
            self.compute,
        )

    def norm(self, x: ir.Value, weight: str) -> ir.Value:
        t = self.tape
        wide = rms_norm(t, t.cast(x, FLOAT), t.cast(self.weights.plain(weight), FLOAT), self.config.norm_eps)
        return t.cast(wide, self.compute)

    def gemm(self, module: str, x: ir.Value) -> ir.Value:
        name = gemm_of(*self.opened.formats(module)).name
        parts = {part: self.weights.part(module, part) for part in GEMMS[name].parts}
        self.need(name)
        return self.dialect.linear(self.tape, x, parts, name, self.compute)

    def logits(self, hidden: ir.Value) -> ir.Value:
        t, last = self.tape, self.options.last_token_only
        if last:
            hidden = t.slice(hidden, -1, ALL, 1)
        head = names.head(self.config.tie_word_embeddings)
        y = self.gemm(head, t.reshape(hidden, -1, self.config.hidden_size))
        y = t.reshape_to(y, t.op("Concat", t.op("Shape", hidden, start=0, end=2), t.ints(-1), axis=0))
        return self.output(
            y, "logits", self.compute, "batch", 1 if last else "length", self.config.vocab_size
        )

    def layer(self, layer: Layer, x: ir.Value, number: int) -> ir.Value:
        """A call of its layer function, with its state among the graph's inputs and outputs."""
        variant, config = self.variant(layer), layer.config
        self.function(variant.name, lambda: layer_function(config, self.dialect, variant, self.compute))
        states = KINDS[layer.kind].states(config)
        before = [
            self.input(f"{state.name}.{number}", self.state_type(state, variant), *state_shape(state, "past"))
            for state in states
        ]
        weights = [self.layer_weight(variant, layer, name) for name in weight_names(config, variant)]
        x, *after = self.tape.ops(variant.name, 1 + len(before), x, *before, *weights, domain=LAYERS)
        for state, old, value in zip(states, before, after, strict=True):
            value.name = f"present_{state.name.removeprefix('past_')}.{number}"
            value.type, value.shape = old.type, ir.Shape(state_shape(state, "total"))
            self.states.append(value)
        return x

    def state_type(self, state: StateTensor, variant: Variant) -> ir.DataType:
        """A state's dtype in the graph."""
        cached = self.dialect.cache_dtype(variant.cache, self.compute)
        return {"float32": FLOAT, "compute": self.compute, "cache": cached}[state.dtype]

    def variant(self, layer: Layer) -> Variant:
        """The layer's function, by kind and formats; the operators that it calls become functions too."""
        gemms = []
        for projection in KINDS[layer.kind].projections(layer.config):
            name = gemm_of(*self.opened.formats(layer.mixer + names.member(projection, 0))).name
            gemms.append((projection, name))
            self.need(name)
        quantized = f"{layer.mixer}k_proj{names.OUTPUT}" in self.opened.inputs
        cache = self.opened.cache.name if quantized and self.opened.cache is not None else None
        variant = Variant(layer.kind, tuple(gemms), cache, layer.sizes)
        if not self.dialect.has_plugins:
            operators = LAYER_GRAPHS[layer.kind].operators(layer.config, self.dialect, variant, self.compute)
            for key, make in operators.items():
                self.function(key, make)
        return variant

    def layer_weight(self, variant: Variant, layer: Layer, name: str) -> ir.Value:
        mixer = layer.mixer
        if name == "layer_norm":
            return self.weights.plain(f"{layer.prefix}norm.weight")
        if name in ("k_scale", "v_scale"):
            return self.weights.cache_scale(f"{mixer}{name[0]}_proj")
        module, _, part = name.rpartition(".")
        if names.is_stack(module):
            return self.weights.experts(mixer, module, part, layer.config.n_routed_experts)
        if any(module == projection for projection, _ in variant.gemms):
            return self.weights.part(mixer + module, part)
        return self.weights.plain(mixer + name)

    def need(self, name: str) -> None:
        """Add the function of nemoquant that rounds the inputs of a GEMM, where the dialect has one."""
        gemm = GEMMS[name]
        if gemm.number is not None and gemm.rounds:
            make = self.dialect.codecs[gemm.number].function
            if make is not None:
                self.function(name, make)

    def function(self, key: str, make: Callable[[], ir.Function | None]) -> None:
        if key not in self.functions:
            recorded = make()
            if recorded is not None:
                self.functions[key] = recorded

    def model(self, name: str, outputs: list[ir.Value]) -> ir.Model:
        domains = {domain for domain in self.tape.domains if domain} | {
            f.domain for f in self.functions.values()
        }
        graph = ir.Graph(
            self.inputs,
            [*outputs, *self.states],
            nodes=self.tape.nodes,
            initializers=list(self.weights.values.values()),
            opset_imports={"": OPSET, **dict.fromkeys(sorted(domains), 1)},
            name=name,
        )
        return ir.Model(
            graph,
            ir_version=IR_VERSION,
            functions=list(self.functions.values()),
            producer_name="nemoquant",
            producer_version=__version__,
        )


def state_shape(state: StateTensor, positions: str) -> list[int | str]:
    """The shape of a state in a graph; ``positions`` names the dimension that grows."""
    return ["batch", *(positions if size == PAST else size for size in state.shape)]
