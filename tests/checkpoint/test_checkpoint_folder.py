"""OUT.partial: who may be in it, what is removed from it, and that no link in it is followed."""

import errno
import fcntl
import os
import shutil
from pathlib import Path

import pytest
from support.files import tree

from nemoquant.checkpoint.folder import FOLDER, HIDDEN, STATE, check_output
from nemoquant.checkpoint.making import making
from nemoquant.errors import Interrupted, OutputError, UsageError

FILES = ("a.json", "b.safetensors")


@pytest.fixture
def out(tmp_path):
    return tmp_path / "new" / "out"


def failed(out, error, fill=lambda folder: None, kept="", **options):
    """What is raised where the body of ``making`` raises ``error`` after ``fill``."""
    with pytest.raises(BaseException) as raised, making(out, FILES, ("deep",), **options) as made:
        fill(made.folder)
        made.kept = lambda _: kept
        raise error
    return raised.value


def test_it_gets_its_name_when_the_body_ends(out):
    with making(out, FILES) as made:
        (made.folder / "a.json").write_text("a")
        (made.folder / FOLDER / STATE).write_text("{}")
        assert not out.exists()
    assert tree(out.parents[1]) == {"new": None, "new/out": None, "new/out/a.json": b"a"}


def test_after_an_error_nothing_of_ours_is_left(out, tmp_path):
    def fill(folder):
        for name in ("a.json", "b.safetensors.partial", f"{FOLDER}/{STATE}", f"{FOLDER}/{HIDDEN[1]}"):
            (folder / name).write_text("x")
        (folder / "deep").mkdir()

    assert str(failed(out, UsageError("no"), fill)) == "no; nothing was kept"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("where", [".", FOLDER, "deep"])
def test_what_others_put_there_stays(where, out):
    def fill(folder):
        (folder / "deep").mkdir()
        (folder / "a.json").write_text("ours")
        (folder / where / "theirs").write_text("mine")
        (folder / where / "folder").mkdir()

    partial = out.with_name("out.partial")
    says = f"no; nothing was kept; {partial} stays, others have put files into it"
    assert str(failed(out, UsageError("no"), fill)) == says
    left = {name for name in tree(partial) if not name.endswith(("deep", FOLDER))}
    assert left == {str(Path(where) / name) for name in ("theirs", "folder")}


