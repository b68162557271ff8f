"""Who the source is: a byte that changed, in whatever way, is seen before a model is made of two."""

import errno
import json
import mmap
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from support.commands import nemoquant
from support.files import tree
from support.stops import stopped_after
from support.tampering import changed_copy, overwrite

from nemoquant.api import RunOptions, diff, quantize
from nemoquant.checkpoint import intact, lost_pages
from nemoquant.checkpoint.identity import UnitHash, hash_unit, piece_hash, pieces, unit_name, units_of
from nemoquant.checkpoint.reader import Checkpoint
from nemoquant.errors import (
    CheckpointError,
    Interrupted,
    OutputError,
    SourceChangedError,
    UsageError,
    WeightError,
)
from nemoquant.pack import write
from nemoquant.pack.verify import verify
from nemoquant.run.unfinished import FOLDER, STATE
from nemoquant.sources.source import open_weights

EXPERT = "backbone.layers.2.mixer.experts.3.up_proj.weight"
EXPERTS = "backbone.layers.2.mixer.experts.up_proj.weight"
HEAD = "lm_head.weight"


@pytest.fixture
def own(source, tmp_path):
    """A copy of the source that a test may change."""
    return shutil.copytree(source, tmp_path / "own")


def flip(folder, name, at=0):
    """Change the lowest bit of a tensor's byte in its file."""
    overwrite(folder, name, lambda data: data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])


def make(source, token_rows, out, preset="nvfp4", *, resume=False, said=None, **options):
    options = {"data": token_rows, "dtype": "float32", "threads": 1, "shard_bytes": 30_000} | options
    said = [] if said is None else said
    return quantize(source, out, preset, RunOptions(method="max", resume=resume, **options), say=said.append)


# The hash.


def test_a_unit_is_hashed_as_the_formula_says(source):
    import xxhash

    with Checkpoint(source) as checkpoint:
        members = [n for n in checkpoint.tensors if unit_name(n) == EXPERTS]
        assert len(members) > 1
        tensors = [xxhash.xxh3_128(xxhash.xxh3_128_digest(checkpoint.raw(n).tobytes())) for n in members]
        expected = xxhash.xxh3_128(b"".join(t.digest() for t in tensors)).hexdigest()
        assert hash_unit(checkpoint, members) == expected


@pytest.mark.parametrize("size", [1, 64, 100, 1 << 30])
def test_pieces_cover_a_tensor_in_whole_rows(size, monkeypatch):
    from nemoquant.checkpoint import identity

    monkeypatch.setattr(identity, "PIECE_BYTES", size)
    for shape, nbytes in (((7, 10), 140), ((5,), 20), ((), 4), ((3, 0), 0), ((1, 900), 1800)):
        parts = list(pieces(shape, nbytes))
        assert [begin for begin, _ in parts] == [0, *(end for _, end in parts[:-1])][: len(parts)]
        assert (parts[-1][1] if parts else 0) == nbytes
        row = nbytes // shape[0] if shape and nbytes else 1
        assert all(
            begin % row == 0 and (end - begin <= size or end - begin == row or not shape)
            for begin, end in parts
        )


def test_packing_and_reading_give_the_same_hashes(source, token_rows, tmp_path, monkeypatch):
    """In pieces of a few rows: the packer's order of pieces is that of the file."""
    from nemoquant.checkpoint import identity

    monkeypatch.setattr(identity, "PIECE_BYTES", 1000)
    out = make(source, token_rows, tmp_path / "out").out
    stored = json.loads((out / "nemoquant.json").read_text())["source"]["units"]
    with Checkpoint(source) as checkpoint:
        units = units_of(checkpoint.tensors)
        assert stored == {name: hash_unit(checkpoint, tensors) for name, tensors in units.items()}
    scales = json.loads((out / "nemoquant_scales.json").read_text())["units"]
    assert scales == {k: v for k, v in stored.items() if not k.startswith("mtp.") and k != HEAD}


def test_hashes_do_not_depend_on_files(source, tmp_path):
    whole = changed_copy(source, tmp_path / "whole", lambda tensors: None)
    with Checkpoint(source) as a, Checkpoint(whole) as b:
        for name, tensors in units_of(a.tensors).items():
            assert hash_unit(a, tensors) == hash_unit(b, tensors), name


