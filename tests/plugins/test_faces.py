"""Every plugin through TensorRT's interface, in the order of a caller's calls, without TensorRT.

Creation, shapes, formats, serialization, enqueue. The library's tables are compared with
``plugins/<op>/spec.yaml``; the inputs that a plugin must accept or refuse follow from the specification.
"""

import itertools
import math
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import yaml
from numpy.typing import NDArray
from support.plugin_build import (
    OPERATORS,
    PLUGINS,
    harness,
    host_folder,
    needs_compiler,
    needs_tensorrt_headers,
)
from support.trt_caller import BUILD, DATA_TYPES, HWC8, RUNTIME, Caller, Creator, Field, Plugin, Tensor, field

pytestmark = [needs_compiler, needs_tensorrt_headers, pytest.mark.slow]

NUMPY = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "int8": np.int8,
    "int64": np.int64,
    "int32": np.int32,
}
COMPUTE = ["bfloat16", "float16", "float32"]
# Sizes of two calls that the kernels accept; sizes missing in the second are those of the first.
SIZES: dict[str, tuple[dict[str, int], dict[str, int]]] = {
    "causal_conv1d": ({"B": 2, "L": 5, "C": 12, "K": 4}, {"B": 1, "L": 1, "K": 3}),
    "mamba2_scan": ({"B": 2, "L": 5, "H": 4, "P": 64, "G": 2, "N": 64}, {"B": 1, "L": 1}),
    "routed_experts": ({"T": 5, "k": 2, "E": 4, "I": 32, "M": 64}, {"T": 1}),
}


def read_spec(op: str) -> dict[str, Any]:
    return dict(yaml.safe_load((PLUGINS / op / "spec.yaml").read_text(encoding="utf-8")))


def defaults(op: str) -> dict[str, Any]:
    return {name: attribute["default"] for name, attribute in read_spec(op)["attributes"].items()}


def fields_of(op: str, **changes: Any) -> list[Field]:
    """Fields as nemoquant's export and TensorRT's parser give them; ``changes`` are values by name."""
    return [field(name, value) for name, value in (defaults(op) | changes).items()]


