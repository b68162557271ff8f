"""Differences between the runtimes of a graph: how weights are unpacked, inputs rounded, and experts run.

onnxruntime   FLOAT8E4M3FN weights by DequantizeLinear, E2M1 codes as UINT8 unpacked by standard operators,
              caches in the compute dtype; a Loop over the chosen experts, each with its own tokens
tensorrt_rtx  FLOAT4E2M1 and FLOAT8E4M3FN by DequantizeLinear, TRT_FP4DynamicQuantize, FP8 caches; all experts
              over all tokens
tensorrt      the same GEMMs; CausalConv1d, Mamba2Scan and RoutedExperts are plugin nodes without a body,
              which take packed codes as INT8
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from nemoquant.errors import UsageError
from nemoquant.formats import e2m1, e4m3
from nemoquant.graph.ops import BLOCK, F8
from nemoquant.graph.spec import spec
from nemoquant.graph.tape import BF16, DOMAIN, FLOAT, HALF, Tape, function

Parts = Mapping[str, ir.Value]

FORMAT_NAMES = {
    ("source", None): "bf16",
    ("fp8", "fp8"): "fp8",
    ("fp8", None): "w8a16",
    ("nvfp4", "nvfp4"): "nvfp4",
    ("nvfp4", None): "w4a16",
}
COMPUTE = {"float32": FLOAT, "float16": HALF, "bfloat16": BF16}
DTYPES = {
    "BF16": BF16,
    "F32": FLOAT,
    "F16": HALF,
    "F8_E4M3": F8,
    "U8": ir.DataType.UINT8,
}
# E2M1_PAIRS: both values of a byte of E2M1 codes, doubled so that they are integers [256, 2].
# E4M3_VALUES: the values of E4M3 codes, exact in float16.
E2M1_PAIRS = np.stack(
    [2 * e2m1.VALUES[np.arange(256) % 16], 2 * e2m1.VALUES[np.arange(256) // 16]], 1
).astype(np.int8)
E4M3_VALUES = e4m3.VALUES.astype(np.float16)


def format_name(format: str, activation: str | None) -> str:
    """(weight, input) -> the format's name in variants and RoutedExperts."""
    return FORMAT_NAMES[format, activation]


def parts_of(name: str) -> tuple[str, ...]:
    """The parts of a GEMM's weight in a format, in the order of ``plugins/routed_experts/spec.yaml``."""
    return spec("routed_experts").formats[name]


