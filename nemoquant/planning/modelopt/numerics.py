"""Which number format a quantizer of Model Optimizer has, from its attributes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nemoquant.formats import FORMATS, FormatName
from nemoquant.planning.modelopt.entries import Attributes

E2M1, E4M3, E8M0 = (2, 1), (4, 3), (8, 0)


@dataclass(frozen=True)
class Code:
    """A number format as a quantizer has it: bits of exponent and mantissa, of codes and of block scales."""

    bits: tuple[int, int]
    scale_bits: tuple[int, int] | None
    static: bool  # whether a quantizer may have block scales that calibration chooses


CODES: Mapping[FormatName, Code] = {
    "fp8": Code(E4M3, None, static=False),
    "mxfp8": Code(E4M3, E8M0, static=False),
    "nvfp4": Code(E2M1, E4M3, static=True),
}
# Attributes that change no number of a checkpoint: effective_bits is what a search counts, the others are for
# training, for integers, or for ONNX.
_NO_NUMBERS = frozenset(
    ("effective_bits", "pass_through_bwd", "trt_high_precision_dtype", "narrow_range", "unsigned", "enable")
)
_CONSTANT = frozenset(("use_constant_amax", "constant_amax"))  # a scale that is not calibrated


@dataclass(frozen=True)
class Number:
    """What a quantizer computes with, where it is a format of ours.

    Attributes:
        static: block scales are chosen by calibration, and not from each block at run time.
        four_over_six: they are chosen among two.
        constant: its scale is given, not calibrated.
    """

    format: FormatName
    static: bool = False
    four_over_six: bool = False
    constant: bool = False


def number(cfg: tuple[Attributes, ...]) -> Number | None:
    """The format of a quantizer; None if it is none of ours, of which :func:`words` says what it is."""
    if len(cfg) != 1:
        return None
    attributes = {key: value for key, value in cfg[0].items() if key not in _NO_NUMBERS}
    constant = any(attributes.pop(key, None) for key in _CONSTANT)
    bits, blocks = attributes.pop("num_bits", 8), dict(attributes.pop("block_sizes", None) or {})
    if attributes or not isinstance(bits, list | tuple):
        return None
    scale_bits, kind = blocks.pop("scale_bits", None), blocks.pop("type", "static")
    four_over_six = bool(blocks.pop("four_over_six", False))
    size = {str(axis): length for axis, length in blocks.items()}
    for name, code in CODES.items():
        block = FORMATS[name].block
        if (tuple(bits), _pair(scale_bits), size) != (
            code.bits,
            code.scale_bits,
            {} if block is None else {"-1": block},
        ):
            continue
        static = block is not None and kind == "static"
        if static and not code.static:
            return None
        return Number(name, static, four_over_six, constant)
    return None


def _pair(bits: Any) -> Any:
    return tuple(bits) if isinstance(bits, list) else bits


def words(cfg: tuple[Attributes, ...]) -> str:
    """What a quantizer has, for a message: ``NVFP4``, ``INT4 in blocks of 128``."""
    if len(cfg) != 1:
        return " after ".join(words((one,)) for one in reversed(cfg))
    held = number(cfg)
    if held is not None:
        return FORMATS[held.format].short
    one = cfg[0]
    blocks = dict(one.get("block_sizes") or {})
    scale_bits, _ = blocks.pop("scale_bits", None), blocks.pop("type", None)
    with_words = [key for key in ("four_over_six", "scale_block_sizes") if blocks.pop(key, None)]
    text = _bits(one.get("num_bits", 8))
    if blocks:
        text += " in blocks of " + " x ".join(str(length or "a row") for length in blocks.values())
    if scale_bits is not None:
        text += f" with {_bits(scale_bits)} scales"
    axis = one.get("axis")
    if axis is not None:
        text += " per channel" if axis == 0 else f" per index of axis {axis}"
    if one.get("type") == "dynamic":
        text += " scaled at run time"
    known = {"num_bits", "block_sizes", "axis", "type", *_NO_NUMBERS, *_CONSTANT}
    with_words += sorted(key for key in one if key not in known)
    return text + (f" with {', '.join(with_words)}" if with_words else "")


def _bits(bits: Any) -> str:
    return f"E{bits[0]}M{bits[1]}" if isinstance(bits, list | tuple) else f"INT{bits}"
