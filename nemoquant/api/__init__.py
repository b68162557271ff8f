"""The Python API: the command line as functions. Messages and progress go to callbacks, results are data.

Arguments are checked first, so that a wrong word is a UsageError that lists the known ones; what is heavy is
loaded inside the functions, after that.
"""

from nemoquant.api.compare import diff
from nemoquant.api.converting import convert
from nemoquant.api.export import export_engine, export_onnx
from nemoquant.api.look import inspect, plan
from nemoquant.api.quantizing import Result, estimate, quantize, verify
from nemoquant.api.text import Generated, generate
from nemoquant.progress import Progress, no_progress
from nemoquant.run.options import RunOptions

__all__ = [
    "Generated",
    "Progress",
    "Result",
    "RunOptions",
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
