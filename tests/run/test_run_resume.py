"""Runs that were interrupted or failed, and resumed: the bytes of an uninterrupted run, and refusals.

tests/run/test_run_killed.py kills runs in the middle of a write.
"""

import json
import os
import re

import numpy as np
import pytest
import torch
from support.files import tree
from support.stops import stopped_after

from nemoquant.api import RunOptions, quantize
from nemoquant.checkpoint import manifest
from nemoquant.errors import CheckpointError, Interrupted, OutputError, UsageError, WeightError
from nemoquant.run.unfinished import FOLDER, STATE
from nemoquant.run.write import Output

SHARD_BYTES = 30_000


@pytest.fixture
def begun(source, token_rows, tmp_path, monkeypatch):
    """Begins a run of ``source`` into ``out``, interrupted after ``layers`` layers or ``shards`` shards."""
    from nemoquant.calibrate import run
    from nemoquant.pack import write

    def begin(*, layers=None, shards=None, of=source, rows=token_rows, **options):
        count, layer, packed = 0, run._Run.layer, write.Packer.write
        with monkeypatch.context() as patch:

            def counted(function, limit):
                def call(*arguments):
                    nonlocal count
                    count += 1
                    if count > limit:
                        raise KeyboardInterrupt
                    return function(*arguments)

                return call

            if layers is not None:
                patch.setattr(run._Run, "layer", counted(layer, layers))
            else:
                patch.setattr(write.Packer, "write", counted(packed, shards))
            with pytest.raises(Interrupted) as error:
                make(of, rows, tmp_path / "out", **options)
        return str(error.value)

    return begin


def make(source, token_rows, out, preset="nvfp4", *, resume=False, said=None, calibration=None, **options):
    calibration = {"data": token_rows, "dtype": "float32", **(calibration or {})}
    defaults = {"method": "max", "threads": 1, "shard_bytes": SHARD_BYTES}
    options = RunOptions(**calibration, resume=resume, **{**defaults, **options})
    said = [] if said is None else said
    return quantize(source, out, preset, options, say=said.append)


@pytest.mark.parametrize(
    ("where", "says"),
    [
        ({"layers": 1}, "1 layers calibrated"),
        ({"layers": 4}, "4 layers calibrated"),
        ({"shards": 0}, "calibrated"),
        ({"shards": 2}, "calibrated, 2 shards written"),
    ],
)
def test_an_interrupted_run_is_gone_on_with(where, says, begun, source, token_rows, tmp_path):
    whole = make(source, token_rows, tmp_path / "whole")
    assert begun(**where) == f"{tmp_path}/out.partial is kept ({says}): --resume goes on from there"
    said = []
    again = make(source, token_rows, tmp_path / "out", resume=True, said=said)
    first, *shards, last = said
    assert first == f"going on with {tmp_path}/out.partial: {says}"
    number = where.get("shards")
    whole_shards = f"hashing the {number} shards in {tmp_path}/out.partial, to see that they are whole"
    assert shards == ([whole_shards] if number else [])
    assert re.fullmatch(rf"hashing [\d.]+ kB of {source} again, which it was made from", last)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
    assert (again.warnings, again.calibration, again.verified) == (
        whole.warnings,
        whole.calibration,
        whole.verified,
    )


def test_what_is_finished_is_not_done_again(begun, source, token_rows, tmp_path, monkeypatch):
    from nemoquant.calibrate import run

    begun(shards=2)
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out.partial").glob("*.safetensors")}
    assert len(before) == 2
    monkeypatch.setattr(run._Run, "layer", lambda *arguments: 1 / 0)
    make(source, token_rows, tmp_path / "out", resume=True)
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in before} == before


