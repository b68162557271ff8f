"""How a runtime unpacks weights of a number format, rounds inputs to it, and keeps caches in it.

One class for each format and family of runtimes, one table for each family. TensorRT and TensorRT-RTX share
theirs: FP4, FP8 and block scales are tensors of their own dtypes there, and quantization are operators that
the builder may fuse with a GEMM. ONNX Runtime gets standard operators, exact in float32.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir

from nemoquant.formats import CacheName, FormatName, e2m1, e4m3, e8m0
from nemoquant.graph import ops
from nemoquant.graph.ops import BLOCK, F8, MX_BLOCK
from nemoquant.graph.tape import DOMAIN, FLOAT, Tape

Parts = Mapping[str, ir.Value]

# E2M1_PAIRS: both values of a byte of E2M1 codes, doubled so that they are integers [256, 2].
# E4M3_VALUES: the values of E4M3 codes, exact in float16.
E2M1_PAIRS = np.stack(
    [2 * e2m1.VALUES[np.arange(256) % 16], 2 * e2m1.VALUES[np.arange(256) // 16]], 1
).astype(np.int8)
E4M3_VALUES = e4m3.VALUES.astype(np.float16)


class Codec(Protocol):
    """One number format in one family of runtimes; ``w`` are the parts of ``gemms.Gemm.parts``."""

    @property
    def codes(self) -> ir.DataType | None:
        """The dtype of codes in a graph, where it is another than the file's; the bytes are the same."""

    @property
    def function(self) -> Callable[[], ir.Function] | None:
        """Makes nemoquant's function that ``rounded`` calls; None where it calls none."""

    def decoded(self, t: Tape, w: Parts, compute: ir.DataType, stacked: bool) -> ir.Value:
        """A weight [out, in], or experts [E, out, in], in the compute dtype; ``stacked``: from a stack."""

    def rounded(self, t: Tape, x: ir.Value, w: Parts, compute: ir.DataType) -> ir.Value:
        """A GEMM's input through the format and back."""


class CacheCodec(Protocol):
    """One format of the KV cache in one family of runtimes."""

    def dtype(self, compute: ir.DataType) -> ir.DataType:
        """The dtype of the states."""

    def append(
        self, t: Tape, past: ir.Value, x: ir.Value, scale: ir.Value, compute: ir.DataType
    ) -> tuple[ir.Value, ir.Value]:
        """Append new keys or values [B, heads, L, size]; see ``Dialect.cached``."""


# ONNX Runtime.


def _e4m3(t: Tape, codes: ir.Value) -> ir.Value:
    """Bytes of E4M3 codes as float32."""
    return t.cast(t.op("Gather", t.constant(E4M3_VALUES), t.cast(codes, ir.DataType.INT32), axis=0), FLOAT)


def _fp8_round_trip(t: Tape, x: ir.Value, scale: ir.Value, compute: ir.DataType) -> ir.Value:
    """``x`` rounded to E4M3 and back; the scale stays float32, whatever the dtype of ``x``."""
    codes = t.op("QuantizeLinear", t.cast(x, FLOAT), scale, output_dtype=int(F8))
    return t.cast(t.op("DequantizeLinear", codes, scale), compute)


class _Fp8:
    codes = function = None

    def decoded(self, t: Tape, w: Parts, compute: ir.DataType, stacked: bool) -> ir.Value:
        if stacked:
            return t.cast(t.op("Mul", _e4m3(t, w["codes"]), w["global_scale"]), compute)
        return t.cast(t.op("DequantizeLinear", w["codes"], w["global_scale"]), compute)

    def rounded(self, t: Tape, x: ir.Value, w: Parts, compute: ir.DataType) -> ir.Value:
        return _fp8_round_trip(t, x, w["input_scale"], compute)


class _Mxfp8:
    codes = None
    function = staticmethod(ops.mxfp8_dynamic_quant_dequant)

    def decoded(self, t: Tape, w: Parts, compute: ir.DataType, stacked: bool) -> ir.Value:
        # from a table, not by Pow(2, byte - 127): exact everywhere, byte 0 too
        scales = t.op("Gather", t.constant(e8m0.VALUES), t.cast(w["block_scales"], ir.DataType.INT32), axis=0)
        if not stacked:
            values = t.op("DequantizeLinear", w["codes"], scales, axis=-1, block_size=MX_BLOCK)
            return t.cast(values, compute)
        blocks = t.reshape_to(
            _e4m3(t, w["codes"]), t.op("Concat", t.op("Shape", scales), t.ints(MX_BLOCK), axis=0)
        )
        values = t.op("Mul", blocks, t.unsqueeze(scales, 2))
        return t.cast(t.reshape_to(values, t.op("Shape", w["codes"])), compute)

    def rounded(self, t: Tape, x: ir.Value, w: Parts, compute: ir.DataType) -> ir.Value:  # noqa: ARG002
        return t.op("MXFP8DynamicQuantDequant", x, domain=DOMAIN)


