"""The scan's kernels on a GPU, through torch, at the published models' sizes.

Against float64, against the host's bits, and at a million tokens. NEMOQUANT_KERNELS names the library of
`nemoquant plugins build`, NQ_HOST_LIB that of a build with `--host`. Under compute-sanitizer (memcheck,
racecheck, synccheck):

    compute-sanitizer --tool racecheck python -m pytest tests/gpu/test_gpu_mamba2_scan.py -k "base or cut or
    bits"
"""

import importlib.util
from typing import Any

import pytest
import torch
from support.gpu_needs import HAS_DEVICE, host_library, needs, needs_host_library, needs_kernel
from torch import Tensor

from nemoquant.ops.functional import mamba2_scan
from nemoquant.ops.library import use

pytestmark = needs_kernel("mamba2_scan")

SUPER: dict[str, int] = {"heads": 128, "width": 64, "groups": 8, "size": 128}
NANO = {**SUPER, "heads": 64}
FLOOR = 5e-7  # float32 sums of 128 products, in any order
BFLOAT16 = torch.bfloat16


def inputs(
    batch: int = 1,
    length: int = 333,
    heads: int = 128,
    width: int = 64,
    groups: int = 8,
    size: int = 128,
    *,
    dtype: torch.dtype = BFLOAT16,
    state_dtype: torch.dtype = torch.float32,
    bias: float = -3.0,
    state: float = 1.0,
    device: str = "cuda",
) -> dict[str, Tensor]:
    g = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, device=device)

    return {
        "x": normal(batch, length, heads, width).to(dtype),
        "dt": normal(batch, length, heads).to(dtype),
        "A": -torch.rand(heads, generator=g, device=device) * 8 - 0.01,
        "B": normal(batch, length, groups, size).to(dtype),
        "C": normal(batch, length, groups, size).to(dtype),
        "D": normal(heads),
        "dt_bias": normal(heads) + bias,
        "state_in": (normal(batch, heads, width, size) * state).to(state_dtype),
    }


