"""What can run here: each engine, and why not where it can't."""

import importlib.metadata
import importlib.util
import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """``builds`` and ``runs`` here; ``why`` says what is missing, or what there is."""

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


def gpu() -> str | None:
    """The first CUDA device that torch can use, with its SM; None without one."""
    import torch

    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability(0)
    return f"{torch.cuda.get_device_name(0)} (SM {major}{minor})"


def plugins(device: str | None) -> Finding:
    """The plugin library: what is missing to build it, and what was built."""
    from nemoquant.errors import BuildError
    from nemoquant.ops.build import default_folder, missing, read_built
    from nemoquant.ops.sources import sources_hash

    try:
        lacking, built = missing(), read_built(default_folder())
    except BuildError as error:
        return Finding("plugins", False, False, str(error))
    how = f"`nemoquant plugins build` can't: {lacking}" if lacking else "`nemoquant plugins build` makes them"
    if built is None:
        return Finding("plugins", not lacking, False, f"none are built; {how}")
    what = f"{', '.join(sorted(built.libraries))} in {default_folder()}, for {', '.join(f'sm_{a}' for a in built.architectures)}"
    if built.tensorrt:
        what += f", TensorRT {built.tensorrt}'s headers"
    if built.sources != sources_hash():
        return Finding("plugins", not lacking, False, f"{what}: built from other sources than this version's; {how}")
    return Finding("plugins", not lacking, device is not None, what + ("" if device else "; no CUDA device is usable here"))


def doctor() -> list[Finding]:
    """All engines, and the machine they are on."""
    device = gpu()
    ort = _version("onnxruntime", "onnxruntime-gpu")
    rtx, trt = _version("tensorrt-rtx-cu13"), _version("tensorrt", "tensorrt-cu13", "tensorrt-cu12")
    no_gpu = "no CUDA device is usable here"
    no_onnx = None if importlib.util.find_spec("onnx_ir") else "graphs need the extra `onnx`: pip install 'nemoquant[onnx]'"
    return [
        Finding("machine", True, True, f"{len(os.sched_getaffinity(0))} CPU threads, {device or 'no CUDA device'}"),
        Finding("torch", True, True, f"torch {_version('torch')}; needs no graph"),
        Finding(
            "onnxruntime", no_onnx is None, ort is not None and no_onnx is None,
            no_onnx or (f"onnxruntime {ort}, on the CPU" if ort else "not installed: pip install 'nemoquant[ort]'"),
        ),
        Finding(
            "rtx", rtx is not None and no_onnx is None, False,
            no_onnx or (f"tensorrt-rtx {rtx} builds; {'nemoquant has no runner yet' if device else no_gpu + ', so nothing runs'}" if rtx else
                        "not installed: pip install 'nemoquant[rtx]'"),
        ),
        Finding("trt", False, False, "needs nemoquant's plugins, which this version does not have yet; `export onnx --dialect tensorrt` "
                f"writes the graph{f'; tensorrt {trt} is installed' if trt else ''}"),
        plugins(device),
    ]  # fmt: skip
