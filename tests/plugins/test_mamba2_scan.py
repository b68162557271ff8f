"""The scan's kernels, run by the host emulator: every path, every refusal.

Against float64, the ONNX function, torch and transformers.
"""

import ctypes
import itertools
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.emulator import ORDERS, Device, emulated
from support.norms import relative_error as error
from support.plugin_build import host_folder, needs_compiler
from support.scan_call import DTYPES, Array, Arrays, Refused, Scan, aligned, inputs, pieces, recurrence
from support.single_op import single_op

from nemoquant.model import mamba2

pytestmark = [needs_compiler, pytest.mark.slow]

CHUNK = 64
# Torch keeps running sums in float64. In float32, a little more is lost after one strong decay; measured at
# most 2.5e-7.
FLOOR = 3e-7


@pytest.fixture(scope="module")
def scan() -> Scan:
    return Scan(host_folder() / "libnemoquant_host.so")


def in_torch(given: Arrays, low: float = 0.0, high: float = np.inf) -> list[Array]:
    """The reference model's scan: float32 inside."""
    wide = [
        torch.from_numpy(given[name].astype(np.float32))
        for name in ("x", "dt", "a", "b", "c", "d", "dt_bias", "state_in")
    ]
    return [
        value.numpy() for value in mamba2.scan(*wide[:6], dt_bias=wide[6], limit=(low, high), state=wide[7])
    ]


class Bound:
    """The true result for some inputs, and the limits for the errors of y and state.

    Float32 inputs: twice the error of torch's scan. 16-bit inputs: twice the error of the true result rounded
    once to their dtype; no framework's result in that dtype can be below that rounding.
    """

    def __init__(self, given: Arrays, low: float = 0.0, high: float = np.inf) -> None:
        self.truth = recurrence(given, low, high)
        dtype = given["x"].dtype
        if dtype == np.float32:
            self.limits = [
                max(2 * error(a, b), FLOOR)
                for a, b in zip(in_torch(given, low, high), self.truth, strict=True)
            ]
        else:
            self.limits = [2 * error(true.astype(dtype), true) for true in self.truth]

    def check(self, found: tuple[Array, Array]) -> None:
        errors = [error(value, true) for value, true in zip(found, self.truth, strict=True)]
        assert [e < most for e, most in zip(errors, self.limits, strict=True)] == [True, True], (
            errors,
            self.limits,
        )


# One factor at a time. Float32 uses the kernel of single steps; 16-bit inputs use that of chunks, from 32
# positions on.

