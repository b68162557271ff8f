"""Recording ONNX nodes: of the graph itself, of functions, and of the bodies of loops.

Every value has a unique name in the whole model: subgraphs refer to outer values by name, and ONNX allows no
shadowing.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import ArrayLike

from nemoquant.graph.spec import Spec

OPSET = 23
IR_VERSION = 11
DOMAIN = "nemoquant"

FLOAT, HALF, BF16, INT64, BOOL = (
    ir.DataType.FLOAT,
    ir.DataType.FLOAT16,
    ir.DataType.BFLOAT16,
    ir.DataType.INT64,
    ir.DataType.BOOL,
)


class Tape:
    """Records nodes in the order of the calls."""

    def __init__(self, name: str = "", parent: "Tape | None" = None) -> None:
        """``name`` is a prefix of a function's values and nodes.

        TensorRT's parser inlines functions, and refuses a name that occurs twice.
        """
        self.nodes: list[ir.Node] = []
        self.name: str = name if parent is None else parent.name
        self._names: itertools.count[int] = itertools.count() if parent is None else parent._names
        # domains that nodes here and in subgraphs use
        self.domains: set[str] = set() if parent is None else parent.domains
        self._constants: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}

    def op(self, kind: str, *inputs: ir.Value | None, domain: str = "", **attributes: Any) -> ir.Value:
        """A node with one output."""
        return self.ops(kind, 1, *inputs, domain=domain, **attributes)[0]

    def ops(
        self, kind: str, outputs: int, *inputs: ir.Value | None, domain: str = "", **attributes: Any
    ) -> Sequence[ir.Value]:
        """A node with several outputs; attributes of type :class:`ir.Attr` (references, graphs) are kept."""
        attrs = [
            a if isinstance(a, ir.Attr) else ir.convenience.convert_attribute(name, a)
            for name, a in attributes.items()
        ]
        results = [ir.Value(name=f"{self.name}v{next(self._names)}") for _ in range(outputs)]
        self.domains.add(domain)
        self.nodes.append(
            ir.Node(
                domain,
                kind,
                inputs,
                attributes=attrs,
                outputs=results,
                name=f"{self.name}{kind}_{next(self._names)}",
            )
        )
        return results

    def constant(self, value: ArrayLike, dtype: ir.DataType | None = None) -> ir.Value:
        """A small constant inside the model; equal ones are shared within a scope."""
        array = np.asarray(value)
        tensor = ir.tensor(array, dtype=dtype)
        key = (str(tensor.dtype), array.shape, array.tobytes())
        recorded = self._constants.get(key)
        if recorded is None:
            recorded = self._constants[key] = self.op("Constant", value=tensor)
        return recorded

    def ints(self, *values: int) -> ir.Value:
        """A constant int64 vector."""
        return self.constant(np.array(values, np.int64))

    def attribute(self, name: str, kind: str) -> ir.Value:
        """An attribute of the recorded function, as a value; ``kind`` is ``float`` or ``int``."""
        types = {"float": ir.AttributeType.FLOAT, "int": ir.AttributeType.INT}
        reference: dict[str, Any] = {f"value_{kind}": ir.RefAttr(f"value_{kind}", name, types[kind])}
        return self.op("Constant", **reference)

    # Short forms of frequent operators.

    def size(self, x: ir.Value, axis: int) -> ir.Value:
        """The length of one axis, int64 [1]."""
        return self.op("Shape", x, start=axis, end=axis + 1)

    def reshape(self, x: ir.Value, *dims: int | ir.Value) -> ir.Value:
        """To ``dims``: numbers (-1 infers, 0 keeps), or int64 [1] values."""
        if all(isinstance(d, int) for d in dims):
            return self.op("Reshape", x, self.ints(*(d for d in dims if isinstance(d, int))))
        parts = [
            d if not isinstance(d, int) else self.ints(d) if d else self.size(x, i)
            for i, d in enumerate(dims)
        ]
        return self.reshape_to(x, self.op("Concat", *parts, axis=0))

    def reshape_to(self, x: ir.Value, shape: ir.Value) -> ir.Value:
        """To a computed shape. A zero is a size: with "keep" TensorRT would prepare for both meanings."""
        return self.op("Reshape", x, shape, allowzero=1)

    def cast(self, x: ir.Value, dtype: ir.DataType) -> ir.Value:
        return self.op("Cast", x, to=int(dtype))

    def slice(self, x: ir.Value, start: int | ir.Value, end: int | ir.Value, axis: int) -> ir.Value:
        bounds = [self.ints(b) if isinstance(b, int) else b for b in (start, end)]
        return self.op("Slice", x, *bounds, self.ints(axis))

    def unsqueeze(self, x: ir.Value, *axes: int) -> ir.Value:
        return self.op("Unsqueeze", x, self.ints(*axes))

    def loop(
        self, count: ir.Value, start: ir.Value, record: Callable[["Tape", ir.Value, ir.Value], ir.Value]
    ) -> ir.Value:
        """``count`` times ``value = record(tape, i, value)``, from ``start`` on."""

        def body(t: "Tape", i: ir.Value, going: ir.Value, value: ir.Value) -> list[ir.Value]:
            i.type, i.shape = ir.TensorType(INT64), ir.Shape([])  # ONNX Runtime needs these
            going.type, going.shape = ir.TensorType(BOOL), ir.Shape([])
            return [t.op("Identity", going), record(t, i, value)]

        return self.op(
            "Loop",
            count,
            self.constant(np.bool_(True)),
            start,
            body=self.subgraph("body", ["i", "going", "value"], body),
        )

    def subgraph(
        self, name: str, inputs: Sequence[str], record: Callable[..., Sequence[ir.Value]]
    ) -> ir.Attr:
        """A graph attribute (``body``, ``then_branch``): ``record(tape, *inputs)`` returns its outputs."""
        tape = Tape(parent=self)
        values = [ir.Value(name=f"{self.name}{hint}_{next(self._names)}") for hint in inputs]
        outputs = list(record(tape, *values))
        outputs = [
            tape.op("Identity", out) if out in values or out.producer() not in tape.nodes else out
            for out in outputs
        ]
        return ir.AttrGraph(
            name, ir.Graph(values, outputs, nodes=tape.nodes, name=name, opset_imports={"": OPSET})
        )


Recorder = Callable[..., Sequence[ir.Value]]  # (tape, *inputs) -> outputs


def function(op: Spec, record: Recorder, *, name: str = "", inputs: Sequence[str] = ()) -> ir.Function:
    """The body of an operator; a format's own body has its ``name`` and further ``inputs``."""
    attributes = [
        ir.convenience.convert_attribute(key, value)
        for key, value in op.attributes.items()
        if key not in ("format",)
    ]
    return make_function(op.domain, name or op.name, [*op.inputs, *inputs], record, attributes)


def make_function(
    domain: str, name: str, inputs: Sequence[str], record: Recorder, attributes: Sequence[ir.Attr] = ()
) -> ir.Function:
    """A function of the model; no overloads: ONNX Runtime does not find them from inside another function."""
    tape = Tape(f"{name}/")
    values = [ir.Value(name=hint) for hint in inputs]
    outputs = list(record(tape, *values))
    imports = {"": OPSET} | {used: 1 for used in sorted(tape.domains) if used}
    graph = ir.Graph(values, outputs, nodes=tape.nodes, opset_imports=imports, name=name)
    return ir.Function(domain, name, graph=graph, attributes=list(attributes))
