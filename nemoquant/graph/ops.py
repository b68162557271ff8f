"""The nemoquant operators as functions of standard ONNX operators, for runtimes without nemoquant's kernels.

All compute in float32. Names and order of inputs and attributes are those of ``plugins/<op>/spec.yaml``.
Dimensions: B batch, L length, C channels, K kernel, H heads, P head size, G groups, h heads of a group, N
state, q positions of a chunk.
"""

import numpy as np
import onnx_ir as ir

from nemoquant.graph.spec import spec
from nemoquant.graph.tape import FLOAT, Tape, function

F8 = ir.DataType.FLOAT8E4M3FN
BLOCK, MX_BLOCK = 16, 32  # of NVFP4 and MXFP8


def causal_conv1d(kernel: int) -> ir.Function:
    """y_t = silu(bias + sum over j of weight[:, j] * x_{t - K + 1 + j}): depthwise, as K shifted products."""

    def record(t: Tape, x: ir.Value, weight: ir.Value, bias: ir.Value, state: ir.Value) -> list[ir.Value]:
        length = t.size(x, 1)
        full = t.op("Concat", t.op("Transpose", state, perm=[0, 2, 1]), x, axis=1)
        y = bias
        for j in range(kernel):
            part = t.slice(full, j, t.op("Add", length, t.ints(j)), 1)
            tap = t.op("Squeeze", t.slice(weight, j, j + 1, 1), t.ints(1))
            y = t.op("Add", t.op("Mul", t.cast(part, FLOAT), tap), y)
        y = t.op("Mul", y, t.op("Sigmoid", y))
        end = t.op("Add", length, t.ints(kernel - 1))
        return [y, t.op("Transpose", t.slice(full, length, end, 1), perm=[0, 2, 1])]

    return function(spec("causal_conv1d"), record)


def mamba2_scan(heads: int, head_dim: int, groups: int, state_size: int) -> ir.Function:
    """The selective scan by chunks (Dao and Gu 2024, arXiv:2405.21060, section 6).

    A single position is a chunk of one. ``rounding`` and ``philox_rounds`` are used by the plugin only: here
    the state is float32, and only the sums round it.
    """
    scan = _Scan(heads, head_dim, groups, state_size)

    def record(
        t: Tape,
        x: ir.Value,
        dt: ir.Value,
        a: ir.Value,
        b: ir.Value,
        c: ir.Value,
        d: ir.Value,
        dt_bias: ir.Value,
        state: ir.Value,
    ) -> list[ir.Value]:
        step = t.op("Softplus", t.op("Add", dt, dt_bias))
        step = t.op("Clip", step, t.attribute("dt_min", "float"), t.attribute("dt_max", "float"))
        return scan.chunks(t, x, step, a=a, b=b, c=c, d=d, state=state)

    return function(spec("mamba2_scan"), record)