def size_of(word: str, sizes: dict[str, int]) -> int:
    """``K-1`` with K = 4 is 3; ``1`` is 1."""
    if word.isdigit():
        return int(word)
    value, by = sizes[word[0]], int(word[2:] or 0)
    return {"": value, "-": value - by, "*": value * by, "/": value // (by or 1)}[word[1:2]]


class Operator:
    """A creator, its specification, and ports as the library describes them.

    A test compares this description with the specification.
    """

    def __init__(self, caller: Caller, op: str, **attributes: str) -> None:
        """With ``attributes``, the inputs are those that belong to them, optional ones too.

        Give one text attribute; the others keep their defaults.
        """
        self.op, self.spec = op, read_spec(op)
        self.caller, self.attributes = caller, attributes
        self.creator: Creator = caller.creators[self.spec["name"]]
        self.table = caller.describe()[self.spec["name"]]
        self.inputs = [port for port in self.table["inputs"] if not port["optional"]]
        for name, value in attributes.items():
            self.inputs = self.table["inputs_by"][f"{name}={value}"]
        self.outputs = self.table["outputs"]

    def texts(self) -> list["Operator"]:
        """One operator for each value of each text attribute."""
        fields = [f for f in self.table["fields"] if f["type"] == "string"]
        return [Operator(self.caller, self.op, **{f["name"]: value}) for f in fields for value in f["values"]]

    def plugin(self) -> Plugin:
        made = self.creator.create(fields_of(self.op, **self.attributes))
        assert made is not None, self.caller.log()
        return made

    def types(self, first: int = 0) -> list[str]:
        """Types of inputs and outputs: of each, number ``first`` of the allowed types."""
        found: dict[str, str] = {}
        for port in (*self.inputs, *self.outputs):
            one = port["types"][min(first, len(port["types"]) - 1)]
            found[port["name"]] = found[one[1:]] if one[0] == "=" else one
        return list(found.values())

    def tensors(self, sizes: dict[str, int], first: int = 0) -> tuple[list[Tensor], list[Tensor]]:
        ports = (*self.inputs, *self.outputs)
        made = [
            Tensor(type, tuple(size_of(word, sizes) for word in port["shape"].split()))
            for port, type in zip(ports, self.types(first), strict=True)
        ]
        return made[: len(self.inputs)], made[len(self.inputs) :]

    def sizes(self, which: int = 0) -> dict[str, int]:
        one, other = SIZES[self.op]
        return one | other if which else one


@pytest.fixture(params=OPERATORS)
def operator(request: pytest.FixtureRequest, caller: Caller) -> Operator:
    caller.log(), caller.recorded()
    return Operator(caller, request.param)


def memory(tensor: Tensor, seed: int) -> NDArray[np.generic]:
    """Small values: indices of experts are 0 or 1, and codes are small."""
    g = np.random.default_rng(seed)
    if tensor.type in ("int64", "int32", "int8"):
        return g.integers(0, 2, tensor.dims).astype(NUMPY[tensor.type])
    return (g.random(tensor.dims) - 0.5).astype(NUMPY[tensor.type])


def blank(tensor: Tensor) -> NDArray[np.generic]:
    return np.full(tensor.dims, 99, NUMPY[tensor.type])


def run(
    plugin: Plugin, inputs: list[Tensor], outputs: list[Tensor], seed: int = 0
) -> list[NDArray[np.generic]]:
    """One shape change and one enqueue -> the outputs."""
    assert plugin.shape_change(inputs, outputs) == 0, plugin.caller.log()
    return enqueue(plugin, inputs, outputs, seed)


def enqueue(
    plugin: Plugin, inputs: list[Tensor], outputs: list[Tensor], seed: int = 0
) -> list[NDArray[np.generic]]:
    given = [(t, memory(t, seed + i)) for i, t in enumerate(inputs)]
    made = [(t, blank(t)) for t in outputs]
    space = np.zeros(plugin.workspace(inputs, outputs) + 1, np.uint8)
    assert plugin.enqueue(given, made, space) == 0, plugin.caller.log()
    return [array for _, array in made]


# The library.


def test_the_library_has_tensorrts_entry_points_and_needs_no_tensorrt(caller: Caller) -> None:
    """The creators are the folders with a plugin.cpp.

    They have the version that TensorRT looks up, and the names that the graph uses.
    """
    assert b"libnvinfer" not in (host_folder() / "libnemoquant_plugins_host.so").read_bytes()
    specs = [read_spec(op) for op in OPERATORS]
    assert sorted(caller.creators) == sorted(spec["name"] for spec in specs)
    for spec in specs:
        creator = caller.creators[spec["name"]]
        assert (creator.kind, creator.version, creator.namespace) == (
            "PLUGIN CREATOR_V3ONE",
            str(spec["version"]),
            spec["domain"],
        )


def test_plugins_name_themselves_as_their_creators(operator: Operator) -> None:
    kinds = ["PLUGIN", "PLUGIN_V3ONE_CORE", "PLUGIN_V3ONE_BUILD", "PLUGIN_V3ONE_RUNTIME"]
    creator = operator.creator
    for plugin in (operator.plugin(), operator.plugin().clone(), operator.plugin().attach()):
        assert plugin.facts() == [creator.name, creator.version, creator.namespace, *kinds]


# The tables against spec.yaml.


def test_fields_equal_the_specification(operator: Operator) -> None:
    """Names, order, types, defaults, ranges: of the table and of the result of getFieldNames."""
    infinite = {"inf": math.inf, "-inf": -math.inf}
    table = {
        f["name"]: {
            key: infinite.get(value, value)
            if isinstance(value, str) and key != "default"
            else infinite.get(str(value), value)
            for key, value in f.items()
            if key != "name"
        }
        for f in operator.table["fields"]
    }
    limits = {"int": (-(2**31), 2**31 - 1), "float": (-math.inf, math.inf)}
    expected = {}
    for name, attribute in operator.spec["attributes"].items():
        expected[name] = dict(attribute)
        if attribute["type"] == "string":
            continue
        low, high = limits[attribute["type"]]
        if "values" in attribute:
            assert attribute["type"] == "string", "a plugin's numbers have ranges"
        expected[name] = {"minimum": low, "maximum": high} | expected[name]
    assert table == expected
    assert list(table) == list(expected)
    given = [field(name, attribute["default"]) for name, attribute in operator.spec["attributes"].items()]
    assert operator.creator.field_names() == given


def expected_ports(ports: list[dict[str, Any]], before: dict[str, str]) -> list[dict[str, Any]]:
    """Ports by the specification; ``before`` holds the first input of dtype "compute", others share it."""
    made = []
    for port in ports:
        types = port.get("plugin_dtypes", port["dtype"])
        if types == "compute":
            types = before.get("compute", COMPUTE)
            before.setdefault("compute", port["name"])
        if isinstance(types, str):
            types = [types if types in NUMPY else f"={types}"]
        shape = " ".join(str(d).replace(" ", "") for d in port["shape"])
        made.append(
            {"name": port["name"], "shape": shape, "types": types, "optional": bool(port.get("optional"))}
        )
    return made


def test_inputs_and_outputs_equal_the_specification(operator: Operator) -> None:
    """Names, order, shapes, dtypes.

    Inputs that depend on a format are in ``formats``: for each projection its parts.
    """
    before: dict[str, str] = {}
    inputs = expected_ports(operator.spec["inputs"], before)
    assert operator.table["outputs"] == expected_ports(operator.spec["outputs"], before)
    formats = operator.spec.get("formats")
    if formats is None:
        assert operator.table["inputs"] == inputs
        return
    for format, parts in formats.items():
        found = operator.table["inputs_by"][f"format={format}"]
        assert found[: len(inputs)] == inputs
        assert [port["name"] for port in found[len(inputs) :]] == [
            f"{p}_{part}" for p in ("up", "down") for part in parts
        ]


# Creation.


@pytest.mark.parametrize("phase", [BUILD, RUNTIME])
def test_creation_with_every_value_that_is_allowed(phase: int, operator: Operator) -> None:
    """Both ends of each range, each text.

    int64 and float64 are also accepted, and texts without the terminating zero.
    """
    for name, attribute in operator.spec["attributes"].items():
        values = attribute.get("values") or [
            attribute["default"],
            *(attribute[k] for k in ("minimum", "maximum") if k in attribute),
        ]
        for value in values:
            assert operator.creator.create(fields_of(operator.op, **{name: value}), phase), (
                operator.caller.log()
            )
    wide = {"int32": "int64", "float32": "float64"}
    others = [
        field(name, value, wide[field(name, value).type])
        if not isinstance(value, str)
        else Field(name, "string", value.encode(), len(value))
        for name, value in defaults(operator.op).items()
    ]
    assert operator.creator.create(others, phase), operator.caller.log()
    assert operator.caller.log() == ""


def bad_fields(op: str) -> list[tuple[str, list[Field] | None, str]]:
    """One fault each: (what, the fields, text that the log must contain)."""
    good = fields_of(op)
    rows: list[tuple[str, list[Field] | None, str]] = [
        ("no collection", None, "there is no collection of fields"),
        ("unknown", [*good, field("colour", 1)], "field 'colour' is unknown; the fields are: "),
        ("no name", [*good, Field(None, "int32", b"\0\0\0\0", 1)], "field '' is unknown"),
        ("a name that can't be printed", [*good, field("\x1b[31m" + "x" * 99, 1)], "field '?[31mxxx"),
    ]
    for i, given in enumerate(good):
        attribute = read_spec(op)["attributes"][given.name]
        name, rest = str(given.name), [*good[:i], *good[i + 1 :]]

        def row(what: str, bad: Field, says: str, name: str = name, rest: list[Field] = rest) -> None:
            rows.append((f"{name}: {what}", [bad, *rest], f"field '{name}' {says}"))

        rows.append((f"{name}: missing", rest, f"field '{name}' is missing; expected "))
        rows.append((f"{name}: twice", [*good, given], f"field '{name}' is given twice"))
        row("null data", Field(name, given.type, None, 1), "has no data; expected ")
        row("length 0", Field(name, given.type, given.data, 0), "has no data; expected ")
        row("negative length", Field(name, given.type, given.data, -4), "has no data; expected ")
        if attribute["type"] == "string":
            for text in ("", "nonsense", str(attribute["default"]) + "2", str(attribute["default"]).upper()):
                row(f"'{text}'", field(name, text), f"is '{text}'; expected a string, one of: ")
            row("a zero inside", field(name, str(attribute["default"]) + "\0x"), "is '")
            row("a number", field(name, 1), "is of type int32; expected a string")
            continue
        other = "float32" if given.type == "int32" else "int32"
        row(
            "two values", Field(name, given.type, given.data * 2, 2), "has 2 values; expected "
        ) if given.data else None
        row("a text", field(name, "1"), "") if given.type != "string" else None
        row(
            "another type",
            field(name, 1.0 if other == "float32" else 1, other),
            f"is of type {other}; expected ",
        )
        row("half", field(name, 1.0, "float16"), "is of type float16; expected ")
        wide = "int64" if given.type == "int32" else "float64"
        low, high = attribute.get("minimum", -math.inf), attribute.get("maximum", math.inf)
        step = 1 if wide == "int64" else 0.5
        if low > -math.inf:
            row("below", field(name, low - step, wide), f"is {low - step:g}; expected ")
        if high < math.inf:
            row("above", field(name, high + step, wide), f"is {high + step:g}; expected ")
        if wide == "float64":
            row("NaN", field(name, math.nan), "is ")
        else:
            row(
                "beyond 32 bits",
                field(name, 2**32 + int(attribute["default"]), "int64"),
                "is 4.29497e+09; expected ",
            )
    return rows


@pytest.mark.parametrize(
    ("op", "fields", "says"),
    [pytest.param(op, f, says, id=f"{op}-{what}") for op in OPERATORS for what, f, says in bad_fields(op)],
)
@pytest.mark.parametrize("phase", [BUILD, RUNTIME])
def test_bad_fields_give_no_plugin_and_a_logged_reason(
    phase: int, op: str, fields: list[Field] | None, says: str, caller: Caller
) -> None:
    """The process continues: the next creation with good fields succeeds."""
    operator = Operator(caller, op)
    caller.log()
    assert operator.creator.create(fields, phase) is None
    log = caller.log()
    assert log.count("\n") == 1
    assert log.startswith(f"1 {operator.spec['name']}: ")  # an error, by TensorRT's severities
    assert says in log
    assert all(" " <= c <= "~" for c in log.strip())
    assert operator.creator.create(fields_of(op), phase) is not None
    assert caller.log() == ""


def test_without_a_logger_reasons_go_to_standard_error(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    library = shutil.copy(host_folder() / "libnemoquant_plugins_host.so", tmp_path / "another.so")
    for creator in Caller(harness(), library, with_logger=False).creators.values():
        assert creator.create([]) is None
        assert capfd.readouterr().err.startswith(f"nemoquant plugins: {creator.name}: field '")


# Serialization.


def test_serialized_fields_make_the_same_plugin(operator: Operator) -> None:
    """Build, serialize, deserialize: the fields equal the creator's.

    Values differ from the defaults where they can.
    """
    other = {}
    for name, attribute in operator.spec["attributes"].items():
        choices = attribute.get("values") or [
            attribute[k] for k in ("minimum", "maximum") if math.isfinite(attribute.get(k, math.inf))
        ]
        other[name] = next((v for v in choices if v != attribute["default"]), attribute["default"])
    given = fields_of(operator.op, **other)
    plugin = operator.creator.create(given, BUILD)
    assert plugin is not None
    kept = plugin.serialize()
    assert kept == given
    again = operator.creator.create(kept, RUNTIME)
    assert again is not None
    assert again.serialize() == kept
    assert again.clone().serialize() == again.attach().serialize() == kept


# Build.


def test_output_types_follow_the_inputs(operator: Operator) -> None:
    for first in range(3):
        types = operator.types(first)
        assert operator.plugin().output_types(types[: len(operator.inputs)]) == types[len(operator.inputs) :]
    assert (
        operator.plugin().output_types(types[: len(operator.inputs)], outputs=len(operator.outputs) + 1)
        is None
    )
    assert (
        f"got {len(operator.outputs) + 1} outputs; expected {len(operator.outputs)}" in operator.caller.log()
    )


def test_output_shapes_are_those_of_the_specification_in_symbols(operator: Operator) -> None:
    """Every dimension of an output is an expression of the inputs' dimensions.

    A dimension that is constant in any input is constant in the output.
    """
    plugin = operator.plugin()
    symbolic = [[f"{port['name']}.{word}" for word in port["shape"].split()] for port in operator.inputs]
    first: dict[str, str] = {}
    for shape in symbolic:
        for name in shape:
            first.setdefault(name.split(".")[1], name)
    expected = [[first[word] for word in port["shape"].split()] for port in operator.outputs]
    assert plugin.output_shapes(symbolic) == expected
    constant = {word: str(100 + i) for i, word in enumerate(first)}
    words = [port["shape"].split() for port in operator.inputs]
    for word in first:  # symbolic everywhere except in the last input that has it
        last = max(i for i, shape in enumerate(words) if word in shape)
        given = [
            [constant[w] if w == word and i == last else name for w, name in zip(shape, names, strict=True)]
            for i, (shape, names) in enumerate(zip(words, symbolic, strict=True))
        ]
        found = plugin.output_shapes(given)
        assert found is not None
        assert [
            constant[word] if w == word else first[w]
            for port in operator.outputs
            for w in port["shape"].split()
        ] == list(itertools.chain(*found))
    assert plugin.output_shapes([[*symbolic[0], "more"], *symbolic[1:]]) is None
    assert (
        f"input {operator.inputs[0]['name']} has rank {len(symbolic[0]) + 1}; expected ["
        in operator.caller.log()
    )


def test_format_combinations_are_those_of_the_specification(operator: Operator) -> None:
    """Linear only; each dtype at each position, with valid dtypes at the positions before."""
    plugin = operator.plugin()
    ports = (*operator.inputs, *operator.outputs)
    for first in range(3):
        inputs, outputs = operator.tensors(operator.sizes(), first)
        tensors = [*inputs, *outputs]
        by_name = {port["name"]: t.type for port, t in zip(ports, tensors, strict=True)}
        for i, port in enumerate(ports):
            for type in DATA_TYPES:
                admitted = {by_name[t[1:]] if t[0] == "=" else t for t in port["types"]}
                later = [
                    t.but(type="bool", format=HWC8) for t in tensors[i + 1 :]
                ]  # not yet decided by TensorRT
                asked = [*tensors[:i], tensors[i].but(type=type), *later]
                assert plugin.supports(i, asked, len(inputs)) == (type in admitted), (port["name"], type)
            assert not plugin.supports(
                i, [*tensors[:i], tensors[i].but(format=HWC8), *tensors[i + 1 :]], len(inputs)
            )
    assert operator.caller.log() == ""
    assert not plugin.supports(len(ports), tensors, len(inputs))
    assert not plugin.supports(0, tensors[1:], len(inputs) - 1)
    assert "inputs; expected " in operator.caller.log()


def test_configuration_takes_profiles_and_refuses_what_contradicts_the_tables(operator: Operator) -> None:
    plugin = operator.plugin()
    inputs, outputs = operator.tensors(operator.sizes())
    assert plugin.configure(inputs, outputs) == 0
    small, _ = operator.tensors(operator.sizes(1))
    profile = [
        t.but(
            dims=tuple(n if n == m else -1 for n, m in zip(t.dims, s.dims, strict=True)),
            minimum=s.dims,
            maximum=t.dims,
        )
        for t, s in zip(inputs, small, strict=True)
    ]
    assert any(-1 in t.dims for t in profile)
    assert plugin.configure(profile, outputs) == 0
    assert operator.caller.log() == ""
    for i, (port, t) in enumerate(zip(operator.inputs, inputs, strict=True)):
        longer = t.but(dims=(*t.dims, 1))
        assert plugin.configure([*inputs[:i], longer, *inputs[i + 1 :]], outputs) != 0
        assert (
            f"input {port['name']} has rank {len(t.dims) + 1}; expected [{port['shape']}]"
            in operator.caller.log()
        )
        assert plugin.configure([*inputs[:i], t.but(type="bool"), *inputs[i + 1 :]], outputs) != 0
        assert f"{port['name']} is " in operator.caller.log() or port["types"][0][0] == "="


def dependent(operator: Operator) -> list[tuple[int, int]]:
    """(input, axis) whose size follows from other inputs, so that another size there is a contradiction."""
    words = [port["shape"].split() for port in operator.inputs]
    counts: dict[str, int] = {}
    for word in itertools.chain(*words):
        counts[word[0]] = counts.get(word[0], 0) + 1
    return [
        (i, axis) for i, shape in enumerate(words) for axis, word in enumerate(shape) if counts[word[0]] > 1
    ]


def test_sizes_that_contradict_each_other_are_refused(operator: Operator) -> None:
    """Each size that two inputs share, changed in one of them, where it is constant and at run time.

    The message names the input with the wrong size. Bounds of what is not constant may differ, and the
    workspace is that of the smallest: all inputs have one size at run time.
    """
    inputs, outputs = operator.tensors(operator.sizes())
    plugin = operator.plugin().attach()
    run(plugin, inputs, outputs)  # a successful call before must not make the wrong shapes pass
    assert dependent(operator)
    for i, axis in dependent(operator):
        t = inputs[i]
        wrong = t.but(dims=tuple(n + 1 if a == axis else n for a, n in enumerate(t.dims)))
        changed = [*inputs[:i], wrong, *inputs[i + 1 :]]
        assert plugin.configure(changed, outputs) != 0
        log = operator.caller.log()
        assert log.count("; expected [") == 1
        assert " with " in log or "no whole number" in log
        unknown = tuple(-1 if a == axis else n for a, n in enumerate(t.dims))
        twice = tuple(n * 2 if a == axis else n for a, n in enumerate(t.dims))
        wider = [*inputs[:i], t.but(dims=unknown, maximum=twice), *inputs[i + 1 :]]
        assert plugin.configure(wider, outputs) == 0
        assert plugin.workspace(wider, outputs) == plugin.workspace(inputs, outputs)
        loose = [*inputs[:i], t.but(dims=unknown, maximum=tuple(2**31 - 1 for _ in t.dims)), *inputs[i + 1 :]]
        sizes = {word[0] for word in operator.inputs[i]["shape"].split()}
        elsewhere = {w for p in [*operator.inputs[:i], *operator.inputs[i + 1 :]] for w in p["shape"].split()}
        if sizes <= elsewhere:
            assert plugin.workspace(loose, outputs) == plugin.workspace(inputs, outputs)
        assert operator.caller.log() == ""
        operator.caller.recorded()
        assert plugin.shape_change(changed, outputs) != 0
        assert "; expected [" in operator.caller.recorded()  # the application gets the error too
        operator.caller.log()
        given = [(t, memory(t, 0)) for t in changed]
        assert plugin.enqueue(given, [(t, blank(t)) for t in outputs], np.zeros(1, np.uint8)) != 0
        assert "enqueue before a successful onShapeChange" in operator.caller.log()
    run(plugin, inputs, outputs)  # the plugin still works


def test_the_timing_cache_tells_attributes_apart(operator: Operator) -> None:
    """TensorRT keys the times that it measured by name, version, shapes, types and this text."""
    made = [one.plugin().timing_cache_id() for one in operator.texts()]
    names = {f["name"] for f in operator.table["fields"]}
    for text in made:
        assert text is not None
        assert {word.split("=")[0] for word in text.split()} == names
    values = {(f["name"], value) for f in operator.table["fields"] for value in f.get("values", [])}
    assert {f"{name}={value}" for name, value in values} <= set(" ".join(map(str, made)).split())
    for f in operator.spec["attributes"]:
        value = defaults(operator.op)[f]
        if isinstance(value, float):
            near = [np.nextafter(np.float32(value), np.float32(9)), np.float32(value)]
            plugins = [operator.creator.create(fields_of(operator.op, **{f: float(v)})) for v in near]
            assert len({p.timing_cache_id() for p in plugins if p}) == 2


def test_the_workspace_of_a_profile_serves_its_smaller_shapes(operator: Operator) -> None:
    large, small = (operator.tensors(operator.sizes(which)) for which in (0, 1))
    plugin = operator.plugin()
    assert plugin.workspace(*large) >= plugin.workspace(*small)
    assert operator.caller.log() == ""


def test_a_profile_of_sizes_that_the_operator_does_not_take_is_said(caller: Caller) -> None:
    """No workspace is asked for then, which is not to be taken for none that is needed."""
    operator = Operator(caller, "routed_experts")
    inputs, outputs = operator.tensors(operator.sizes() | {"I": 33})
    assert operator.plugin().workspace(inputs, outputs) == 0
    assert "input is 33; expected a multiple of 32" in caller.log()


# Runtime.


def test_enqueue_follows_shape_changes(operator: Operator) -> None:
    """For two shapes in turn, a deserialized plugin gives what a new plugin gives for each shape alone.

    Every output is written completely.
    """
    plugin = operator.creator.create(operator.plugin().serialize(), RUNTIME)
    assert plugin is not None
    context = plugin.attach()
    expected = {}
    for which in (0, 1):
        fresh = operator.creator.create(fields_of(operator.op), RUNTIME)
        assert fresh is not None
        expected[which] = run(fresh.attach(recorder=False), *operator.tensors(operator.sizes(which)))
        for array in expected[which]:
            values = array.astype(np.float64)
            assert np.isfinite(values).all()
            assert not (values == 99).any()
    for which in (0, 1, 0, 1):
        for got, wanted in zip(
            run(context, *operator.tensors(operator.sizes(which))), expected[which], strict=True
        ):
            assert got.tobytes() == wanted.tobytes()
    again = enqueue(context, *operator.tensors(operator.sizes(1)))  # no shape change between
    assert all(got.tobytes() == wanted.tobytes() for got, wanted in zip(again, expected[1], strict=True))
    assert operator.caller.log() == operator.caller.recorded() == ""


def test_every_text_attribute_runs_with_every_input_that_goes_with_it(operator: Operator) -> None:
    """Formats and roundings have their own inputs and dtypes; optional inputs are given here."""
    for one in operator.texts():
        for first in range(max(len(port["types"]) for port in one.inputs)):
            plugin, (inputs, outputs) = one.plugin(), one.tensors(one.sizes(), first)
            tensors = [*inputs, *outputs]
            assert all(plugin.supports(i, tensors, len(inputs)) for i in range(len(tensors))), (
                operator.caller.log()
            )
            assert plugin.configure(inputs, outputs) == 0, operator.caller.log()
            for array in run(plugin, inputs, outputs):
                assert not (array.astype(np.float64) == 99).any(), one.attributes


def test_a_context_keeps_its_shapes_apart_from_the_plugin_it_came_from(operator: Operator) -> None:
    plugin = operator.plugin()
    large, small = (operator.tensors(operator.sizes(which)) for which in (0, 1))
    one, two = plugin.attach(), plugin.attach()
    assert one.shape_change(*large) == two.shape_change(*small) == 0
    assert [a.tobytes() for a in enqueue(one, *large)] == [a.tobytes() for a in run(plugin, *large)]
    assert [a.tobytes() for a in enqueue(two, *small)] == [a.tobytes() for a in run(plugin, *small)]
