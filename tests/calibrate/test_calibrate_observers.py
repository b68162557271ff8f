"""A user's own observer: a second quantity next to the maxima.

Its arrays live for one layer, then lie in a file that resume reads.
"""

import hashlib

import numpy as np
import pytest
import torch

from nemoquant.calibrate.hidden import InFiles
from nemoquant.calibrate.observers import AmaxCollector
from nemoquant.calibrate.run import calibrate
from nemoquant.calibrate.scales import Scales
from nemoquant.errors import CalibrationError
from nemoquant.model.reference import ReferenceModel
from nemoquant.sources.source import open_weights
from nemoquant.tokens.rows import Rows


class Moments:
    """Sums of x x^T of every attention projection's input."""

    def __init__(self):
        self.sums = {}

    def observe(self, name, x):
        if name.endswith(("q_proj", "o_proj")):
            wide = x.double()
            self.sums[name] = self.sums.get(name, 0) + wide.mT @ wide
        return x

    def collect(self):
        return {name: value.numpy() for name, value in self.sums.items()}


class MomentsInFiles:
    """Adds the moments up for a layer, and writes them next to the run's state."""

    name = "moments"
    observer = Moments

    def __init__(self, folder):
        self.folder, self.files, self.sums = folder, {}, {}

    def add(self, collected):
        for name, value in collected.items():
            self.sums[name] = self.sums.get(name, 0) + value

    def finish(self, layer, batches):  # noqa: ARG002
        for name, value in self.sums.items():
            np.save(self.folder / f"{name}.npy", value)
            self.files[name] = hashlib.sha256((self.folder / f"{name}.npy").read_bytes()).hexdigest()
        self.sums = {}

    def state(self):
        return dict(self.files)

    def restore(self, state):
        for name, digest in state.items():
            if hashlib.sha256((self.folder / f"{name}.npy").read_bytes()).hexdigest() != digest:
                raise CalibrationError(f"{name} was changed")
        self.files = dict(state)


def tokens():
    return Rows(np.random.default_rng(0).integers(3, 96, (6, 32)), "rows", 0)


def run(source, folder, *, begin=None, current=0, stop_after=None):
    """Returns the scales, the moments' collector, and the arguments of the last call of ``keep``.

    One of these arguments is the number of the hidden states' file.
    """
    folder.mkdir(exist_ok=True)
    opened, last = open_weights(source, ""), []
    amax, moments = AmaxCollector(opened.config, Scales()), MomentsInFiles(folder)
    hidden = InFiles(folder, (6, 32, opened.config.hidden_size), torch.float32, current)

    def keep(between):
        last[:] = [between, hidden.current]
        if between.layers == stop_after:
            raise KeyboardInterrupt

    try:
        calibrate(
            opened.checkpoint,
            opened.config,
            tokens(),
            [amax, moments],
            dtype=torch.float32,
            row_batch=2,
            hidden=hidden,
            begin=begin,
            keep=keep,
        )
    except KeyboardInterrupt:
        assert stop_after is not None
    finally:
        hidden.close()
    return amax.scales, moments, last


def test_a_second_observer_sees_what_the_model_computes(source, tmp_path):
    """The reference model takes all rows at once, calibration takes batches of two.

    They agree within the rule for reordered sums.
    """
    scales, moments, _ = run(source, tmp_path / "all")
    expected = Moments()
    opened = open_weights(source, "")
    from nemoquant.checkpoint.weights import LayerWeights

    model = ReferenceModel(opened.config, lambda prefix: LayerWeights(opened.checkpoint, prefix))
    model.forward(torch.from_numpy(tokens().ids), tap=expected.observe)
    found = {name: np.load(tmp_path / "all" / f"{name}.npy") for name in moments.files}
    assert set(found) == {name for name in expected.sums if name.startswith("backbone.")}
    for name, value in found.items():
        true = expected.sums[name].numpy()
        assert np.linalg.norm(value - true) <= 1e-5 * np.linalg.norm(true)
    assert moments.sums == {}, "nothing stays in memory"
    alone = AmaxCollector(opened.config, Scales())
    calibrate(opened.checkpoint, opened.config, tokens(), [alone], dtype=torch.float32, row_batch=2)
    assert alone.scales == scales, "the maxima are not disturbed"


@pytest.mark.parametrize("stop_after", [1, 2, 4])  # before the attention layer, after it, and later
def test_a_run_continues_with_the_files_of_the_layers_before(stop_after, source, tmp_path):
    whole, moments, _ = run(source, tmp_path / "whole")
    _, _, (between, current) = run(source, tmp_path / "cut", stop_after=stop_after)
    assert set(between.collected) == {"scales", "moments"}
    scales, again, _ = run(source, tmp_path / "cut", begin=between, current=current)
    assert scales == whole
    assert again.files == moments.files


def test_a_changed_file_is_refused(source, tmp_path):
    _, moments, (between, current) = run(source, tmp_path / "cut", stop_after=2)
    (tmp_path / "cut" / f"{min(moments.files)}.npy").write_bytes(b"")
    with pytest.raises(CalibrationError, match="was changed"):
        run(source, tmp_path / "cut", begin=between, current=current)
