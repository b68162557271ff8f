"""A layer as an ONNX function, ``x + mixer(norm(x))``: one for each kind and combination of formats."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

import numpy as np
import onnx_ir as ir

from nemoquant.formats import CacheName
from nemoquant.graph import ops
from nemoquant.graph.dialects import Dialect, squared_relu
from nemoquant.graph.gemms import GEMMS
from nemoquant.graph.tape import DOMAIN, FLOAT, Tape, make_function
from nemoquant.model.config import LayerKind, NemotronHConfig, Sizes
from nemoquant.model.kinds import KINDS
from nemoquant.model.kinds.moe import DOWN, ROUTER_BIAS, ROUTER_WEIGHT, UP

CHUNK = 64  # positions of a chunk of the scan; a larger one has larger products and fewer steps
LAYERS = "nemoquant.layers"

Operators = Mapping[str, Callable[[], ir.Function | None]]


@dataclass(frozen=True)
class Variant:
    """Layers share a function if kind, sizes, formats of GEMMs (by projection) and of the cache are the same.

    ``sizes`` are those that differ from the model's; see :class:`nemoquant.model.config.NemotronHConfig`.
    """

    kind: LayerKind
    gemms: tuple[tuple[str, str], ...]
    cache: CacheName | None = None
    sizes: Sizes = ()

    def format(self, projection: str) -> str:
        return next(name for p, name in self.gemms if p == projection)

    @property
    def name(self) -> str:
        """``MoeLayer_nvfp4``, or with mixed formats ``MoeLayer_experts_nvfp4_shared_experts_fp8``."""
        groups: dict[str, dict[str, None]] = {}
        for projection, name in self.gemms:
            groups.setdefault(name, {})[projection.split(".")[0].removesuffix("_proj")] = None
        text = (
            "_".join("_".join([*members, name]) for name, members in groups.items())
            if len(groups) > 1
            else next(iter(groups))
        )
        sizes = "".join(f"_{field}_{re.sub(r'[^0-9A-Za-z]', '_', str(value))}" for field, value in self.sizes)
        cache = f"_{self.cache}_cache" if self.cache else ""
        return f"{self.kind.capitalize()}Layer_{text}{cache}{sizes}"


@dataclass(frozen=True)
class LayerGraph:
    """What a graph computes for a kind of layer.

    Attributes:
        record: (recorder, normalised x, *states) -> [y, *new states].
        weights: names of its tensors that are no GEMM's, relative to the mixer.
        operators: functions that it calls where the dialect has no plugins, by a key that is the same for
            the same function.
    """

    record: Callable[..., list[ir.Value]]
    weights: Callable[[NemotronHConfig], list[str]]
    operators: Callable[[NemotronHConfig, Dialect, Variant, ir.DataType], Operators]


class LayerRecorder:
    """Records one layer function."""

    def __init__(
        self,
        t: Tape,
        config: NemotronHConfig,
        dialect: Dialect,
        variant: Variant,
        compute: ir.DataType,
        weights: Mapping[str, ir.Value],
    ) -> None:
        self.t, self.c, self.dialect, self.variant, self.compute, self.w = (
            t,
            config,
            dialect,
            variant,
            compute,
            weights,
        )

    def gemm(self, projection: str, x: ir.Value) -> ir.Value:
        """x [tokens, in] -> [tokens, out], both in the compute dtype."""
        name = self.variant.format(projection)
        parts = {part: self.w[f"{projection}.{part}"] for part in GEMMS[name].parts}
        return self.dialect.linear(self.t, x, parts, name, self.compute)

    def f32(self, name: str) -> ir.Value:
        return self.t.cast(self.w[name], FLOAT)

    def rms_norm(self, x: ir.Value, weight: ir.Value) -> ir.Value:
        """Over the last axis; float32 in and out."""
        return rms_norm(self.t, x, weight, self.c.norm_eps)

    def flat(self, x: ir.Value) -> ir.Value:
        return self.t.reshape(x, -1, self.c.hidden_size)


def rms_norm(t: Tape, x: ir.Value, weight: ir.Value, eps: float) -> ir.Value:
    """``weight * x / sqrt(mean(x^2) + eps)`` over the last axis, float32."""
    mean = t.op("ReduceMean", t.op("Mul", x, x), t.ints(-1), keepdims=1)
    root = t.op("Sqrt", t.op("Add", mean, t.constant(np.float32(eps))))
    return t.op("Mul", t.op("Div", x, root), weight)


def weight_names(config: NemotronHConfig, variant: Variant) -> list[str]:
    """Inputs of the function after x and state: ``layer_norm``, then names relative to the mixer."""
    names = ["layer_norm"]
    for projection, name in variant.gemms:
        names += [f"{projection}.{part}" for part in GEMMS[name].parts]
    names += LAYER_GRAPHS[variant.kind].weights(config)
    if variant.cache is not None:
        names += ["k_scale", "v_scale"]
    return names


def layer_function(
    config: NemotronHConfig, dialect: Dialect, variant: Variant, compute: ir.DataType
) -> ir.Function:
    """(x, states, weights) -> (x + mixer(norm(x)), states)."""
    states = [state.name for state in KINDS[variant.kind].states(config)]
    weights = weight_names(config, variant)

    def record(t: Tape, x: ir.Value, *rest: ir.Value) -> list[ir.Value]:
        named = dict(zip(weights, rest[len(states) :], strict=True))
        layer = LayerRecorder(t, config, dialect, variant, compute, named)
        wide = t.cast(x, FLOAT)
        normed = t.cast(layer.rms_norm(wide, layer.f32("layer_norm")), compute)
        y, *after = LAYER_GRAPHS[variant.kind].record(layer, normed, *rest[: len(states)])
        y = t.reshape_to(y, t.op("Shape", x))
        return [t.op("Add", x, y), *after]

    return make_function(LAYERS, variant.name, ["x", *states, *weights], record)


def mamba_weights(config: NemotronHConfig) -> list[str]:
    bias = ["conv1d.bias"] if config.use_conv_bias else []
    return ["conv1d.weight", *bias, "A_log", "D", "dt_bias", "norm.weight"]


def mamba(layer: LayerRecorder, x: ir.Value, conv_state: ir.Value, ssm_state: ir.Value) -> list[ir.Value]:
    t, c = layer.t, layer.c
    shape = t.op("Shape", x, start=0, end=2)
    bc = c.n_groups * c.ssm_state_size

    def positions(value: ir.Value, *rest: int) -> ir.Value:
        return t.reshape_to(value, t.op("Concat", shape, t.ints(*rest), axis=0))

    projected = positions(layer.gemm("in_proj", layer.flat(x)), -1)
    z, xbc, dt = t.ops(
        "Split", 3, projected, t.ints(c.mamba_inner, c.conv_channels, c.mamba_num_heads), axis=-1
    )
    weight = t.op("Squeeze", layer.f32("conv1d.weight"), t.ints(1))
    bias = (
        layer.f32("conv1d.bias")
        if c.use_conv_bias
        else t.op("Expand", t.constant(np.zeros(1, np.float32)), t.ints(c.conv_channels))
    )
    xbc, conv_out = t.ops(
        "CausalConv1d",
        2,
        xbc,
        weight,
        bias,
        conv_state,
        domain=DOMAIN,
        **layer.dialect.plugin("causal_conv1d", activation="silu"),
    )
    xs, b, cc = t.ops("Split", 3, xbc, t.ints(c.mamba_inner, bc, bc), axis=-1)
    a = t.op("Neg", t.op("Exp", layer.f32("A_log")))
    low, high = c.time_step_limit
    inputs = (
        positions(xs, c.mamba_num_heads, c.mamba_head_dim),
        t.cast(dt, FLOAT),
        a,
        positions(b, c.n_groups, c.ssm_state_size),
        positions(cc, c.n_groups, c.ssm_state_size),
        layer.f32("D"),
        layer.f32("dt_bias"),
        ssm_state,
    )
    attributes = layer.dialect.plugin("mamba2_scan", chunk_size=CHUNK, dt_min=float(low), dt_max=float(high))
    y, ssm_out = t.ops("Mamba2Scan", 2, *inputs, domain=DOMAIN, **attributes)
    if layer.dialect.has_plugins:
        y = t.cast(y, FLOAT)  # the function returns float32, the plugin the dtype of x
    gate = t.cast(z, FLOAT)
    gated = t.op("Mul", t.op("Mul", gate, t.op("Sigmoid", gate)), positions(y, -1))
    grouped = positions(gated, c.n_groups, c.mamba_inner // c.n_groups)
    weight = t.reshape(layer.f32("norm.weight"), c.n_groups, -1)
    y = t.cast(t.reshape(layer.rms_norm(grouped, weight), -1, c.mamba_inner), layer.compute)
    return [layer.gemm("out_proj", y), conv_out, ssm_out]


def attention(layer: LayerRecorder, x: ir.Value, past_key: ir.Value, past_value: ir.Value) -> list[ir.Value]:
    t, c = layer.t, layer.c
    kv, group, size = c.num_key_value_heads, c.num_attention_heads // c.num_key_value_heads, c.head_dim
    shape = t.op("Shape", x, start=0, end=2)
    flat = layer.flat(x)

    def heads(name: str, count: int) -> ir.Value:
        split = t.reshape_to(layer.gemm(name, flat), t.op("Concat", shape, t.ints(count, size), axis=0))
        return t.op("Transpose", split, perm=[0, 2, 1, 3])  # [B, heads, L, size]

    query, key, value = heads("q_proj", kv * group), heads("k_proj", kv), heads("v_proj", kv)
    k_scale, v_scale = (layer.w.get(name) for name in ("k_scale", "v_scale"))
    cache = layer.variant.cache
    key, key_out = layer.dialect.cached(t, key, past_key, cache=cache, scale=k_scale, compute=layer.compute)
    value, value_out = layer.dialect.cached(
        t, value, past_value, cache=cache, scale=v_scale, compute=layer.compute
    )
    length, total = t.size(query, 2), t.size(key, 2)
    scores = t.op(
        "MatMul",
        t.reshape(query, 0, kv, group, length, size),
        t.op("Transpose", t.unsqueeze(key, 2), perm=[0, 1, 2, 4, 3]),
    )
    scores = t.op("Mul", t.cast(scores, FLOAT), t.constant(np.float32(size**-0.5)))
    zero, one = t.constant(np.int64(0)), t.constant(np.int64(1))
    place = t.unsqueeze(
        t.op("Range", t.op("Squeeze", t.op("Sub", total, length)), t.op("Squeeze", total), one), 1
    )
    future = t.op(
        "Greater", t.unsqueeze(t.op("Range", zero, t.op("Squeeze", total), one), 0), place
    )  # [L, total]
    scores = t.op("Where", future, t.constant(np.float32(-np.inf)), scores)
    weights = t.cast(t.op("Softmax", scores, axis=-1), layer.compute)
    y = t.op("MatMul", weights, t.unsqueeze(value, 2))  # [B, kv, group, L, size]
    y = t.op("Transpose", t.reshape(y, 0, kv * group, length, size), perm=[0, 2, 1, 3])
    return [layer.gemm("o_proj", t.reshape(y, -1, kv * group * size)), key_out, value_out]


def mlp(layer: LayerRecorder, x: ir.Value) -> list[ir.Value]:
    return [layer.gemm("down_proj", squared_relu(layer.t, layer.gemm("up_proj", layer.flat(x))))]


def moe(layer: LayerRecorder, x: ir.Value) -> list[ir.Value]:
    t, c = layer.t, layer.c
    flat = layer.flat(x)
    ids, factors = route(layer, t.cast(flat, FLOAT))
    inputs = layer.gemm("fc1_latent_proj", flat) if c.moe_latent_size else flat
    name = layer.variant.format(UP)
    experts = [layer.w[f"{projection}.{part}"] for projection in (UP, DOWN) for part in GEMMS[name].parts]
    op, attributes = layer.dialect.experts_node(name)
    y = t.op(op, inputs, ids, factors, *experts, domain=DOMAIN, **attributes)
    if c.moe_latent_size:
        y = layer.gemm("fc2_latent_proj", y)
    if c.n_shared_experts:
        shared = layer.gemm(
            "shared_experts.down_proj", squared_relu(t, layer.gemm("shared_experts.up_proj", flat))
        )
        y = t.op("Add", y, shared)
    return [y]


def route(layer: LayerRecorder, x: ir.Value) -> tuple[ir.Value, ir.Value]:
    """x [tokens, hidden] float32 -> expert ids [tokens, k] int64 and their factors [tokens, k] float32."""
    t, c = layer.t, layer.c
    scores = t.op("Sigmoid", t.op("Gemm", x, layer.f32(ROUTER_WEIGHT), transB=1))
    choice = t.op("Add", scores, layer.f32(ROUTER_BIAS))
    if c.n_group > 1:
        choice = close_groups(t, choice, c)
    _, ids = t.ops("TopK", 2, choice, t.ints(c.num_experts_per_tok), axis=-1, sorted=0)
    chosen = t.op("GatherElements", scores, ids, axis=1)
    if c.norm_topk_prob:
        total = t.op("Add", t.op("ReduceSum", chosen, t.ints(1), keepdims=1), t.constant(np.float32(1e-20)))
        chosen = t.op("Div", chosen, total)
    return ids, t.op("Mul", chosen, t.constant(np.float32(c.routed_scaling_factor)))


def close_groups(t: Tape, choice: ir.Value, c: NemotronHConfig) -> ir.Value:
    """-inf for experts outside each token's best groups; a group's score is the sum of its two best."""
    size = c.n_routed_experts // c.n_group
    grouped = t.reshape(choice, -1, c.n_group, size)
    best, _ = t.ops("TopK", 2, grouped, t.ints(min(2, size)), axis=-1)
    _, open_groups = t.ops(
        "TopK", 2, t.op("ReduceSum", best, t.ints(2), keepdims=0), t.ints(c.topk_group), axis=-1
    )
    hot = t.op(
        "OneHot",
        open_groups,
        t.constant(np.int64(c.n_group)),
        t.constant(np.array([0, 1], np.float32)),
        axis=-1,
    )
    is_open = t.op("Greater", t.op("ReduceSum", hot, t.ints(1), keepdims=0), t.constant(np.float32(0)))
    return t.reshape(
        t.op("Where", t.unsqueeze(is_open, 2), grouped, t.constant(np.float32(-np.inf))),
        -1,
        c.n_routed_experts,
    )


def scan_operators(c: NemotronHConfig, *_: object) -> Operators:
    sizes = (c.mamba_num_heads, c.mamba_head_dim, c.n_groups, c.ssm_state_size)
    return {"conv": partial(ops.causal_conv1d, c.conv_kernel), "scan": partial(ops.mamba2_scan, *sizes)}


def expert_operators(
    _: NemotronHConfig, dialect: Dialect, variant: Variant, compute: ir.DataType
) -> Operators:
    name = variant.format(UP)
    return {f"experts {name}": partial(dialect.routed_experts, name, compute)}


def no_operators(*_: object) -> Operators:
    return {}


LAYER_GRAPHS: Mapping[LayerKind, LayerGraph] = MappingProxyType(
    {
        "mamba": LayerGraph(mamba, mamba_weights, scan_operators),
        "moe": LayerGraph(moe, lambda _: [ROUTER_WEIGHT, ROUTER_BIAS], expert_operators),
        "attention": LayerGraph(attention, lambda _: [], no_operators),
        "mlp": LayerGraph(mlp, lambda _: [], no_operators),
    }
)
