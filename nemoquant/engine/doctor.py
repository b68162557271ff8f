"""Which engines can build and run on this machine, and the reason where one can't."""

import importlib.metadata
import importlib.util
import os
from dataclasses import dataclass

from nemoquant.engine import TARGETS
from nemoquant.engine.targets import Gpu, find_gpu, plugin_library
from nemoquant.errors import BuildError, UsageError
from nemoquant.machine import usable_threads
from nemoquant.ops.build import ARCHITECTURES, default_folder, missing
from nemoquant.ops.built import Built, read_built
from nemoquant.ops.library import KERNELS, VARIABLE, not_by_default, other_device
from nemoquant.ops.sources import sources_hash

NO_GPU = "no CUDA device is usable here"


@dataclass(frozen=True)
class Finding:
    """Whether an engine ``builds`` and ``runs`` here; ``why`` names what is missing, or what is installed."""

    name: str
    builds: bool
    runs: bool
    why: str


def _version(*packages: str) -> str | None:
    for package in packages:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _rtx_runs(gpu: Gpu | None) -> bool:
    return gpu is not None and gpu.sm in (TARGETS["rtx"].sms or ())


def _rtx_why(gpu: Gpu | None) -> str:
    if gpu is None:
        return f"{NO_GPU}, so nothing runs"
    return (
        f"runs on {gpu.name}"
        if _rtx_runs(gpu)
        else f"it does not build for {gpu.name}, SM {gpu.sm}: --target trt"
    )


def plugins(found: Gpu | None) -> Finding:
    """The plugin library: what is missing to build it, and what was built."""
    try:
        lacking, built = missing(), read_built(default_folder())
    except BuildError as error:
        return Finding("plugins", False, False, str(error))
    how = f"`nemoquant plugins build` can't: {lacking}" if lacking else "`nemoquant plugins build` makes them"
    if built is None:
        return Finding("plugins", not lacking, False, f"none are built; {how}")
    targets = ", ".join(f"sm_{a}" for a in built.architectures)
    what = f"{', '.join(sorted(built.libraries))} in {default_folder()}, for {targets}"
    if built.tensorrt:
        what += f", TensorRT {built.tensorrt}'s headers"
    if built.sources != sources_hash():
        return Finding(
            "plugins", not lacking, False, f"{what}: built from other sources than this version's; {how}"
        )
    if found is None:
        return Finding("plugins", not lacking, False, f"{what}; {NO_GPU}")
    capability = (found.sm // 10, found.sm % 10)
    if why := other_device(built.architectures, capability):
        if other_device(ARCHITECTURES, capability):
            how = "nor is what `nemoquant plugins build` makes by default"
        return Finding("plugins", not lacking, False, f"{default_folder()} {why}; {how}")
    return Finding("plugins", not lacking, True, what + _for_torch(capability, built))


def _for_torch(capability: tuple[int, int], built: Built) -> str:
    """Which kernels torch's operators take on this GPU, as the end of a sentence; empty if all."""
    named = os.environ.get(VARIABLE)
    if named:
        return f"; torch: {VARIABLE}={named}"
    if KERNELS not in built.libraries:
        return ""
    rest = not_by_default(default_folder() / KERNELS, capability)
    return f"; torch: {rest}" if rest else ""


def doctor() -> list[Finding]:
    """All engines, and the machine."""
    cuda = find_gpu()
    gpu = f"{cuda.name} (SM {cuda.sm})" if cuda else None
    ort = _version("onnxruntime", "onnxruntime-gpu")
    rtx, trt = _version("tensorrt-rtx-cu13"), _version("tensorrt", "tensorrt-cu13", "tensorrt-cu12")
    no_onnx = (
        None
        if importlib.util.find_spec("onnx_ir")
        else "graphs need the extra `onnx`: pip install 'nemoquant[onnx]'"
    )
    library, lacking = None, [no_onnx] if no_onnx else []
    if cuda is None:
        lacking.append(NO_GPU)
    if trt is None:
        lacking.append("not installed: pip install 'nemoquant[trt]'")
    try:
        library = plugin_library(None)
    except (BuildError, UsageError) as error:
        lacking.append(str(error))
    return [
        Finding("machine", True, True, f"{usable_threads()} CPU threads, {gpu or 'no CUDA device'}"),
        Finding("torch", True, True, f"torch {_version('torch')}; needs no graph"),
        Finding(
            "onnxruntime",
            no_onnx is None,
            ort is not None and no_onnx is None,
            no_onnx
            or (f"onnxruntime {ort}, on the CPU" if ort else "not installed: pip install 'nemoquant[ort]'"),
        ),
        Finding(
            "rtx",
            rtx is not None and no_onnx is None,
            rtx is not None and no_onnx is None and _rtx_runs(cuda),
            no_onnx
            or (
                f"tensorrt-rtx {rtx} builds; {_rtx_why(cuda)}"
                if rtx
                else "not installed: pip install 'nemoquant[rtx]'"
            ),
        ),
        Finding("trt", not lacking, not lacking, "; ".join(lacking) or f"tensorrt {trt} with {library}"),
        plugins(cuda),
    ]