def test_boundaries_of_tensors_count():
    def digest(*tensors):
        unit = UnitHash()
        for tensor in tensors:
            for piece in tensor:
                unit.piece(piece_hash(piece))
            unit.end_tensor()
        return unit.hexdigest()

    assert len({digest([b"a", b"b"]), digest([b"a"], [b"b"]), digest([b"ab"]), digest([b"b", b"a"])}) == 4


# Across runs.


def test_damaged_weights_offer_no_resume(own, token_rows, tmp_path):
    """What was made before the NaN was found is not of the repaired source."""
    repaired = shutil.copytree(own, tmp_path / "repaired")
    overwrite(own, EXPERT, np.float32(np.nan).view(np.uint32).astype("<u4").tobytes()[2:], at=6)
    with pytest.raises(WeightError, match=r"has NaN.*nothing was kept") as error:
        make(own, token_rows, tmp_path / "out")
    assert "--resume" not in str(error.value)
    assert not (tmp_path / "out.partial").exists()
    said = []
    make(repaired, token_rows, tmp_path / "out", resume=True, said=said)
    assert said == ["nothing to go on with, beginning anew"]
    make(repaired, token_rows, tmp_path / "whole")
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


@pytest.mark.parametrize("shards", [0, 3])
@pytest.mark.parametrize("name", [EXPERT, "backbone.layers.0.mixer.in_proj.weight"])
def test_a_repaired_source_is_not_gone_on_with(name, shards, own, token_rows, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        stopped_after(shards, patch)
        make(own, token_rows, tmp_path / "out")
    flip(own, name)
    before = tree(tmp_path / "out.partial")
    says = (
        rf"begun with other weights than .*1 of \d+ tensors or groups .*{unit_name(name)}.*remove the folder"
    )
    with pytest.raises(UsageError, match=says):
        make(own, token_rows, tmp_path / "out", resume=True)
    assert tree(tmp_path / "out.partial") == before
    flip(own, name)
    make(own, token_rows, tmp_path / "out", resume=True)
    make(own, token_rows, tmp_path / "whole")
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_what_nothing_was_made_from_may_change(own, token_rows, tmp_path, monkeypatch):
    """The head comes last: calibration does not read its weight, and no shard has it yet."""
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        stopped_after(1, patch)
        make(own, token_rows, tmp_path / "out")
    flip(own, HEAD)
    make(own, token_rows, tmp_path / "out", resume=True)
    make(own, token_rows, tmp_path / "whole")
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


GROUP = "backbone.layers.1.mixer"
ATTENTION = """
name: attention
summary: Attention only.
rules:
  - {roles: [attention.*_proj], format: nvfp4, activations: none}
  - {roles: ["*"], format: source}
"""


@pytest.mark.parametrize("member", ["k_proj", "v_proj"])
def test_a_scale_is_made_from_its_whole_group(member, own, tmp_path, monkeypatch):
    """q is written, with the scale of q, k and v: the run must not go on with another k or v."""
    recipe, packed = tmp_path / "recipe.yaml", write.Packer.write
    recipe.write_text(ATTENTION)

    def run(out, *, resume=False):
        quantize(own, out, recipe, RunOptions(threads=1, shard_bytes=1, resume=resume))

    def until_q(self, path, shard):
        if shard.units[0].rows[0].module == f"{GROUP}.k_proj":
            raise KeyboardInterrupt
        return packed(self, path, shard)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(write.Packer, "write", until_q)
        run(tmp_path / "out")
    flip(own, f"{GROUP}.{member}.weight")
    with pytest.raises(UsageError, match=rf"begun with other weights than .*1 of .*{member}"):
        run(tmp_path / "out", resume=True)
    flip(own, f"{GROUP}.{member}.weight")
    run(tmp_path / "out", resume=True)
    run(tmp_path / "whole")
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_kept_shards_are_hashed_once(source, token_rows, tmp_path, monkeypatch):
    """When the run is taken up; that verifies them at its end is another matter."""
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        stopped_after(2, patch)
        make(source, token_rows, tmp_path / "out")
    read, problem = [], intact.Hashing._problem
    monkeypatch.setattr(intact.Hashing, "_problem", lambda *a: (read.append(a[1].name), problem(*a))[1])
    stopped_after(0, monkeypatch)
    with pytest.raises(Interrupted):
        make(source, token_rows, tmp_path / "out", resume=True)
    assert sorted(name[:11] for name in read) == ["model-00001", "model-00002"]


def test_damaged_scales_in_a_partial_folder(own, token_rows, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        stopped_after(1, patch)
        make(own, token_rows, tmp_path / "out")
    file = tmp_path / "out.partial/nemoquant_scales.json"
    text = file.read_text()
    file.write_text(text.replace("0.", "1.", 1))
    assert file.read_text() != text
    with pytest.raises(OutputError, match=r"nemoquant_scales\.json is damaged: its sha256 is not"):
        make(own, token_rows, tmp_path / "out", resume=True)


def test_scales_of_another_model_are_told(source, token_rows, tmp_path):
    """A merge changes matrices only; their norms and SSM parameters are the same."""
    scales = make(source, token_rows, tmp_path / "base").out / "nemoquant_scales.json"
    merged = changed_copy(source, tmp_path / "merged", lambda t: t[EXPERT][0].mul_(2))
    made = make(merged, None, tmp_path / "out", scales=scales, dtype=None)
    warning = made.warnings[0]
    assert f"{scales} was made from other weights than {merged}: 1 of " in warning
    assert EXPERTS in warning and "calibrate again without --scales" in warning
    assert "other weights" in (made.out / "README.md").read_text()
    assert warning in json.loads((made.out / "nemoquant.json").read_text())["warnings"]
    again = make(source, None, tmp_path / "again", scales=scales, dtype=None)
    assert not again.warnings


def test_scales_that_do_not_say_what_they_are_of_are_told(source, token_rows, tmp_path):
    scales = make(source, token_rows, tmp_path / "base").out / "nemoquant_scales.json"
    scales.write_text(json.dumps(json.loads(scales.read_text()) | {"units": {}}))
    made = make(source, None, tmp_path / "out", scales=scales, dtype=None)
    assert "was made from other weights" in made.warnings[0]


def test_a_finished_output_with_scales_of_another_model(source, token_rows, tmp_path):
    """A run that calibrates would not have made it."""
    scales = make(source, token_rows, tmp_path / "base").out / "nemoquant_scales.json"
    merged = changed_copy(source, tmp_path / "merged", lambda t: t[EXPERT][0].mul_(2))
    out = make(merged, None, tmp_path / "out", scales=scales, dtype=None).out
    with pytest.raises(UsageError, match=rf"out has scales of other weights than .*1 of .*{EXPERTS}"):
        make(merged, token_rows, out, resume=True)
    make(merged, None, out, scales=scales, dtype=None, resume=True)


@pytest.mark.parametrize("text", ["{", "larger"])
def test_given_scales_are_written_again(text, source, token_rows, tmp_path, monkeypatch):
    """The state has no hash of them: whatever a killed run left of its copy is not used."""
    scales = make(source, token_rows, tmp_path / "base").out / "nemoquant_scales.json"
    given = {"scales": scales, "dtype": None}
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        stopped_after(1, patch)
        make(source, None, tmp_path / "out", **given)
    copy = tmp_path / "out.partial/nemoquant_scales.json"
    copy.write_text(text if text == "{" else copy.read_text().replace("0.", "1.", 1))
    assert copy.read_text() != scales.read_text()
    out = make(source, None, tmp_path / "out", resume=True, **given).out
    assert (out / copy.name).read_text() == scales.read_text()


def test_a_name_that_is_not_utf8(own, token_rows, tmp_path):
    """Of the rows' file and of one that is left out: both are in the manifest, the first in the state too."""
    rows = tmp_path / os.fsdecode(b"caf\xe9.npy")
    shutil.copy(token_rows, rows)
    (own / os.fsdecode(b"caf\xe9.txt")).write_text("")
    out = make(own, rows, tmp_path / "out").out
    data = json.loads((out / "nemoquant.json").read_text())
    assert data["calibration"]["data"] == "caf\\udce9.npy"
    assert "caf\\udce9.txt" in data["skipped_side_files"]
    assert verify(out, open_weights(own, "")).ok
    make(own, rows, tmp_path / "out", resume=True)


def test_verify_against_is_exact(own, token_rows, tmp_path):
    """A change that rounds away gives the same codes, and is another source all the same."""
    out = make(own, token_rows, tmp_path / "out").out
    for name in (EXPERT, "backbone.layers.0.norm.weight"):
        flip(own, name)
        source = open_weights(own, "")
        problems = verify(out, source).problems
        assert any(f"{own} is not the source: 1 of " in text and unit_name(name) in text for text in problems)
        flip(own, name)
    assert verify(out, open_weights(own, "")).ok


def test_a_diff_with_another_source(own, token_rows, tmp_path, monkeypatch):
    """It is said before the candidate's layer is computed, and before its shards are hashed to the end."""
    from nemoquant.checkpoint.intact import Reading
    from nemoquant.evaluate import run

    layers, layer = [], run._layer

    def computed(side, source, before, stage, what):
        layers.append(stage.layer)
        layer(side, source, before, stage, what)

    out = make(own, token_rows, tmp_path / "out").out
    options = {"data": token_rows, "threads": 1}
    diff(own, [out], **options)
    monkeypatch.setattr(run, "_layer", computed)
    monkeypatch.setattr(Reading, "finish", lambda *_: pytest.fail("it waits"))
    for name in (EXPERT, "mtp.layers.0.eh_proj.weight", HEAD):
        layers.clear()
        flip(own, name)
        before = tree(out)
        with pytest.raises(
            CheckpointError, match=rf"made from another source than .*1 of .*{unit_name(name)}"
        ):
            diff(own, [out], **options)
        assert tree(out) == before
        assert (int(EXPERT.split(".")[2]) in layers) is (name != EXPERT)
        flip(own, name)


def test_a_source_that_changes_while_heads_are_compared(own, token_rows, tmp_path, monkeypatch):
    from nemoquant.evaluate import run

    out = make(own, token_rows, tmp_path / "out").out
    compared = run.compare_heads

    def changed(*arguments):
        flip(own, HEAD)
        return compared(*arguments)

    monkeypatch.setattr(run, "compare_heads", changed)
    with pytest.raises(SourceChangedError, match="written to meanwhile"):
        diff(own, [out], data=token_rows, threads=1)


# Within one run.


def shard_of(folder, name):
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return folder / index["weight_map"][name]


def rewritten(folder):
    flip(folder, HEAD)


def replaced(folder):
    shard = shard_of(folder, HEAD)
    copy = shard.with_name("copy")
    shutil.copy2(shard, copy)
    copy.replace(shard)


def removed(folder):
    shard_of(folder, HEAD).unlink()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (rewritten, "it was written to meanwhile"),
        (replaced, "another file has its name now"),
        (removed, "it can't be opened any more"),
    ],
)
@pytest.mark.parametrize("where", ["calibration", "packing", "the last shard"])
def test_a_source_that_changes_during_the_run(change, says, where, own, token_rows, tmp_path, monkeypatch):
    from nemoquant.calibrate import run

    with monkeypatch.context() as patch:
        if where == "calibration":
            layer = run._Run.layer
            patch.setattr(
                run._Run, "layer", lambda self, i, *rest: (i == 2 and change(own), layer(self, i, *rest))[1]
            )
        elif where == "packing":
            stopped_after(2, patch, lambda: own.exists() and change_once(change, own))
        else:
            from nemoquant.run import write as writing

            check = writing.verify
            patch.setattr(writing, "verify", lambda *a, **k: (check(*a, **k), change(own))[0])
        with pytest.raises(SourceChangedError, match=rf"changed while it was read: {says}.*is kept"):
            make(own, token_rows, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.partial" / FOLDER / STATE).is_file()


def change_once(change, folder, done=set()):  # noqa: B006  one call for each folder
    if folder not in done:
        done.add(folder)
        change(folder)


def flip_secretly(folder, name):
    """Size, time and inode are as before."""
    shard = shard_of(folder, name)
    status = shard.stat()
    flip(folder, name)
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_a_file_that_is_being_written_is_not_called_damaged(own, token_rows, tmp_path, monkeypatch):
    """NaN of a copy in progress: the run is kept, and its source is not said to be damaged."""
    from nemoquant.calibrate import run

    name, layer, done = "backbone.layers.2.mixer.gate.weight", run._Run.layer, 0

    def half_written(*arguments):
        nonlocal done
        done += 1
        if done == 3:
            overwrite(own, name, lambda data: b"\xff" * len(data))
        return layer(*arguments)

    shard = shard_of(own, name)
    before = shard.read_bytes()
    with monkeypatch.context() as patch, pytest.raises(SourceChangedError, match="--resume goes on"):
        patch.setattr(run._Run, "layer", half_written)
        make(own, token_rows, tmp_path / "out")
    shard.write_bytes(before)
    make(own, token_rows, tmp_path / "out", resume=True)
    make(own, token_rows, tmp_path / "whole")
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_a_source_that_changes_once_the_output_has_its_name(own, token_rows, tmp_path, monkeypatch):
    monkeypatch.setattr("nemoquant.checkpoint.making.clear", lambda out: flip(own, HEAD))
    assert make(own, token_rows, tmp_path / "out").verified


def test_a_source_disk_that_fails_is_not_the_outputs(own, token_rows, tmp_path, monkeypatch):
    read = os.preadv

    def fail(file, *rest):
        if Path(f"/proc/self/fd/{file}").readlink().parent == own:
            raise OSError(errno.EIO, "Input/output error")
        return read(file, *rest)

    with monkeypatch.context() as patch, pytest.raises(CheckpointError) as error:
        patch.setattr(os, "preadv", fail)
        make(own, token_rows, tmp_path / "out")
    assert re.match(rf"{own}/model-\S+ cannot be read \(Input/output error\)", str(error.value))


def test_a_change_that_hides_its_time(own, token_rows, tmp_path, monkeypatch):
    """Only the hashes of calibration and packing differ."""
    with monkeypatch.context() as patch:
        stopped_after(0, patch, lambda: change_once(lambda folder: flip_secretly(folder, EXPERT), own))
        with pytest.raises(
            SourceChangedError,
            match=rf"is not the same for calibration and packing, or on all nodes: .*{EXPERTS}",
        ):
            make(own, token_rows, tmp_path / "out")
    state = json.loads((tmp_path / "out.partial" / FOLDER / STATE).read_text())["state"]
    assert not any(EXPERTS in entry["units"] for entry in state["shards"].values())
    with pytest.raises(UsageError, match=rf"begun with other weights than .*{EXPERTS}"):
        make(own, token_rows, tmp_path / "out", resume=True)
    flip(own, EXPERT)  # as it was when it was calibrated
    make(own, token_rows, tmp_path / "out", resume=True)
    make(own, token_rows, tmp_path / "whole")
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


@pytest.mark.parametrize("member", ["q_proj", "v_proj"])
def test_a_change_between_a_scale_and_its_codes(member, own, tmp_path, monkeypatch):
    """As where two nodes of a cluster read copies that differ."""
    name, encode = f"{GROUP}.{member}.weight", write.encode
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(ATTENTION)

    def changed(*arguments):
        change_once(lambda folder: flip_secretly(folder, name), own)
        return encode(*arguments)

    monkeypatch.setattr(write, "encode", changed)
    with pytest.raises(SourceChangedError, match=rf"{name} had other bytes for its scale than for its codes"):
        quantize(own, tmp_path / "out", recipe, RunOptions(threads=1, shard_bytes=1))
    assert not (tmp_path / "out").exists()


def test_a_change_while_a_finished_layer_is_hashed(own, token_rows, tmp_path, monkeypatch):
    """The hash is that of the new bytes: the layer, computed on the old ones, must not be kept with it."""
    from nemoquant.checkpoint.identity import Ahead

    def take(self, key):
        if key == 2:
            flip(own, EXPERT)
        groups = self._groups[key].items()
        return {name: hash_unit(self._checkpoint, tensors) for name, tensors in groups}

    with monkeypatch.context() as patch:
        patch.setattr(Ahead, "begin", lambda self, key: None)
        patch.setattr(Ahead, "take", take)
        with pytest.raises(SourceChangedError, match=r"written to meanwhile.*\(2 layers calibrated\)"):
            make(own, token_rows, tmp_path / "out")
    make(own, token_rows, tmp_path / "out", resume=True)
    make(own, token_rows, tmp_path / "whole")
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


TRUNCATED = """
import os, sys
from pathlib import Path
from nemoquant.calibrate import run
from nemoquant.pack import write

shard, where = Path(sys.argv.pop(1)), sys.argv.pop(1)
place, name = {"calibration": (run, "observe"), "packing": (write.Packer, "_quantize")}[where]
inner = getattr(place, name)

def cut(*arguments, **options):
    if shard.stat().st_size > 8192:
        os.truncate(shard, 8192)
    return inner(*arguments, **options)

setattr(place, name, cut)
from nemoquant.cli import main
main()
"""


@pytest.mark.parametrize("where", ["calibration", "packing"])
def test_a_source_that_shrinks(where, own, token_rows, tmp_path):
    """No SIGBUS: a line that names the file, exit code 2, and the state is kept."""
    shard = shard_of(own, "backbone.layers.0.mixer.in_proj.weight")
    whole = shard.read_bytes()
    out = tmp_path / "out"
    options = [
        "--fmt",
        "nvfp4",
        "--method",
        "max",
        "--calib",
        token_rows,
        "--compute",
        "float32",
        "--threads",
        "1",
    ]
    command = [sys.executable, "-c", TRUNCATED, shard, where, "quantize", own, out, *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2, (done.returncode, done.stderr)
    line = done.stderr.splitlines()[-1]
    assert line.startswith(f"error: {shard} ") and ("and has 8,192" in line or "ends within" in line), line
    assert not out.exists()
    kept = where == "packing"
    assert (tmp_path / "out.partial" / FOLDER / STATE).is_file() is kept
    shard.write_bytes(whole)
    nemoquant("quantize", own, out, *options, *(["--resume"] if kept else []))
    assert verify(out, open_weights(own, "")).ok


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda shard: os.truncate(shard, 8192), "and has 8,192"),
        (lambda shard: shard.unlink(), "it can't be opened any more"),
        (lambda shard: shard.with_name("new").replace(shard), "another file has its name now"),
    ],
)
def test_a_file_that_is_not_mapped_yet(change, says, own):
    shard = shard_of(own, HEAD)
    with pytest.raises(SourceChangedError, match=rf"{shard} changed while it was read: .*{says}"):  # noqa: SIM117
        with Checkpoint(own) as checkpoint:
            shutil.copy2(shard, shard.with_name("new"))
            change(shard)
            checkpoint.raw(HEAD)


