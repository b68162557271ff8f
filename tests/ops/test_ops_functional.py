"""The operators for torch over the host library.

Schemas and fake kernels are checked by torch itself, values against the reference model; also refusals.
"""

import json
import math
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.norms import relative_error as error
from support.plugin_build import host_folder, needs_compiler
from torch._subclasses.fake_tensor import FakeTensorMode

from nemoquant.errors import BuildError, EngineError
from nemoquant.graph.spec import spec
from nemoquant.model import mamba2
from nemoquant.ops import functional, library, proven
from nemoquant.ops.abi import structure
from nemoquant.ops.functional import EXPERT_FORMATS, causal_conv1d, mamba2_scan, routed_experts
from nemoquant.ops.library import Kernels

HOST = "libnemoquant_host.so"


@pytest.fixture(autouse=True)
def untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test chooses the library afresh, and no setting or library of the user is used."""
    monkeypatch.setattr(library, "_used", {})
    monkeypatch.delenv(library.VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/nonexistent")


@pytest.fixture
def host() -> None:
    """CPU tensors go through the emulated kernels."""
    library.use(host_folder() / HOST, "cpu")


def conv_arguments(dtype: torch.dtype = torch.float32, length: int = 5, bias: bool = True) -> list[Any]:
    g = torch.Generator().manual_seed(0)

    def made(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g)

    return [made(2, length, 12).to(dtype), made(12, 4), made(12) if bias else None, made(2, 12, 3).to(dtype)]


def scan_arguments(
    dtype: torch.dtype = torch.float32, length: int = 5, state: torch.dtype = torch.float32
) -> list[Any]:
    g = torch.Generator().manual_seed(0)

    def made(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g)

    return [
        made(2, length, 4, 16).to(dtype),
        made(2, length, 4).to(dtype),
        -torch.rand(4, generator=g) - 0.1,
        made(2, length, 2, 16).to(dtype),
        made(2, length, 2, 16).to(dtype),
        made(4),
        made(4),
        made(2, 4, 16, 16).to(state),
    ]


def expert_arguments(format: str = "bf16", dtype: torch.dtype = torch.float32, tokens: int = 5) -> list[Any]:
    """Four experts of 32 by 64; codes are any bytes but NaN."""
    g = torch.Generator().manual_seed(0)
    parts: dict[str, list[torch.Tensor]] = {"up": [], "down": []}
    for projection, out, into in (("up", 64, 32), ("down", 32, 64)):
        for name in EXPERT_FORMATS[format][1]:
            width = {
                "weight": into,
                "codes": into // 2 if "4" in format else into,
                "block_scales": into // 16,
            }.get(name)
            if width is None:
                made = torch.rand(4, generator=g) + 0.5
            elif name == "weight":
                made = torch.randn(4, out, width, generator=g).bfloat16()
            else:
                made = torch.randint(0, 0x50, (4, out, width), generator=g, dtype=torch.uint8)
            parts[projection].append(made)
    ids = torch.stack([torch.randperm(4, generator=g)[:2] for _ in range(tokens)])
    return [
        torch.randn(tokens, 32, generator=g).to(dtype),
        ids,
        torch.rand(tokens, 2, generator=g),
        parts["up"],
        parts["down"],
        format,
    ]


# torch's own check.


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "length", "bias", "y_dtype"),
    [
        (torch.float32, 5, True, None),
        (torch.bfloat16, 5, True, None),
        (torch.bfloat16, 5, True, torch.bfloat16),
        (torch.float16, 1, True, torch.float16),
        (torch.float32, 5, False, None),
    ],
)
@pytest.mark.usefixtures("host")
def test_opcheck_of_the_convolution(
    dtype: torch.dtype, length: int, bias: bool, y_dtype: torch.dtype | None
) -> None:
    torch.library.opcheck(
        torch.ops.nemoquant.causal_conv1d.default, (*conv_arguments(dtype, length, bias), y_dtype)
    )


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "length", "state", "more"),
    [
        (torch.float32, 5, torch.float32, {}),
        (torch.bfloat16, 5, torch.float16, {"y_dtype": torch.bfloat16}),
        (torch.bfloat16, 1, torch.float16, {"rounding": "stochastic", "seed": torch.tensor([7]), "step": 3}),
        (torch.float16, 5, torch.bfloat16, {"dt_min": 0.01, "dt_max": 0.1}),
    ],
)
@pytest.mark.usefixtures("host")
def test_opcheck_of_the_scan(
    dtype: torch.dtype, length: int, state: torch.dtype, more: dict[str, Any]
) -> None:
    torch.library.opcheck(
        torch.ops.nemoquant.mamba2_scan.default, tuple(scan_arguments(dtype, length, state)), more
    )


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    ("format", "dtype", "tokens"),
    [
        ("bf16", torch.float32, 5),
        ("w8a16", torch.bfloat16, 5),
        ("fp8", torch.bfloat16, 1),
        ("w4a16", torch.float16, 5),
        ("nvfp4", torch.bfloat16, 5),
    ],
)
@pytest.mark.usefixtures("host")
def test_opcheck_of_the_experts(format: str, dtype: torch.dtype, tokens: int) -> None:
    torch.library.opcheck(
        torch.ops.nemoquant.routed_experts.default, tuple(expert_arguments(format, dtype, tokens))
    )


@needs_compiler
@pytest.mark.slow
@pytest.mark.usefixtures("host")
def test_experts_count_the_ids_that_are_none() -> None:
    """The count adds up over calls, and torch's schema declares that this input is mutated."""
    skipped = torch.zeros(1, dtype=torch.int32)
    given = expert_arguments()
    given[1][2, 1], given[1][3, 0] = -1, 4
    for _ in range(2):
        routed_experts(*given, skipped=skipped)
    assert skipped.tolist() == [4]
    torch.library.opcheck(torch.ops.nemoquant.routed_experts.default, tuple(given), {"skipped": skipped})