CHANGES: list[tuple[str, dict[str, Any]]] = [
    ("base", {}),
    *[
        (f"length {n}", {"length": n})
        for n in (1, 2, 31, 32, 33, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 3 * CHUNK + 5)
    ],
    ("one row", {"batch": 1}),
    ("three rows", {"batch": 3}),
    ("one group", {"groups": 1}),
    ("a group for each head", {"groups": 4}),
    ("three heads a group", {"heads": 6, "batch": 1}),
    ("one head", {"heads": 1, "groups": 1}),
    ("head_dim 128", {"width": 128}),
    *[(f"state {n}", {"size": n}) for n in (16, 32, 64, 96, 256)],
    *[(f"state {n}, one position", {"size": n, "length": 1}) for n in (16, 32, 64, 96, 256)],
    ("head_dim 20: no tile", {"width": 20}),
    ("no state before", {"state": 0.0}),
    ("dt bounded above", {"high": 0.05}),
    ("dt bounded below", {"low": 0.02}),
    ("dt bounded on both sides, one position", {"low": 0.02, "high": 0.05, "length": 1}),
    ("large x", {"scale": 100.0}),
    ("small x", {"scale": 1e-3}),
    ("slow heads: dt about 1e-6", {"bias": -14.0, "state": 0.0}),
    (
        "the same over several chunks, no skip beside it",
        {"bias": -14.0, "state": 0.0, "skip": 0.0, "length": 3 * CHUNK + 5},
    ),
    ("fast heads: dt about 30", {"bias": 30.0}),
    ("each step forgets everything: exp underflows", {"bias": 30.0, "a": 100.0}),
    ("decays of all strengths", {"spread": 40.0, "a": 16.0}),
    ("weak decays after a strong one", {"decays": "strong, then weak"}),
    ("the same over several chunks", {"decays": "strong, then weak", "length": 3 * CHUNK + 5}),
    (
        "weak decays among very strong ones, no skip beside them",
        {"decays": "very strong among weak", "skip": 0.0, "length": CHUNK},
    ),
    ("dt in bfloat16", {"dt_dtype": "bfloat16"}),
    ("dt in float16", {"dt_dtype": "float16"}),
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("change", [pytest.param(change, id=name) for name, change in CHANGES])
def test_scan_is_the_recurrence(change: dict[str, Any], dtype: str, scan: Scan) -> None:
    limits = {key: change[key] for key in ("low", "high") if key in change}
    narrow = (
        {"width": 16} if dtype == "float32" else {}
    )  # single steps are slow in the emulator, and all rows are alike
    given = inputs(
        **{**narrow, **{key: value for key, value in change.items() if key not in limits}}, dtype=dtype
    )
    bound = Bound(given, **limits)
    bound.check(scan(given, **limits))
    found = scan(given, y_dtype=dtype, **limits)
    assert found[0].dtype == DTYPES[dtype]
    bound.check(found)


@pytest.mark.parametrize("length", [1, 5, 40])
@pytest.mark.parametrize("state_dtype", ["float32", "float16", "bfloat16"])
def test_states_of_every_dtype(state_dtype: str, length: int, scan: Scan) -> None:
    """Rounded once, at the end: twice the rounding of the state's dtype, or of a coarser inputs' dtype."""
    given = inputs(length=length, dtype="bfloat16", state_dtype=state_dtype)
    y, state = scan(given, y_dtype="bfloat16")
    truth = recurrence(given)
    assert state.dtype == DTYPES[state_dtype]
    assert error(y, truth[0]) < 2 * error(truth[0].astype(DTYPES["bfloat16"]), truth[0])
    computed = FLOOR if length < 32 else error(truth[1].astype(DTYPES["bfloat16"]), truth[1])
    assert error(state, truth[1]) < 2 * max(error(truth[1].astype(DTYPES[state_dtype]), truth[1]), computed)


@pytest.mark.parametrize("length", [1, 40])
def test_inputs_that_may_be_left_out(length: int, scan: Scan) -> None:
    given = inputs(length=length, dtype="bfloat16")
    for name in ("d", "dt_bias", "state_in"):
        zeros = {**given, name: np.zeros_like(given[name])}
        left_out = {key: value for key, value in given.items() if key != name}
        for one, other in zip(
            scan(zeros, state_dtype="float32"), scan(left_out, state_dtype="float32"), strict=True
        ):
            assert np.array_equal(one, other)


# Independent oracles.


def test_scan_is_the_onnx_function(scan: Scan) -> None:
    from nemoquant.graph import ops

    given = inputs(length=2 * CHUNK + 9)
    names = {
        "x": "x",
        "dt": "dt",
        "a": "A",
        "b": "B",
        "c": "C",
        "d": "D",
        "dt_bias": "dt_bias",
        "state_in": "state_in",
    }
    feeds = {onnx: np.ascontiguousarray(given[ours]) for ours, onnx in names.items()}
    body = single_op(ops.mamba2_scan(4, 64, 2, 128), feeds)(feeds)
    for found, expected, true in zip(scan(given), body, recurrence(given), strict=True):
        assert error(found, expected.astype(np.float64)) < 2 * max(error(expected, true), FLOOR)


class Collected(torch.nn.Module):
    """Replaces a layer's norm and keeps the scan's output."""

    def forward(self, y: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        self.y = y
        return gate


def in_transformers(given: Arrays, dtype: torch.dtype) -> tuple[Array, Array]:
    """Their mixer with everything around the scan removed.

    One chunk: their torch path is wrong beyond one chunk.
    """
    from transformers import DynamicCache, NemotronHConfig
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMamba2Mixer

    batch, length, heads, width = given["x"].shape
    groups, size = given["b"].shape[2:]
    config = NemotronHConfig(
        hidden_size=heads * width,
        mamba_num_heads=heads,
        mamba_head_dim=width,
        n_groups=groups,
        ssm_state_size=size,
        chunk_size=CHUNK,
        time_step_min=0.0,
        hybrid_override_pattern="M",
        num_hidden_layers=1,
    )
    mixer = NemotronHMamba2Mixer(config, layer_idx=0)

    def tensor(name: str) -> torch.Tensor:
        return torch.from_numpy(given[name].astype(np.float32))

    with torch.no_grad():
        mixer.A_log.copy_(torch.log(-tensor("a")))
        mixer.D.copy_(tensor("d"))
        mixer.dt_bias.copy_(tensor("dt_bias"))
        mixer.conv1d.weight.zero_()[:, 0, -1] = 1.0  # the output equals the input
        if mixer.conv1d.bias is not None:
            mixer.conv1d.bias.zero_()
        mixer.to(dtype)
        mixer.act = torch.nn.Identity()
        mixer.out_proj = torch.nn.Identity()
        mixer.norm = Collected()
        parts = [
            torch.zeros(batch, length, heads * width),
            *(tensor(name).flatten(2) for name in ("x", "b", "c")),
            tensor("dt"),
        ]
        mixer.in_proj = torch.nn.Identity()
        cache = DynamicCache(config=config)
        mixer.torch_forward(torch.cat(parts, -1).to(dtype), cache_params=cache)
        state = cache.layers[0].recurrent_states[0]
    return mixer.norm.y.float().view(batch, length, heads, width).numpy(), state.float().numpy()


@pytest.mark.parametrize("length", [2, 40, CHUNK])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_error_is_below_twice_that_of_transformers(dtype: str, length: int, scan: Scan) -> None:
    given = inputs(length=length, state=0.0, dtype=dtype, dt_dtype=dtype)
    for name in ("d", "dt_bias"):
        given[name][...] = given[name].astype(DTYPES[dtype])
    given["a"][...] = -np.exp(np.log(-given["a"]).astype(DTYPES[dtype]).astype(np.float32))
    theirs = in_transformers(given, getattr(torch, dtype))
    for found, expected, true in zip(scan(given), theirs, recurrence(given), strict=True):
        assert error(found, true) < max(2 * error(expected, true), FLOOR)


@pytest.mark.parametrize("length", [9, 100])
def test_nan_in_dt_is_nan_from_there_on(length: int, scan: Scan) -> None:
    """Only in its head; the limits of dt do not hide the NaN."""
    given = inputs(length=length, dtype="bfloat16")
    clean, _ = scan(given, low=0.001, high=1.0)
    given["dt"][1, 5, 2] = np.nan
    y, state = scan(given, low=0.001, high=1.0)
    hit = np.zeros(y.shape, bool)
    hit[1, 5:, 2] = True
    assert np.array_equal(np.isnan(y), hit)
    assert np.array_equal(y[~hit], clean[~hit])
    assert np.isnan(state[1, 2]).all()
    assert np.isnan(state).sum() == state[1, 2].size


# Cutting, and changes that must not change a bit.


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_scan_may_be_cut_anywhere(dtype: str, scan: Scan) -> None:
    """Two calls that pass the state on keep the bound of one call, for cuts at and around every boundary."""
    length = 2 * CHUNK + 37
    given = inputs(
        batch=1, heads=2, groups=1, width=16 if dtype == "float32" else 64, length=length, dtype=dtype
    )
    bound = Bound(given)
    for cut in (1, 31, 32, 33, CHUNK - 1, CHUNK, CHUNK + 1, 100, 2 * CHUNK, length - 32, length - 1):
        first, state = scan(pieces(given, slice(None, cut)))
        second, state = scan({**pieces(given, slice(cut, None)), "state_in": state})
        bound.check((np.concatenate([first, second], 1), state))


def test_single_steps_are_a_sequence_of_steps_bit_for_bit(scan: Scan) -> None:
    given = inputs(length=20, dtype="bfloat16")
    whole, end = scan(given)
    state, parts = given["state_in"], []
    for t in range(20):
        y, state = scan({**pieces(given, slice(t, t + 1)), "state_in": state})
        parts.append(y)
    assert np.array_equal(np.concatenate(parts, 1), whole)
    assert np.array_equal(state, end)


@pytest.mark.parametrize(("length", "segments"), [(1, 0), (40, 0), (200, 3)])
@pytest.mark.parametrize("state_dtype", ["float32", "float16"])
def test_the_state_may_be_written_in_place(length: int, segments: int, state_dtype: str, scan: Scan) -> None:
    given = inputs(length=length, dtype="bfloat16", state_dtype=state_dtype)
    apart, within = scan(given, segments=segments), scan(given, segments=segments, in_place=True)
    assert all(np.array_equal(one, other) for one, other in zip(apart, within, strict=True))


@pytest.mark.parametrize("length", [3, 70])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_views_into_a_wider_array(dtype: str, length: int, scan: Scan) -> None:
    """x, B and C are slices of the convolution's output, followed by dt."""
    given = inputs(length=length, dtype=dtype, dt_dtype=dtype)
    wide = np.concatenate(
        [given[name].reshape(2, length, -1) for name in ("x", "b", "c", "dt")] + [np.zeros((2, length, 4))],
        -1,
    )
    space = inputs(1, 1, 1, 16, 1, 16, dtype=dtype)["x"]  # for its dtype
    whole = np.empty(wide.size + 8, space.dtype)
    start = -whole.ctypes.data % 16 // whole.itemsize
    whole = whole[start : start + wide.size].reshape(wide.shape)
    whole[...] = wide
    views, place = dict(given), 0
    for name in ("x", "b", "c", "dt"):
        columns = int(np.prod(given[name].shape[2:]))
        part = whole[..., place : place + columns]
        views[name] = np.lib.stride_tricks.as_strided(
            part, given[name].shape, (*part.strides[:2], *np.empty(given[name].shape[2:], part.dtype).strides)
        )
        place += columns
    assert all(np.array_equal(one, other) for one, other in zip(scan(given), scan(views), strict=True))


@pytest.mark.parametrize("segments", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_segments_side_by_side(segments: int, dtype: str, scan: Scan) -> None:
    given = inputs(length=6 * CHUNK + 11, dtype=dtype, width=128, heads=2, groups=1)
    Bound(given).check(scan(given, segments=segments))


@pytest.mark.parametrize("segments", [2, 3, 4])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_segments_with_slow_heads(segments: int, dtype: str, scan: Scan) -> None:
    """A state lives through all segments, and each decays by its own share: 0.9, 0.6, 0.3, 0.9, ..."""
    given = inputs(length=6 * CHUNK + 11, dtype=dtype, heads=2, groups=1, skip=0.0)
    given["a"][:], given["dt_bias"][:] = [-1.0, -0.7], 0.0
    each = -(-(6 + 1) // segments) * CHUNK  # positions of a segment
    share = np.array([0.9, 0.6, 0.3])[np.arange(6 * CHUNK + 11) // each % 3]
    given["dt"][:] = np.log(np.expm1(-np.log(share) / each))[:, None]
    Bound(given).check(scan(given, segments=segments))


def test_segments_with_decays_that_end_everything(scan: Scan) -> None:
    given = inputs(length=4 * CHUNK, dtype="bfloat16", decays="strong, then weak")
    Bound(given).check(scan(given, segments=4))


def test_long_sequences_are_cut_by_themselves(scan: Scan) -> None:
    """Few heads and many positions: more segments, which need workspace.

    The workspace never shrinks when a size grows.
    """
    given = inputs(batch=1, heads=1, groups=1, length=2100, dtype="bfloat16")
    Bound(given).check(scan(given))
    fixed = {"groups": 1, "head_dim": 64, "state": 128, "dtype": 2}
    lengths = [1, 64, 2047, 2048, 4096, 2**17, 2**20]
    table = [
        [scan.workspace(batch=b, heads=h, length=n, **fixed) for n in lengths]
        for b in (1, 2, 7, 64)
        for h in (1, 8, 128, 256)
    ]
    assert all(row == sorted(row) for row in table)
    for heads in range(4):
        assert [table[4 * b + heads][-1] for b in range(4)] == sorted(
            table[4 * b + heads][-1] for b in range(4)
        )
    assert table[0][1] == 0
    assert max(map(max, table)) < 32 * 2**20


def test_the_workspace_is_no_smaller_than_what_is_asked_for(scan: Scan) -> None:
    """A call without one is refused with the bytes that it would use; there are shapes that use all of it."""
    given = inputs(batch=1, heads=1, groups=1, length=40, dtype="bfloat16")
    closest = 0.0  # to 1, where all of it is used
    for batch, heads, length, size, segments in itertools.product(
        (1, 3), (1, 2, 17, 85, 128, 129, 254, 255, 256), (64, 2047, 2048, 4096, 2**20), (64, 256), (0, 3)
    ):
        sizes = {
            "batch": batch,
            "heads": heads,
            "length": length,
            "head_dim": 64,
            "groups": 1,
            "state": size,
            "segments": segments,
            "dtype": 2,
            "state_dtype": 0,
        }
        room = scan.workspace(**sizes)
        if room == 0:
            continue
        nothing_runs = {"workspace": 8, "y": given["x"].ctypes.data}  # without need of one, x and y overlap
        with pytest.raises(Refused) as refused:
            scan(given, fields=sizes | nothing_runs)
        said = re.search(r"workspace .*, expected (\d+) bytes aligned to 16", str(refused.value))
        if said is None:
            assert "y at" in str(refused.value)
            continue
        wanted = int(said[1])
        assert 0 < wanted <= room
        closest = max(closest, wanted / room)
    assert closest > 0.99


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        pytest.param({}, {"dtype": "float32", "width": 20, "length": 5}, id="steps"),
        pytest.param({}, {"dtype": "bfloat16", "length": 1, "state_dtype": "bfloat16"}, id="one step"),
        *[
            pytest.param({}, {"dtype": dtype, "size": size, "length": 2 * CHUNK + 5}, id=f"{dtype}, {size}")
            for dtype in ("bfloat16", "float16")
            for size in (64, 96, 128, 256)
        ],
        pytest.param({"segments": 3}, {"dtype": "bfloat16", "length": 3 * CHUNK + 9}, id="segments"),
        pytest.param(
            {"seed": 5, "in_place": True},
            {"dtype": "float16", "length": 2 * CHUNK, "state_dtype": "float16"},
            id="in place, by chance",
        ),
    ],
)
def test_every_order_gives_the_same_bits(options: Any, sizes: Any, scan: Scan) -> None:
    """Copies early or late, threads upwards or downwards, one chunk or two in flight."""
    given = inputs(**({"batch": 1, "heads": 2} | sizes))
    found = []
    for order in ORDERS:
        for size in (0, 99 * 1024) if sizes.get("size") != 256 else (0,):
            with emulated(scan.path, replace(order, shared_memory=size)):
                found.append([array.tobytes() for array in scan(given, **options)])
    assert found == [found[0]] * len(found)


def test_a_device_with_little_shared_memory(scan: Scan) -> None:
    """99 KB (SM120): one chunk in flight instead of two, the same bits.

    It is too little for state 256, which takes single steps.
    """
    given, large = inputs(dtype="bfloat16"), inputs(dtype="bfloat16", size=256, batch=1)
    wide = scan(given)
    with emulated(scan.path, Device(shared_memory=99 * 1024)):
        narrow, steps = scan(given), scan(large)
    assert all(np.array_equal(one, other) for one, other in zip(wide, narrow, strict=True))
    assert error(steps[0], recurrence(large)[0]) < FLOOR


def test_what_the_kernel_declares_itself_counts_as_shared_memory(scan: Scan) -> None:
    """Two times 776 bytes of decays, ending at a multiple of 128, stand beside chunks and the rounded state.

    A byte less than two chunks need, and there is one in flight, with the same bits; a byte less than one
    needs, and single steps are taken, which are more exact than chunks of bfloat16.
    """
    decays = 1664
    for size in (128, 256):
        given = inputs(dtype="bfloat16", size=size, batch=1)
        true, by_chunks = recurrence(given)[0], scan(given)
        chunk, rounded = 2 * 64 * (2 * (size + 8) + 64 + 8), 2 * 64 * (size + 8) + 16
        for stages in (1, 2):
            for less in (0, 1, 112, decays):
                limit = stages * chunk + rounded + decays - less
                with emulated(scan.path, Device(shared_memory=limit)):
                    found = scan(given)
                if less and stages == 1:
                    assert error(found[0], true) < FLOOR
                else:
                    assert all(
                        np.array_equal(one, other) for one, other in zip(found, by_chunks, strict=True)
                    )
                    assert error(found[0], true) > FLOOR


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_more_elements_than_32_bits_count(dtype: str, scan: Scan, tmp_path: Path) -> None:
    """Positions so far apart that the last lies 2^32 elements after the first, in sparse files."""
    given = inputs(batch=1, heads=2, groups=1, length=40, dtype=dtype)
    far, stride = dict(given), 2**32 // 39 // 8 * 8 + 8
    for name in ("x", "b", "c"):
        value = given[name]
        flat = np.memmap(tmp_path / name, value.dtype, "w+", shape=(40 * stride,))
        far[name] = np.lib.stride_tricks.as_strided(
            flat, value.shape, (value.strides[0], stride * value.itemsize, *value.strides[2:])
        )
        far[name][...] = value
    assert all(np.array_equal(one, other) for one, other in zip(scan(given), scan(far), strict=True))


@pytest.mark.parametrize(("dtype", "length"), [("bfloat16", 64), ("bfloat16", 1), ("float32", 3)])
def test_results_beyond_32_bits(dtype: str, length: int, scan: Scan, tmp_path: Path) -> None:
    """y has 2^31 elements and more, of which the last block alone is computed, in sparse files.

    All rows of the batch read the same inputs, by strides of 0.
    """
    heads = 2**31 // (65535 * length * 64) + 1
    given = inputs(batch=1, heads=heads, groups=1, size=64, length=length, dtype=dtype)
    y = np.memmap(tmp_path / "y", np.float32, "w+", shape=(65535, length, heads, 64))
    state = np.memmap(tmp_path / "state", np.float32, "w+", shape=(65535, heads, 64, 64))
    assert y.size > 2**31
    fields = {f"{name}_batch_stride": 0 for name in ("x", "b", "c", "dt")} | {
        "batch": 65535,
        "y": y.ctypes.data,
        "state_out": state.ctypes.data,
        "state_in": None,
    }
    with emulated(scan.path, Device(last_block_only=True)):
        scan(given, fields=fields)
    without = {name: value for name, value in given.items() if name != "state_in"}
    apart = scan(without, state_dtype="float32")
    for found, wanted in zip((y, state), apart, strict=True):
        assert found.ravel()[-8:].tobytes() == wanted.ravel()[-8:].tobytes() != bytes(32)


def test_outputs_that_overlap_anything_are_refused(scan: Scan) -> None:
    """At the first bytes of an input and at its last ones; only the state may be written in its own place."""
    given = inputs(length=40, dtype="bfloat16", state_dtype="float16")
    names = {"x": "x", "b": "B", "c": "C", "dt": "dt", "a": "A", "d": "D", "dt_bias": "dt_bias"}
    for field, name in (names | {"state_in": "state_in", "seed": "seed"}).items():
        size = given[field].nbytes if field in given else 8
        for far in (1, 3) if field in ("x", "b", "c", "dt") else (1,):
            # positions so many times as far apart as they are long, rows of the batch behind one another
            strides = {}
            if far > 1:
                each = given[field][0, 0].size
                strides = {f"{field}_position_stride": far * each, f"{field}_batch_stride": 40 * far * each}
                size = 80 * far * each * given[field].itemsize - (far - 1) * each * given[field].itemsize
            space = np.zeros(2**21 + size + 2**21, np.uint8)  # so that only this input is near
            place = (space.ctypes.data + 2**21) // 16 * 16
            for output in ("y", "state_out"):
                for at in (place, (place + size - 1) // 16 * 16):
                    if (field, output, at) == ("state_in", "state_out", place):
                        continue
                    with pytest.raises(
                        Refused, match=rf"Mamba2Scan: {output} at .* overlaps {name} at .*; exp"
                    ):
                        scan(given, seed=1, fields=strides | {field: place, output: at})
    with pytest.raises(Refused, match=r"state_out at .* overlaps y at"):
        scan(given, fields={"y": place, "state_out": place})


def test_the_workspace_overlaps_nothing(scan: Scan) -> None:
    """Where one is wanted; an address for none may be any."""
    given = inputs(length=200, dtype="bfloat16")
    space = np.zeros(2**24, np.uint8)
    place = (space.ctypes.data + 2**23) // 16 * 16
    for field, name in {"x": "x", "y": "y", "state_in": "state_in", "state_out": "state_out"}.items():
        with pytest.raises(Refused, match=rf"workspace at .* overlaps {name} at"):
            scan(given, segments=3, fields={field: place, "workspace": place})
    single = inputs(length=1, dtype="bfloat16")
    assert np.array_equal(
        scan(single)[0], scan(single, fields={"workspace": single["x"].ctypes.data + 16})[0]
    )


def test_rows_that_are_read_again_take_no_more_memory(scan: Scan) -> None:
    """A batch stride of 0: what lies behind the one row is another's."""
    given = inputs(length=1, dtype="bfloat16")
    space = np.zeros(2**20, np.uint8)
    place = (space.ctypes.data + 2**16) // 16 * 16
    one = given["x"][:1]
    ctypes.memmove(place, one.ctypes.data, one.nbytes)
    again = {**given, "x": aligned(np.concatenate([one, one]))}
    wanted = scan(again)[0]
    scan(given, fields={"x": place, "x_batch_stride": 0, "y": place + one.nbytes})
    found = np.frombuffer((ctypes.c_char * wanted.nbytes).from_address(place + one.nbytes), np.float32)
    assert found.tobytes() == wanted.tobytes()


@pytest.mark.parametrize("name", ["x_batch_stride", "c_position_stride", "dt_batch_stride"])
def test_strides_that_go_back_are_refused(name: str, scan: Scan) -> None:
    with pytest.raises(Refused, match=rf"{name} is -8 elements, expected"):
        scan(inputs(length=2), fields={name: -8})


# Stochastic rounding.


def philox_words(count: int, seed: int, step: int, rounds: int) -> Array:
    """By the definition in abi.h, in numpy: a word for each of ``count`` flat indices."""
    low = np.uint64(0xFFFFFFFF)
    places = np.arange((count + 3) // 4, dtype=np.uint64)
    fixed = [
        np.uint64(word)
        for word in (step & 0xFFFFFFFF, step >> 32 & 0xFFFFFFFF, seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF)
    ]
    c = [places & low, places >> np.uint64(32), *(np.broadcast_to(word, places.shape) for word in fixed[:2])]
    key = [int(fixed[2]), int(fixed[3])]
    for _ in range(rounds):
        one, two = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        high = np.uint64(32)
        c = [
            (two >> high) ^ c[1] ^ np.uint64(key[0]),
            two & low,
            (one >> high) ^ c[3] ^ np.uint64(key[1]),
            one & low,
        ]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return np.stack(c, -1).ravel()[:count]


def rounded_by_chance(x: Array, words: Array) -> Array:
    """Rounds up where the fraction of an ulp and word / 2^32 together reach 1.

    Computed in integers of Python and numpy.
    """
    wide = x.astype(np.float64)
    ulp = np.exp2(np.maximum(np.floor(np.log2(np.maximum(np.abs(wide), 2.0**-30))), -14) - 10)
    units = np.abs(wide) / ulp
    whole = np.floor(units)
    fraction = ((units - whole) * 2.0**32).astype(np.uint64)  # 32 bits of it
    up = (fraction + words) >> np.uint64(32)
    return (np.sign(wide) * (whole + up) * ulp).astype(np.float16)


@pytest.mark.parametrize("length", [1, 40])
@pytest.mark.parametrize(
    ("seed", "step", "rounds"),
    [
        pytest.param(0, 0, 5, id="base"),
        pytest.param(12345678901234567, 0, 5, id="another seed"),
        pytest.param(-1, 0, 5, id="a negative seed: all bits set"),
        pytest.param(0, 1, 5, id="another step"),
        pytest.param(0, 2**40 + 3, 5, id="a step beyond 32 bits"),
        pytest.param(0, 0, 10, id="ten rounds"),
        pytest.param(0, 0, 1, id="one round"),
    ],
)
def test_stochastic_states_are_the_definition_bit_for_bit(
    seed: int, step: int, rounds: int, length: int, scan: Scan
) -> None:
    """Equal to the float32 state of the same call, rounded in numpy; a repeated call gives the same bits."""
    given = inputs(length=length, dtype="bfloat16", state=0.0)
    wide = scan(given)[1]
    given["state_in"] = given["state_in"].astype(np.float16)
    options: dict[str, Any] = {"seed": seed, "step": step, "rounds": rounds, "state_dtype": "float16"}
    found = scan(given, **options)[1]
    expected = rounded_by_chance(wide.ravel(), philox_words(wide.size, seed, step, rounds))
    assert np.array_equal(found.ravel().view(np.uint16), expected.view(np.uint16))
    assert np.array_equal(scan(given, **options)[1].view(np.uint16), found.view(np.uint16))


def test_stochastic_states_differ_by_seed_and_step(scan: Scan) -> None:
    given = inputs(length=1, dtype="bfloat16", state_dtype="float16")
    made = [
        scan(given, seed=seed, step=step, rounds=rounds)[1]
        for seed, step, rounds in [(0, 0, 5), (1, 0, 5), (0, 1, 5), (0, 0, 7)]
    ]
    for i, one in enumerate(made):
        for other in made[i + 1 :]:
            assert (
                0.3 < (one != other).mean() < 0.6
            )  # a third, were fractions and words independent and uniform


def test_stochastic_states_are_unbiased(scan: Scan) -> None:
    """A million values: the mean error, in ulps, is within three standard errors of zero."""
    given = inputs(batch=1, heads=128, groups=8, length=1, dtype="bfloat16", state=0.0)
    wide = scan(given)[1].ravel().astype(np.float64)
    given["state_in"] = given["state_in"].astype(np.float16)
    found = scan(given, seed=7)[1].ravel().astype(np.float64)
    assert wide.size == 2**20
    ulp = np.exp2(np.maximum(np.floor(np.log2(np.maximum(np.abs(wide), 2.0**-30))), -14) - 10)
    off = (found - wide) / ulp
    assert np.abs(off).max() < 1
    assert abs(off.mean()) < 3 * off.std() / np.sqrt(off.size)
    assert off.std() > 0.35  # for a uniform fraction: 1 / sqrt(6)


# Refusals.


@pytest.mark.parametrize(
    ("change", "code", "reason"),
    [
        ({"x": None}, 1, "x is a null pointer"),
        ({"state_out": None}, 1, "state_out is a null pointer"),
        ({"length": 0}, 1, "length is 0, expected at least 1"),
        ({"batch": -1}, 1, "batch is -1, expected at least 1"),
        ({"groups": 3}, 1, "4 heads in 3 groups, expected a multiple"),
        ({"state": 100}, 2, "state size 100, expected 16, 32, 64, 96, 128 or 256"),
        ({"batch": 70000}, 2, "batch 70000"),
        ({"dtype": 5}, 1, "dtype 5 of x, B and C, expected float32 (0), float16 (1) or bfloat16 (2)"),
        ({"dt_dtype": -1}, 1, "dtype -1 of dt"),
        ({"y_dtype": 3}, 1, "dtype 3 of y"),
        ({"state_dtype": 4}, 1, "dtype 4 of state"),
        ({"dt_min": 0.5, "dt_max": 0.1}, 1, "dt_min 0.5, dt_max 0.1, expected 0 <= dt_min <= dt_max"),
        ({"dt_min": float("nan")}, 1, "dt_min nan"),
        ({"dt_min": -1.0}, 1, "dt_min -1"),
        ({"rounding": 2}, 1, "rounding 2, expected nearest (0) or stochastic (1)"),
        ({"rounding": 1}, 1, "stochastic rounding of a state of dtype 0, expected float16 (1)"),
        ({"rounding": 1, "state_dtype": 1}, 1, "stochastic rounding without a seed"),
        ({"segments": -1}, 1, "segments -1, expected 0 (chosen) to 64"),
        (
            {"b_position_stride": 129},
            1,
            "b_position_stride is 129 elements, expected a multiple of 8, 0 or more",
        ),
    ],
)
def test_bad_arguments_are_refused_by_name(
    change: dict[str, Any], code: int, reason: str, scan: Scan
) -> None:
    with pytest.raises(Refused, match="Mamba2Scan: ") as refused:
        scan(inputs(length=2), fields=change)
    assert refused.value.code == code
    assert reason in str(refused.value)


@pytest.mark.parametrize("rounds", [0, 33])
def test_rounds_out_of_range_are_refused(rounds: int, scan: Scan) -> None:
    with pytest.raises(Refused, match=f"philox_rounds {rounds}, expected 1 to 32"):
        scan(inputs(length=1, state_dtype="float16"), seed=1, rounds=rounds)


def test_a_workspace_that_is_missing_is_refused(scan: Scan) -> None:
    with pytest.raises(Refused, match=r"workspace .*, expected \d+ bytes aligned to 16"):
        scan(inputs(length=200, dtype="bfloat16"), segments=2, fields={"workspace": None})


def test_a_pointer_that_is_not_aligned_is_refused(scan: Scan) -> None:
    given = inputs(length=2)
    with pytest.raises(Refused, match="x is not aligned to 16 bytes"):
        scan(given, fields={"x": given["x"].ctypes.data + 4})