def test_hashing_ahead_ends_soon(source, monkeypatch):
    """After an interrupt nobody waits for the rest of a layer, which can have gigabytes."""
    from nemoquant.checkpoint import identity

    hashed = []

    def slow(data):
        hashed.append(len(data))
        time.sleep(0.05)
        return piece_hash(data)

    monkeypatch.setattr(identity, "PIECE_BYTES", 100)
    monkeypatch.setattr(identity, "piece_hash", slow)
    with Checkpoint(source) as checkpoint:
        with identity.Ahead(checkpoint, {"head": [HEAD]}) as ahead:
            ahead.begin("head")
        assert sum(hashed) < checkpoint.tensors[HEAD].nbytes // 10


# Two sets of weights.


def test_two_sets_of_weights_are_refused(source, own, tmp_path):
    single = changed_copy(source, tmp_path / "single", lambda tensors: tensors[HEAD].mul_(2))
    shutil.copy(single / "model.safetensors", own / "model.safetensors")
    with pytest.raises(
        CheckpointError,
        match=r"two sets of weights: model\.safetensors\.index\.json, and model\.safetensors, which it",
    ):
        Checkpoint(own)
    (own / "model.safetensors.index.json").unlink()
    with pytest.raises(
        CheckpointError,
        match=r"two sets of weights: model\.safetensors, and model-00001-of-00002\.safetensors",
    ):
        Checkpoint(own)