def test_rows_with_nan_are_remembered(make_checkpoint, begun, tmp_path, monkeypatch):
    """Packing refuses the embedding that caused the NaN; the scales file still records the lost rows."""

    def edit(tensors):
        tensors["backbone.embeddings.weight"][95] = torch.nan

    poisoned, rows = make_checkpoint("poisoned", edit), tmp_path / "nan.npy"
    ids = np.random.default_rng(1).integers(3, 95, (20, 16))
    ids[4, 7] = 95
    np.save(rows, ids)
    begun(layers=3, of=poisoned, rows=rows)
    kept, write = [], Output.write

    def copied(output, run, *arguments, **options):
        kept.append((run.folder / "nemoquant_scales.json").read_bytes())
        return write(output, run, *arguments, **options)

    monkeypatch.setattr(Output, "write", copied)
    for name, resume in (("whole", False), ("out", True)):
        with pytest.raises(WeightError, match=r"backbone\.embeddings\.weight has NaN.*nothing was kept"):
            make(poisoned, rows, tmp_path / name, resume=resume)
        assert not (tmp_path / f"{name}.partial").exists()
    assert kept[0] == kept[1]
    assert json.loads(kept[0])["non_finite_rows"] == 1
    assert json.loads(kept[0])["warnings"][0] == "1 calibration rows came to NaN or Inf and were left out"


def test_zero_weights_are_remembered(make_checkpoint, token_rows, tmp_path, monkeypatch):

    def edit(tensors):
        tensors["backbone.layers.0.mixer.in_proj.weight"].zero_()  # in the first shards
        tensors["backbone.layers.5.mixer.experts.3.up_proj.weight"].zero_()  # in the last ones

    source = make_checkpoint("zeros", edit)
    whole = make(source, token_rows, tmp_path / "whole")
    assert "2 weights are zero" in whole.warnings[-1]
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        stopped_after(3, patch)
        make(source, token_rows, tmp_path / "out")
    assert make(source, token_rows, tmp_path / "out", resume=True).warnings == whole.warnings
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"preset": "fp8"}, r"the recipe was nvfp4-max \(\w{12}\) and is fp8-max \(\w{12}\)"),
        ({"method": None}, r"the recipe was nvfp4-max \(\w{12}\) and is nvfp4 \(\w{12}\)"),
        ({"scale_groups": False}, "--no-scale-groups was False and is True"),
        ({"shard_bytes": 60_000}, "--shard-size was 3e-05 and is 6e-05"),
        ({"threads": 2}, "--threads was 1 and is 2"),
        (
            {"calibration": {"row_batch": 3}},
            r"--row-batch was 8 \(attention\), 8 \(mamba\), 8 \(mlp\), 8 \(moe\) and is 3",
        ),
        ({"calibration": {"dtype": "bfloat16"}}, "--compute was float32 and is bfloat16"),
    ],
)
def test_options_that_matter_must_be_the_same(change, says, begun, source, token_rows, tmp_path):
    begun(layers=2)
    before = tree(tmp_path)
    with pytest.raises(
        UsageError,
        match=rf"out\.partial was begun with other options: .*{says}.*give the same ones, or remove the",
    ):
        make(source, token_rows, tmp_path / "out", resume=True, **change)
    assert tree(tmp_path) == before


def test_other_rows_or_another_source_are_refused(begun, source, token_rows, tmp_path, make_checkpoint):
    begun(layers=2)
    np.save(tmp_path / "other.npy", np.load(token_rows)[:4])
    says = r"--calib was 8 rows of 32 tokens of rows\.npy \(\w+\) and is 4 rows of 32 tokens of other\.npy"
    with pytest.raises(UsageError, match=says):
        make(source, tmp_path / "other.npy", tmp_path / "out", resume=True)
    first = quantize(
        source, tmp_path / "first", "nvfp4", RunOptions(method="max", data=token_rows, threads=1)
    )
    with pytest.raises(
        UsageError, match=r"--calib was 8 rows.* and is not given.*--scales was not given and is \w{12}"
    ):
        make(
            source,
            token_rows,
            tmp_path / "out",
            resume=True,
            calibration={"scales": first.out / "nemoquant_scales.json"},
        )
    other = make_checkpoint("other", seed=1)
    with pytest.raises(
        UsageError, match=r"begun with other weights than .* tensors or groups of experts diff"
    ):
        make(other, token_rows, tmp_path / "out", resume=True)


