"""Finding and loading the kernel libraries, and calling them."""

import ctypes
import os
from functools import cache
from pathlib import Path
from typing import Any

from nemoquant.errors import BuildError, EngineError
from nemoquant.ops.abi import structure
from nemoquant.ops.build import default_folder, read_built, sources_hash

VARIABLE = "NEMOQUANT_KERNELS"


class Kernels:
    """A loaded library. ``path`` says which, ``architectures`` what it was built for (empty where nothing says it)."""

    def __init__(self, path: Path) -> None:
        """Load it.

        Raises:
            BuildError: it is not there, can't be loaded, is no kernel library, or was built from other sources than this version's.
        """
        self.path = path.absolute()
        if not self.path.is_file():
            raise BuildError(f"{self.path} is not there; expected a library made by `nemoquant plugins build`")
        built = read_built(self.path.parent, host="host" in self.path.name)
        if built and built.sources != sources_hash():
            raise BuildError(
                f"{self.path} was built from other sources than this version of nemoquant has; build it again: nemoquant plugins build"
            )
        self.architectures = built.architectures if built else ()
        try:
            self._library = ctypes.CDLL(str(self.path))
            self._last_error = self._library.nemoquant_last_error
        except (OSError, AttributeError) as error:
            raise BuildError(f"{self.path} can't be loaded: {error}; build it again: nemoquant plugins build") from None
        self._last_error.restype = ctypes.c_char_p

    def has(self, op: str) -> bool:
        return hasattr(self._library, f"nemoquant_{op}")

    def workspace(self, op: str, **arguments: Any) -> int:
        """Bytes that a call wants."""
        function = getattr(self._library, f"nemoquant_{op}_workspace")
        function.restype = ctypes.c_size_t
        return int(function(ctypes.byref(structure(op)(**arguments))))

    def call(self, op: str, *, stream: int | None = None, **arguments: Any) -> None:
        """Start a kernel; arguments are the members of ``nemoquant_<op>_args``, addresses as integers. It does not wait for the device.

        Raises:
            EngineError: the kernel refused, with its reason.
        """
        code = getattr(self._library, f"nemoquant_{op}")(ctypes.byref(structure(op)(**arguments)), ctypes.c_void_p(stream))
        if code:
            raise EngineError(f"{self.path.name}: {self._last_error().decode(errors='replace')} (error {code})")


@cache
def load(path: Path) -> Kernels:
    """As :class:`Kernels`, once a process."""
    return Kernels(path)


def find() -> Path | None:
    """The library for GPUs: that of NEMOQUANT_KERNELS (which must be there), else what was built into the default folder, else None."""
    named = os.environ.get(VARIABLE)
    if named:
        return Path(named)
    path = default_folder() / "libnemoquant_kernels.so"
    return path if path.is_file() else None