def scan(given: dict[str, Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    return mamba2_scan(**given, **options)  # type: ignore[no-any-return]


def recurrence(given: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The definition, position by position, in float64."""
    x, dt, a, b, c, d, bias, state = (value.double() for value in given.values())
    dt = torch.nn.functional.softplus(dt + bias, threshold=200.0)
    share = x.shape[2] // b.shape[2]
    b, c = b.repeat_interleave(share, 2), c.repeat_interleave(share, 2)
    y = torch.empty_like(x)
    for t in range(x.shape[1]):
        written = (dt[:, t, :, None] * x[:, t])[..., None] * b[:, t, :, None]
        state = torch.exp(dt[:, t] * a)[..., None, None] * state + written
        y[:, t] = (state @ c[:, t, :, :, None])[..., 0] + d[:, None] * x[:, t]
    return y, state


def error(found: Tensor, truth: Tensor) -> float:
    """Norm of the difference over the norm."""
    return float((found.double() - truth).norm() / truth.norm())


def pieces(given: dict[str, Tensor], part: slice) -> dict[str, Tensor]:
    return {name: value[:, part] if name in ("x", "dt", "B", "C") else value for name, value in given.items()}


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({}, id="base"),
        *[pytest.param({"length": n}, id=f"length {n}") for n in (1, 2, 31, 32, 63, 64, 65, 1024, 4099)],
        pytest.param(NANO, id="Nano"),
        pytest.param({"batch": 3}, id="three rows"),
        pytest.param({"width": 128, "heads": 64}, id="head_dim 128"),
        *[pytest.param({"size": n}, id=f"state {n}") for n in (64, 96, 256)],
        pytest.param({"bias": -14.0, "state": 0.0}, id="slow heads"),
        pytest.param({"bias": 30.0}, id="fast heads"),
        pytest.param({"heads": 8, "groups": 1, "length": 5000}, id="few heads: segments"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BFLOAT16], ids=str)
def test_scan_is_the_recurrence(change: dict[str, Any], dtype: torch.dtype) -> None:
    """16 bits: error below twice that of rounding the true result to the inputs' dtype.

    float32: below a few roundings of its sums.
    """
    given = inputs(**change, dtype=dtype)
    for y_dtype in (torch.float32, dtype):
        for found, true in zip(scan(given, y_dtype=y_dtype), recurrence(given), strict=True):
            assert error(found, true) < max(2 * error(true.to(dtype), true), FLOOR)


@pytest.mark.parametrize("length", [1, 40])
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.float16, BFLOAT16], ids=str)
def test_states_of_every_dtype(state_dtype: torch.dtype, length: int) -> None:
    given = inputs(length=length, state_dtype=state_dtype)
    _, state = scan(given)
    true = recurrence(given)[1]
    assert (
        error(state, true)
        < 2
        * max(error(true.to(kind), true) for kind in (state_dtype, BFLOAT16 if length > 1 else state_dtype))
        + FLOOR
    )


def test_scan_may_be_cut_anywhere() -> None:
    given = inputs(length=300)
    truth = recurrence(given)
    for cut in (1, 31, 32, 64, 65, 200, 299):
        first, state = scan(pieces(given, slice(None, cut)))
        second, state = scan({**pieces(given, slice(cut, None)), "state_in": state})
        for found, true in zip((torch.cat([first, second], 1), state), truth, strict=True):
            assert error(found, true) < 2 * error(true.to(BFLOAT16), true)


def test_twice_the_same_call_gives_the_same_bits() -> None:
    given = inputs(length=4099)
    assert all(torch.equal(one, other) for one, other in zip(scan(given), scan(given), strict=True))


@needs_host_library
@pytest.mark.parametrize("seed", [None, 12345])
@pytest.mark.parametrize("dtype", [torch.float32, BFLOAT16], ids=str)
@pytest.mark.parametrize("length", [1, 20])
def test_steps_have_the_host_s_bits(length: int, dtype: torch.dtype, seed: int | None) -> None:
    """Decode: y and state, stochastic states too, have the emulator's bits, so the same on every device."""
    given = inputs(
        batch=2,
        length=length,
        heads=8,
        dtype=dtype,
        state_dtype=torch.float16 if seed else torch.float32,
        device="cpu",
    )
    options: dict[str, Any] = {"rounding": "stochastic"} if seed else {}
    more = {"seed": torch.tensor([seed])} if seed else {}
    use(host_library(), "cpu")
    try:
        expected = scan({**given, **more}, **options)
    finally:
        use(None, "cpu")
    found = scan({name: value.cuda() for name, value in {**given, **more}.items()}, **options)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.cpu(), other)


def test_a_captured_decode_step_takes_its_seed_from_memory() -> None:
    given = inputs(length=1, state_dtype=torch.float16)
    seed = torch.tensor([1], device="cuda")

    def run() -> Tensor:
        return scan({**given, "seed": seed}, rounding="stochastic")[1]

    expected = []
    for value in (1, 2):
        seed.fill_(value)
        expected.append(run().clone())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    for value, state in zip((1, 2), expected, strict=True):
        seed.fill_(value)
        graph.replay()
        assert torch.equal(out, state)
    assert not torch.equal(*expected)


@pytest.mark.slow
@needs("40 GB of GPU memory", HAS_DEVICE and torch.cuda.get_device_properties(0).total_memory > 40e9)
def test_a_million_tokens() -> None:
    """x has 2^31 elements and more.

    Decays are strong, so that the last positions depend only on the last thousand.
    """
    given = inputs(length=2**20 + 7, heads=33, groups=1, bias=1.0)
    given["A"] -= 1.0
    assert given["x"].numel() > 2**31
    y, state = scan(given, y_dtype=BFLOAT16)
    last = pieces(given, slice(-1000, None))
    true_y, true_state = recurrence({**last, "state_in": torch.zeros_like(given["state_in"])})
    assert error(y[:, -500:], true_y[:, -500:]) < 2 * error(true_y[:, -500:].to(BFLOAT16), true_y[:, -500:])
    assert error(state, true_state) < 2 * error(true_state.to(BFLOAT16), true_state)


@needs("mamba_ssm", importlib.util.find_spec("mamba_ssm") is not None)
@pytest.mark.parametrize("shape", [SUPER, NANO], ids=["Super", "Nano"])
@pytest.mark.parametrize("length", [1, 300, 4096])
def test_error_is_below_twice_that_of_mamba_ssm(length: int, shape: dict[str, int]) -> None:
    """mamba_ssm's Triton kernels on the same bf16 inputs.

    mamba_chunk_scan_combined, and selective_state_update for one position.
    """
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    given = inputs(length=length, **shape)
    heads, width, size = shape["heads"], shape["width"], shape["size"]
    if length > 1:
        theirs = mamba_chunk_scan_combined(
            given["x"],
            given["dt"],
            given["A"],
            given["B"],
            given["C"],
            128,
            D=given["D"],
            dt_bias=given["dt_bias"],
            initial_states=given["state_in"],
            dt_softplus=True,
            return_final_states=True,
        )
    else:
        state = given["state_in"].clone()
        y = selective_state_update(
            state,
            given["x"][:, 0],
            given["dt"][:, 0, :, None].expand(-1, -1, width),
            given["A"][:, None, None].expand(-1, width, size),
            given["B"][:, 0],
            given["C"][:, 0],
            given["D"][:, None].expand(-1, width),
            dt_bias=given["dt_bias"][:, None].expand(-1, width),
            dt_softplus=True,
        )
        theirs = y.view(1, 1, heads, width), state
    for found, other, true in zip(scan(given, y_dtype=BFLOAT16), theirs, recurrence(given), strict=True):
        assert error(found, true) < max(2 * error(other, true), FLOOR)
