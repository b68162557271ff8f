"""TensorRT's side of the plugin interface: ``tests/plugins/trt_caller.cpp`` for Python."""

import ctypes
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

BUILD, RUNTIME = 0, 1  # TensorRTPhase
FIELD_TYPES = {
    "float16": 0,
    "float32": 1,
    "float64": 2,
    "int8": 3,
    "int16": 4,
    "int32": 5,
    "string": 6,
    "dims": 7,
    "int64": 10,
}
DATA_TYPES = {
    "float32": 0,
    "float16": 1,
    "int8": 2,
    "int32": 3,
    "bool": 4,
    "uint8": 5,
    "float8": 6,
    "bfloat16": 7,
    "int64": 8,
}
LINEAR, HWC8 = 0, 2  # TensorFormat


class CField(ctypes.Structure):
    """nvinfer1::PluginField."""

    _fields_ = [
        ("name", ctypes.c_char_p),
        ("data", ctypes.c_void_p),
        ("type", ctypes.c_int32),
        ("length", ctypes.c_int32),
    ]


class CFields(ctypes.Structure):
    """nvinfer1::PluginFieldCollection."""

    _fields_ = [("count", ctypes.c_int32), ("fields", ctypes.POINTER(CField))]


class CTensor(ctypes.Structure):
    _fields_ = [
        ("rank", ctypes.c_int32),
        ("type", ctypes.c_int32),
        ("format", ctypes.c_int32),
        ("unused", ctypes.c_int32),
        ("dims", ctypes.c_int64 * 8),
        ("minimum", ctypes.c_int64 * 8),
        ("maximum", ctypes.c_int64 * 8),
    ]


@dataclass(frozen=True)
class Field:
    """A plugin field as a caller gives it: raw bytes (None: a null pointer) and a count of values.

    The bytes are ``data``, the count is ``length``.
    """

    name: str | None
    type: str
    data: bytes | None
    length: int


def field(name: str, value: Any, type: str | None = None) -> Field:
    """A field as TensorRT's parser makes it: int32, float32, or characters with the terminating zero."""
    if isinstance(value, str):
        data = value.encode() + b"\0"
        return Field(name, type or "string", data, len(data))
    type = type or ("float32" if isinstance(value, float) else "int32")
    array = np.atleast_1d(np.array(value, dtype=type))
    return Field(name, type, array.tobytes(), array.size)


@dataclass(frozen=True)
class Tensor:
    """Describes an input or output; the profile's ``minimum`` and ``maximum`` default to ``dims``."""

    type: str
    dims: tuple[int, ...]
    minimum: tuple[int, ...] | None = None
    maximum: tuple[int, ...] | None = None
    format: int = LINEAR

    def c(self) -> CTensor:
        made = CTensor(rank=len(self.dims), type=DATA_TYPES[self.type], format=self.format)
        for name, values in (
            ("dims", self.dims),
            ("minimum", self.minimum or self.dims),
            ("maximum", self.maximum or self.dims),
        ):
            getattr(made, name)[: len(values)] = values
        return made

    def but(self, **changes: Any) -> "Tensor":
        return replace(self, **changes)


def _tensors(tensors: Sequence[Tensor]) -> ctypes.Array[CTensor]:
    return (CTensor * max(1, len(tensors)))(*(t.c() for t in tensors))


def _collection(fields: Sequence[Field]) -> tuple[CFields, list[Any]]:
    """The C collection, and the objects that must stay alive with it."""
    buffers = [
        ctypes.create_string_buffer(f.data, len(f.data)) if f.data is not None else None for f in fields
    ]
    array = (CField * max(1, len(fields)))(
        *(
            CField(
                f.name.encode() if f.name is not None else None,
                ctypes.addressof(b) if b else None,
                FIELD_TYPES[f.type],
                f.length,
            )
            for f, b in zip(fields, buffers, strict=True)
        )
    )
    return CFields(len(fields), array), [buffers, array]


def _read(collection: CFields) -> list[Field]:
    sizes = {"float32": 4, "int32": 4, "string": 1}
    names = {number: name for name, number in FIELD_TYPES.items()}
    found = []
    for i in range(collection.count):
        f = collection.fields[i]
        type = names[f.type]
        found.append(
            Field(
                f.name.decode(),
                type,
                ctypes.string_at(f.data, f.length * sizes[type]) if f.data else None,
                f.length,
            )
        )
    return found


class Caller:
    """A loaded plugin library."""

    def __init__(self, harness: Path, library: Path, with_logger: bool = True) -> None:
        self.c = c = ctypes.CDLL(str(harness))
        for name in (
            "describe",
            "creator_facts",
            "plugin_facts",
            "output_shapes",
            "take_log",
            "timing_cache_id",
        ):
            getattr(c, f"trt_{name}").restype = ctypes.c_char_p
        for name in ("load", "create", "clone", "attach"):
            getattr(c, f"trt_{name}").restype = ctypes.c_void_p
        for name in ("field_names", "serialize"):
            getattr(c, f"trt_{name}").restype = ctypes.POINTER(CFields)
        c.trt_workspace.restype = ctypes.c_uint64
        c.trt_supports.restype = ctypes.c_bool
        handle = c.trt_load(str(library).encode(), with_logger)
        assert handle, self.log()
        self.handle = ctypes.c_void_p(handle)
        room = (ctypes.c_void_p * 16)()
        count = c.trt_creators(self.handle, room, len(room))
        self.creators = {}
        for pointer in room[:count]:
            creator = Creator(self, pointer)
            self.creators[creator.name] = creator

    def log(self) -> str:
        """Messages logged since the last call, one a line."""
        return str(self.c.trt_take_log(False).decode())

    def recorded(self) -> str:
        """Errors in the error recorder since the last call."""
        return str(self.c.trt_take_log(True).decode())

    def describe(self) -> dict[str, Any]:
        """The library's tables, by operator."""
        return {op["name"]: op for op in json.loads(self.c.trt_describe(self.handle))}


