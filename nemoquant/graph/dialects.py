"""Differences between the runtimes of a graph: how weights are unpacked, inputs rounded, and experts run.

onnxruntime   FLOAT8E4M3FN weights by DequantizeLinear, E2M1 codes as UINT8 unpacked by standard operators,
              caches in the compute dtype; a Loop over the chosen experts, each with its own tokens
tensorrt_rtx  FLOAT4E2M1 and FLOAT8E4M3FN by DequantizeLinear, MXFP8 and inputs by TensorRT's own operators,
              FP8 caches; all experts over all tokens
tensorrt      the same GEMMs; CausalConv1d, Mamba2Scan and RoutedExperts are plugin nodes without a body,
              which take packed codes as INT8
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from nemoquant.errors import UsageError
from nemoquant.formats import CacheName, FormatName
from nemoquant.graph.codecs import (
    ONNXRUNTIME,
    ONNXRUNTIME_CACHES,
    TENSORRT,
    TENSORRT_CACHES,
    CacheCodec,
    Codec,
    Parts,
)
from nemoquant.graph.gemms import GEMMS
from nemoquant.graph.ops import F8
from nemoquant.graph.spec import spec
from nemoquant.graph.tape import BF16, FLOAT, HALF, Tape, function

COMPUTE = {"float32": FLOAT, "float16": HALF, "bfloat16": BF16}
DTYPES = {
    "BF16": BF16,
    "F32": FLOAT,
    "F16": HALF,
    "F8_E4M3": F8,
    "U8": ir.DataType.UINT8,
}


class Dialect:
    """The onnxruntime dialect; the others override what differs."""

    name = "onnxruntime"
    computes: tuple[str, ...] = ("float32", "float16")
    codecs: Mapping[FormatName, Codec] = ONNXRUNTIME
    caches: Mapping[CacheName, CacheCodec] = ONNXRUNTIME_CACHES
    one_input_scale = False  # one for all experts of a layer and projection
    has_plugins = False  # kernels of nemoquant: the operators need no body
    onnxruntime = True  # ONNX Runtime's CPU kernels run it
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

    def stored(self, part: str, dtype: str, number: FormatName | None, stacked: bool) -> ir.DataType:  # noqa: ARG002
        """A stored tensor's dtype in the graph.

        Args:
            part: of a weight, in the number format ``number``.
            dtype: in the file.
            stacked: it is that of all experts of a layer and projection.
        """
        if stacked and dtype == "F8_E4M3" and part in ("codes", "block_scales"):
            return ir.DataType.UINT8  # experts are gathered, and Gather takes no FP8
        return DTYPES[dtype]

    def plugin(self, op: str, **attributes: Any) -> dict[str, Any]:  # noqa: ARG002
        """The attributes of one of nemoquant's nodes; a plugin has more than a function."""
        return attributes

    @property
    def expert_gemms(self) -> Collection[str]:
        """Names of the GEMMs that routed experts may have."""
        return GEMMS

    def experts_node(self, name: str) -> tuple[str, dict[str, Any]]:
        """Name and attributes of the node for the routed experts of a format."""
        return experts_op(name), {"activation": "relu2"}

    def decoded(self, t: Tape, w: Parts, name: str, compute: ir.DataType, stacked: bool) -> ir.Value:
        """A weight [out, in] in the compute dtype; ``stacked``: it was gathered from a stack."""
        number = GEMMS[name].number
        if number is None:
            return t.cast(w["weight"], compute)
        return self.codecs[number].decoded(t, w, compute, stacked)

    def rounded(self, t: Tape, x: ir.Value, w: Parts, name: str, compute: ir.DataType) -> ir.Value:
        """A GEMM's input, rounded as its format demands."""
        gemm = GEMMS[name]
        if gemm.number is None or not gemm.rounds:
            return x
        return self.codecs[gemm.number].rounded(t, x, w, compute)

    def linear(
        self, t: Tape, x: ir.Value, w: Parts, name: str, compute: ir.DataType, stacked: bool = False
    ) -> ir.Value:
        """x [tokens, in] in the compute dtype -> [tokens, out]."""
        return t.op(
            "Gemm", self.rounded(t, x, w, name, compute), self.decoded(t, w, name, compute, stacked), transB=1
        )

    def cached(
        self,
        t: Tape,
        x: ir.Value,
        past: ir.Value,
        *,
        cache: CacheName | None,
        scale: ir.Value | None,
        compute: ir.DataType,
    ) -> tuple[ir.Value, ir.Value]:
        """Append new keys or values to the past ones [B, heads, positions, size].

        ``scale`` belongs to ``cache``; both are None where the cache is not quantized.

        Returns:
            what attention reads, and what is kept as state.
        """
        if cache is not None:
            assert scale is not None
            return self.caches[cache].append(t, past, x, scale, compute)
        both = t.op("Concat", past, x, axis=2)
        return both, both

    def cache_dtype(self, cache: CacheName | None, compute: ir.DataType) -> ir.DataType:
        """The dtype of the KV cache's states."""
        return compute if cache is None else self.caches[cache].dtype(compute)

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
        up, down = ({part: weights[f"{p}_{part}"] for part in GEMMS[name].parts} for p in ("up", "down"))
        return self.linear(
            t, squared_relu(t, self.linear(t, x, up, name, compute, True)), down, name, compute, True
        )