def test_formats_of_the_experts_are_those_of_the_specification() -> None:
    assert {name: parts for name, (_, parts) in EXPERT_FORMATS.items()} == spec("routed_experts").formats


# The reference model's forward.


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [1, 7])
def test_the_reference_model_goes_through_the_kernels(
    dtype: torch.dtype, length: int, capfd: pytest.CaptureFixture[str]
) -> None:
    """Convolution and scan agree with torch to float32's rounding.

    Both compute in float32 from the same inputs.
    """
    x, weight, bias, state = conv_arguments(dtype, length)
    scan = scan_arguments(torch.float32, length)
    scan[1] = scan[1].to(dtype)

    def run() -> list[torch.Tensor]:
        convolved = mamba2.causal_conv(x, weight[:, None], bias, state)
        scanned = mamba2.scan(*scan[:6], dt_bias=scan[6], limit=(0.0, math.inf), state=scan[7])
        return [*convolved, *scanned]

    wanted = run()
    called = []

    class Counting(Kernels):
        def call(self, op: str, **arguments: Any) -> None:  # type: ignore[override]
            called.append(op)
            super().call(op, **arguments)

    library._used["cpu"] = Counting(host_folder() / HOST)
    got = run()
    assert called == ["causal_conv1d", "mamba2_scan"]
    assert [t.dtype for t in got] == [t.dtype for t in wanted]
    assert max(map(error, got, wanted)) < 1e-6
    assert got[1].equal(wanted[1])
    assert capfd.readouterr().err == ""  # the CPU is used only where it was asked for


def test_without_a_library_torch_computes() -> None:
    assert not library.serves("causal_conv1d", "cpu")
    x, weight, bias, state = conv_arguments()
    with pytest.raises(
        BuildError, match=r"no kernels for tensors on cpu; build them: nemoquant plugins build --host"
    ):
        causal_conv1d(x, weight, bias, state)


