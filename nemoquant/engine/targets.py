"""What the two TensorRTs (``TARGETS``) build for, and what they need."""

import os
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemoquant.engine import Target, TargetName
from nemoquant.errors import UsageError
from nemoquant.formats import FORMATS
from nemoquant.ops.build import ARCHITECTURES, default_folder
from nemoquant.ops.built import read_built
from nemoquant.ops.library import covers
from nemoquant.ops.sources import sources_hash

DATA_CENTRE = (90, 100, 103)
PLUGINS = "NEMOQUANT_PLUGINS"  # environment variable: the plugin library


@dataclass(frozen=True)
class Gpu:
    """A CUDA device: its name and SM, 90 for compute capability 9.0."""

    name: str
    sm: int


def find_gpu() -> Gpu | None:
    """The first CUDA device that torch can use; None without one."""
    import torch

    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability(0)
    return Gpu(torch.cuda.get_device_name(0), 10 * major + minor)


def default_target(found: Gpu | None) -> TargetName:
    """``rtx`` without a GPU, else ``trt``: the plugins work with TensorRT only."""
    return "rtx" if found is None else "trt"


def target_sm(target: Target, sm: int | None, found: Gpu | None, path: Path) -> int:
    """The SM to build for.

    Args:
        sm: the requested one, None is that of this machine's GPU.
        path: the checkpoint, for the command in a message.
    Raises:
        UsageError: ``target`` does not build for it, or not on this machine.
    """
    if target.sms is None:
        if found is None:
            raise UsageError(_needs_gpu(sm, path))
        if sm not in (None, found.sm):
            raise UsageError(
                f"--sm {sm}: TensorRT builds for the GPU in the machine, {found.name}, SM {found.sm}; leave "
                f"out --sm, or build on the other GPU"
            )
        return found.sm
    if sm is None and found is None:
        raise UsageError(
            f"--sm is needed where no GPU is found; {target.title} builds for SM "
            f"{', '.join(map(str, target.sms))}"
        )
    wanted = sm if sm is not None or found is None else found.sm
    assert wanted is not None
    if wanted in DATA_CENTRE:
        raise UsageError(
            f"--sm {wanted}: {target.title} does not build for data-centre GPUs; they need TensorRT, "
            f"--target trt"
        )
    if wanted not in target.sms:
        raise UsageError(f"--sm {wanted}: {target.title} builds for SM {', '.join(map(str, target.sms))}")
    return wanted


def check_formats(target: Target, sm: int, formats: Set[str], path: Path) -> None:
    """Raises UsageError where the GPU cannot multiply in a format that ``target`` leaves to it.

    Args:
        formats: of the weights and inputs of GEMMs that the runtime itself computes.
    """
    for name, least in target.least_sm.items():
        title = FORMATS[name].short
        if name in formats and sm < least:
            raise UsageError(
                f"SM {sm}: {path} holds {title} outside of {target.title}'s plugins, which GPUs have from "
                f"SM {least} on; choose another GPU or format"
                if target.sms is None
                else f"--sm {sm}: {path} holds {title}, which GPUs have from SM {least} on; choose another "
                f"GPU or format"
            )


def plugin_library(given: Path | None) -> Path:
    """The plugin library: ``given``, else NEMOQUANT_PLUGINS, else the output of `nemoquant plugins build`.

    Raises:
        UsageError: there is no such file, or it was built from the sources of another version.
        BuildError: nothing names it, and this user has no home folder where it could be.
    """
    path = given or (Path(os.environ[PLUGINS]) if os.environ.get(PLUGINS) else None)
    if path is None:
        path = default_folder() / "libnemoquant_plugins.so"
        if not path.is_file():
            raise UsageError(
                f"TensorRT needs nemoquant's plugin library; neither --plugins nor {PLUGINS} names it, and "
                f"{path} is not there; "
                "build it with `nemoquant plugins build`"
            )
    if not path.is_file():
        raise UsageError(
            f"{path}, the plugin library, does not exist; build it with `nemoquant plugins build`"
        )
    built = read_built(path.parent)
    if built and path.name in built.libraries and built.sources != sources_hash():
        raise UsageError(
            f"{path} was built from other sources than this version's; build it again with `nemoquant "
            f"plugins build`"
        )
    return path


def load_plugins(trt: Any, library: Path) -> None:
    """Register the plugin creators of ``library`` with TensorRT.

    Raises:
        UsageError: it can't be loaded, or holds no plugins.
    """
    registry = trt.get_plugin_registry()
    before = {(c.name, c.plugin_version, c.plugin_namespace) for c in registry.all_creators}
    try:
        registry.load_library(str(library))
    except Exception as error:  # pybind11's exceptions have no common base
        raise UsageError(
            f"{library} can't be loaded as a plugin library ({error}); build it with `nemoquant plugins "
            f"build`"
        ) from None
    after = {(c.name, c.plugin_version, c.plugin_namespace) for c in registry.all_creators}
    if not any(namespace == "nemoquant" for _, _, namespace in after):
        raise UsageError(
            f"{library} holds no plugin of the namespace nemoquant ({len(after - before)} others); build it "
            f"with `nemoquant plugins build`"
        )


def _needs_gpu(sm: int | None, path: Path) -> str:
    wanted = [] if sm is None else [name for name in ARCHITECTURES if covers(name, *divmod(sm, 10))]
    arch = f" --arch sm_{wanted[0]}" if wanted else ""
    return (
        "--target trt: TensorRT builds on the GPU that the engine is for, and no CUDA device is usable "
        "here. There: "
        f"pip install 'nemoquant[trt,plugins]' && nemoquant plugins build{arch} && nemoquant export trt "
        f"{path} OUT --target trt. "
        f"Here, `nemoquant export onnx {path} --dialect tensorrt` writes its graph, and --target rtx builds "
        f"for SM 75 to 89, 120 and 121"
    )