def test_threads_are_free_once_calibration_is_over(begun, source, token_rows, tmp_path):
    make(source, token_rows, tmp_path / "whole")
    begun(shards=2)
    make(source, token_rows, tmp_path / "out", resume=True, threads=2)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_threads_not_given_are_those_of_before(begun, source, token_rows, tmp_path):
    make(source, token_rows, tmp_path / "whole")
    begun(layers=2)
    make(source, token_rows, tmp_path / "out", resume=True, threads=None)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_hidden_states_go_when_calibration_is_over(begun, tmp_path):
    begun(shards=1)
    assert [p.name for p in (tmp_path / "out.partial" / FOLDER).iterdir()] == [STATE]


def test_damaged_hidden_states_are_computed_again(begun, source, token_rows, tmp_path):
    make(source, token_rows, tmp_path / "whole")
    begun(layers=3)
    for file in (tmp_path / "out.partial" / FOLDER).glob("hidden.*"):
        data = bytearray(file.read_bytes())
        data[1000] ^= 1
        file.write_bytes(data)
    said = []
    make(source, token_rows, tmp_path / "out", resume=True, said=said)
    assert "hidden states" in said[2]
    assert "are damaged: calibrating from the first layer on" in said[2]
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_a_damaged_shard_is_packed_again(begun, source, token_rows, tmp_path):
    make(source, token_rows, tmp_path / "whole")
    begun(shards=3)
    shards = sorted((tmp_path / "out.partial").glob("*.safetensors"))
    data = bytearray(shards[0].read_bytes())
    data[-1] ^= 1
    shards[0].write_bytes(data)
    shards[1].unlink()
    make(source, token_rows, tmp_path / "out", resume=True)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"schema": 4}', '{"schema": 3, "identity": {}}', "[" * 5000]
)
def test_a_state_that_cannot_be_read(content, begun, source, token_rows, tmp_path):
    begun(layers=2)
    (tmp_path / "out.partial" / FOLDER / STATE).write_text(content)
    with pytest.raises(OutputError, match=rf"{STATE} can't be read .*remove .*out\.partial and begin again"):
        make(source, token_rows, tmp_path / "out", resume=True)


def test_a_folder_of_somebody_else(source, token_rows, tmp_path):
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "mine").write_text("mine")
    with pytest.raises(
        OutputError, match=r"out\.partial holds mine, which no run writes there; move it away"
    ):
        make(source, token_rows, tmp_path / "out", resume=True)
    (partial / "mine").rename(partial / "config.json")
    with pytest.raises(OutputError, match=rf"out\.partial has files but no {FOLDER}/{STATE}"):
        make(source, token_rows, tmp_path / "out", resume=True)
    assert tree(partial) == {"config.json": b"mine"}


