"""One small checkpoint in two widths, and the outputs of Model Optimizer and nemoquant for it.

Each tool runs once in a session, when a test first needs the output.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import modelopt_run
from support.once import Once
from support.synthetic import CONFIG, WIDE, random_rows, random_tensors, write_checkpoint
from torch import Tensor

from nemoquant.api import RunOptions, quantize


def edge_cases(tensors: dict[str, Tensor]) -> None:
    """Cases that a whole run must handle too.

    A zero block, a block whose scale underflows, an outlier, signs of zero, F32 tensors.
    """
    w = tensors["backbone.layers.0.mixer.in_proj.weight"]
    w[0, :32] = 0.0
    w[1, :32] = 1e-7
    w[2, 0] = 6.0
    w[3, :2] = torch.tensor([-0.0, -1e-7])
    g = torch.Generator().manual_seed(7)
    tensors["backbone.layers.0.mixer.A_log"] = (
        torch.rand(tensors["backbone.layers.0.mixer.A_log"].shape, generator=g) * 2.5
    )
    tensors["backbone.layers.2.mixer.gate.weight"] = tensors["backbone.layers.2.mixer.gate.weight"].float()


@dataclass
class Runs:
    """Folders with ``source`` quantized; calibration takes the first ``rows`` rows of ``length`` tokens."""

    once: Once
    token_rows: np.ndarray[Any, Any]

    def source(self, preset: str) -> Path:
        """The checkpoint for a preset, with sizes that its blocks divide."""
        wide = preset == "mxfp8"
        raw = {**CONFIG, **WIDE} if wide else CONFIG

        def build(folder: Path) -> None:
            tensors = random_tensors(raw)
            edge_cases(tensors)
            write_checkpoint(folder, raw, tensors)

        return self.once("oracles/wide" if wide else "oracles/source", build)

    def theirs(self, preset: str, *, compute: str = "bfloat16", rows: int = 8, length: int = 32) -> Path:
        """Model Optimizer's output; ``compute`` is the dtype in which it loads the model."""
        tokens = torch.from_numpy(self.token_rows[:rows, :length])

        def build(out: Path) -> None:
            modelopt_run.run(self.source(preset), out, preset, tokens, getattr(torch, compute))

        return self.once(f"oracles/theirs-{preset}-{compute}-{rows}x{length}", build)

    def ours(
        self,
        preset: str,
        *,
        scale_groups: bool = True,
        compute: str = "bfloat16",
        rows: int = 8,
        length: int = 32,
    ) -> Path:
        """nemoquant's output; ``compute`` is the dtype of calibration."""

        def build(out: Path) -> None:
            data = out.with_name(f"{rows}x{length}.npy")
            np.save(data, self.token_rows[:rows, :length])
            options = RunOptions(
                data=data,
                dtype=compute,
                row_batch=1,
                scale_groups=scale_groups,
                threads=1,
                method="max",
                headroom=1,  # theirs is of another making
            )
            quantize(self.source(preset), out, preset, options)

        return self.once(f"oracles/ours-{preset}-{scale_groups}-{compute}-{rows}x{length}", build)


@pytest.fixture(scope="session")
def runs(once: Once) -> Runs:
    """Both tools over ``M*E-ME``: latent experts, shared expert, MTP, 8 experts a layer.

    Rows are no longer than ``chunk_size``.
    """
    return Runs(once, random_rows())
