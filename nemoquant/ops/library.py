"""Load and call the kernel libraries, and decide where they replace torch's operators."""

import ctypes
import os
import sys
from functools import cache
from pathlib import Path
from typing import Any

from nemoquant.errors import BuildError, EngineError
from nemoquant.ops.abi import structure
from nemoquant.ops.build import default_folder
from nemoquant.ops.built import read_built
from nemoquant.ops.proven import OPERATORS, proven_on
from nemoquant.ops.sources import sources_hash
from nemoquant.words import plain

VARIABLE = "NEMOQUANT_KERNELS"
KERNELS = "libnemoquant_kernels.so"


def covers(architecture: str, major: int, minor: int) -> bool:
    """Whether code for an architecture, such as "80", "90a" or "100f", runs on a compute capability.

    "a" is for that one device alone. The others run on later minor numbers too: sm_80 on 8.6 and 8.9, the
    family sm_100f on 10.3 (B300), sm_120f on 12.1 (DGX Spark). 10.1 (Thor, before CUDA 13 called it 11.0) is
    of no family but its own.
    """
    number = architecture.rstrip("af")
    built = int(number[:-1]), int(number[-1])
    if architecture.endswith("a") or (architecture.endswith("f") and (major, minor) == (10, 1)):
        return built == (major, minor)
    return built[0] == major and built[1] <= minor


def other_device(architectures: tuple[str, ...], capability: tuple[int, int]) -> str | None:
    """Says that a library was not built for a device, and for what it was, as the end of a sentence.

    None if it runs there, or if what it was built for is unknown: no ``architectures``.
    """
    if not architectures or any(covers(name, *capability) for name in architectures):
        return None
    names = ", ".join(f"sm_{a}" for a in architectures)
    return f"was built for {names}, not for this device, SM {capability[0]}{capability[1]}"


class Kernels:
    """A loaded library.

    Attributes:
        path: its file.
        architectures: what it was built for; empty if that is unknown, or for the host.
        gemm_architectures: those of them with CUTLASS's grouped products.
    """

    def __init__(self, path: Path, operators: frozenset[str] | None = None) -> None:
        """Load the library.

        Args:
            operators: those that it serves; None: all that it has.
        Raises:
            BuildError: the file does not exist, can't be loaded, is no kernel library, or was built from
                other sources than those of this version.
        """
        self.path, self._operators = path.absolute(), operators
        if not self.path.is_file():
            raise BuildError(
                f"{self.path} is not there; expected a library made by `nemoquant plugins build`"
            )
        self._host = "host" in self.path.name
        built = read_built(self.path.parent, host=self._host)
        if built and built.sources != sources_hash():
            raise BuildError(
                f"{self.path} was built from other sources than this version of nemoquant has; build it "
                f"again: nemoquant plugins build"
            )
        self.architectures = built.architectures if built else ()
        self.gemm_architectures = built.gemm_architectures if built else ()
        try:
            self._library = ctypes.CDLL(str(self.path))
            self._last_error = self._library.nemoquant_last_error
        except (OSError, AttributeError) as error:
            raise BuildError(
                f"{self.path} can't be loaded: {error}; build it again: nemoquant plugins build"
            ) from None
        self._last_error.restype = ctypes.c_char_p

    def has(self, op: str) -> bool:
        """Whether it serves the operator."""
        return (self._operators is None or op in self._operators) and hasattr(
            self._library, f"nemoquant_{op}"
        )

    def workspace(self, op: str, **arguments: Any) -> int:
        """Bytes of workspace that a call needs."""
        function = getattr(self._library, f"nemoquant_{op}_workspace")
        function.restype = ctypes.c_size_t
        return int(function(ctypes.byref(structure(op)(**arguments))))

    def call(self, op: str, *, stream: int | None = None, **arguments: Any) -> None:
        """Start a kernel, without waiting for the device.

        Args:
            op: name of the operator.
            stream: handle of the CUDA stream.
            arguments: the members of ``nemoquant_<op>_args``, addresses as integers.
        Raises:
            EngineError: the kernel refused, with its reason.
        """
        code = getattr(self._library, f"nemoquant_{op}")(
            ctypes.byref(structure(op)(**arguments)), ctypes.c_void_p(stream)
        )
        if code:
            reason = self._last_error().decode(errors="replace")
            # the variable chooses CUDA's library alone
            instead = "" if self._host else f"; {VARIABLE}=none lets torch compute"
            raise EngineError(f"{self.path.name}: {reason} (error {code}){instead}")


