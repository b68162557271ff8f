"""Engines: the runtimes that compute a written checkpoint, by their names; this page loads none of them.

torch         the functional model over packed weights, without a graph: always available
onnxruntime   ``model.onnx`` on the CPU; the extra `ort` (or `gpu`)
rtx           an engine file of TensorRT-RTX: built anywhere, run on a GPU; the extra `rtx`
trt           an engine file of TensorRT: built and run on a GPU, with the plugins; the extra `trt`

The two TensorRTs share one Python interface, and are what ``export trt`` builds for:

rtx   TensorRT-RTX builds on any machine for the GPUs of desktops and laptops; operators have their bodies in
      the graph
trt   TensorRT builds on the GPU that the engine is for; nemoquant's plugin library replaces those bodies
"""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, get_args

from nemoquant.errors import MissingExtraError
from nemoquant.formats import FormatName

EngineName = Literal["torch", "onnxruntime", "rtx", "trt"]
TargetName = Literal["rtx", "trt"]
ENGINES: tuple[EngineName, ...] = get_args(EngineName)


@dataclass(frozen=True)
class Target:
    """One TensorRT.

    Attributes:
        sms: the SMs that it builds for; None is only the GPU in the machine.
        least_sm: the first GPUs for which it takes a format.
    """

    name: TargetName
    title: str
    module: str
    dialect: str
    sms: tuple[int, ...] | None
    least_sm: Mapping[FormatName, int]

    def package(self) -> Any:
        """Its Python module.

        Raises:
            MissingExtraError: it is not installed.
        """
        try:
            return importlib.import_module(self.module)
        except ImportError:
            raise MissingExtraError(
                f"{self.title} engines need the extra `{self.name}`: pip install 'nemoquant[{self.name}]'"
            ) from None


# From the refusals of TensorRT-RTX 1.7's builder, and for TensorRT from its support matrix.
TARGETS: Mapping[str, Target] = MappingProxyType(
    {
        "rtx": Target(
            "rtx",
            "TensorRT-RTX",
            "tensorrt_rtx",
            "tensorrt_rtx",
            sms=(75, 80, 86, 89, 120, 121),
            least_sm=MappingProxyType({"fp8": 89, "mxfp8": 89, "nvfp4": 100}),
        ),
        "trt": Target(
            "trt",
            "TensorRT",
            "tensorrt",
            "tensorrt",
            sms=None,
            least_sm=MappingProxyType({"fp8": 89, "mxfp8": 100, "nvfp4": 100}),
        ),
    }
)