class Dialect:
    """The onnxruntime dialect; the others override what differs."""

    name = "onnxruntime"
    computes: tuple[str, ...] = ("float32", "float16")
    fp8_caches = False
    one_input_scale = False  # one for all experts of a layer and projection
    has_plugins = False  # kernels of nemoquant: the operators need no body
    rounds_nvfp4_inputs = True  # by a function of nemoquant; else the runtime has an operator for it
    limit = ", its CPU kernels multiply no bfloat16"  # reason for ``computes``, for messages

    def compute(self, name: str) -> ir.DataType:
        """The dtype of a ``--compute`` option.

        Raises:
            UsageError: this dialect does not compute in it.
        """
        if name not in self.computes:
            raise UsageError(
                f"--compute {name}: the {self.name} dialect computes in "
                f"{' or '.join(self.computes)}{self.limit}"
            )
        return COMPUTE[name]

    def stored(self, part: str, dtype: str, stacked: bool) -> ir.DataType:
        """A stored tensor's dtype in the graph; ``stacked``: all experts of a layer and projection."""
        if stacked and dtype == "F8_E4M3" and part in ("codes", "block_scales"):
            return ir.DataType.UINT8  # experts are gathered, and Gather takes no FP8
        return DTYPES[dtype]

    def shape(self, part: str, dtype: str, shape: Sequence[int], stacked: bool) -> list[int]:  # noqa: ARG002
        """The shape that goes with ``stored``."""
        return list(shape)

    def plugin(self, op: str, **attributes: Any) -> dict[str, Any]:  # noqa: ARG002
        """The attributes of one of nemoquant's nodes; a plugin has more than a function."""
        return attributes

    def experts_node(self, name: str) -> tuple[str, dict[str, Any]]:
        """Name and attributes of the node for the routed experts of a format."""
        return experts_op(name), {"activation": "relu2"}

    def decoded(self, t: Tape, w: Parts, name: str, compute: ir.DataType, stacked: bool) -> ir.Value:
        """A weight [out, in] in the compute dtype; ``stacked``: it was gathered from a stack."""
        if name == "bf16":
            return t.cast(w["weight"], compute)
        if name in ("fp8", "w8a16"):
            if stacked:
                return t.cast(t.op("Mul", _e4m3(t, w["codes"]), w["global_scale"]), compute)
            return t.cast(t.op("DequantizeLinear", w["codes"], w["global_scale"]), compute)
        block_scale = _e4m3(t, w["block_scales"]) if stacked else t.cast(w["block_scales"], FLOAT)
        half = t.op("Mul", t.op("Mul", block_scale, w["global_scale"]), t.constant(np.float32(0.5)))
        # [out, in/2, 2]
        pairs = t.op("Gather", t.constant(E2M1_PAIRS), t.cast(w["codes"], ir.DataType.INT32), axis=0)
        blocks = t.reshape_to(
            t.cast(pairs, FLOAT), t.op("Concat", t.op("Shape", half), t.ints(BLOCK), axis=0)
        )
        values = t.op("Mul", blocks, t.unsqueeze(half, 2))  # exact: twice the code times half the scale
        return t.cast(t.reshape(values, t.size(w["codes"], 0), -1), compute)

    def rounded(self, t: Tape, x: ir.Value, w: Parts, name: str, compute: ir.DataType) -> ir.Value:
        """A GEMM's input, rounded as its format demands."""
        if name == "fp8":
            return self.fp8_round_trip(t, x, w["input_scale"], compute)
        if name == "nvfp4":
            return t.op("NVFP4DynamicQuantDequant", x, w["input_scale"], domain=DOMAIN)
        return x

    def fp8_round_trip(self, t: Tape, x: ir.Value, scale: ir.Value, compute: ir.DataType) -> ir.Value:
        """``x`` rounded to E4M3 and back; the scale stays float32, whatever the dtype of ``x``."""
        codes = t.op("QuantizeLinear", t.cast(x, FLOAT), scale, output_dtype=int(F8))
        return t.cast(t.op("DequantizeLinear", codes, scale), compute)

    def linear(
        self, t: Tape, x: ir.Value, w: Parts, name: str, compute: ir.DataType, stacked: bool = False
    ) -> ir.Value:
        """x [tokens, in] in the compute dtype -> [tokens, out]."""
        return t.op(
            "Gemm", self.rounded(t, x, w, name, compute), self.decoded(t, w, name, compute, stacked), transB=1
        )

    def cached(
        self, t: Tape, x: ir.Value, past: ir.Value, scale: ir.Value | None, compute: ir.DataType
    ) -> tuple[ir.Value, ir.Value]:
        """Append new keys or values to the past ones [B, heads, positions, size].

        Returns:
            what attention reads, and what is kept as state.
        """
        if scale is not None:
            x = self.fp8_round_trip(t, x, scale, compute)
        both = t.op("Concat", past, x, axis=2)
        return both, both

    def routed_experts(self, name: str, compute: ir.DataType) -> ir.Function | None:
        """The operator's body for one format; None where the runtime has a kernel.

        Sums are in float32, in ascending order of experts.
        """

        def one(
            t: Tape,
            x: ir.Value,
            ids: ir.Value,
            factors: ir.Value,
            *,
            expert: ir.Value,
            weights: Parts,
            total: ir.Value,
        ) -> ir.Value:
            hit = t.op("Equal", ids, expert)
            factor = t.op(
                "ReduceSum", t.op("Where", hit, factors, t.constant(np.float32(0))), t.ints(1), keepdims=1
            )  # [T, 1]
            rows = t.op("ReduceMax", t.cast(hit, ir.DataType.INT32), t.ints(1), keepdims=0)
            rows = t.reshape(t.op("NonZero", rows), -1)
            y = self.expert(t, t.op("Gather", x, rows, axis=0), weights, name, compute)
            y = t.op("Mul", t.cast(y, FLOAT), t.op("Gather", factor, rows, axis=0))
            return t.op("ScatterND", total, t.unsqueeze(rows, 1), y, reduction="add")

        def record(
            t: Tape, x: ir.Value, ids: ir.Value, factors: ir.Value, *stacks: ir.Value
        ) -> list[ir.Value]:
            names = stack_names(name)
            chosen = t.op("Unique", t.reshape(ids, -1), sorted=1)
            start = t.op("ConstantOfShape", t.op("Shape", x), value=ir.tensor(np.zeros(1, np.float32)))

            def body(t: Tape, i: ir.Value, total: ir.Value) -> ir.Value:
                expert = t.op("Gather", chosen, i, axis=0)
                mine = {
                    key: t.op("Gather", stack, expert, axis=0)
                    for key, stack in zip(names, stacks, strict=True)
                }
                return one(t, x, ids, factors, expert=expert, weights=mine, total=total)

            return [t.cast(t.loop(t.op("Size", chosen), start, body), compute)]

        return function(spec("routed_experts"), record, name=experts_op(name), inputs=stack_names(name))

    def expert(self, t: Tape, x: ir.Value, weights: Parts, name: str, compute: ir.DataType) -> ir.Value:
        """``down(relu(up(x))^2)`` with one expert's parts, ``up_...`` and ``down_...``."""
        up, down = ({part: weights[f"{p}_{part}"] for part in parts_of(name)} for p in ("up", "down"))
        return self.linear(
            t, squared_relu(t, self.linear(t, x, up, name, compute, True)), down, name, compute, True
        )