_used: dict[str, Kernels | None] = {}  # by device type; "cpu" only after `use`


def use(path: Path | None, device: str = "cuda") -> None:
    """Use the kernels of this library for tensors on ``device``; None: no kernels at all.

    ``device`` is ``cuda``, or ``cpu`` with a host library.

    Raises:
        BuildError: see :class:`Kernels`.
    """
    _used[device] = load(path) if path else None


@cache
def load(path: Path) -> Kernels:
    """:class:`Kernels` of ``path``, loaded once per process."""
    return Kernels(path)


def kernels(device: str) -> Kernels | None:
    """The library for tensors on ``device``; None where there is none, and torch's own operators compute.

    For CUDA: that of :func:`use`, else of NEMOQUANT_KERNELS (a file, or "none"), else what `nemoquant plugins
    build` put into its default folder; the last serves only what a GPU like this one has shown to be right
    (``proven.py``). The choice is printed once, on standard error. For the CPU: only that of :func:`use`.

    Raises:
        BuildError: NEMOQUANT_KERNELS names a library that can't be used.
    """
    if device not in _used:
        _used[device] = _find() if device == "cuda" else None
    return _used[device]


def _find() -> Kernels | None:
    """The library for this process's CUDA device; prints which, and why."""
    named = os.environ.get(VARIABLE)
    if named == "none":
        _report(f"{VARIABLE}=none, torch computes")
        return None
    if named:
        library = load(Path(named))
        if why := other_device(library.architectures, _capability()):
            raise BuildError(f"{library.path} {why}; build it again: nemoquant plugins build")
        _report(str(library.path))
        return library
    try:
        path = default_folder() / KERNELS
        if not path.is_file():
            _report("none are built, torch computes; `nemoquant plugins build` makes them")
            return None
        capability = _capability()
        proven = proven_on(capability)
        library = Kernels(path, proven)
    except (BuildError, OSError) as error:  # of another version, or no place; the user did not name it
        _report(f"torch computes: {error}")
        return None
    if why := other_device(library.architectures, capability):
        _report(f"torch computes: {path} {why}")
        return None
    used = ", ".join(sorted(proven))
    rest = not_by_default(path, capability)
    _report(f"{path}{f' for {used}' if used else ' is built'}, but {rest}" if rest else str(path))
    return library if proven else None


def not_by_default(path: Path, capability: tuple[int, int]) -> str | None:
    """Which operators of ``path``, in the default folder, are not used on a device, and what takes them."""
    proven = proven_on(capability)
    rest = ", ".join(op for op in OPERATORS if op not in proven)
    if not rest:
        return None
    return (
        f"no GPU of SM {capability[0]}{capability[1]} has run {rest} yet: torch computes; {VARIABLE}={path} "
        f"takes the kernels"
    )


def _capability() -> tuple[int, int]:
    import torch

    return torch.cuda.get_device_capability()


def _report(text: str) -> None:
    if sys.stderr is not None:  # print would take standard output instead
        print(plain(f"CUDA kernels: {text}"), file=sys.stderr)


def serves(op: str, device: str) -> bool:
    """Whether a kernel computes ``op`` for tensors on ``device`` (``cuda``, ``cpu``).

    It does if there is a library for that device, and the library serves the operator.
    """
    if device not in ("cuda", *_used):
        return False
    library = kernels(device)
    return library is not None and library.has(op)
