"""What tests of ``tests/gpu`` need: a CUDA device, a library of kernels, the host build to compare bits with.

Imports torch alone. tests/gpu/conftest.py counts the skips by what they need.
"""

import os
from pathlib import Path

import pytest
import torch

from nemoquant.ops.library import VARIABLE, serves

HAS_DEVICE = torch.cuda.is_available()


def needs(what: str, there: bool) -> pytest.MarkDecorator:
    """Skips where there is no CUDA device, or on one ``what`` is not there."""
    return pytest.mark.skipif(
        not (HAS_DEVICE and there), reason=f"needs {what if HAS_DEVICE else 'a CUDA device'}"
    )


def has_kernel(op: str) -> bool:
    """On a CUDA device: whether the library that NEMOQUANT_KERNELS names has the operator."""
    return HAS_DEVICE and serves(op, "cuda")


def needs_kernel(op: str) -> pytest.MarkDecorator:
    return needs(f"a library with {op}: {VARIABLE}=.../libnemoquant_kernels.so", has_kernel(op))


def host_library() -> Path | None:
    """The library of `nemoquant plugins build --host`, from NQ_HOST_LIB as in bench/gpu."""
    named = os.environ.get("NQ_HOST_LIB")
    return Path(named) if named else None


needs_host_library = needs("the host build: NQ_HOST_LIB=.../libnemoquant_host.so", host_library() is not None)
