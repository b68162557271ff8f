"""The arithmetic of every format, by name."""

from collections.abc import Mapping
from types import MappingProxyType

from nemoquant.formats import FormatName, fp8, mxfp8, nvfp4
from nemoquant.formats.arithmetic import Arithmetic

ARITHMETIC: Mapping[FormatName, Arithmetic] = MappingProxyType(
    {"fp8": fp8.Fp8(), "mxfp8": mxfp8.Mxfp8(), "nvfp4": nvfp4.Nvfp4()}
)
