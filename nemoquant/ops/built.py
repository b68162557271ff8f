"""What a build of the plugins wrote down beside its libraries.

Read without pydantic: the operators need torch alone, and a GPU machine may have no more.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemoquant.errors import BuildError
from nemoquant.files import MOST_SETTINGS, read_json


@dataclass(frozen=True)
class Built:
    """The content of ``build.json``.

    Attributes:
        nemoquant: version that built it.
        sources: sha256 of all sources.
        host: whether it is the emulated host library.
        architectures: what the kernels were compiled for, such as "90a".
        gemm_architectures: those with CUTLASS's grouped products.
        tensorrt: version of TensorRT's headers; None without TensorRT plugins.
        libraries: file name to sha256.
    """

    nemoquant: str
    sources: str
    host: bool
    architectures: tuple[str, ...]
    gemm_architectures: tuple[str, ...]
    tensorrt: str | None
    libraries: dict[str, str]


def read_built(folder: Path, host: bool = False) -> Built | None:
    """What was built into ``folder``; None if nothing was.

    Raises:
        BuildError: its ``build.json`` (of a host build ``build_host.json``) can't be read.
    """
    path = folder / ("build_host.json" if host else "build.json")
    try:
        data = read_json(path, MOST_SETTINGS)
        wrong = _wrong(data)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise BuildError(f"{path} can't be read ({error.strerror or error}); set XDG_CACHE_HOME") from None
    except ValueError as error:
        wrong = str(error)
    if wrong:
        raise BuildError(
            f"{path} is not what `nemoquant plugins build` writes ({wrong}); remove it and build again"
        )
    known = {name: data[name] for name in _FIELDS}
    return Built(**known | {name: tuple(data[name]) for name in ("architectures", "gemm_architectures")})


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_text, value))


_FIELDS: dict[str, Callable[[Any], bool]] = {
    "nemoquant": _text,
    "sources": _text,
    "host": lambda value: isinstance(value, bool),
    "architectures": _texts,
    "gemm_architectures": _texts,
    "tensorrt": lambda value: value is None or _text(value),
    "libraries": lambda value: isinstance(value, dict) and all(map(_text, value.values())),
}


def _wrong(data: Any) -> str | None:
    """The first thing that is not as in :class:`Built`."""
    if not isinstance(data, dict):
        return "no object"
    for name, right in _FIELDS.items():
        if name not in data:
            return f"`{name}` is missing"
        if not right(data[name]):
            return f"`{name}` is of another kind"
    return None
