"""The torch engine: the functional model over packed weights, with every rounding of the checkpoint."""

from pathlib import Path
from typing import Any

import torch

from nemoquant.checkpoint.intact import Say, hash_once, silent
from nemoquant.engine.base import Admit, Floats, Step, Tokens, admit_any
from nemoquant.machine import torch_threads
from nemoquant.model.reference import ReferenceModel
from nemoquant.progress import Progress, no_progress
from nemoquant.quantized.checkpoint import PackedCheckpoint


class TorchEngine:
    """Runs the checkpoint in ``path`` in float32 on the CPU; any checkpoint, quantized or not.

    Each call has ``threads`` threads; None is as many as torch has in this process.
    """

    name = "torch"
    max_seq_len: int | None = None

    def __init__(
        self,
        path: Path,
        threads: int | None = None,
        say: Say = silent,
        progress: Progress = no_progress,
        admit: Admit = admit_any,
    ) -> None:
        """Raises CheckpointError where the checkpoint can't be opened, or is not what its manifest lists."""
        self.threads = threads
        self.opened = PackedCheckpoint(path)
        self.has_mtp = self.opened.has_mtp
        admit(self)
        signed = self.opened.manifest
        self.intact = None if signed is None else hash_once(path, signed, say, progress, threads)
        self.model = ReferenceModel(self.opened.config, self.opened.weights)
        self.tap = self.opened.tap()

    def forward(self, tokens: Tokens, state: Any = None) -> Step:
        with torch_threads(self.threads):
            hidden, after = self.model.hidden(torch.from_numpy(tokens), state, self.tap)
            step = Step(self.model.logits(hidden, self.tap).numpy(), hidden.numpy(), after)
        self.opened.checkpoint.check_unchanged()
        return step

    def draft(self, tokens: Tokens, hidden: Floats, state: Any = None) -> Step:
        with torch_threads(self.threads):
            logits, out, after = self.model.mtp_forward(
                torch.from_numpy(tokens), torch.from_numpy(hidden), state, self.tap
            )
        self.opened.checkpoint.check_unchanged()
        return Step(logits.numpy(), out.numpy(), after)

    def describe(self) -> dict[str, Any]:
        return {"engine": self.name, "version": str(torch.__version__), "device": "cpu", "compute": "float32"}
