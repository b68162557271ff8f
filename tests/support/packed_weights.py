"""One expert's weight in each format of RoutedExperts: its parts by name, and their decoded values."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemoquant.formats import fp8, mxfp8, nvfp4

Floats = NDArray[np.float32]


def packed(format: str, weight: Floats, scale: np.float32) -> tuple[dict[str, NDArray[Any]], Floats]:
    """[out, in] in float32 -> parts, and the values that they stand for."""
    if format == "bf16":
        import ml_dtypes

        part = weight.astype(ml_dtypes.bfloat16)
        return {"weight": part}, part.astype(np.float32)
    if format == "mxfp8":
        codes, blocks = mxfp8.encode(weight)
        return {"codes": codes, "block_scales": blocks}, mxfp8.decode(codes, blocks)
    if "8" in format:
        codes = fp8.encode(weight, scale)
        return {"codes": codes, "global_scale": scale}, fp8.decode(codes, scale)
    codes, blocks = nvfp4.encode(weight, scale)
    return {"codes": codes, "block_scales": blocks, "global_scale": scale}, nvfp4.decode(codes, blocks, scale)
