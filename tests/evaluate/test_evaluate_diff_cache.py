"""The reference cache: it gives identical figures, and is never used for another source or other rows."""

import errno
import fcntl
import json
import os

import numpy as np
import pytest
from safetensors import safe_open
from support.commands import check_parts, invoke, refusal
from support.tampering import overwrite

from nemoquant.api import diff
from nemoquant.checkpoint.writer import ShardWriter
from nemoquant.errors import CheckpointError, HeaderError, OutputError
from nemoquant.evaluate import reference
from nemoquant.files import UNFINISHED

IN_PROJ = "backbone.layers.0.mixer.in_proj.weight"


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "reference.safetensors"


@pytest.fixture
def ids(tmp_path):
    """Text as token ids, whose rows --rows and --seq-len cut."""
    path = tmp_path / "ids.jsonl"
    path.write_text(json.dumps({"input_ids": np.random.default_rng(2).integers(3, 96, 300).tolist()}) + "\n")
    return path


def test_it_changes_no_byte_of_the_report(source, quantized, compare, cache):
    out = quantized("nvfp4")
    without = compare(source, out).dump()
    first = compare(source, out, reference_cache=cache).dump()
    written = cache.read_bytes()
    second = compare(source, out, reference_cache=cache).dump()
    assert without == first == second
    assert cache.read_bytes() == written
    assert [p.name for p in cache.parent.iterdir() if "reference" in p.name] == [cache.name]


def test_it_serves_other_candidates(source, quantized, compare, cache):
    compare(source, source, reference_cache=cache)
    out = quantized("fp8")
    assert compare(source, out, reference_cache=cache).dump() == compare(source, out).dump()


@pytest.fixture
def scaled(source, compare, cache):
    """A cache whose stream after layer 2 was changed."""
    compare(source, source, reference_cache=cache)
    folder = cache.parent / "holds"
    folder.mkdir()
    cache.rename(folder / "reference.safetensors")
    overwrite(folder, "hidden.3", lambda data: (np.frombuffer(data, np.float32) * np.float32(1.5)).tobytes())
    return folder / "reference.safetensors"


def test_it_is_read(source, compare, scaled, monkeypatch):
    """The candidate is compared with the cache's content: a changed stream is an error of the candidate."""
    monkeypatch.setattr(reference, "tensor_hash", lambda data: stored_hash(scaled, data))
    (found,) = compare(source, source, reference_cache=scaled).candidates
    assert [entry.name for entry in found.layers if entry.stream.relative > 0] == ["2"]


def stored_hash(cache, data):
    """The hash that the cache has for the tensor with these bytes: as if it had been written so."""
    with safe_open(cache, "np") as f:
        name = next(n for n in f.keys() if np.array_equal(f.get_tensor(n).ravel(), data))  # noqa: SIM118
        return json.loads(f.metadata()["tensors"])[name]


def test_a_damaged_one_is_refused(source, scaled, token_rows):
    with pytest.raises(CheckpointError, match=r"reference\.safetensors is damaged: hidden\.3 does not have"):
        diff(source, [source], threads=1, card=False, reference_cache=scaled, data=token_rows)


def test_it_is_a_safetensors_file_of_the_stream(source, compare, cache):
    compare(source, source, reference_cache=cache)
    with safe_open(cache, "np") as f:
        shapes = {name: tuple(f.get_tensor(name).shape) for name in f.keys()}  # noqa: SIM118
        assert all(np.isfinite(f.get_tensor(name)).all() for name in shapes)
        assert f.metadata().keys() >= {"schema", "config", "tensor_table", "units", "tensors", "tokens"}
    hidden = {f"hidden.{i}": (8, 32, 64) for i in range(7)}
    assert shapes == hidden | {f"ssm_state.{i}": (8, 4, 16, 16) for i in (0, 4)}


# A cache that does not belong to this run is refused and not changed.