def test_other_safetensors_are_no_weights(own):
    """An adapter or a draft model in the same folder is not a second set."""
    shutil.copy(own / "model-00001-of-00002.safetensors", own / "adapter_model.safetensors")
    Checkpoint(own).close()


def test_lost_pages_are_noted_for_their_file(tmp_path):
    """And a fault elsewhere still ends the process, as before."""
    code = """
import mmap, os, sys
from pathlib import Path
import numpy as np
from nemoquant.checkpoint.lost_pages import Watched
maps = []
for name, watched in (("a", True), ("b", True), ("c", False)):
    path = Path(sys.argv[1]) / name
    path.write_bytes(b"x" * 40_960)
    with path.open("r+b") as f:
        mapped = mmap.mmap(f.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    maps.append((np.frombuffer(mapped, np.uint8), Watched(mapped) if watched else None))
    os.truncate(path, 8192)
(a, lost_a), (b, lost_b), (c, _) = maps
print(int((a == 120).sum()), int(a[:9000].sum()), lost_a.lost, lost_b.lost, flush=True)
c.sum()
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["8192", str(120 * 8192), "True", "False"]
    assert done.returncode == -7


def test_any_number_of_pages_may_be_lost(tmp_path):
    """More than the maps that a process may have (vm.max_map_count), and no two beside each other."""
    code = """