@needs_compiler
@pytest.mark.slow
@pytest.mark.usefixtures("host")
def test_views_are_not_copied_and_odd_strides_are() -> None:
    """A slice of a wide projection, as in the model, is passed without a copy.

    Strides that the kernel cannot take are copied. The results equal those of a copy in both cases.
    """
    x, weight, bias, state = conv_arguments(torch.bfloat16, 6)
    wanted = causal_conv1d(x, weight, bias, state)
    wide = torch.randn(2, 6, 40, dtype=torch.bfloat16)
    wide[:, :, 16:28] = x
    for view in (wide[:, :, 16:28], x.mT.contiguous().mT, torch.stack([x, x])[1], x.flip(0).flip(0)):
        assert all(a.equal(b) for a, b in zip(causal_conv1d(view, weight, bias, state), wanted, strict=True))
    one = x[:, :1].contiguous()
    broadcast = one[:1].expand(2, 1, 12)
    same = causal_conv1d(broadcast, weight, bias, state)
    assert same[0].equal(causal_conv1d(broadcast.contiguous(), weight, bias, state)[0])
    s = scan_arguments()
    wide = torch.randn(2, 5, 4 * 16 + 2 * 32 + 8)
    parts = [
        wide[:, :, :64].unflatten(2, (4, 16)),
        wide[:, :, 64:96].unflatten(2, (2, 16)),
        wide[:, :, 96:128].unflatten(2, (2, 16)),
    ]
    through = mamba2_scan(parts[0], s[1], s[2], parts[1], parts[2], *s[5:])
    copies = [p.contiguous() for p in parts]
    assert through[0].equal(mamba2_scan(copies[0], s[1], s[2], copies[1], copies[2], *s[5:])[0])


# Refusals.


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"weight": torch.zeros(12, 3)},
            r"causal_conv1d: state_in is \[2, 12, 3\]; expected \[2, 12, 2\] \(B C K-1\)",
        ),
        ({"bias": torch.zeros(3)}, r"causal_conv1d: bias is \[3\]; expected \[12\] \(C\)"),
        (
            {"weight": torch.zeros(12, 4).half()},
            r"weight is torch.float16, x torch.float32; expected torch.float32$",
        ),
        (
            {"state_in": torch.zeros(2, 12, 3).half()},
            r"state_in is torch.float16, x torch.float32; expected torch.float32$",
        ),
        (
            {"x": torch.zeros(2, 5, 12).double(), "state_in": torch.zeros(2, 12, 3).double()},
            r"conv1d: x is torch.float64; expected one of torch.float32, torch.float16, torch.bfloat16$",
        ),
    ],
)
@pytest.mark.usefixtures("host")
def test_tensors_that_do_not_go_together(change: dict[str, Any], says: str) -> None:
    given = dict(zip(("x", "weight", "bias", "state_in"), conv_arguments(), strict=True)) | change
    with pytest.raises(ValueError, match=says):
        causal_conv1d(**given)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"format": "fp4"},
            r"routed_experts: format is 'fp4', activation 'relu2'; expected one of bf16, w8a16, fp8, w4a16, "
            r"nvfp4",
        ),
        ({"activation": "silu"}, r"activation 'silu'; expected .* relu2"),
        ({"skipped": torch.zeros(1)}, r"skipped is torch.float32, x .*; expected torch.int32"),
        (
            {"skipped": torch.zeros(2, dtype=torch.int32)},
            r"skipped is \[2\]; expected \[1\] \(1\)",
        ),
        ({"products": "fast"}, r"products is 'fast'; expected one of auto, decoded, native, grouped"),
        ({"format": "w8a16"}, r"routed_experts: up has 1 parts, down 1; w8a16 has codes, global_scale"),
        ({"down": []}, r"routed_experts: up has 1 parts, down 0; bf16 has weight"),
        ({"expert_ids": torch.zeros(4, 2, dtype=torch.int64)}, r"expert_ids is \[4, 2\]; expected \[5, 2\]"),
        (
            {"expert_ids": torch.zeros(5, 2, dtype=torch.int32)},
            r"expert_ids is torch.int32, x torch.float32; expected torch.int64$",
        ),
        (
            {"expert_weights": torch.zeros(5, 2).half()},
            r"expert_weights is torch.float16, x torch.float32; expected torch.float32$",
        ),
        (
            {"down": [torch.zeros(4, 32, 32).bfloat16()]},
            r"down's weight is \[4, 32, 32\]; expected \[4, 32, 64\] \(E I M\)",
        ),
        (
            {"up": [torch.zeros(4, 64, 32)]},
            r"up's weight is torch.float32, x torch.float32; expected torch.bfloat16$",
        ),
        (
            {"x": torch.zeros(5, 32).double()},
            r"x is torch.float64; expected one of torch.float32, .*bfloat16$",
        ),
    ],
)
@pytest.mark.usefixtures("host")
def test_experts_that_do_not_go_together(change: dict[str, Any], says: str) -> None:
    names = ("x", "expert_ids", "expert_weights", "up", "down", "format")
    with pytest.raises(ValueError, match=says):
        routed_experts(**dict(zip(names, expert_arguments(), strict=True)) | change)