def unpacked(shape: Sequence[int], dtype: ir.DataType) -> list[int]:
    """The shape of a stored tensor in a graph, where it has the dtype of :meth:`Dialect.stored`."""
    per_byte = 8 // dtype.bitwidth if dtype.bitwidth < 8 else 1  # a file counts the bytes of packed codes
    return [*shape[:-1], shape[-1] * per_byte] if shape else []


def stack_names(name: str) -> list[str]:
    """Inputs of RoutedExperts after ``expert_weights``."""
    return [f"{projection}_{part}" for projection in ("up", "down") for part in GEMMS[name].parts]


def experts_op(name: str) -> str:
    """The function's name for a format: no attribute can select a format inside an ONNX function."""
    return f"{spec('routed_experts').name}_{name}"


def squared_relu(t: Tape, x: ir.Value) -> ir.Value:
    x = t.op("Relu", x)
    return t.op("Mul", x, x)


class TensorRTRTX(Dialect):
    """Strongly typed: FP4 and FP8 tensors have their own dtypes."""

    name = "tensorrt_rtx"
    onnxruntime = False
    limit = ""
    computes = ("bfloat16", "float16", "float32")
    codecs = TENSORRT
    caches = TENSORRT_CACHES
    one_input_scale = True  # TRT_FP4DynamicQuantize takes only a scalar that is an initializer

    def stored(self, part: str, dtype: str, number: FormatName | None, stacked: bool) -> ir.DataType:  # noqa: ARG002
        own = self.codecs[number].codes if part == "codes" and number is not None else None
        return DTYPES[dtype] if own is None else own

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
                w = {part: named[f"{projection}_{part}"] for part in GEMMS[name].parts}
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

    def stored(self, part: str, dtype: str, number: FormatName | None, stacked: bool) -> ir.DataType:
        if stacked and part in ("codes", "block_scales"):
            # the same bytes: TensorRT has no UINT8 inside a network, and gives no FP4 to a plugin
            return ir.DataType.INT8
        return super().stored(part, dtype, number, stacked)

    def plugin(self, op: str, **attributes: Any) -> dict[str, Any]:
        known = spec(op)  # a plugin needs all of its attributes
        return {
            **known.attributes,
            **attributes,
            "plugin_version": str(known.version),
            "plugin_namespace": known.domain,
        }

    @property
    def expert_gemms(self) -> Collection[str]:
        return spec("routed_experts").formats

    def experts_node(self, name: str) -> tuple[str, dict[str, Any]]:
        return spec("routed_experts").name, self.plugin("routed_experts", format=name, activation="relu2")


DIALECTS: dict[str, Dialect] = {d.name: d for d in (Dialect(), TensorRTRTX(), TensorRT())}
