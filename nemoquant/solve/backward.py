"""Gradients of the model's loss at the stream between layers, found before weights are solved.

With ``outputs: loss`` the error of a GEMM's outputs counts as it matters to the loss: by O, the second moment
of the loss's gradients there (``coupled.py``). The loss is -log p of labels that are drawn from the source
model's own p. So O is the Fisher matrix, the Hessian of the KL from the source at the source itself.

The rows go through the source, and the hidden states before each layer wait in a file each. Then the loss's
gradients go back, layer by layer: the gradient at a layer's input takes the place of the hidden state there.
When a layer is solved, they go back through it once more, and are kept at the outputs of its GEMMs. Those
gradients are of weights that are folded already, so that they belong to what is solved.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from nemoquant.calibrate.batch import RowBatch, rows_of
from nemoquant.calibrate.hidden import RowFile
from nemoquant.calibrate.inputs import InputFile
from nemoquant.calibrate.memory import backward_rows
from nemoquant.calibrate.run import Between, calibrate
from nemoquant.checkpoint.folder import before_file, gradient_file
from nemoquant.checkpoint.manifest import file_sha256
from nemoquant.checkpoint.reader import Checkpoint
from nemoquant.checkpoint.weights import LayerWeights
from nemoquant.errors import CalibrationError
from nemoquant.model import names
from nemoquant.model.config import NemotronHConfig
from nemoquant.model.gradients import Seen, layer_gradient, rms_norm
from nemoquant.model.taps import Weights, product
from nemoquant.progress import Progress, no_progress
from nemoquant.solve.memory import HEAD_TOKENS
from nemoquant.tokens.rows import Rows

SEED = 20_260_101  # of the labels; a row has its own, so that batches change nothing

Keep = Callable[[int, list[int], Mapping[str, str]], None]
"""Receives how many layers the rows have come through, forward and back; rows without gradients; the files
with their hashes."""


class GradientFiles:
    """Hidden states before layers, and gradients in their place, in a file each.

    Attributes:
        digests: sha256 of each file that is whole, by name.
    """

    def __init__(
        self, folder: Path, shape: tuple[int, int, int], dtype: torch.dtype, digests: Mapping[str, str]
    ) -> None:
        self.folder, self._shape, self._dtype = folder, shape, dtype
        self.digests = dict(digests)
        self._checked: set[str] = set()

    def open(self, name: str) -> RowFile:
        """A whole file, to read.

        Raises:
            CalibrationError: it is not what was written.
        """
        path = self.folder / name
        if name not in self._checked:
            if not path.is_file() or file_sha256(path) != self.digests.get(name):
                raise CalibrationError(
                    f"{path} is not what the run wrote; remove {self.folder.parent} and begin again"
                )
            self._checked.add(name)
        return RowFile(path, self._shape, self._dtype)

    def create(self, name: str) -> RowFile:
        """A new file, in place of what an interrupted run left of it."""
        self.drop(name)
        return RowFile(self.folder / name, self._shape, self._dtype)

    def finish(self, file: RowFile) -> None:
        """A file is written."""
        self.digests[file.path.name] = file.keep()
        self._checked.add(file.path.name)
        file.close()

    def drop(self, name: str) -> None:
        """A file is not needed any more; the state has to forget it first."""
        (self.folder / name).unlink(missing_ok=True)


class _Forward:
    """Hidden states as ``calibrate`` wants them, which stay."""

    def __init__(self, files: GradientFiles, layers: int) -> None:
        """``layers``: number of finished layers; -1 before the embeddings."""
        self._files, self._at = files, layers
        self._read = files.open(before_file(layers)) if layers >= 0 else None
        self._write = files.create(before_file(layers + 1))

    def read(self, rows: Sequence[int]) -> Tensor:
        assert self._read is not None
        return self._read.read(rows)

    def write(self, rows: Sequence[int], states: Tensor) -> None:
        self._write.write(rows, states)

    def turn(self) -> None:
        self._files.finish(self._write)
        self.close(whole=True)
        self._at += 1
        self._read = self._files.open(before_file(self._at))
        self._write = self._files.create(before_file(self._at + 1))

    def close(self, *, whole: bool = False) -> None:
        if self._read is not None:
            self._read.close()
        if not whole:
            self._write.close()
            self._files.drop(self._write.path.name)


def find_gradients(
    checkpoint: Checkpoint,
    config: NemotronHConfig,
    rows: Rows,
    files: GradientFiles,
    *,
    dead: Sequence[int],
    device: torch.device,
    dtype: torch.dtype,
    row_batch: RowBatch,
    keep: Keep,
    progress: Progress = no_progress,
) -> None:
    """Fill ``files`` with the gradients before each layer but the first, and before the head.

    Args:
        dead: rows without gradients, as ``keep`` received them in an earlier run whose files there are.
        keep: called after each layer, forward and back.
    Raises:
        CalibrationError: as ``calibrate``; or gradients came to NaN or Inf, or a file has changed.
    """
    layers = len(config.layers)
    total = 2 * layers  # each layer forward; the head, and each but the first, back
    back = [i for i in range(1, layers + 1) if gradient_file(i) in files.digests]
    if not back:
        done = max((i for i in range(1, layers + 1) if before_file(i) in files.digests), default=-1)
        hidden = _Forward(files, done)

        def kept(between: Between) -> None:
            keep(between.layers, between.dead, files.digests)

        try:
            dead = calibrate(
                checkpoint,
                config,
                rows,
                [],
                device=str(device),
                dtype=dtype,
                row_batch=row_batch,
                hidden=hidden,
                begin=Between(done, list(dead), {}) if done > 0 else None,
                keep=kept,
                progress=lambda stage, at, of, what: progress("gradients", min(at, layers), total, what),
            )
        finally:
            hidden.close()
    alive = [row for row in range(len(rows.ids)) if row not in set(dead)]
    for i in range(min(back, default=layers + 1) - 1, 0, -1):
        what = "head" if i == layers else f"back through layer {i}, {config.layers[i]}"
        progress("gradients", total - i, total, what)
        before, found = files.open(before_file(i)), files.create(gradient_file(i))
        if i == layers:
            for row in alive:
                found.write([row], head_gradient(checkpoint, config, before.read([row]).to(device), row))
        else:
            after = files.open(gradient_file(i + 1))
            weights = LayerWeights(checkpoint, names.layer(i))
            for batch in _parts([alive], backward_rows(rows_of(row_batch, config.layers[i]))):
                x, gradient = before.read(batch).to(device), after.read(batch).to(device)
                found.write(batch, _checked(config, i, weights, x, gradient, lambda name, g: None))
                weights.release()
            after.close()
        before.close()
        files.finish(found)
        checkpoint.check_unchanged()
        done_with = [before_file(i), *([before_file(0)] if i == 1 else [])]
        for name in done_with:
            files.digests.pop(name, None)
        keep(total - i + 1, list(dead), files.digests)
        for name in done_with:
            files.drop(name)
    progress("gradients", total, total, "done")


def keep_at_outputs(
    config: NemotronHConfig,
    layer: int,
    weights: Weights,
    before: Callable[[Sequence[int]], Tensor],
    files: GradientFiles,
    *,
    batches: Sequence[Sequence[int]],
    wanted: set[str],
    outputs: InputFile,
    device: torch.device,
) -> None:
    """Keep the gradients at the outputs of some modules of a layer.

    Args:
        weights: of the layer, folded, by names relative to it.
        before: the source's hidden states before the layer, of some rows.
        batches: the rows of each, as they go through the layer.
        wanted: full names of modules.
        outputs: what keeps them, [tokens, out], by these names.
    Raises:
        CalibrationError: they came to NaN or Inf, or the gradients' file has changed.
    """
    after, prefix = files.open(gradient_file(layer + 1)), names.layer(layer)

    def keep(name: str, gradient: Tensor) -> None:
        if prefix + name in wanted:
            outputs.keep([(prefix + name, outputs.append(gradient))])

    for batch in _parts(batches, backward_rows(max(map(len, batches), default=1))):
        x, gradient = before(batch).to(device), after.read(batch).to(device)
        _checked(config, layer, weights, x, gradient, keep)
    after.close()


def _parts(batches: Sequence[Sequence[int]], most: int) -> list[Sequence[int]]:
    return [batch[at : at + most] for batch in batches for at in range(0, len(batch), most)]


def _checked(
    config: NemotronHConfig, layer: int, weights: Weights, x: Tensor, gradient: Tensor, seen: Seen
) -> Tensor:
    kind = config.layers[layer]
    found = layer_gradient(config.of_layer(layer), kind, weights, x, gradient, seen)
    if not torch.isfinite(found).all():
        raise CalibrationError(
            f"layer {layer} ({kind}): NaN or Inf in the gradients of the loss; expected finite ones, try "
            f"--compute float32, or --outputs equal"
        )
    return found


def head_gradient(checkpoint: Checkpoint, config: NemotronHConfig, x: Tensor, row: int) -> Tensor:
    """The gradient of -log p of drawn labels at the stream [1, length, hidden] of a row, like ``x``.

    In float32, some positions at a time: logits take more than all else.
    """
    norm = LayerWeights(checkpoint, f"{names.FINAL_NORM}.")["weight"]
    head = LayerWeights(checkpoint, f"{names.head(config.tie_word_embeddings)}.")["weight"]
    draws = torch.rand(x.shape[1], generator=torch.Generator().manual_seed(SEED + row)).double().to(x.device)
    found = torch.empty_like(x)
    for start in range(0, x.shape[1], HEAD_TOKENS):
        part = slice(start, start + HEAD_TOKENS)
        with torch.enable_grad():
            leaf = x[:, part].detach().float().requires_grad_()
            normed = rms_norm(leaf, norm, config.norm_eps)
        missed = _missed(product(normed.detach()[0], head), draws[part])
        back = product(missed, head.mT)[None]
        (found[:, part],) = torch.autograd.grad(normed, [leaf], [back])
    return found


def _missed(logits: Tensor, draws: Tensor) -> Tensor:
    """The gradient of -log p at logits [tokens, vocabulary], labels drawn from p with ``draws`` [tokens]."""
    p = torch.softmax(logits, -1)
    sums = p.double().cumsum_(-1)
    labels = torch.searchsorted(sums, (draws * sums[:, -1])[:, None], right=True)
    labels.clamp_(max=p.shape[1] - 1)
    return p.scatter_add_(1, labels, torch.full_like(labels, -1, dtype=p.dtype))
