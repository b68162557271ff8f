"""What is installed here: versions, what can be imported, which kernel library serves.

python -m bench.gpu.environment OUT.json [TEXT]

TEXT is a file whose end is kept too: what the driver, the compiler and pip said.
"""

import argparse
import datetime
import importlib
import json
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

MODULES = (
    "torch",
    "triton",
    "numpy",
    "numba",
    "pydantic",
    "onnx_ir",
    "safetensors",
    "tokenizers",
    "transformers",
    "yaml",
    "click",
    "rich",
    "jinja2",
    "einops",
    "pytest",
    "ml_dtypes",
    "mamba_ssm",
    "nemoquant",
    "nemoquant.api",
    "nemoquant.ops.functional",
    "nemoquant.formats.gpu",
)


def version(module: str) -> str:
    """Or "ok", where it has none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of importing, and of asking for the version so
        return str(getattr(importlib.import_module(module), "__version__", "ok"))


def device() -> str:
    """The GPU's name."""
    import torch

    return torch.cuda.get_device_name()


def need_device() -> None:
    """Ends the process with one line, before anything is made, where torch finds no CUDA device."""
    import torch

    if not torch.cuda.is_available():
        raise SystemExit(
            f"no CUDA device: torch {torch.__version__} finds none; expected an NVIDIA GPU and torch for "
            f"CUDA; see env.json"
        )


def library() -> str:
    """The file of the kernels that torch's operators take on CUDA; None where torch computes."""
    from nemoquant.ops.library import kernels

    found = kernels("cuda")
    return str(found and found.path)


def answer(question: Callable[[], str]) -> str:
    """What it returns, or FAILED and why."""
    try:
        return question()
    except Exception as error:
        return f"FAILED {type(error).__name__}: {error}"[:300]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("out", type=Path, metavar="OUT.json")
    parser.add_argument("text", type=Path, nargs="?")
    options = parser.parse_args()
    start = time.time()
    text = options.text.read_text(errors="replace")[-1500:] if options.text else ""
    found: dict[str, object] = {"text": text, "python": sys.version, "date": str(datetime.date.today())}
    for module in MODULES:
        found[module] = answer(lambda module=module: version(module))
    found |= {"device": answer(device), "library": answer(library)}
    failed = {name: value for name, value in found.items() if str(value).startswith("FAILED")}
    found["seconds"] = round(time.time() - start, 1)
    options.out.write_text(json.dumps(found, indent=0))
    print(failed or "imports ok", found["seconds"], "s")


if __name__ == "__main__":
    main()