class _Scan:
    def __init__(self, heads: int, head_dim: int, groups: int, state_size: int) -> None:
        self.heads, self.head_dim, self.groups, self.state_size = heads, head_dim, groups, state_size
        self.h = heads // groups

    def chunks(
        self,
        t: Tape,
        x: ir.Value,
        dt: ir.Value,
        *,
        a: ir.Value,
        b: ir.Value,
        c: ir.Value,
        d: ir.Value,
        state: ir.Value,
    ) -> list[ir.Value]:
        """Any number of positions: a Scan carries the state over chunks of q.

        The end is padded with dt = 0, which changes nothing.
        """
        length = t.size(x, 1)
        q = t.op("Max", t.op("Min", t.reshape(t.attribute("chunk_size", "int"), 1), length), t.ints(1))
        count = t.op("Div", t.op("Sub", t.op("Add", length, q), t.ints(1)), q)
        missing = t.op("Sub", t.op("Mul", count, q), length)

        def chunked(value: ir.Value, *rest: int) -> ir.Value:
            """[B, L, ...] -> [count, B, q, ...]."""
            pads = t.op("Concat", t.ints(*[0] * (len(rest) + 3)), missing, t.ints(*[0] * len(rest)), axis=0)
            return t.op(
                "Transpose",
                t.reshape(t.op("Pad", value, pads), 0, count, q, *rest),
                perm=[1, 0, 2, *range(3, 3 + len(rest))],
            )

        inputs = [
            chunked(x, self.heads, self.head_dim),
            chunked(dt, self.heads),
            chunked(b, self.groups, self.state_size),
            chunked(c, self.groups, self.state_size),
        ]
        place = t.op("Range", t.constant(np.int64(0)), t.op("Squeeze", q), t.constant(np.int64(1)))
        row, column = t.unsqueeze(place, 1), t.unsqueeze(place, 0)
        later, seen = (t.cast(t.op(kind, row, column), FLOAT) for kind in ("Greater", "GreaterOrEqual"))

        def body(t: Tape, state: ir.Value, *parts: ir.Value) -> list[ir.Value]:
            return self.chunk(t, state, *parts, a=a, d=d, q=q, later=later, seen=seen)

        new, y = t.ops(
            "Scan",
            2,
            state,
            *inputs,
            body=t.subgraph("body", ["state", "x", "dt", "b", "c"], body),
            num_scan_inputs=len(inputs),
        )
        y = t.reshape(
            t.op("Transpose", y, perm=[1, 0, 2, 3, 4]), 0, t.op("Mul", count, q), self.heads, self.head_dim
        )
        return [t.slice(y, 0, length, 1), new]

    def chunk(
        self,
        t: Tape,
        state: ir.Value,
        x: ir.Value,
        dt: ir.Value,
        b: ir.Value,
        c: ir.Value,
        *,
        a: ir.Value,
        d: ir.Value,
        q: ir.Value,
        later: ir.Value,
        seen: ir.Value,
    ) -> list[ir.Value]:
        """One chunk: the state after it, and y [B, q, H, P].

        x is [B, q, H, P], dt [B, q, H], b and c [B, q, G, N]. From position s to position t > s the state
        decays by exp of the sum of dt * A over s < r <= t. The sums are taken directly, not as differences of
        running sums: in float32 those lose the weak decays after one strong one.
        """
        x, dt = (  # [B, H, q, P], [B, H, q]
            t.op("Transpose", x, perm=[0, 2, 1, 3]),
            t.op("Transpose", dt, perm=[0, 2, 1]),
        )
        b, c = (t.op("Transpose", value, perm=[0, 2, 1, 3]) for value in (b, c))  # [B, G, q, N]
        log = t.op("Mul", dt, t.unsqueeze(a, 1))
        last = t.op("Squeeze", t.op("Sub", q, t.ints(1)))
        between = t.op("CumSum", t.op("Mul", t.unsqueeze(log, 3), later), t.constant(np.int64(2)))
        decay = t.op("Mul", t.op("Exp", between), seen)  # [B, H, t, s]
        so_far = t.op("CumSum", log, t.constant(np.int64(2)))  # [B, H, q]: from before the chunk to q

        # [B, G, 1, t, s]
        products = t.unsqueeze(t.op("MatMul", c, t.op("Transpose", b, perm=[0, 1, 3, 2])), 2)
        mixing = t.op("Mul", t.reshape(decay, 0, self.groups, self.h, q, q), products)
        scaled = t.op("Mul", x, t.unsqueeze(dt, 3))
        within = t.op("MatMul", t.reshape(mixing, 0, self.heads, q, q), scaled)

        rows = t.reshape(state, 0, self.groups, self.h * self.head_dim, self.state_size)
        before = t.op("MatMul", c, t.op("Transpose", rows, perm=[0, 1, 3, 2]))  # [B, G, q, h * P]
        before = t.op(
            "Transpose", t.reshape(before, 0, self.groups, q, self.h, self.head_dim), perm=[0, 1, 3, 2, 4]
        )
        before = t.op(
            "Mul", t.reshape(before, 0, self.heads, q, self.head_dim), t.unsqueeze(t.op("Exp", so_far), 3)
        )
        y = t.op("Add", t.op("Add", within, before), t.op("Mul", x, t.unsqueeze(d, 1, 2)))

        left = t.op("Gather", decay, last, axis=2)  # [B, H, s]: from s to the chunk's end
        written = t.reshape(
            t.op("Mul", scaled, t.unsqueeze(left, 3)), 0, self.groups, self.h, q, self.head_dim
        )
        written = t.reshape(
            t.op("Transpose", written, perm=[0, 1, 2, 4, 3]), 0, self.groups, self.h * self.head_dim, q
        )
        written = t.reshape(t.op("MatMul", written, b), 0, self.heads, self.head_dim, self.state_size)
        kept = t.op("Mul", state, t.unsqueeze(t.op("Exp", t.op("Gather", so_far, last, axis=2)), 2, 3))
        return [t.op("Add", kept, written), t.op("Transpose", y, perm=[0, 2, 1, 3])]