def stack_names(name: str) -> list[str]:
    """Inputs of RoutedExperts after ``expert_weights``."""
    return [f"{projection}_{part}" for projection in ("up", "down") for part in parts_of(name)]


def experts_op(name: str) -> str:
    """The function's name for a format: no attribute can select a format inside an ONNX function."""
    return f"{spec('routed_experts').name}_{name}"


def squared_relu(t: Tape, x: ir.Value) -> ir.Value:
    x = t.op("Relu", x)
    return t.op("Mul", x, x)


def _e4m3(t: Tape, codes: ir.Value) -> ir.Value:
    """Bytes of E4M3 codes as float32."""
    return t.cast(t.op("Gather", t.constant(E4M3_VALUES), t.cast(codes, ir.DataType.INT32), axis=0), FLOAT)


class TensorRTRTX(Dialect):
    """Strongly typed: FP4 and FP8 tensors have their own dtypes."""

    name = "tensorrt_rtx"
    rounds_nvfp4_inputs = False
    limit = ""
    computes = ("bfloat16", "float16", "float32")
    fp8_caches = True
    one_input_scale = True  # TRT_FP4DynamicQuantize takes only a scalar that is an initializer

    def stored(self, part: str, dtype: str, stacked: bool) -> ir.DataType:  # noqa: ARG002
        return ir.DataType.FLOAT4E2M1 if part == "codes" and dtype == "U8" else DTYPES[dtype]

    def shape(self, part: str, dtype: str, shape: Sequence[int], stacked: bool) -> list[int]:  # noqa: ARG002
        return [*shape[:-1], 2 * shape[-1]] if part == "codes" and dtype == "U8" else list(shape)

    def decoded(self, t: Tape, w: Parts, name: str, compute: ir.DataType, stacked: bool) -> ir.Value:
        per_expert: dict[str, Any] = {"axis": 0} if stacked else {}
        if name == "bf16":
            return t.cast(w["weight"], compute)
        if name in ("fp8", "w8a16"):
            return t.op(
                "DequantizeLinear", w["codes"], w["global_scale"], output_dtype=int(compute), **per_expert
            )
        scales = t.op("DequantizeLinear", w["block_scales"], w["global_scale"], **per_expert)
        return t.cast(t.op("DequantizeLinear", w["codes"], scales, axis=-1, block_size=BLOCK), compute)

    def rounded(self, t: Tape, x: ir.Value, w: Parts, name: str, compute: ir.DataType) -> ir.Value:
        if name == "fp8":
            return self.fp8_round_trip(t, x, w["input_scale"], compute)
        if name != "nvfp4":
            return x
        codes, scales = t.ops(
            "TRT_FP4DynamicQuantize",
            2,
            x,
            w["input_scale"],
            domain="trt",
            axis=-1,
            block_size=BLOCK,
            scale_type=int(F8),
        )
        scales = t.op("DequantizeLinear", scales, w["input_scale"])
        return t.cast(t.op("DequantizeLinear", codes, scales, axis=-1, block_size=BLOCK), compute)

    def fp8_round_trip(self, t: Tape, x: ir.Value, scale: ir.Value, compute: ir.DataType) -> ir.Value:
        # no casts in between: the runtime is to fuse the pair with its GEMM
        codes = t.op("QuantizeLinear", x, scale, output_dtype=int(F8))
        return t.op("DequantizeLinear", codes, scale, output_dtype=int(compute))

    def cached(
        self, t: Tape, x: ir.Value, past: ir.Value, scale: ir.Value | None, compute: ir.DataType
    ) -> tuple[ir.Value, ir.Value]:
        if scale is None:
            return super().cached(t, x, past, scale, compute)
        both = t.op("Concat", past, t.op("QuantizeLinear", x, scale, output_dtype=int(F8)), axis=2)
        return t.op("DequantizeLinear", both, scale, output_dtype=int(compute)), both

    def routed_experts(self, name: str, compute: ir.DataType) -> ir.Function | None:
        """All experts over all tokens as two batched products; factors of experts not chosen are zero.

        The builder refuses NonZero, and refuses to gather packed codes in any data type. A separate branch
        for few tokens would hold every weight a second time in the engine (measured). So each token costs
        all experts here.
        """

        def record(
            t: Tape, x: ir.Value, ids: ir.Value, factors: ir.Value, *stacks: ir.Value
        ) -> list[ir.Value]:
            named = dict(zip(stack_names(name), stacks, strict=True))
            count = t.size(stacks[0], 0)
            none = t.op(
                "ConstantOfShape",
                t.op("Concat", t.size(ids, 0), count, axis=0),
                value=ir.tensor(np.zeros(1, np.float32)),
            )
            # [E, T]
            share = t.op("Transpose", t.op("ScatterElements", none, ids, factors, axis=1), perm=[1, 0])

            def product(x: ir.Value, projection: str) -> ir.Value:
                """x [1 or E, T, in] by [E, out, in]."""
                w = {part: named[f"{projection}_{part}"] for part in parts_of(name)}
                matrices = t.op("Transpose", self.decoded(t, w, name, compute, True), perm=[0, 2, 1])
                return t.op("MatMul", self.rounded(t, x, w, name, compute), matrices)

            # [E, T, in]
            y = t.cast(product(squared_relu(t, product(t.unsqueeze(x, 0), "up")), "down"), FLOAT)
            total = t.op("ReduceSum", t.op("Mul", y, t.unsqueeze(share, 2)), t.ints(0), keepdims=0)
            return [t.cast(total, compute)]

        return function(spec("routed_experts"), record, name=experts_op(name), inputs=stack_names(name))


class TensorRT(TensorRTRTX):
    """With plugins: an operator that TensorRT lacks is a node, found by name, version and namespace."""

    name = "tensorrt"
    one_input_scale = False
    has_plugins = True

    def stored(self, part: str, dtype: str, stacked: bool) -> ir.DataType:
        if stacked and part in ("codes", "block_scales"):
            # the same bytes: TensorRT has no UINT8 inside a network, and gives no FP4 to a plugin
            return ir.DataType.INT8
        return super().stored(part, dtype, stacked)

    def shape(self, part: str, dtype: str, shape: Sequence[int], stacked: bool) -> list[int]:
        return list(shape) if stacked else super().shape(part, dtype, shape, stacked)

    def plugin(self, op: str, **attributes: Any) -> dict[str, Any]:
        known = spec(op)  # a plugin needs all of its attributes
        return {
            **known.attributes,
            **attributes,
            "plugin_version": str(known.version),
            "plugin_namespace": known.domain,
        }

    def experts_node(self, name: str) -> tuple[str, dict[str, Any]]:
        return spec("routed_experts").name, self.plugin("routed_experts", format=name, activation="relu2")


DIALECTS: dict[str, Dialect] = {d.name: d for d in (Dialect(), TensorRTRTX(), TensorRT())}
