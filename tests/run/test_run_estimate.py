"""The estimate before a run: seconds from given speeds, against arithmetic by hand, and sizes."""

import threading
import time

import pytest
import torch

from nemoquant import api
from nemoquant.calibrate.batch import Batch
from nemoquant.run import speeds
from nemoquant.run.budget import Budget, budget
from nemoquant.run.estimate import estimate_run
from nemoquant.run.speeds import Speeds
from nemoquant.sources.source import open_source

BATCH = Batch(8, 32, "float32")
SPEEDS = Speeds(
    read=1e9,
    write=1e9,
    sync=5e8,
    hash=2e8,
    encode={("nvfp4", "max"): 1e8, ("fp8", "max"): 4e8},
    product=1e12,
    expert=1e11,
    mixer=1e-5,
)


@pytest.fixture
def estimated(source, monkeypatch):
    """An estimate from ``SPEEDS`` (or changed ones) for 8 rows of 32 tokens, 4 at once, and its plan."""

    def make(preset, threads=2, **changes):
        from dataclasses import replace

        from nemoquant.run import estimate as module

        monkeypatch.setattr(module, "measure", lambda *arguments, **named: replace(SPEEDS, **changes))
        opened = open_source(source)
        with opened.checkpoint:
            plan = api.plan(source, preset, method="max")
            batch = BATCH if plan.needs_calibration else None
            chosen = Budget(10**9, {"mamba": 4, "moe": 8, "attention": 4, "mlp": 4} if batch else None, 6)
            return estimate_run(opened.checkpoint, plan, source.parent, batch, chosen, threads=threads), plan

    return make


def test_packing_waits_for_the_slowest(estimated):
    found, plan = estimated("nvfp4-w4a16", hash=1e5)
    assert found.calibrate == 0
    assert found.pack == pytest.approx(plan.bytes_out / 1e5)
    found, plan = estimated("nvfp4-w4a16", hash=1e15, write=1e15, sync=1e15, read=1e15)
    quantized = sum(2 * row.elements for row in plan.quantized)
    assert found.pack == pytest.approx(quantized / 1e8 / 2, rel=1e-3)  # two threads encode
    assert estimated("nvfp4-w4a16", threads=1, hash=1e15, write=1e15, sync=1e15, read=1e15)[
        0
    ].pack == pytest.approx(2 * found.pack, rel=1e-3)


def test_calibration_is_products_mixers_and_weights_read_once_a_batch(estimated):
    """8 x 32 tokens; 2 of 8 experts a token; M*E-ME; MoE layers in one batch, the others in two."""
    found, _ = estimated("nvfp4")
    h, inner, bc, heads, latent = 64, 64, 2 * 16, 4, 32
    mamba = h * (2 * inner + 2 * bc + heads) + inner * h
    attention = h * (4 + 2 + 2) * 16 + 64 * h
    mlp = 2 * 96 * h
    dense_moe = 8 * h + 2 * latent * h + 2 * 80 * h
    experts = 8 * 2 * 48 * latent
    tokens = 8 * 32
    products = 2 * tokens * (2 * mamba + attention + mlp + 2 * dense_moe) / 1e12
    products += 2 * tokens * 2 / 8 * 2 * experts / 1e11
    reading = 2 * (2 * (2 * mamba + attention + mlp) + (2 * dense_moe + 2 * experts)) / 1e9
    assert found.calibrate == pytest.approx(products + reading + 2 * tokens * 1e-5, rel=0.01)


def test_disk_and_verify(estimated):
    found, plan = estimated("fp8")
    assert found.disk >= plan.bytes_out + 2 * 8 * 32 * 64 * 4, "both files of hidden states"
    assert found.disk < plan.bytes_out + (200 << 20)
    assert found.verify == pytest.approx(plan.bytes_out / 2e8 + 50e-6 * plan.tensors_out)


def test_a_chosen_row_batch_is_kept(source):
    plan, given = api.plan(source, "fp8"), {"mamba": 1, "moe": 2, "attention": 3, "mlp": 4}
    assert budget(plan, BATCH, memory=None, row_batch=3, threads=1).row_batch == 3
    assert budget(plan, BATCH, memory=None, row_batch=given, threads=1).row_batch["moe"] == 2
    assert budget(plan, None, memory=None, row_batch=None, threads=1).row_batch is None


def test_a_gpu_is_measured_with_all_threads_and_fed_through_their_memory(source, monkeypatch):
    """The stand-in is a GPU that takes chunks one at a time, 10 ms each; its products are the CPU's."""
    one_at_a_time, asked = threading.Lock(), set()

    def pack_weights(*given):
        asked.add(given[2])
        with one_at_a_time:
            time.sleep(0.01)

    monkeypatch.setattr(speeds, "pack_weights", pack_weights)
    monkeypatch.setattr("nemoquant.run.compute_speeds.torch_device", lambda device: torch.device("cpu"))
    opened, plan = open_source(source), api.plan(source, "fp8", method="max")
    with opened.checkpoint:
        found = speeds.measure(
            opened.checkpoint, plan, source.parent, BATCH, row_batch=4, threads=2, device="cuda"
        )
    assert asked == {"cuda"}
    largest = max(row.bytes_in for row in plan.quantized)
    assert 0 < max(found.encode.values()) <= largest / (2 * 0.01), (
        "a thread's share: each waits for the other"
    )
    cpu, gpu = (
        budget(plan, None, memory=None, row_batch=None, threads=3, device=device).memory
        for device in ("cpu", "cuda")
    )
    assert gpu - cpu == 3 * 3 * (8 << 20), (
        "three threads: a chunk of 8 MiB, twice that as float32, and its codes"
    )
