"""Layouts of checkpoints in files, and what engines do with them. Imports nothing heavy."""

from collections.abc import Mapping
from types import MappingProxyType

ENGINES: Mapping[str, str] = MappingProxyType(
    {"vllm": "vLLM", "sglang": "SGLang", "tensorrt-llm": "TensorRT-LLM"}
)
"""Serving engines: the word for a command line, and the name."""
RIGHT = ("native", "weights only")  # how an engine may run a file, of all that ``engines.Runs`` has