OPERATORS: dict[str, tuple[Any, dict[str, Any]]] = {
    "causal_conv1d": (
        causal_conv1d,
        dict(zip(("x", "weight", "bias", "state_in"), conv_arguments(), strict=True)),
    ),
    "mamba2_scan": (
        mamba2_scan,
        dict(
            zip(
                ("x", "dt", "A", "B", "C", "D", "dt_bias", "state_in"),
                scan_arguments(state=torch.float16),
                strict=True,
            ),
            seed=torch.tensor([7]),
            rounding="stochastic",
        ),
    ),
    "routed_experts": (
        routed_experts,
        dict(
            zip(("x", "expert_ids", "expert_weights", "up", "down"), expert_arguments("w4a16"), strict=False),
            format="w4a16",
            skipped=torch.zeros(1, dtype=torch.int32),
        ),
    ),
}


@pytest.mark.parametrize(
    ("op", "name"),
    [
        (op, name)
        for op, (_, given) in OPERATORS.items()
        for name, value in given.items()
        if name != "x" and not isinstance(value, str)
    ],
)
def test_a_tensor_on_another_device_is_refused(op: str, name: str) -> None:
    """ "meta" stands in for it: no kernel may get its address. Of a list, one is enough.

    torch sends such a call to the fake kernel; where CUDA and the CPU meet, to the real one.
    """
    operator, given = OPERATORS[op]
    value = given[name]
    away = [*value[:-1], value[-1].to("meta")] if isinstance(value, list) else value.to("meta")
    for function in (operator, operator._init_fn):
        with pytest.raises(
            ValueError, match=f"^{op}: {name}('s .*)? is on meta, x on cpu; expected one device$"
        ):
            function(**given | {name: away})


def scan_with(**changes: Any) -> dict[str, Any]:
    """A change of the scan's arguments that makes it round to the nearest."""
    return {"seed": None, "rounding": "nearest"} | changes


CODES, BLOCKS, GLOBAL = (OPERATORS["routed_experts"][1]["up"][i] for i in range(3))