@pytest.fixture
def refused(source, cache):
    """Runs the diff of ``source`` with itself, and checks that the cache is refused."""

    def check(*parts, of=source, kind=CheckpointError, **options):
        before = cache.read_bytes() if cache.is_file() else None
        files = sorted(cache.parent.iterdir())
        with pytest.raises(kind) as told:
            diff(of, [of], threads=1, card=False, reference_cache=cache, **options)
        check_parts(parts, str(told.value))
        assert sorted(cache.parent.iterdir()) == files
        assert (cache.read_bytes() if cache.is_file() else None) == before

    return check


def test_other_rows(source, compare, cache, token_rows, tmp_path, refused):
    compare(source, source, reference_cache=cache)
    other = tmp_path / "other.npy"
    np.save(other, np.load(token_rows)[:, ::-1])
    refused(
        str(cache),
        "made from other rows (--data, --rows, --seq-len)",
        "tokens differ",
        "remove this one",
        data=other,
    )
    np.save(other, np.load(token_rows)[:4])
    refused("tokens differ", data=other)


def test_the_same_rows_of_another_file(source, compare, cache, token_rows, tmp_path):
    compare(source, source, reference_cache=cache)
    copy = tmp_path / "copy.npy"
    np.save(copy, np.load(token_rows).astype(np.int32))
    assert compare(source, source, reference_cache=cache, data=copy).data.source == "copy.npy"


@pytest.mark.parametrize("change", [{"seq_len": 16}, {"rows": 3}])
def test_another_cut(change, source, cache, ids, refused):
    options = {"data": ids, "rows": 4, "seq_len": 32}
    diff(source, [source], threads=1, card=False, reference_cache=cache, **options)
    refused(str(cache), "(--data, --rows, --seq-len)", "tokens differ", **options | change)


@pytest.mark.parametrize(
    ("what", "part"),
    [
        ("training", "groups of experts differ (backbone.embeddings.weight)"),
        ("matrix", f"1 of 10 tensors or groups of experts differ ({IN_PROJ})"),
        ("config", "config differ"),
        ("tensor table", "tensor table differ"),
    ],
)
def test_another_source(what, part, source, make_checkpoint, compare, cache, token_rows, refused):
    compare(source, source, reference_cache=cache)
    other = {
        "training": lambda: make_checkpoint("other", seed=1),
        "matrix": lambda: make_checkpoint(
            "other", lambda t: t[IN_PROJ].mul_(2)
        ),  # its norms and SSM parameters are the same
        "config": lambda: make_checkpoint("other", layer_norm_epsilon=1e-6),
        "tensor table": lambda: make_checkpoint("other", lambda t: t.update({IN_PROJ: t[IN_PROJ].float()})),
    }[what]()
    refused(
        str(cache),
        "made from another source",
        part,
        "give another file or remove this one",
        of=other,
        data=token_rows,
    )


def test_files_that_are_no_cache(source, cache, token_rows, refused):
    cache.write_text("my notes, not to be lost")
    refused(cache.name, "expected a safetensors file", kind=HeaderError, data=token_rows)
    cache.write_bytes((source / "model-00001-of-00002.safetensors").read_bytes())
    refused(str(cache), "expected a reference cache", "give another file or remove this one", data=token_rows)


@pytest.mark.parametrize("size", [0, 5, 3000, -1])
def test_half_a_cache(size, source, compare, cache, token_rows, refused):
    compare(source, source, reference_cache=cache)
    cache.write_bytes(cache.read_bytes()[:size])
    refused(cache.name, "expected", kind=HeaderError, data=token_rows)


def test_a_cache_without_a_tensor(source, compare, cache, token_rows, refused):
    compare(source, source, reference_cache=cache)
    with safe_open(cache, "np") as f:
        table = [(name, f.get_tensor(name)) for name in f.keys() if name != "hidden.6"]  # noqa: SIM118
        metadata = f.metadata()
    cache.unlink()
    with ShardWriter(cache, [(name, "F32", t.shape) for name, t in table], metadata) as writer:
        for _, t in table:
            writer.write(t)
    refused(str(cache), "lacks tensors that a reference cache has", "remove it", data=token_rows)