class Creator:
    def __init__(self, caller: Caller, pointer: int) -> None:
        self.caller, self.pointer = caller, ctypes.c_void_p(pointer)
        facts = caller.c.trt_creator_facts(self.pointer).decode()
        self.kind, self.name, self.version, self.namespace = facts.split("|")

    def field_names(self) -> list[Field]:
        return _read(self.caller.c.trt_field_names(self.pointer).contents)

    def create(self, fields: Sequence[Field] | None, phase: int = BUILD) -> "Plugin | None":
        """None if the creator returns no plugin; ``fields`` None is a null collection."""
        if fields is None:
            made = self.caller.c.trt_create(self.pointer, None, phase)
        else:
            collection, alive = _collection(fields)
            made = self.caller.c.trt_create(self.pointer, ctypes.byref(collection), phase)
            for buffer in alive[0]:  # if a plugin still reads them after creation, it now reads wrong values
                if buffer:
                    ctypes.memset(buffer, 0xA5, len(buffer))
        return Plugin(self.caller, made) if made else None


class Plugin:
    """A plugin, destroyed together with the Python object."""

    def __init__(self, caller: Caller, pointer: int) -> None:
        self.caller, self.pointer = caller, ctypes.c_void_p(pointer)

    def __del__(self) -> None:
        self.caller.c.trt_destroy(self.pointer)

    def facts(self) -> list[str]:
        """Name, version, namespace; types of the object, of core, build and runtime."""
        return str(self.caller.c.trt_plugin_facts(self.pointer).decode()).split("|")

    def clone(self) -> "Plugin":
        return Plugin(self.caller, self.caller.c.trt_clone(self.pointer))

    def attach(self, recorder: bool = True) -> "Plugin":
        return Plugin(self.caller, self.caller.c.trt_attach(self.pointer, recorder))

    def output_types(self, inputs: Sequence[str], outputs: int | None = None) -> list[str] | None:
        count = self.caller.c.trt_output_count(self.pointer) if outputs is None else outputs
        given, made = (
            (ctypes.c_int32 * len(inputs))(*(DATA_TYPES[t] for t in inputs)),
            (ctypes.c_int32 * count)(),
        )
        if self.caller.c.trt_output_types(self.pointer, given, len(inputs), made, count):
            return None
        names = {number: name for name, number in DATA_TYPES.items()}
        return [names[t] for t in made]

    def output_shapes(self, inputs: Sequence[Sequence[str]]) -> list[list[str]] | None:
        """Dimensions as text: digits are constants, the others are symbols."""
        names = [word.encode() for shape in inputs for word in shape]
        count = self.caller.c.trt_output_count(self.pointer)
        made = self.caller.c.trt_output_shapes(
            self.pointer,
            (ctypes.c_char_p * len(names))(*names),
            (ctypes.c_int32 * len(inputs))(*map(len, inputs)),
            len(inputs),
            count,
        )
        return None if made is None else [shape.split(" ") for shape in made.decode().split(";")]

    def supports(self, position: int, tensors: Sequence[Tensor], inputs: int) -> bool:
        return bool(
            self.caller.c.trt_supports(
                self.pointer, position, _tensors(tensors), inputs, len(tensors) - inputs
            )
        )

    def configure(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> int:
        return int(
            self.caller.c.trt_configure(
                self.pointer, _tensors(inputs), len(inputs), _tensors(outputs), len(outputs)
            )
        )

    def workspace(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> int:
        return int(
            self.caller.c.trt_workspace(
                self.pointer, _tensors(inputs), len(inputs), _tensors(outputs), len(outputs)
            )
        )

    def timing_cache_id(self) -> str | None:
        """None: TensorRT keeps no times of this plugin."""
        found = self.caller.c.trt_timing_cache_id(self.pointer)
        return None if found is None else str(found.decode())

    def serialize(self) -> list[Field]:
        return _read(self.caller.c.trt_serialize(self.pointer).contents)

    def shape_change(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> int:
        return int(
            self.caller.c.trt_shape_change(
                self.pointer, _tensors(inputs), len(inputs), _tensors(outputs), len(outputs)
            )
        )

    def enqueue(
        self,
        inputs: Mapping[Tensor, NDArray[Any]] | Sequence[tuple[Tensor, NDArray[Any]]],
        outputs: Sequence[tuple[Tensor, NDArray[Any]]],
        workspace: NDArray[Any],
    ) -> int:
        """Takes tensors together with their memory."""
        pairs = list(inputs.items()) if isinstance(inputs, Mapping) else list(inputs)

        def pointers(some: Sequence[tuple[Tensor, NDArray[Any]]]) -> Any:
            return (ctypes.c_void_p * max(1, len(some)))(*(array.ctypes.data for _, array in some))

        return int(
            self.caller.c.trt_enqueue(
                self.pointer,
                _tensors([t for t, _ in pairs]),
                len(pairs),
                _tensors([t for t, _ in outputs]),
                len(outputs),
                pointers(pairs),
                pointers(outputs),
                ctypes.c_void_p(workspace.ctypes.data),
            )
        )
