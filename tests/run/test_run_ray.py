"""A run on two Ray nodes, one of which is lost in the middle: the bytes equal those of one process."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import nullcontext
from functools import cache
from types import SimpleNamespace

import pytest
from support.commands import nemoquant
from support.files import changed_files
from support.places import SUPPORT
from support.processes import run_python
from support.tampering import overwrite

from nemoquant.api import RunOptions, quantize
from nemoquant.errors import CheckpointError, SourceChangedError, UsageError

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs Ray (extra: ray)")


@pytest.mark.slow
@needs_ray
def test_two_nodes_and_one_that_is_lost(make_checkpoint, token_rows, tmp_path):
    source, folder = make_checkpoint(n_routed_experts=16), tmp_path / "runs"
    folder.mkdir()
    options = RunOptions(
        method="max", data=token_rows, dtype="float32", row_batch=1, threads=1, shard_bytes=60_000
    )
    whole = quantize(source, tmp_path / "whole", "nvfp4", options)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    arguments = [sys.executable, SUPPORT / "ray_runs.py", source, token_rows, folder, "nvfp4"]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    begun, hashed = report["said"]
    assert begun == "Ray: 2 processors"
    assert re.fullmatch(r"hashing .* of .* meanwhile, for the nodes to be held against", hashed)
    for name in (
        "two",
        "calibrate",
        "pack",
    ):  # one row at a time and one thread: even the calibrated scales are equal
        assert changed_files(folder / name, whole.out) == [], name
    for stage in ("calibrate", "pack"):
        node, tasks = report[stage]["lost"], report[stage]["tasks"]
        begun = {name for what, name, where in tasks if what == "begin" and where == node}
        ended_elsewhere = {name for what, name, where in tasks if what == "end" and where != node}
        assert begun & ended_elsewhere, f"{stage}: no task of the lost node ran again"
        assert begun - ended_elsewhere, f"{stage}: the lost node finished nothing before"


@pytest.mark.slow
@needs_ray
def test_errors_of_tasks_are_ours(make_checkpoint, tmp_path):
    """NaN in an expert, detected on a node: the message is the same as without a cluster.

    Through the command line, which starts a cluster for it.
    """
    import torch

    name = "backbone.layers.2.mixer.experts.3.up_proj.weight"
    source = make_checkpoint("bad", lambda tensors: tensors[name].view(-1)[-1:].fill_(torch.nan))
    code = "from nemoquant.cli import main; main()"
    arguments = [
        "quantize",
        source,
        tmp_path / "out",
        "--recipe",
        "nvfp4-w4a16",
        "--method",
        "max",
        "--on",
        "ray",
    ]
    done = run_python(code, *arguments, code=2)
    assert f"error: {name} has NaN; expected finite weights" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("out*"))


@needs_ray
def test_a_cluster_that_is_not_there(source, tmp_path, monkeypatch):
    """Other clusters on this machine must not be used; Ray detects them by processes and a file in /tmp."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("ray._private.services.find_gcs_addresses", cache(set))  # Ray clears its own cache
    monkeypatch.setattr("ray._private.services.find_bootstrap_address", lambda temp_dir: None)
    result = nemoquant(
        "quantize",
        source,
        tmp_path / "out",
        "--recipe",
        "nvfp4-w4a16",
        "--method",
        "max",
        "--on",
        "ray",
        "--address",
        "auto",
        code=2,
    )
    assert "error: no Ray cluster at auto (" in result.stderr
    assert "start one by `ray start --head`" in result.stderr
    assert not list(tmp_path.glob("out*"))


def test_without_the_extra(source, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "ray" else find(name, *a)
    )
    result = nemoquant(
        "quantize",
        source,
        tmp_path / "out",
        "--recipe",
        "nvfp4-w4a16",
        "--method",
        "max",
        "--on",
        "ray",
        code=3,
    )
    assert "--on ray needs the extra `ray`: pip install 'nemoquant[ray]'" in result.stderr
    assert not list(tmp_path.glob("out*"))


def test_options_of_where_it_is_computed(source, tmp_path):
    with pytest.raises(UsageError, match="on is 'spark'; expected local or ray"):
        quantize(source, tmp_path / "out", "nvfp4-w4a16", RunOptions(on="spark"))
    with pytest.raises(UsageError, match=r"an address \(auto\) goes with --on ray only"):
        quantize(source, tmp_path / "out", "nvfp4-w4a16", RunOptions(address="auto"))
    with pytest.raises(
        UsageError, match="--on ray computes on processors only, device is 'cuda'; expected cpu"
    ):
        quantize(source, tmp_path / "out", "fp8", RunOptions(on="ray", device="cuda"))