class _Nvfp4:
    codes = None
    function = staticmethod(ops.nvfp4_dynamic_quant_dequant)

    def decoded(self, t: Tape, w: Parts, compute: ir.DataType, stacked: bool) -> ir.Value:
        block_scale = _e4m3(t, w["block_scales"]) if stacked else t.cast(w["block_scales"], FLOAT)
        half = t.op("Mul", t.op("Mul", block_scale, w["global_scale"]), t.constant(np.float32(0.5)))
        # [out, in/2, 2]
        pairs = t.op("Gather", t.constant(E2M1_PAIRS), t.cast(w["codes"], ir.DataType.INT32), axis=0)
        blocks = t.reshape_to(
            t.cast(pairs, FLOAT), t.op("Concat", t.op("Shape", half), t.ints(BLOCK), axis=0)
        )
        values = t.op("Mul", blocks, t.unsqueeze(half, 2))  # exact: twice the code times half the scale
        return t.cast(t.reshape(values, t.size(w["codes"], 0), -1), compute)

    def rounded(self, t: Tape, x: ir.Value, w: Parts, compute: ir.DataType) -> ir.Value:  # noqa: ARG002
        return t.op("NVFP4DynamicQuantDequant", x, w["input_scale"], domain=DOMAIN)


class _Fp8Cache:
    """Rounded, but kept in the compute dtype: ONNX Runtime's CPU kernels concatenate no FP8."""

    def dtype(self, compute: ir.DataType) -> ir.DataType:
        return compute

    def append(
        self, t: Tape, past: ir.Value, x: ir.Value, scale: ir.Value, compute: ir.DataType
    ) -> tuple[ir.Value, ir.Value]:
        both = t.op("Concat", past, _fp8_round_trip(t, x, scale, compute), axis=2)
        return both, both


ONNXRUNTIME: Mapping[FormatName, Codec] = MappingProxyType(
    {"fp8": _Fp8(), "mxfp8": _Mxfp8(), "nvfp4": _Nvfp4()}
)
ONNXRUNTIME_CACHES: Mapping[CacheName, CacheCodec] = MappingProxyType({"fp8": _Fp8Cache()})


# TensorRT and TensorRT-RTX.


def _per_expert(stacked: bool) -> dict[str, Any]:
    """The attribute of a scale for each expert of a stack [E, out, in]."""
    return {"axis": 0} if stacked else {}


class _TrtFp8:
    codes = function = None

    def decoded(self, t: Tape, w: Parts, compute: ir.DataType, stacked: bool) -> ir.Value:
        return t.op(
            "DequantizeLinear",
            w["codes"],
            w["global_scale"],
            output_dtype=int(compute),
            **_per_expert(stacked),
        )

    def rounded(self, t: Tape, x: ir.Value, w: Parts, compute: ir.DataType) -> ir.Value:
        # no casts in between: the runtime is to fuse the pair with its GEMM
        codes = t.op("QuantizeLinear", x, w["input_scale"], output_dtype=int(F8))
        return t.op("DequantizeLinear", codes, w["input_scale"], output_dtype=int(compute))


class _TrtMxfp8:
    """Block scales are UINT8 initializers, which the parser reads as E8M0: no operator may be in between."""

    codes = function = None

    def decoded(self, t: Tape, w: Parts, compute: ir.DataType, stacked: bool) -> ir.Value:  # noqa: ARG002
        return self._dequantized(t, w["codes"], w["block_scales"], compute)

    def rounded(self, t: Tape, x: ir.Value, w: Parts, compute: ir.DataType) -> ir.Value:  # noqa: ARG002
        codes, scales = t.ops(
            "TRT_MXFP8DynamicQuantize",
            2,
            x,
            domain="trt",
            axis=-1,
            block_size=MX_BLOCK,
            output_dtype=int(F8),
        )
        return self._dequantized(t, codes, scales, compute)

    def _dequantized(self, t: Tape, codes: ir.Value, scales: ir.Value, compute: ir.DataType) -> ir.Value:
        return t.op(
            "TRT_MXFP8DequantizeLinear",
            codes,
            scales,
            domain="trt",
            axis=-1,
            block_size=MX_BLOCK,
            output_dtype=int(compute),
        )


class _TrtNvfp4:
    codes = ir.DataType.FLOAT4E2M1
    function = None

    def decoded(self, t: Tape, w: Parts, compute: ir.DataType, stacked: bool) -> ir.Value:
        scales = t.op("DequantizeLinear", w["block_scales"], w["global_scale"], **_per_expert(stacked))
        return t.cast(t.op("DequantizeLinear", w["codes"], scales, axis=-1, block_size=BLOCK), compute)

    def rounded(self, t: Tape, x: ir.Value, w: Parts, compute: ir.DataType) -> ir.Value:
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


class _TrtFp8Cache:
    """Codes are kept; attention reads them decoded."""

    def dtype(self, compute: ir.DataType) -> ir.DataType:  # noqa: ARG002
        return F8

    def append(
        self, t: Tape, past: ir.Value, x: ir.Value, scale: ir.Value, compute: ir.DataType
    ) -> tuple[ir.Value, ir.Value]:
        both = t.op("Concat", past, t.op("QuantizeLinear", x, scale, output_dtype=int(F8)), axis=2)
        return t.op("DequantizeLinear", both, scale, output_dtype=int(compute)), both


TENSORRT: Mapping[FormatName, Codec] = MappingProxyType(
    {"fp8": _TrtFp8(), "mxfp8": _TrtMxfp8(), "nvfp4": _TrtNvfp4()}
)
TENSORRT_CACHES: Mapping[CacheName, CacheCodec] = MappingProxyType({"fp8": _TrtFp8Cache()})
