"""nemoquant: quantize and deploy NVIDIA Nemotron-H models.

    >>> import nemoquant
    >>> nemoquant.plan("config.json", "nvfp4").bits_per_weight
    >>> nemoquant.quantize("MODEL", "OUT", "nvfp4", rows=128)
    >>> nemoquant.verify("OUT", against="MODEL")["ok"]
    >>> nemoquant.diff("MODEL", "OUT").candidates[0].logits.kl.mean
    >>> nemoquant.generate("OUT", "Once upon a time").text

Functions are loaded when they are first used: importing the package is cheap.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from nemoquant._version import __version__
from nemoquant.errors import (
    BuildError,
    CalibrationError,
    CheckpointError,
    ConfigError,
    EngineError,
    HeaderError,
    HubError,
    Interrupted,
    MissingExtraError,
    NemoquantError,
    OutputError,
    RecipeError,
    SourceChangedError,
    TensorTableError,
    UncomputableError,
    UsageError,
    VerificationError,
    WeightError,
)

if TYPE_CHECKING:
    from nemoquant.api import (
        Generated,
        Progress,
        Result,
        RunOptions,
        convert,
        diff,
        estimate,
        export_engine,
        export_onnx,
        generate,
        inspect,
        no_progress,
        plan,
        quantize,
        verify,
    )
    from nemoquant.converting.result import Converted
    from nemoquant.evaluate.schema import Report
    from nemoquant.graph import Exported
    from nemoquant.planning.plan import Plan
    from nemoquant.run.estimate import Estimate

__all__ = [
    "BuildError",
    "CalibrationError",
    "CheckpointError",
    "ConfigError",
    "Converted",
    "EngineError",
    "Estimate",
    "Exported",
    "Generated",
    "HeaderError",
    "HubError",
    "Interrupted",
    "MissingExtraError",
    "NemoquantError",
    "OutputError",
    "Plan",
    "Progress",
    "RecipeError",
    "Report",
    "Result",
    "RunOptions",
    "SourceChangedError",
    "TensorTableError",
    "UncomputableError",
    "UsageError",
    "VerificationError",
    "WeightError",
    "__version__",
    "convert",
    "diff",
    "estimate",
    "export_engine",
    "export_onnx",
    "generate",
    "inspect",
    "no_progress",
    "plan",
    "quantize",
    "verify",
]
_RESULTS = {  # what functions return, where it is made
    "Converted": "nemoquant.converting.result",
    "Estimate": "nemoquant.run.estimate",
    "Exported": "nemoquant.graph",
    "Plan": "nemoquant.planning.plan",
    "Report": "nemoquant.evaluate.schema",
}


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module(_RESULTS.get(name, "nemoquant.api")), name)
    raise AttributeError(f"module 'nemoquant' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