def test_a_node_with_another_source_or_version(source, make_checkpoint):
    """A worker's check before its first task, called here directly."""
    from nemoquant.checkpoint.reader import Checkpoint
    from nemoquant.run.cluster import _opened, small_tensors_sha256

    other = make_checkpoint("other", seed=1)
    with Checkpoint(source) as checkpoint:
        fingerprint = small_tensors_sha256(checkpoint)
    with pytest.raises(
        CheckpointError, match="is another checkpoint on a node of the cluster; expected the same one"
    ):
        _opened((str(other), fingerprint, __import__("nemoquant").__version__, "run"))
    with pytest.raises(
        CheckpointError, match=r"a node of the cluster has nemoquant .*; expected 0\.0\.0, as here"
    ):
        _opened((str(source), fingerprint, "0.0.0", "run"))


class OneNode:
    """Stands in for Ray: one node, whose source lies elsewhere."""

    class exceptions:
        RayTaskError = RayError = ZeroDivisionError

    def __init__(self, source):
        self.source = source

    def remote(self, **_):
        return lambda function: SimpleNamespace(
            remote=lambda source, *rest: function((str(self.source), *source[1:]), *rest)
        )

    def cluster_resources(self):
        return {"CPU": 1}

    def put(self, value):
        return value

    get = put


@pytest.fixture
def on_node(monkeypatch):
    """Runs ``quantize`` from one source on a node that has another one."""
    from nemoquant.run import cluster

    def run(here, there, out, recipe="nvfp4", **options):
        with monkeypatch.context() as patch:
            patch.setattr(
                cluster, "connected", lambda _, opened: nullcontext(cluster.Cluster(OneNode(there), opened))
            )
            return quantize(here, out, recipe, RunOptions(method="max", dtype="float32", on="ray", **options))

    return run


def test_what_a_node_calibrated_on_other_weights_is_not_kept(source, token_rows, tmp_path, on_node):
    """A LoRA merge on the node: after its first layer the run ends, and nothing of it is taken up again."""
    other, out = shutil.copytree(source, tmp_path / "other"), tmp_path / "out"
    overwrite(other, "backbone.layers.1.mixer.o_proj.weight", lambda data: bytes([data[0] ^ 1]) + data[1:])
    with pytest.raises(CheckpointError, match=r"another one on the nodes .*o_proj.*\(1 layers calibrated"):
        on_node(source, other, out, data=token_rows)
    on_node(source, source, out, data=token_rows, resume=True)
    on_node(source, source, tmp_path / "whole", data=token_rows)
    assert changed_files(out, tmp_path / "whole") == []


def test_what_a_node_packed_from_other_weights_is_not_kept(source, tmp_path, on_node):
    """A worker of the run before does not hold the next one up: each opens the source again."""
    other, out = shutil.copytree(source, tmp_path / "other"), tmp_path / "out"
    overwrite(other, "backbone.layers.2.mixer.experts.3.up_proj.weight", lambda data: bytes(len(data)))
    with pytest.raises(SourceChangedError, match=r"on all nodes: 1 of .*experts\.up_proj"):
        on_node(source, other, out, "nvfp4-w4a16")
    on_node(source, source, out, "nvfp4-w4a16", resume=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tensors_on_the_wire(dtype):
    import torch

    from nemoquant.run.cluster import from_wire, to_wire

    states = torch.randn(2, 3, 4).to(getattr(torch, dtype))
    again = from_wire(to_wire(states[:, ::2]))
    assert again.dtype == states.dtype
    assert again.equal(states[:, ::2])
    again.zero_()


def test_a_task_whose_files_change(make_checkpoint):
    """Whatever a task computed on a node is dropped, with an error that names the file."""
    from nemoquant import __version__
    from nemoquant.checkpoint.reader import Checkpoint
    from nemoquant.run.cluster import _call, _opened, small_tensors_sha256

    source = make_checkpoint()
    with Checkpoint(source) as checkpoint:
        identity = str(source), small_tensors_sha256(checkpoint), __version__, "run"
    shard = source / "model-00001-of-00002.safetensors"
    _opened.cache_clear()
    assert _call(identity, lambda checkpoint: 1, ()) == 1
    with pytest.raises(SourceChangedError, match=rf"{shard} changed while it was read: it was written to"):
        _call(identity, lambda checkpoint: os.utime(shard), ())
    _opened.cache_clear()
