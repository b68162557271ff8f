"""Finding and loading the kernel libraries, calling them, and deciding where torch's operators give way to
them."""

import ctypes
import os
import sys
from functools import cache
from pathlib import Path
from typing import Any

from nemoquant.errors import BuildError, EngineError
from nemoquant.ops.abi import structure
from nemoquant.ops.build import default_folder, read_built
from nemoquant.ops.sources import sources_hash

VARIABLE = "NEMOQUANT_KERNELS"


class Kernels:
    """A loaded library. ``path`` says which, ``architectures`` what it was built for (empty: nothing says it,
    or the host)."""

    def __init__(self, path: Path) -> None:
        """Load it.

        Raises:
            BuildError: it is not there, can't be loaded, is no kernel library, or was built from other
                sources than this version's.
        """
        self.path = path.absolute()
        if not self.path.is_file():
            raise BuildError(
                f"{self.path} is not there; expected a library made by `nemoquant plugins build`"
            )
        built = read_built(self.path.parent, host="host" in self.path.name)
        if built and built.sources != sources_hash():
            raise BuildError(
                f"{self.path} was built from other sources than this version of nemoquant has; build it "
                f"again: nemoquant plugins build"
            )
        self.architectures = built.architectures if built else ()
        try:
            self._library = ctypes.CDLL(str(self.path))
            self._last_error = self._library.nemoquant_last_error
        except (OSError, AttributeError) as error:
            raise BuildError(
                f"{self.path} can't be loaded: {error}; build it again: nemoquant plugins build"
            ) from None
        self._last_error.restype = ctypes.c_char_p

    def has(self, op: str) -> bool:
        return hasattr(self._library, f"nemoquant_{op}")

    def runs_on(self, major: int, minor: int) -> bool:
        """Whether it was built for a device of that compute capability; True where nothing says for what it
        was built."""
        for name in self.architectures:
            number, exact = name.rstrip("af"), name[-1] in "af"
            built = int(number[:-1]), int(number[-1])
            if built == (major, minor) or (not exact and built[0] == major and built[1] < minor):
                return True
        return not self.architectures

    def workspace(self, op: str, **arguments: Any) -> int:
        """Bytes that a call wants."""
        function = getattr(self._library, f"nemoquant_{op}_workspace")
        function.restype = ctypes.c_size_t
        return int(function(ctypes.byref(structure(op)(**arguments))))

    def call(self, op: str, *, stream: int | None = None, **arguments: Any) -> None:
        """Start a kernel; arguments are the members of ``nemoquant_<op>_args``, addresses as integers. It
        does not wait for the device.

        Raises:
            EngineError: the kernel refused, with its reason.
        """
        code = getattr(self._library, f"nemoquant_{op}")(
            ctypes.byref(structure(op)(**arguments)), ctypes.c_void_p(stream)
        )
        if code:
            reason = self._last_error().decode(errors="replace")
            raise EngineError(
                f"{self.path.name}: {reason} (error {code}); {VARIABLE}=none lets torch compute"
            )


_used: dict[str, Kernels | None] = {}  # by device type; "cpu" only where it was asked for


def use(path: Path | None, device: str = "cuda") -> None:
    """Take the kernels for tensors on ``device`` (``cuda``, or ``cpu`` with a host library) from this
    library; None: none at all.

    Raises:
        BuildError: see :class:`Kernels`.
    """
    _used[device] = load(path) if path else None


@cache
def load(path: Path) -> Kernels:
    """As :class:`Kernels`, once a process."""
    return Kernels(path)


def kernels(device: str) -> Kernels | None:
    """The library for tensors on ``device``; None where there is none, and torch's own operators compute.

    For CUDA: that of :func:`use`, else of NEMOQUANT_KERNELS (a file, or "none"), else what `nemoquant plugins
    build` put into its default folder. Which it was is said once, on standard error. For the CPU: that of
    :func:`use` alone.

    Raises:
        BuildError: NEMOQUANT_KERNELS names a library that can't serve.
    """
    if device not in _used:
        _used[device] = _find() if device == "cuda" else None
    return _used[device]


def _find() -> Kernels | None:
    named, built = os.environ.get(VARIABLE), default_folder() / "libnemoquant_kernels.so"
    found: Kernels | None = None
    if named == "none":
        _say(f"{VARIABLE}=none, torch computes")
    elif named:
        found = load(Path(named))
    elif not built.is_file():
        _say("none are built, torch computes; `nemoquant plugins build` makes them")
    else:
        try:
            found = load(built)
        except BuildError as error:  # left over from another version: nobody asked for it here
            _say(f"torch computes: {error}")
    if found is None:
        return None
    import torch

    capability = torch.cuda.get_device_capability()
    if not found.runs_on(*capability):
        names = ", ".join(f"sm_{a}" for a in found.architectures)
        message = (
            f"{found.path} was built for {names}, not for this device, SM {capability[0]}{capability[1]}"
        )
        if named:
            raise BuildError(f"{message}; build it again: nemoquant plugins build")
        _say(f"torch computes: {message}")
        return None
    _say(f"{found.path}")
    return found


def _say(text: str) -> None:
    print(f"CUDA kernels: {text}", file=sys.stderr)


def serves(op: str, device: str) -> bool:
    """Whether ``op`` of tensors on ``device`` (``cuda``, ``cpu``) goes through a kernel: a library is there
    for it, and has it."""
    if device not in ("cuda", *_used):
        return False
    found = kernels(device)
    return found is not None and found.has(op)