import mmap, os, sys
from pathlib import Path
import numpy as np
from nemoquant.checkpoint.lost_pages import Watched
path, pages = Path(sys.argv[1]) / "a", 2 * int(Path("/proc/sys/vm/max_map_count").read_text())
with path.open("w+b") as f:
    f.truncate(pages * mmap.PAGESIZE)
    mapped = mmap.mmap(f.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    f.truncate(0)
data, watched = np.frombuffer(mapped, np.uint8), Watched(mapped)
print(int(data[:: 2 * mmap.PAGESIZE].sum()), watched.lost)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.stdout.split() == ["0", "True"], done.stderr


def test_maps_of_threads_take_a_place_each(tmp_path, monkeypatch):
    """Two checkpoints may be mapped at once: neither may end the watch over the other."""
    (tmp_path / "file").write_bytes(b"x" * 4096)

    def slow(found):
        rows = np.flatnonzero(found)
        time.sleep(0.01)
        return rows

    def watch(_):
        with (tmp_path / "file").open("rb") as f:
            mapped = mmap.mmap(f.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        return mapped, lost_pages.Watched(mapped)

    names = SimpleNamespace(frombuffer=np.frombuffer, uint8=np.uint8, flatnonzero=slow)
    monkeypatch.setattr(lost_pages, "np", names)
    with ThreadPoolExecutor(4) as pool:
        maps = list(pool.map(watch, range(8)))
    rows = [watched._row for _, watched in maps]
    assert None not in rows and len(set(rows)) == len(rows)


def test_a_run_that_ended_between_its_last_layer_and_its_scales(own, token_rows, tmp_path, monkeypatch):
    from nemoquant.calibrate import run

    def stop(_run):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(run._Run, "head", stop)
        make(own, token_rows, tmp_path / "out")
    make(own, token_rows, tmp_path / "out", resume=True)
    make(own, token_rows, tmp_path / "whole")
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


@pytest.mark.parametrize("name", ["config.json", "model-00001-of-00001.safetensors"])
def test_a_finished_out_that_is_damaged_is_not_called_finished(name, source, token_rows, tmp_path):
    options = {"shard_bytes": 10**9}
    out = make(source, token_rows, tmp_path / "out", **options).out
    said = []
    make(source, token_rows, out, resume=True, said=said, **options)
    assert said[-1] == f"{out} was finished already"
    with (out / name).open("r+b") as f:
        f.truncate(f.seek(0, 2) - 1)
    with pytest.raises(CheckpointError, match=name):
        make(source, token_rows, out, resume=True, **options)