def test_strange_files_in_a_folder_of_ours(begun, source, token_rows, tmp_path):
    begun(layers=2)
    (tmp_path / "out.partial/notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"holds notes\.txt"):
        make(source, token_rows, tmp_path / "out", resume=True)
    assert (tmp_path / "out.partial/notes.txt").read_text() == "mine"


def test_nothing_to_go_on_with(source, token_rows, tmp_path):
    make(source, token_rows, tmp_path / "whole")
    (tmp_path / "b.partial").mkdir()  # killed before it wrote a file
    for name in ("a", "b"):
        said = []
        make(source, token_rows, tmp_path / name, resume=True, said=said)
        assert said == ["nothing to go on with, beginning anew"]
        assert tree(tmp_path / name) == tree(tmp_path / "whole")


def test_two_runs_at_once(begun, source, token_rows, tmp_path):
    import fcntl

    begun(layers=2)
    handle = os.open(tmp_path / "out.partial" / FOLDER, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        before = tree(tmp_path)
        with pytest.raises(OutputError, match=r"out\.partial is being written by another run; wait for it"):
            make(source, token_rows, tmp_path / "out", resume=True)
        assert tree(tmp_path) == before
    finally:
        os.close(handle)
    make(source, token_rows, tmp_path / "out", resume=True)


def test_an_out_that_came_to_be_meanwhile(source, token_rows, tmp_path, monkeypatch):
    from nemoquant.run import write as run

    verify = run.verify
    with monkeypatch.context() as patch:
        patch.setattr(
            run, "verify", lambda *a, **k: ((tmp_path / "out").write_text("mine"), verify(*a, **k))[1]
        )
        with pytest.raises(
            OutputError, match=r"out\.partial is finished and verified, but can't be renamed to .*out"
        ):
            make(source, token_rows, tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"
    (tmp_path / "out").unlink()
    make(source, token_rows, tmp_path / "whole")
    make(source, token_rows, tmp_path / "out", resume=True)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_room_that_is_taken_already_counts(begun, source, token_rows, tmp_path, monkeypatch):
    """The disk has space for the rest, not for the whole."""
    import shutil
    from collections import namedtuple

    begun(shards=3)
    written = sum(p.stat().st_size for p in (tmp_path / "out.partial").glob("*.safetensors"))
    needed = quantize(
        source, tmp_path / "dry", "nvfp4", RunOptions(method="max", data=token_rows), dry_run=True
    ).plan
    free = needed.bytes_out + 600 * needed.tensors_out + (64 << 20) - written
    usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, free))
    make(source, token_rows, tmp_path / "out", resume=True)


def test_an_output_that_is_finished(source, token_rows, tmp_path):
    """The same options: there is nothing to do, with or without an empty folder that a kill left."""
    first = make(source, token_rows, tmp_path / "out")
    before = tree(tmp_path / "out")
    (tmp_path / "out" / FOLDER).mkdir()
    (tmp_path / "out" / FOLDER / STATE).write_text("damaged")
    said = []
    again = make(
        source, token_rows, tmp_path / "out", resume=True, said=said, threads=2, calibration={"dtype": None}
    )
    assert said[0].startswith("hashing ")
    assert said[1:] == [f"{tmp_path}/out was finished already"]
    assert tree(tmp_path / "out") == before
    assert (again.warnings, again.calibration, again.skipped_files, again.verified) == (
        first.warnings,
        first.calibration,
        first.skipped_files,
        {},
    )
    scales = {"data": None, "dtype": None, "scales": tmp_path / "out/nemoquant_scales.json"}
    make(source, token_rows, tmp_path / "out", resume=True, calibration=scales)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"calibration": {}}, "`calibration.rows`: field required"),
        ({"calibration": {"tokens_sha256": 3}}, "`calibration.tokens_sha256` is 3"),
        ({"calibration": {"row_batch": "x"}}, "`calibration.row_batch"),
        ({"calibration": {"row_batch": [1]}}, "`calibration.row_batch"),
        ({"calibration": {"row_batch": {"moe": 2}}}, "--row-batch was"),
        ({"calibration": {"row_batch": {"what": 2}}}, "`row_batch"),
        ({"calibration": {"dtype": "int8"}}, "`dtype` is 'int8'"),
        ({"nemoquant": None}, "`nemoquant` is None"),
        ({"source": {"units": {}}}, "does not list the hashes of all of its source"),
    ],
)
def test_a_finished_output_whose_manifest_is_forged(change, says, source, token_rows, tmp_path):
    """It was signed again, so that only its content tells."""
    out = make(source, token_rows, tmp_path / "out").out
    data = manifest.read_manifest(out)
    for key, value in change.items():
        data[key] = (data[key] | value if value else value) if isinstance(value, dict) else value
    manifest.write_manifest(out, data)
    before = tree(out)
    with pytest.raises((CheckpointError, UsageError), match=says):
        make(source, token_rows, out, resume=True)
    assert tree(out) == before