def test_places_where_none_can_be(source, cache, tmp_path, token_rows, refused):
    cache.mkdir()
    refused(str(cache), "cannot be read", kind=HeaderError, data=token_rows)
    with pytest.raises(
        OutputError, match="nowhere is not a folder; make it, or give another place for the reference cache"
    ):
        diff(source, [source], data=token_rows, threads=1, reference_cache=tmp_path / "nowhere/cache")
    assert not (tmp_path / "nowhere").exists()


def test_through_the_command_line(source, cache, token_rows, tmp_path):
    command = ["diff", source, source, "--data", token_rows, "--threads", 1]
    for _ in range(2):
        result = invoke(*command, "--reference-cache", cache)
        assert (result.exit_code, cache.is_file()) == (0, True), result.output
    refusal(*command, "--reference-cache", tmp_path / "no/where", parts=["no is not a folder"])


# Interrupted while the cache is written.


@pytest.mark.parametrize("at", [0, 3, 7, 8])
def test_an_interrupt_leaves_nothing(at, source, cache, token_rows):
    def stop(_stage, done, _total, _what):
        if done == at:
            raise KeyboardInterrupt

    before = sorted(cache.parent.iterdir())
    with pytest.raises(KeyboardInterrupt):
        diff(source, [source], data=token_rows, threads=1, card=False, reference_cache=cache, progress=stop)
    left = sorted(cache.parent.iterdir())
    whole = [cache] if at >= 7 else []  # after the last layer it is complete
    assert left == sorted(before + whole)


def test_a_candidate_that_fails_leaves_nothing(source, changed, compare, cache):
    bad = changed(source, lambda t: t["backbone.layers.4.mixer.in_proj.weight"].fill_(3e38))
    before = sorted(cache.parent.iterdir())
    with pytest.raises(CheckpointError, match="layer 4, mamba computes NaN or Inf"):
        compare(source, bad, reference_cache=cache)
    assert sorted(cache.parent.iterdir()) == before


def test_a_full_disk(source, compare, cache, monkeypatch):
    write, calls = ShardWriter.write, []

    def full(self, data):
        calls.append(data.nbytes)
        if len(calls) > 3:
            raise OSError(28, "No space left on device")
        write(self, data)

    monkeypatch.setattr(ShardWriter, "write", full)
    before = sorted(cache.parent.iterdir())
    with pytest.raises(
        OutputError, match="No space left on device; give another place for the reference cache"
    ) as told:
        compare(source, source, reference_cache=cache)
    assert str(cache) in str(told.value)
    assert sorted(cache.parent.iterdir()) == before


def test_what_another_run_writes_is_left_to_it(source, compare, cache):
    partial = cache.with_name(cache.name + UNFINISHED)
    partial.write_text("half of it")
    with partial.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(
            OutputError, match=r"partial is being written by another run; wait for it, or give"
        ):
            compare(source, source, reference_cache=cache)
        assert partial.read_text() == "half of it"
        assert not cache.exists()


def test_a_lock_on_a_network_disk(source, compare, cache, monkeypatch):
    """NFS gives an exclusive lock only to who has opened the file for writing."""
    lock = fcntl.flock

    def of_nfs(handle, operation):
        if operation & fcntl.LOCK_EX and fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        lock(handle, operation)

    monkeypatch.setattr(reference.fcntl, "flock", of_nfs)
    cache.with_name(cache.name + UNFINISHED).write_text("half of it")
    compare(source, source, reference_cache=cache, card=False)
    assert cache.is_file()


def test_what_a_killed_run_left_is_replaced(source, compare, cache):
    partial = cache.with_name(cache.name + UNFINISHED)
    partial.write_text("half of it")
    compare(source, source, reference_cache=cache)
    assert cache.is_file() and not partial.exists()
