"""What is installed here: device, which kernel library serves, versions, what can be imported.

python -m bench.gpu.environment OUT.json [TEXT]

TEXT is a file whose end is kept too: what the driver, the compiler and pip said. OUT.json is written after
each answer, what the steps lack first. The exit code is 1 without torch or a device, 4 where there is a
device that the kernel library can't be used on.
"""

import argparse
import datetime
import importlib
import importlib.util
import json
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

UNUSABLE = 4  # exit code: all.sh ends then

_OPERATORS = ("torch", "numpy")
_FILES = (
    *_OPERATORS,
    "triton",
    "numba",
    "safetensors",
    "tokenizers",
    "xxhash",
    "yaml",
    "jinja2",
    "click",
    "rich",
)
NEEDS = {  # by step of all.sh; pydantic is in .gpu/
    "correct": _OPERATORS,
    "pack": _FILES,
    "triton": (*_OPERATORS, "triton", "numba"),
    "timing": (*_OPERATORS, "triton", "einops", "packaging"),
    "grouped": _OPERATORS,
    "pytest": (*_FILES, "pytest"),
}
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


def missing() -> dict[str, list[str]]:
    """By step: what it needs and is not installed; nothing is imported."""
    found = {
        step: [name for name in names if not importlib.util.find_spec(name)] for step, names in NEEDS.items()
    }
    return {step: names for step, names in found.items() if names}


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

    def write(name: str, value: object) -> None:
        found[name] = value
        found["seconds"] = round(time.time() - start, 1)
        options.out.write_text(json.dumps(found, indent=0))

    lacking = missing()
    for step, names in lacking.items():
        print(f"{step} lacks {', '.join(names)}")
    write("missing", lacking)
    on, serves = answer(device), answer(library)
    write("device", on)
    write("library", serves)
    print(f"device: {on}\nlibrary: {serves}")
    for module in MODULES:
        write(module, answer(lambda module=module: version(module)))
    failed = {name: value for name, value in found.items() if str(value).startswith("FAILED")}
    print(failed or "imports ok", found["seconds"], "s")
    if on.startswith("FAILED"):
        sys.exit(1)
    if serves.startswith("FAILED"):
        sys.exit(UNUSABLE)


if __name__ == "__main__":
    main()