REFUSED: list[tuple[str, dict[str, Any], str]] = [
    # ranks
    ("causal_conv1d", {"x": torch.zeros(5, 12)}, "x is [5, 12]; expected [B, L, C]"),
    ("causal_conv1d", {"weight": torch.tensor(1.0)}, "weight is []; expected [C, K]"),
    ("mamba2_scan", {"x": torch.zeros(5, 4)}, "x is [5, 4]; expected [B, L, H, P]"),
    ("mamba2_scan", {"B": torch.zeros(2, 5, 16)}, "B is [2, 5, 16]; expected [B, L, G, N]"),
    ("mamba2_scan", {"seed": torch.tensor(7)}, "seed is []; expected [1]"),
    ("routed_experts", {"x": torch.zeros(32)}, "x is [32]; expected [T, I]"),
    ("routed_experts", {"expert_ids": torch.tensor(1)}, "expert_ids is []; expected [T, k]"),
    ("routed_experts", {"up": [CODES[0, 0], BLOCKS, GLOBAL]}, "up's codes is [16]; expected [E, M, I/2]"),
    # shapes
    ("mamba2_scan", {"dt": torch.zeros(2, 5, 3)}, "dt is [2, 5, 3]; expected [2, 5, 4] (B L H)"),
    ("mamba2_scan", {"seed": torch.tensor([7, 8])}, "seed is [2]; expected [1] (1)"),
    (
        "routed_experts",
        {"up": [CODES, BLOCKS[:, :, :1], GLOBAL]},
        "up's block_scales is [4, 64, 1]; expected [4, 64, 2] (E M I/16)",
    ),
    # dtypes
    ("causal_conv1d", {"y_dtype": torch.int32}, "y_dtype is torch.int32; expected torch.float32"),
    (
        "mamba2_scan",
        {"y_dtype": torch.int32},
        "y_dtype is torch.int32; expected one of torch.float32, torch.float16, torch.bfloat16",
    ),
    (
        "mamba2_scan",
        {"B": torch.zeros(2, 5, 2, 16).half()},
        "B is torch.float16, x torch.float32; expected torch.float32",
    ),
    (
        "mamba2_scan",
        scan_with(state_in=torch.zeros(2, 4, 16, 16).double()),
        "state_in is torch.float64, x torch.float32; expected one of torch.float32, torch.float16, "
        "torch.bfloat16",
    ),
    (
        "mamba2_scan",
        {"state_in": torch.zeros(2, 4, 16, 16)},
        "state_in is torch.float32, rounding 'stochastic'; expected torch.float16",
    ),
    (
        "mamba2_scan",
        {"seed": torch.tensor([7], dtype=torch.int32)},
        "seed is torch.int32, x torch.float32; expected torch.int64",
    ),
    (
        "routed_experts",
        {"up": [CODES.int(), BLOCKS, GLOBAL]},
        "up's codes is torch.int32, x torch.float32; expected one of torch.uint8, torch.int8, "
        "torch.float8_e4m3fn",
    ),
    # words
    ("mamba2_scan", {"rounding": "up"}, "rounding is 'up'; expected one of nearest, stochastic"),
    (
        "mamba2_scan",
        {"seed": None},
        "seed is None, rounding 'stochastic'; expected int64 [1] with 'stochastic', None with 'nearest'",
    ),
    (
        "mamba2_scan",
        {"rounding": "nearest"},
        "seed is given, rounding 'nearest'; expected int64 [1] with 'stochastic', None with 'nearest'",
    ),
    (
        "routed_experts",
        {"products": "fast"},
        "products is 'fast'; expected one of auto, decoded, native, grouped",
    ),
    # sizes of 0
    ("causal_conv1d", {"x": torch.zeros(2, 5, 0)}, "x is [2, 5, 0] (B L C); expected C >= 1"),
    ("causal_conv1d", {"weight": torch.zeros(12, 0)}, "weight is [12, 0] (C K); expected K >= 1"),
    ("mamba2_scan", {"x": torch.zeros(2, 5, 0, 16)}, "x is [2, 5, 0, 16] (B L H P); expected H >= 1"),
    (
        "routed_experts",
        {"expert_ids": torch.zeros(5, 0, dtype=torch.int64)},
        "expert_ids is [5, 0] (T k); expected k >= 1",
    ),
    (
        "routed_experts",
        {"up": [CODES[:0], BLOCKS[:0], GLOBAL[:0]]},
        "up's codes is [0, 64, 16] (E M I/2); expected E >= 1",
    ),
]


