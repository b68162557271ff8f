"""What solving is said to take: memory against a measured peak, and disk by hand."""

import ctypes
import subprocess
import sys

import pytest
from support.places import DEMO, ROOT

from nemoquant import api
from nemoquant.calibrate.batch import Batch
from nemoquant.calibrate.memory import batch_bytes
from nemoquant.machine import resident, trim_heap
from nemoquant.solve.memory import (
    coupled_rows,
    fold_bytes,
    graded_bytes,
    input_bytes,
    solve_bytes,
    solved_bytes,
    stream_bytes,
)

WIDTH, OUT = 2048, 1024
MEASURE = f"""
import numpy as np
from nemoquant.machine import resident
from nemoquant.solve.metric import gram, prepare
from nemoquant.solve.solver import solve
from nemoquant.solve.targets import cross, writer_target

small = np.random.default_rng(0).standard_normal((64, 64), np.float32)
solve("nvfp4", small, np.float32(0.001), prepare(gram([small], 64), 64, 0.5), "gptq", 1)
before = resident()
x = np.random.default_rng(0).standard_normal((256, {WIDTH}), np.float32)
weight = np.random.default_rng(1).standard_normal(({OUT}, {WIDTH}), np.float32)
moments = gram([x], {WIDTH})
metric = prepare(moments, 256, 0.5)
if PROPAGATES:
    made = writer_target(moments, cross([(x[:, :{OUT}], x)], {OUT}, {WIDTH}), 0.5)
    del moments
    target = made(weight)
    solve("nvfp4", target, np.float32(0.002), metric, "gptq", 1)
else:
    del moments
    solve("nvfp4", weight, np.float32(0.002), metric, "gptq", 1)
print(resident("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("propagate", ["source", "quantized"])
def test_the_peak_of_one_weight_is_within_what_is_said(propagate):
    from dataclasses import replace

    plan = api.plan(DEMO, "nvfp4-full", folds=[], propagate=propagate)
    (row,) = [row for row in plan.quantized if row.name.endswith("layers.0.mixer.out_proj.weight")]
    wide = replace(plan, rows=(replace(row, shape=(OUT, WIDTH)),))
    module, said = solve_bytes(wide, threads=1)
    assert module == row.module
    took = subprocess.run(
        [sys.executable, "-c", f"PROPAGATES = {plan.propagates}\n{MEASURE}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert said / 3 < int(took.stdout) < said


def test_the_disk_for_what_waits():
    plan = api.plan(DEMO, "nvfp4-w4a16")
    batch = Batch(32, 512, "float32")
    # a token's inputs of 4 experts of 16: 96 latent channels, 256 of the experts
    assert input_bytes(plan, batch) == 32 * 512 * 4 * 4 * (96 + 256)
    assert solved_bytes(plan) == sum(row.bytes_out for row in plan.quantized)
    assert solved_bytes(api.plan(DEMO, "nvfp4", method="max")) == 0


def test_gradients_of_the_loss_are_counted():
    plan = api.plan(DEMO, "nvfp4-w4a16", outputs="loss")
    batch = Batch(32, 512, "float32")
    # between layers, with one file more while it is replaced; at outputs of 4 experts of 16
    between = (len(plan.config.layers) + 2) * plan.config.hidden_size
    assert graded_bytes(plan, batch) == 32 * 512 * 4 * (between + 4 * (96 + 256))
    assert graded_bytes(api.plan(DEMO, "nvfp4-w4a16"), batch) == 0
    config = ROOT / "tests/configs/super-120b-a12b.json"
    plain, weighed = (solve_bytes(api.plan(config, "nvfp4-full", outputs=o), 2)[1] for o in ("equal", "loss"))
    assert plain < weighed < 2 * plain


def test_many_outputs_are_weighed_in_equal_parts():
    assert [coupled_rows(out) for out in (1, 2048, 2049, 18_560)] == [1, 2048, 1025, 1856]


def test_experts_are_counted_by_thread_and_dense_weights_once():
    plan = api.plan(ROOT / "tests/configs/super-120b-a12b.json", "nvfp4")
    module, one = solve_bytes(plan, threads=1)
    assert module.endswith("mixer.out_proj")
    assert one < solve_bytes(plan, threads=2)[1] < 2 * one
    many, memory = solve_bytes(plan, threads=32)
    assert ".experts." in many and memory > 4 * one


def test_folds_alone_are_counted_too():
    """With a method that needs no inputs nothing is solved, and the folds' matrices are kept all the same."""
    config = ROOT / "tests/configs/super-120b-a12b.json"
    plan = api.plan(config, "nvfp4-full", method="max", folds=["latent", "norm"])
    assert solve_bytes(plan, threads=2) == ("", 0)
    module, memory = fold_bytes(plan)
    (row,) = [row for row in plan.quantized if row.module == module]
    assert row.bytes_in == max(other.bytes_in for other in plan.quantized)
    layers = sum(kind == "moe" for kind in plan.config.layers)
    assert memory > 2 * row.bytes_in + layers * 2 * 4 * plan.config.moe_latent_size**2
    assert fold_bytes(api.plan(config, "nvfp4-full", folds=[])) == ("", 0)


CHOOSE = """
import numpy as np
from nemoquant.machine import resident
from nemoquant.solve.folds.choose import energy
from nemoquant.solve.source import floats

weight = np.full((16384, 1024), 0x3f80, np.uint16)
energy(weight[:512])
before = resident("VmHWM")
energy(weight)
chosen = resident("VmHWM") - before
floats(weight)
print(chosen / weight.size, (resident("VmHWM") - before) / weight.size)
"""


def test_a_weight_is_not_copied_more_than_is_said():
    """Choosing a fold takes blocks of rows; a weight becomes float32 without another copy."""
    result = subprocess.run(
        [sys.executable, "-c", CHOOSE], cwd=ROOT, capture_output=True, text=True, check=True
    )
    chosen, widened = map(float, result.stdout.split())
    assert chosen < 0.7 and widened < 4.7


def test_the_quantized_stream_takes_memory_beside_a_layer():
    """By hand: the router's input three times, what is lacking, and the widest input that all tokens have."""
    plan = api.plan(DEMO, "nvfp4-full")
    hidden, widest = plan.config.hidden_size, max(r.shape[1] for r in plan.quantized if r.expert is None)
    assert stream_bytes(plan, 4) == 12 * hidden + 16 * hidden + 4 * widest
    assert stream_bytes(api.plan(DEMO, "nvfp4"), 4) == 0
    batch = Batch(1, 512, "float32")
    alone = batch_bytes(plan.config, "moe", batch)
    assert batch_bytes(plan.config, "moe", batch, stream_bytes(plan, 4)) == alone + 512 * stream_bytes(
        plan, 4
    )


def test_freed_memory_goes_back_to_the_system():
    """Blocks below one that is kept stay with the heap until then."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    *blocks, kept = [libc.malloc(20_000) for _ in range(3000)]
    for block in [*blocks, kept]:
        ctypes.memset(block, 1, 20_000)
    for block in blocks:
        libc.free(block)
    before = resident()
    trim_heap()
    assert before - resident() > 50_000_000
    libc.free(kept)