def test_a_finished_output_that_lacks_its_scales(source, token_rows, tmp_path):
    out = make(source, token_rows, tmp_path / "out").out
    (out / "nemoquant_scales.json").unlink()
    with pytest.raises(CheckpointError, match=r"nemoquant_scales\.json cannot be read \(No such file"):
        make(source, token_rows, out, resume=True)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"preset": "fp8"}, r"the recipe was nvfp4-max \(\w{12}\) and is fp8-max \(\w{12}\)"),
        ({"method": None}, r"the recipe was nvfp4-max \(\w{12}\) and is nvfp4 \(\w{12}\)"),
        ({"scale_groups": False}, "--no-scale-groups was False and is True"),
        ({"shard_bytes": 60_000}, "--shard-size was 3e-05 and is 6e-05"),
        ({"calibration": {"row_batch": 3}}, r"--row-batch was .* and is 3"),
        ({"calibration": {"dtype": "bfloat16"}}, "--compute was float32 and is bfloat16"),
    ],
)
def test_another_output_is_finished(change, says, source, token_rows, tmp_path):
    make(source, token_rows, tmp_path / "out")
    before = tree(tmp_path)
    with pytest.raises(
        UsageError, match=rf"out was begun with other options: .*{says}.*; give the same ones"
    ):
        make(source, token_rows, tmp_path / "out", resume=True, **change)
    assert tree(tmp_path) == before


def test_a_finished_output_of_another_config_or_that_lacks_a_file(make_checkpoint, token_rows, tmp_path):
    out = tmp_path / "out"
    source, other = make_checkpoint("source"), make_checkpoint("other", max_position_embeddings=77)
    make(source, token_rows, out, "nvfp4-w4a16")
    with pytest.raises(UsageError, match=r"SRC's config was \w{12} and is \w{12}"):
        make(other, token_rows, out, "nvfp4-w4a16", resume=True)
    next(out.glob("*.safetensors")).unlink()
    with pytest.raises(
        OutputError, match=r"out lacks model-\S+, which its manifest lists; remove it and begin"
    ):
        make(source, token_rows, out, "nvfp4-w4a16", resume=True)


def test_a_finished_output_of_other_weights(make_checkpoint, token_rows, tmp_path):
    """The same shapes, and one changed byte in the middle of a matrix."""

    def edit(tensors):
        tensors["backbone.layers.3.mixer.up_proj.weight"][5, 5] += 1

    make(make_checkpoint("source"), token_rows, tmp_path / "out", "nvfp4-w4a16")
    with pytest.raises(
        UsageError, match=r"out was begun with other weights than .*1 of \d+ .*3\.mixer\.up_proj"
    ):
        make(make_checkpoint("other", edit), token_rows, tmp_path / "out", "nvfp4-w4a16", resume=True)


def test_an_output_that_nobody_of_ours_made(source, token_rows, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match="out exists; expected a new folder"):
        make(source, token_rows, tmp_path / "out", resume=True)


def test_files_that_others_put_there_are_not_listed(source, token_rows, tmp_path, monkeypatch):
    """Nor hashed: it may be a pipe. The run ends with all of its own in OUT."""
    from nemoquant.run import write as run

    config_files = run.config_files
    partial = tmp_path / "out.partial"
    monkeypatch.setattr(
        run, "config_files", lambda *a: ((partial / "theirs").write_text("mine"), config_files(*a))[1]
    )
    out = make(source, token_rows, tmp_path / "out").out
    assert "theirs" not in json.loads((out / "nemoquant.json").read_text())["files"]
    assert (out / "theirs").read_text() == "mine"


def test_a_state_with_an_option_that_this_version_does_not_know(tmp_path):
    """It is named as the state names it: nothing is assumed of it, and the run is not continued."""
    from nemoquant.run.unfinished import Unfinished, check_identity

    with pytest.raises(UsageError, match=r"another_option was 3 and is not given; give the same ones"):
        check_identity(Unfinished(tmp_path, {"rows": 1, "another_option": 3}), {"rows": 1})