@pytest.mark.parametrize(("op", "change", "says"), REFUSED, ids=[f"{op}: {says}" for op, _, says in REFUSED])
def test_the_operator_and_its_fake_kernel_refuse_the_same(op: str, change: dict[str, Any], says: str) -> None:
    """Before any library is looked for."""
    operator, given = OPERATORS[op]
    with pytest.raises(ValueError, match=f"^{re.escape(f'{op}: {says}')}$"):
        operator(**given | change)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = {
            name: [mode.from_tensor(part) for part in value]
            if isinstance(value, list)
            else mode.from_tensor(value)
            if isinstance(value, torch.Tensor)
            else value
            for name, value in (given | change).items()
        }
        with pytest.raises(ValueError, match=f"^{re.escape(f'{op}: {says}')}$"):
            operator(**fake)


def test_what_would_not_run_is_not_exported() -> None:
    class Rounds(torch.nn.Module):
        def forward(self, seed: torch.Tensor) -> torch.Tensor:
            given = OPERATORS["mamba2_scan"][1] | {"seed": seed}
            y: torch.Tensor = torch.ops.nemoquant.mamba2_scan(**given)[0]
            return y

    torch.export.export(Rounds(), (torch.tensor([7]),))
    with pytest.raises(
        Exception, match=r"mamba2_scan: seed is torch.int32, x torch.float32; expected torch.int64"
    ):
        torch.export.export(Rounds(), (torch.tensor([7], dtype=torch.int32),))


@pytest.mark.parametrize("batch", [0, 2])
def test_nothing_to_compute_needs_no_kernel(batch: int) -> None:
    """No batch or no length: an empty result, and the state as it was, in memory of its own."""
    length = 0 if batch else 5
    x, weight, bias, state = conv_arguments()
    state = state[:batch].mT.contiguous().mT
    y, after = causal_conv1d(x[:batch, :length], weight, bias, state)
    assert y.shape == (batch, length, 12)
    assert after.equal(state) and after.is_contiguous()
    assert not batch or after.data_ptr() != state.data_ptr()
    x, dt, A, B, C, D, dt_bias, state = scan_arguments(state=torch.float16)
    x, dt, B, C = (t[:batch, :length] for t in (x, dt, B, C))
    y, after = mamba2_scan(x, dt, A, B, C, D, dt_bias, state[:batch], y_dtype=torch.bfloat16)
    assert (y.shape, y.dtype) == ((batch, length, 4, 16), torch.bfloat16)
    assert after.equal(state[:batch]) and after.dtype == torch.float16


def shifted(t: torch.Tensor) -> torch.Tensor:
    """The same values, contiguous, at an address that is no multiple of 16."""
    moved = torch.empty(t.numel() + 1, dtype=t.dtype)[1:].view(t.shape).copy_(t)
    assert moved.is_contiguous() and moved.data_ptr() % 16
    return moved


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("op", OPERATORS)
@pytest.mark.usefixtures("host")
def test_tensors_may_begin_anywhere(op: str) -> None:
    """The kernels would refuse them."""
    operator, given = OPERATORS[op]
    away = {
        name: [shifted(part) for part in value]
        if isinstance(value, list)
        else shifted(value)
        if isinstance(value, torch.Tensor)
        else value
        for name, value in given.items()
    }
    for one, other in zip(operator(**given), operator(**away), strict=True):
        assert one.equal(other)


