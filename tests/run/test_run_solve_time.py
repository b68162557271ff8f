"""What solving is expected to take: arithmetic by hand on given rates, and what a GPU is counted to do."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from support.places import DEMO
from torch.utils._python_dispatch import TorchDispatchMode

from nemoquant import api
from nemoquant.calibrate.batch import Batch
from nemoquant.formats.registry import ARITHMETIC
from nemoquant.run import solve_time
from nemoquant.run.solve_speeds import SolveSpeeds, solve_speeds
from nemoquant.run.solve_time import solve_seconds
from nemoquant.run.speeds import Speeds
from nemoquant.solve.grids import grid
from nemoquant.solve.metric import gram, gram_products, prepare
from nemoquant.solve.on_device import solve_on

NOTHING = SolveSpeeds(
    weight=0, kernel=0, keep=0, value=0, moment=0, single=np.inf, double=np.inf, factor=np.inf
)
BATCH = Batch(4, 512, "float32")
LAYERS, EXPERTS, LATENT, WIDTH = 4, 16, 96, 256  # MoE layers of the demo model, 4 of 16 experts a token
WEIGHTS = 2 * LAYERS * EXPERTS * LATENT * WIDTH


def seconds(plan, threads=1, device="cpu", **rates):
    speeds = Speeds(
        read=1,
        write=1,
        sync=np.inf,
        hash=1,
        encode={},
        product=1,
        expert=1,
        mixer=0,
        solve=replace(NOTHING, **rates),
    )
    return solve_seconds(plan, BATCH, speeds, threads, device)


@pytest.fixture(scope="module")
def experts():
    """Only experts are solved for, without folds."""
    return api.plan(DEMO, "nvfp4-w4a16", descent=1)


def test_weights_and_their_products_are_done_by_all_threads(experts):
    assert sum(row.elements for row in experts.quantized) == WEIGHTS
    assert seconds(experts, weight=1e-6, kernel=2e-6) == pytest.approx(3e-6 * WEIGHTS)
    assert seconds(experts, threads=4, kernel=2e-6) == pytest.approx(2e-6 * WEIGHTS / 4)
    # plain codes, the method and what it reached once each, a sweep twice
    flop = 5 * LAYERS * EXPERTS * LATENT * WIDTH * (LATENT + WIDTH)
    assert seconds(experts, single=1e9) == pytest.approx(flop / 1e9)
    more = api.plan(DEMO, "nvfp4-w4a16", descent=2)
    assert seconds(more, single=1e9) == pytest.approx(1.4 * flop / 1e9)


def test_errors_of_outputs_take_sweeps_in_two_metrics(experts):
    """By hand: gradients and their moments, sweeps with H and O, two objectives in both."""
    weighed = api.plan(DEMO, "nvfp4-w4a16", descent=1, outputs="loss")

    def more(**rates):
        return seconds(weighed, **rates) - seconds(experts, **rates)

    tokens, count, both = BATCH.tokens * 4 / 16, LAYERS * EXPERTS, LATENT + WIDTH
    assert more(keep=1e-6) == pytest.approx(2 * count * tokens * both * 1e-6), "kept, and hashed"
    assert more(kernel=1e-6) == pytest.approx(1.5e-6 * WEIGHTS)
    assert more(double=1e9) == pytest.approx(count * 2 * tokens * (LATENT**2 + WIDTH**2) / 1e9)
    # a weight: 2 in + 3 out for a sweep, 2 (in + out) for the objectives; up and down together have both
    assert more(single=1e9) == pytest.approx(WEIGHTS / 2 * (5 * both + 4 * both) / 1e9)
    assert more(threads=4, kernel=1e-6) == pytest.approx(1.5e-6 * WEIGHTS / 4)


def test_an_expert_has_second_moments_of_its_own_for_each_projection(experts):
    tokens = BATCH.tokens * 4 / 16
    squares = LATENT**2 + WIDTH**2
    count = LAYERS * EXPERTS
    assert seconds(experts, double=1e9) == pytest.approx(count * 2 * tokens * squares / 1e9)
    assert seconds(experts, moment=1e-6) == pytest.approx(count * squares * 1e-6)
    assert seconds(experts, factor=1e9) == pytest.approx(count * (LATENT**3 + WIDTH**3) / 3 / 1e9)
    values = count * tokens * (LATENT + WIDTH)
    assert seconds(experts, threads=2, value=1e-6) == pytest.approx(values * 1e-6 / 2)
    assert seconds(experts, threads=2, keep=1e-6) == pytest.approx(2 * values * 1e-6), "kept, and hashed"


def test_the_fold_of_latents_multiplies_weights_and_inputs(experts):
    folded = replace(experts, recipe=experts.recipe.model_copy(update={"folds": ["latent"]}))
    tokens, ups = BATCH.tokens * 4 / 16, LAYERS * EXPERTS
    # weights once; of inputs the maxima, what is solved for, and the moments that the matrix is chosen by
    flop = 2 * ups * LATENT**2 * (WIDTH + 3 * tokens)
    assert seconds(folded, double=1e9) - seconds(experts, double=1e9) == pytest.approx(flop / 1e9)


def test_a_dense_weight_has_as_many_threads_as_slices():
    plan = api.plan(DEMO, "nvfp4-full-w4a16", folds=[])
    dense = [row for row in plan.quantized if row.expert is None]
    plan = replace(plan, rows=tuple(dense))
    one = seconds(plan, kernel=1e-6)
    assert one == pytest.approx(1e-6 * sum(row.elements for row in dense))
    assert seconds(plan, threads=4, kernel=1e-6) == one, "each is a single slice"


def test_products_of_second_moments_end_at_the_diagonal():
    assert gram_products(100) == 100 * 100
    assert gram_products(2688) == 1024 * 1024 + 1024 * 2048 + 640 * 2688


def test_nothing_is_expected_where_nothing_is_solved():
    speeds = Speeds(read=1, write=1, sync=1, hash=1, encode={}, product=1, expert=1, mixer=0)
    assert solve_seconds(api.plan(DEMO, "nvfp4", method="max"), BATCH, speeds, 1) == 0


def test_a_gpu_takes_products_and_codes_from_the_host(experts, monkeypatch):
    host = {"weight": 1e-6, "value": 1e-7, "double": 1e9}
    on_gpu = seconds(experts, device="cuda", kernel=1, single=1, factor=1, **host)
    assert on_gpu > seconds(experts, **host), "codes, products and factor are not the host's"
    for name in ("GPU_FLOPS", "GPU_FACTOR", "GPU_BYTES", "GPU_BUS"):
        monkeypatch.setattr(solve_time, name, np.inf)
    launches = LAYERS * EXPERTS * (LATENT + WIDTH) * (10.4 + 11.4) * 5e-6
    assert seconds(experts, device="cuda") == pytest.approx(launches)
    assert seconds(experts, threads=8, device="cuda") == pytest.approx(launches / 8), "experts at once"


FREE = "view slice select expand transpose unsqueeze squeeze t permute _unsafe_view as_strided detach alias "
FREE += "diagonal empty empty_like lift_fresh"
PRODUCTS = ("baddbmm_", "bmm", "linalg_solve_triangular")


class Count(TorchDispatchMode):
    """Operations that are launched, and bytes of tensors that they take and give, products aside."""

    launches, moved = 0, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if name not in FREE.split():
            self.launches += 1
            if name not in PRODUCTS:
                self.moved += sum(map(_size, (*args, result)))
        return result


def _size(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    return sum(map(_size, value)) if isinstance(value, list | tuple) else 0


@contextmanager
def counted() -> Iterator[Count]:
    with Count() as count:
        yield count


@pytest.mark.parametrize(
    ("format", "method", "descent"),
    [
        ("nvfp4", "gptq", 0),
        ("nvfp4", "gptq", 2),
        ("nvfp4", "hess", 1),
        ("fp8", "gptq", 1),
        ("mxfp8", "gptq", 1),
    ],
)
def test_operations_of_the_gpu_are_what_is_counted(format, method, descent):
    random, rows, found = np.random.default_rng(0), 512, []
    scale = ARITHMETIC[format].decode_scale(1.0).value if format != "mxfp8" else np.float32(1)
    widths = (64, 128)
    for width in widths:
        metric = prepare(gram([random.standard_normal((300, width), np.float32)], width), 300, 0.5)
        weight = random.uniform(-1, 1, (rows, width)).astype(np.float32)
        with counted() as count:
            solve_on(torch.device("cpu"), format, weight, scale, metric, method, descent)
        found.append(count)
    more = widths[1] - widths[0]
    launches = (found[1].launches - found[0].launches) / more
    moved = (found[1].moved - found[0].moved) / more / rows
    numbers = grid(format, scale)
    assert launches == pytest.approx(
        solve_time.LAUNCHES[method] + descent * solve_time.SWEEP_LAUNCHES, rel=0.25
    )
    said = solve_time.BYTES[method] + numbers.four * solve_time.SEARCH_BYTES[method]
    said += descent * (solve_time.SWEEP_BYTES + solve_time.TRIAL_BYTES * (2 * numbers.reach + 1))
    assert moved == pytest.approx(said, rel=0.25)


def test_every_step_is_measured(experts):
    found = solve_speeds(experts, 2, busy=True)
    assert all(rate > 0 for rate in vars(found).values())
    assert found.single > 1e8 and found.weight < 1e-4
