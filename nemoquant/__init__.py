"""nemoquant: quantize and deploy NVIDIA Nemotron-H models.

    >>> import nemoquant
    >>> nemoquant.plan(Path("config.json"), "nvfp4").bits_per_weight
    >>> nemoquant.quantize(Path("model"), Path("model-fp8"), "fp8")
    >>> nemoquant.verify(Path("model-fp8"), against=Path("model"))
    >>> nemoquant.diff(Path("model"), [Path("model-fp8")]).candidates[0].logits.kl.mean

Functions are loaded when they are first used: importing the package is cheap.
"""

from typing import TYPE_CHECKING, Any

from nemoquant._version import __version__

if TYPE_CHECKING:
    from nemoquant.api import (
        Result,
        RunOptions,
        diff,
        export_engine,
        export_onnx,
        inspect,
        plan,
        quantize,
        verify,
    )

__all__ = [
    "Result",
    "RunOptions",
    "__version__",
    "diff",
    "export_engine",
    "export_onnx",
    "inspect",
    "plan",
    "quantize",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from nemoquant import api

        return getattr(api, name)
    raise AttributeError(f"module 'nemoquant' has no attribute {name!r}")
