"""Stand-ins for packages of GPUs and servers that engines import, so that their Python runs without them."""

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

NAMES = """
    IPython blobfile cuda cutlass datasets decord decord2 deep_ep deep_gemm deepseek_recipe distro easydict
    flash_attn flash_attn_4 flash_mla flashinfer gguf humming interegular kernels mathdx modelscope nvidia
    nvshmem openai_harmony orjson outlines py_spy pynvml quack sgl_deep_ep sgl_kernel smg_grpc_servicer
    soundfile tilelang timm tml_renderers torch_memory_saver torchao torchaudio torchcodec torchvision uvloop
    xxhash zmq_
"""
PACKAGES = frozenset(NAMES.split())


class Stub(ModuleType):
    """A module that has every name; decorators that register something give it back."""

    __path__: Sequence[str] = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name.startswith("register"):
            return _register
        made = object if name == "Object" else MagicMock(name=f"{self.__name__}.{name}")
        setattr(self, name, made)
        return made


def _register(*arguments: Any, **_named: Any) -> Any:
    if len(arguments) == 1 and isinstance(arguments[0], type):
        return arguments[0]
    return lambda registered: registered


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds a stub for every module of ``packages``."""

    def __init__(self, packages: frozenset[str]) -> None:
        self.packages = packages

    def find_spec(self, name: str, path: object, target: object = None) -> Any:  # noqa: ARG002
        if name.split(".")[0] in self.packages:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return Stub(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        module.__version__ = "99.0"  # type: ignore[attr-defined]
        module.__file__ = "stub"


def install(packages: frozenset[str] = PACKAGES) -> None:
    """From now on these packages are stubs; what looks for them to choose a way must be imported before."""
    sys.meta_path.insert(0, Finder(packages))
