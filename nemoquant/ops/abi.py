"""The C interface of the kernels as ctypes structures, read from their source, ``plugins/<op>/abi.h``."""

import ctypes
import re
from functools import cache
from typing import Any

from nemoquant.errors import BuildError
from nemoquant.shipped import plugin_folder

DTYPES = {
    "float32": 0,
    "float16": 1,
    "bfloat16": 2,
    "float8_e4m3fn": 3,
    "float4_e2m1x2": 4,
    "int64": 5,
    "int32": 6,
}
"""``enum nemoquant_dtype`` of ``common/abi.h``, by the names of numpy, ml_dtypes and torch."""

_SCALARS: dict[str, Any] = {
    "int8_t": ctypes.c_int8,
    "uint8_t": ctypes.c_uint8,
    "int32_t": ctypes.c_int32,
    "uint32_t": ctypes.c_uint32,
    "int64_t": ctypes.c_int64,
    "uint64_t": ctypes.c_uint64,
    "size_t": ctypes.c_size_t,
    "int": ctypes.c_int,
    "float": ctypes.c_float,
    "double": ctypes.c_double,
}


@cache
def structure(op: str) -> type[ctypes.Structure]:
    """``nemoquant_<op>_args``; ``op`` is the folder's name, such as ``causal_conv1d``.

    Raises:
        BuildError: its header has no such structure, or a member of a type that no structure here may have.
    """
    path = plugin_folder() / op / "abi.h"
    text = re.sub(r"/\*.*?\*/|//[^\n]*", " ", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    body = re.search(rf"struct\s+nemoquant_{op}_args\s*\{{(.*?)\}}", text, re.DOTALL)
    if body is None:
        raise BuildError(
            f"{path} has no struct nemoquant_{op}_args; the plugin folder is not as this version needs it"
        )
    fields: list[tuple[str, Any]] = []
    for declaration in filter(
        None, (" ".join(part.split()) for part in body[1].replace("*", " *").split(";"))
    ):
        match = re.fullmatch(r"(?:const )?(\w+) (.*)", declaration)
        for declarator in match[2].split(",") if match else [""]:
            part = re.fullmatch(r"\s*(\*?)\s*(?:const )?(\w+)\s*(?:\[(\d+)\])?\s*", declarator)
            kind = (
                None
                if match is None or part is None
                else ctypes.c_void_p
                if part[1]
                else _SCALARS.get(match[1])
            )
            if part is None or kind is None:
                raise BuildError(f"{path}: '{declaration}' is no member that a kernel's arguments may have")
            fields.append((part[2], kind * int(part[3]) if part[3] else kind))
    return type(f"nemoquant_{op}_args", (ctypes.Structure,), {"_fields_": fields})