def nvfp4_dynamic_quant_dequant() -> ir.Function:
    """``formats.nvfp4.encode_activations`` and decoding; a block whose scale rounds to zero becomes zero."""

    def record(t: Tape, x: ir.Value, scale: ir.Value) -> list[ir.Value]:
        one, zero = t.constant(np.float32(1)), t.constant(np.float32(0))
        blocks = t.reshape(t.cast(x, FLOAT), -1, BLOCK)
        magnitude = t.op("Abs", blocks)
        amax = t.op("ReduceMax", magnitude, t.ints(1), keepdims=1)
        ratio = t.op("Div", amax, t.op("Mul", t.constant(np.float32(6)), scale))
        block_scale = t.op("DequantizeLinear", t.op("QuantizeLinear", ratio, one, output_dtype=int(F8)), one)
        d = t.op("Mul", block_scale, scale)
        divisor = t.op("Where", t.op("Equal", d, zero), one, d)
        rounded = t.op(
            "Mul", t.op("Mul", e2m1_round(t, t.op("Div", magnitude, divisor)), d), t.op("Sign", blocks)
        )
        return [t.op("CastLike", t.reshape_to(rounded, t.op("Shape", x)), x)]

    return function(spec("nvfp4_dynamic_quant_dequant"), record)


def mxfp8_dynamic_quant_dequant() -> ir.Function:
    """``formats.mxfp8.encode_activations`` and decoding, in float32, for finite inputs.

    A block's scale is q = amax / 448 rounded up to a power of two, at least 2^-127. In float64, q * 2^53 + q
    rounds q to a multiple of the spacing at q * 2^53, which is the next power of two: exact, where Log is not
    (Rump, Ogita and Oishi 2008, "Accurate floating-point summation I", algorithm 3.5).
    """

    def record(t: Tape, x: ir.Value) -> list[ir.Value]:
        blocks = t.reshape(t.cast(x, FLOAT), -1, MX_BLOCK)
        amax = t.op("ReduceMax", t.op("Abs", blocks), t.ints(1), keepdims=0)
        ratio = t.cast(t.op("Div", amax, t.constant(np.float32(448))), ir.DataType.DOUBLE)
        far = t.op("Mul", ratio, t.constant(np.float64(2**53)))
        power = t.op("Sub", t.op("Add", far, ratio), far)
        # q itself where it is a power of two: there the sum is a tie, to the even q * 2^53
        power = t.op("Max", power, ratio, t.constant(np.float64(2.0**-127)))
        scale = t.cast(power, FLOAT)
        codes = t.op("QuantizeLinear", blocks, scale, axis=0, output_dtype=int(F8))
        rounded = t.op("DequantizeLinear", codes, scale, axis=0)
        return [t.op("CastLike", t.reshape_to(rounded, t.op("Shape", x)), x)]

    return function(spec("mxfp8_dynamic_quant_dequant"), record)


def e2m1_round(t: Tape, magnitude: ir.Value) -> ir.Value:
    """To the nearest of 0 0.5 1 1.5 2 3 4 6, ties to the even code.

    Rounding to a multiple of 0.5, 1 or 2 does exactly this.
    """
    half, one, two, four, six = (t.constant(np.float32(v)) for v in (0.5, 1, 2, 4, 6))
    step = t.op(
        "Where", t.op("Less", magnitude, two), half, t.op("Where", t.op("Less", magnitude, four), one, two)
    )
    return t.op("Min", t.op("Mul", t.op("Round", t.op("Div", magnitude, step)), step), six)