def test_a_link_under_our_name_is_removed_and_not_followed(out, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("mine")
    failed(out, UsageError("no"), lambda folder: (folder / "deep").symlink_to(elsewhere))
    failed(out, UsageError("no"), lambda folder: (folder / "a.json").symlink_to(elsewhere / "precious"))
    assert tree(elsewhere) == {"precious": b"mine"}


def test_what_is_worth_keeping_is_told(out):
    assert str(failed(out, UsageError("no"), kept="it is kept")) == "no; it is kept"
    interrupted = failed(out, KeyboardInterrupt(), kept="it is kept", resume=True)
    assert (type(interrupted), str(interrupted)) == (Interrupted, "it is kept")
    system = failed(out, OSError(errno.ENOSPC, "full", "x"), kept="it is kept", resume=True)
    assert str(system) == "x: full; make room or choose another output; it is kept"
    assert type(failed(out, BrokenPipeError(), kept="it is kept", resume=True)) is BrokenPipeError


def test_a_folder_that_a_run_was_killed_in_at_once_is_not_in_the_way(out, tmp_path):
    (out.with_name("out.partial") / FOLDER).mkdir(parents=True)
    (out.with_name("out.partial") / FOLDER / f"{STATE}.partial").write_text("{")
    check_output(out, tmp_path / "source", 1, 1)
    with making(out, FILES) as made:
        assert not made.begun
        (made.folder / FOLDER / f"{STATE}.partial").unlink()
    assert tree(out) == {}


@pytest.mark.parametrize("resume", [None, False, True])
def test_another_run_is_in_it(resume, out, tmp_path):
    partial = out.with_name("out.partial")
    (partial / FOLDER).mkdir(parents=True)
    handle = os.open(partial / FOLDER, os.O_RDONLY)
    before = tree(tmp_path)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        says = r"out\.partial is being written by another run; wait for it, or choose another output$"
        with pytest.raises(OutputError, match=says):
            check_output(out, tmp_path / "source", 1, 1, resume=resume)
        with pytest.raises(OutputError, match=says), making(out, FILES, resume=resume):
            pass
    finally:
        os.close(handle)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("made_by", ["quantize", "others"])
def test_only_who_can_go_on_is_offered_to(made_by, out, tmp_path):
    partial = out.with_name("out.partial")
    partial.mkdir(parents=True)
    (partial / "a.json").write_text("a")
    if made_by == "quantize":
        (partial / FOLDER).mkdir()
        (partial / FOLDER / STATE).write_text("{}")
    before = tree(partial)
    for resume, offer in (
        (
            False,
            "--resume goes on with it, or remove it" if made_by == "quantize" else "did not end; remove it",
        ),
        (None, "did not end; remove it"),
    ):
        with pytest.raises(OutputError, match=offer):
            check_output(out, tmp_path / "source", 1, 1, resume=resume)
        with pytest.raises(OutputError, match=offer), making(out, FILES, resume=resume):
            pass
    assert tree(partial) == before


def test_a_copy_that_was_killed_is_begun_anew(out, tmp_path):
    """It kept no state, and nobody holds its lock: whatever is of ours there is of no use."""
    partial = out.with_name("out.partial")
    (partial / FOLDER).mkdir(parents=True)
    for name in ("a.json", "b.safetensors.partial"):
        (partial / name).write_text("half")
    check_output(out, tmp_path / "source", 1, 1)
    with making(out, FILES) as made:
        assert (made.begun, tree(made.folder)) == (False, {FOLDER: None})
        (made.folder / "b.safetensors").write_text("b")
    assert tree(out) == {"b.safetensors": b"b"}


def test_a_copy_that_was_killed_at_its_very_end(out, tmp_path):
    (out / FOLDER).mkdir(parents=True)
    (out / "a.json").write_text("a")
    with pytest.raises(OutputError, match="out exists; expected a new folder"):
        check_output(out, tmp_path / "source", 1, 1)
    assert tree(out) == {"a.json": b"a"}


@pytest.mark.parametrize("resume", [None, False, True])
def test_another_run_has_just_made_it(resume, out, tmp_path):
    """It got the lock, and its name, after this one had looked for it."""
    out.mkdir(parents=True)
    before = tree(tmp_path)
    with (
        pytest.raises(OutputError, match="out exists; expected a new folder"),
        making(out, FILES, resume=resume),
    ):
        pass
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("out.partial", "out.partial is a link or a file"),
        (f"out.partial/{FOLDER}", f"{FOLDER} is a link or a file"),
        ("out.partial/a.json", "a.json is a link, or not what a run writes"),
        ("out.partial/deep", "deep is a link, or not what a run writes"),
        (f"out.partial/{FOLDER}/{STATE}", f"{STATE} is a link, or not"),
        (f"out.partial/{FOLDER}/{HIDDEN[0]}", f"{HIDDEN[0]} is a link, or not"),
        (f"out.partial/{FOLDER}/{STATE}.partial", f"{STATE}.partial is a link, or not"),
        (f"out.partial/{FOLDER}/theirs", "holds theirs, which no run writes there"),
    ],
)
@pytest.mark.parametrize("what", ["folder", "file", "nowhere"])
def test_links_are_refused(what, name, says, out, tmp_path):
    target = tmp_path / what
    if what == "folder":
        target.mkdir()
        (target / "precious").write_text("mine")
    elif what == "file":
        target.write_text("mine")
    link = out.parent / name
    link.parent.mkdir(parents=True)
    if FOLDER not in name and name != "out.partial":
        (out.with_name("out.partial") / FOLDER).mkdir()
    link.symlink_to(target)
    before = tree(tmp_path)
    with pytest.raises(OutputError, match=says), making(out, FILES, ("deep",), resume=True):
        pass
    after = tree(tmp_path)
    assert link.is_symlink()
    assert {key: after[key] for key in before} == before


def test_a_state_that_cannot_be_removed_from_a_whole_output(out):
    with pytest.raises(OutputError, match=rf"^{out} is whole, but .*{FOLDER} in it can't be removed"):  # noqa: SIM117
        with making(out, FILES) as made:
            (made.folder / FOLDER / "theirs").write_text("mine")
    assert tree(out) == {FOLDER: None, f"{FOLDER}/theirs": b"mine"}


def test_what_is_finished_but_has_not_its_name_may_be_made_again(out, tmp_path, monkeypatch):
    """As where the disk has no room for the new name; both ways that the message names end well."""

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    for by_hand in (False, True):
        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", full)
            with pytest.raises(  # noqa: SIM117
                OutputError,
                match=r"is finished .* make room there, then rename it, or give the command again$",
            ):
                with making(out, FILES) as made:
                    (made.folder / FILES[0]).write_text("whole")
        if by_hand:
            made.folder.rename(out)
        else:
            check_output(out, tmp_path / "source", 1, 1)
            with making(out, FILES) as made:
                assert not (made.folder / FILES[0]).exists()
                (made.folder / FILES[0]).write_text("whole")
        assert (out / FILES[0]).read_text() == "whole"
        with pytest.raises(OutputError, match="out exists"):
            check_output(out, tmp_path / "source", 1, 1)
        assert tree(out) == {FILES[0]: b"whole"}
        shutil.rmtree(out)


def test_an_interrupt_behind_the_rename_says_that_the_output_is_whole(out, monkeypatch):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("nemoquant.checkpoint.making.clear", interrupt)
    with pytest.raises(Interrupted, match=f"^{out} is whole$"), making(out, FILES):
        pass
    assert tree(out) == {FOLDER: None}


def test_hidden_states_are_not_written_through_a_second_name(tmp_path):
    import torch

    from nemoquant.calibrate.hidden import InFiles

    (tmp_path / "precious").write_text("mine")
    os.link(tmp_path / "precious", tmp_path / HIDDEN[0])
    with pytest.raises(OSError, match="not a regular file with one name"):
        InFiles(tmp_path, (1, 2, 2), torch.float32)
    assert (tmp_path / "precious").read_text() == "mine"