def test_the_workspace_is_asked_for_on_the_tensors_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its size follows the properties of the current device."""
    said: list[str] = []

    def workspace(op: str, **_: Any) -> int:
        said.append(f"workspace of {op}")
        return 0

    recording = SimpleNamespace(
        has=lambda op: True, workspace=workspace, call=lambda op, **_: said.append(f"call of {op}")
    )

    @contextmanager
    def current(device: torch.device) -> Iterator[None]:
        said.append(f"to {device}")
        yield
        said.append("back")

    monkeypatch.setitem(library._used, "cuda", recording)
    monkeypatch.setattr(torch.cuda, "device", current)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(torch, "empty", lambda *sizes, **options: torch.zeros(0))
    functional.call("mamba2_scan", torch.device("cuda", 1))
    assert said == ["to cuda:1", "workspace of mamba2_scan", "call of mamba2_scan", "back"]


def test_experts_of_no_token_need_no_kernel() -> None:
    x, ids, weights, *rest = expert_arguments(dtype=torch.bfloat16)
    assert routed_experts(x[:0], ids[:0], weights[:0], *rest).shape == (0, 32)


@needs_compiler
@pytest.mark.slow
@pytest.mark.usefixtures("host")
def test_a_kernel_that_refuses_gives_its_reason(tmp_path: Path) -> None:
    """For CUDA, where another choice than the library is left, also that."""
    x, weight, bias, _ = conv_arguments()
    given = (x, weight.repeat(1, 2)[:, :5], bias, torch.zeros(2, 12, 4))
    reason = r"causal_conv1d: kernel is 5; expected 2, 3 or 4 taps \(error 1\)"
    with pytest.raises(EngineError, match=f"{reason}$"):
        causal_conv1d(*given)
    cuda = tmp_path / library.KERNELS
    shutil.copy(host_folder() / HOST, cuda)
    library.use(cuda, "cpu")
    with pytest.raises(EngineError, match=f"{reason}; NEMOQUANT_KERNELS=none lets torch compute$"):
        causal_conv1d(*given)


# The choice of the library.


@needs_compiler
@pytest.mark.slow
def test_libraries_that_cannot_serve_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        BuildError, match=r"missing.so is not there; expected a library made by `nemoquant plugins build`"
    ):
        Kernels(tmp_path / "missing.so")
    (tmp_path / "text.so").write_text("no library")
    with pytest.raises(BuildError, match=r"text.so can't be loaded: .*; build it again"):
        Kernels(tmp_path / "text.so")
    stale = tmp_path / HOST
    shutil.copy(host_folder() / HOST, stale)
    facts = json.loads((host_folder() / "build_host.json").read_text())
    (tmp_path / "build_host.json").write_text(json.dumps(facts | {"sources": "0" * 64}))
    with pytest.raises(
        BuildError, match="was built from other sources than this version of nemoquant has; build it again"
    ):
        Kernels(stale)
    (tmp_path / "build_host.json").write_text("{}")
    with pytest.raises(BuildError, match=r"build_host.json is not what `nemoquant plugins build` writes"):
        Kernels(stale)


@needs_compiler
@pytest.mark.slow
def test_which_library_serves_cuda(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The named library, otherwise the built one; reported once.

    The host library stands in for a device's; no kernel runs. The built one serves what is proven for the
    device.
    """
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(proven, "PROVEN", ())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "nemoquant/plugins"
    folder.mkdir(parents=True)

    def chosen(**environment: str) -> tuple[Kernels | None, str]:
        library._used.clear()
        library.load.cache_clear()
        monkeypatch.delenv(library.VARIABLE, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        kernels = library.kernels("cuda")
        assert library.kernels("cuda") is kernels
        return kernels, capfd.readouterr().err

    assert chosen() == (
        None,
        "CUDA kernels: none are built, torch computes; `nemoquant plugins build` makes them\n",
    )
    built = folder / "libnemoquant_kernels.so"
    shutil.copy(host_folder() / HOST, built)
    facts = json.loads((host_folder() / "build_host.json").read_text()) | {"host": False}

    def write(**changes: Any) -> None:
        (folder / "build.json").write_text(json.dumps(facts | changes))

    def serving() -> list[str]:
        return [op for op in proven.OPERATORS if library.serves(op, "cuda")]

    def prove(*operators: str, capability: tuple[int, int] = (9, 0)) -> None:
        rows = tuple(proven.Proof(op, capability, "made") for op in operators)
        monkeypatch.setattr(proven, "PROVEN", rows)

    write(architectures=["80", "90a"])
    prove(*proven.OPERATORS, capability=(10, 0))  # another device's do not count
    assert chosen() == (
        None,
        f"CUDA kernels: {built} is built, but no GPU of SM 90 has run causal_conv1d, mamba2_scan, "
        f"routed_experts yet: torch computes; NEMOQUANT_KERNELS={built} takes the kernels\n",
    )
    assert serving() == []
    with pytest.raises(
        BuildError, match=r"^mamba2_scan: no kernels for tensors on cuda; build them: .*PATH$"
    ):
        functional.library_for("mamba2_scan", torch.device("cuda"))
    prove("mamba2_scan")
    kernels, message = chosen()
    assert kernels is not None and kernels.path == built
    assert message == (
        f"CUDA kernels: {built} for mamba2_scan, but no GPU of SM 90 has run causal_conv1d, "
        f"routed_experts yet: torch computes; NEMOQUANT_KERNELS={built} takes the kernels\n"
    )
    assert serving() == ["mamba2_scan"]
    prove(*proven.OPERATORS)
    kernels, message = chosen()
    assert (kernels and kernels.path, message) == (built, f"CUDA kernels: {built}\n")
    assert serving() == list(proven.OPERATORS)
    prove()
    assert chosen(NEMOQUANT_KERNELS="none") == (
        None,
        "CUDA kernels: NEMOQUANT_KERNELS=none, torch computes\n",
    )
    kernels, message = chosen(NEMOQUANT_KERNELS=str(host_folder() / HOST))
    assert kernels is not None and kernels.path == host_folder() / HOST
    assert message == f"CUDA kernels: {kernels.path}\n"
    assert serving() == list(proven.OPERATORS)
    with pytest.raises(BuildError, match=r"missing.so is not there"):
        chosen(NEMOQUANT_KERNELS=str(tmp_path / "missing.so"))

    write(architectures=["100a"])
    kernels, message = chosen()
    assert kernels is None
    assert (
        message
        == f"CUDA kernels: torch computes: {built} was built for sm_100a, not for this device, SM 90\n"
    )
    with pytest.raises(BuildError, match="was built for sm_100a, not for this device, SM 90; build it again"):
        chosen(NEMOQUANT_KERNELS=str(built))
    write(sources="0" * 64)
    kernels, message = chosen()
    assert kernels is None
    assert "torch computes: " in message and "other sources" in message


@pytest.mark.parametrize(
    ("built", "device", "runs"),
    [
        ((), (9, 0), True),  # the library does not say for which device it was built
        (("80",), (8, 0), True),
        (("80",), (8, 9), True),  # the same major number, a later minor one
        (("86",), (8, 0), False),
        (("80",), (9, 0), False),
        (("90a",), (9, 0), True),
        (("90a",), (9, 1), False),
        (("100a",), (10, 0), True),
        (("100a",), (10, 3), False),  # architecture-specific
        (("100f",), (10, 0), True),
        (("100f",), (10, 3), True),  # B300: the same family
        (("100f",), (10, 1), False),  # Thor, as it was called before CUDA 13
        (("103f",), (10, 0), False),
        (("100f",), (12, 0), False),
        (("100f",), (9, 0), False),
        (("80", "120a"), (12, 0), True),
        (("120a",), (12, 1), False),
        (("120f",), (12, 0), True),
        (("120f",), (12, 1), True),  # DGX Spark
        (("121a",), (12, 0), False),
        (("80", "90a", "100f", "120f"), (10, 3), True),
        (("80", "90a", "100f", "120f"), (12, 1), True),
        (("80", "90a", "100f", "120f"), (7, 5), False),
    ],
)
def test_what_a_library_runs_on(built: tuple[str, ...], device: tuple[int, int], runs: bool) -> None:
    assert (library.other_device(built, device) is None) == runs


@pytest.mark.parametrize("op", ["causal_conv1d", "mamba2_scan"])
def test_structures_are_read_from_the_headers(op: str) -> None:
    """The sizes are gcc's on a 64-bit machine: pointers and int64 have 8 bytes, int32 and float 4."""
    fields = dict(structure(op)._fields_)
    assert len(fields) == len(structure(op)._fields_)
    assert {"y", "state_in", "state_out", "batch", "length", "dtype", "y_dtype"} <= set(fields)
    assert {fields[name].__name__ for name in ("y", "batch", "dtype")} == {"c_void_p", "c_long", "c_int"}
