"""Memory that packing holds and disk space of hidden states, by hand: both are promised to the user."""

import shutil
from collections import namedtuple

import pytest

from nemoquant.api import RunOptions, plan, quantize
from nemoquant.calibrate.batch import Batch
from nemoquant.errors import CalibrationError, OutputError
from nemoquant.run.budget import pack_bytes

WAITING = (
    2 * 8 * (4 << 20)
)  # two queues, for hashing and writing, of 8 pieces: codes of 8 MiB of bf16 at most
IN_PROJ = (64 + 64 + 2 * 2 * 16 + 4) * 64 // 16  # rows z, x, B and C, dt; a scale for 16 of 64 columns
EXPERTS = 8 * 48 * 32 // 16  # of one layer and projection together


@pytest.mark.parametrize(
    ("preset", "blocks"),
    [("fp8", 0), ("nvfp4", EXPERTS), ("nvfp4-w4a16", EXPERTS), ("nvfp4-full", IN_PROJ)],
    ids=["no block scales", "all experts of a unit", "the same, weights only", "a larger single tensor"],
)
def test_packing_holds_what_waits_and_one_unit_of_block_scales(preset, blocks, source):
    assert IN_PROJ == 784 and EXPERTS == 768
    assert pack_bytes(plan(source, preset)) == WAITING + blocks


@pytest.mark.parametrize(("dtype", "item"), [("float32", 4), ("bfloat16", 2)])
def test_hidden_states_are_two_files_of_all_rows(dtype, item):
    assert Batch(8, 32, dtype).hidden_bytes(64) == 2 * 8 * 32 * 64 * item
    assert Batch(8, 32, dtype).of(1).hidden_bytes(64) == 2 * 32 * 64 * item


@pytest.mark.parametrize(("dtype", "item"), [("float32", 4), ("bfloat16", 2)])
def test_the_disk_has_room_for_them_or_the_run_is_refused(dtype, item, source, tmp_path, monkeypatch):
    """Exact to the byte. With enough space the next error is the tokenizer, missing for the shipped text."""
    made = plan(source, "fp8")
    needed = made.bytes_out + 600 * made.tensors_out + (64 << 20) + 2 * 5 * 48 * 64 * item
    usage = namedtuple("usage", "total used free")

    def run(free):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 0, free))
        quantize(source, tmp_path / "out", "fp8", RunOptions(method="max", rows=5, seq_len=48, dtype=dtype))

    with pytest.raises(CalibrationError, match=r"tokenizer\.json does not exist"):
        run(needed)
    with pytest.raises(OutputError, match="GB needed"):
        run(needed - 1)
    assert not list(tmp_path.glob("out*"))
