"""One small checkpoint, and what Model Optimizer and nemoquant make of it: each run once in a session, when first asked for."""

import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import modelopt_run
import numpy as np
import pytest
import torch
from oracle_tensors import read
from torch import Tensor

from nemoquant.api import RunOptions, quantize


def synthetic() -> Any:
    """tests/conftest.py as a module: its fixtures serve one test each, these here serve a session."""
    spec = importlib.util.spec_from_file_location("synthetic_checkpoint", Path(__file__).parents[1] / "conftest.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def edge_cases(tensors: dict[str, Tensor]) -> None:
    """What a whole run must get right too: a zero block, one whose scale underflows, an outlier, signs of zero, F32 tensors."""
    w = tensors["backbone.layers.0.mixer.in_proj.weight"]
    w[0, :16] = 0.0
    w[1, :16] = 1e-7
    w[2, 0] = 6.0
    w[3, :2] = torch.tensor([-0.0, -1e-6])
    g = torch.Generator().manual_seed(7)
    tensors["backbone.layers.0.mixer.A_log"] = torch.rand(tensors["backbone.layers.0.mixer.A_log"].shape, generator=g) * 2.5
    tensors["backbone.layers.2.mixer.gate.weight"] = tensors["backbone.layers.2.mixer.gate.weight"].float()


@dataclass
class Runs:
    """Folders that hold ``source`` quantized. Calibration takes the first ``rows`` rows of ``length`` tokens."""

    folder: Path
    source: Path
    token_rows: np.ndarray[Any, Any]
    made: dict[str, Path] = field(default_factory=dict)

    def theirs(self, preset: str, *, compute: str = "bfloat16", rows: int = 8, length: int = 32) -> Path:
        """By Model Optimizer; ``compute`` is the dtype that it loads the model in."""
        name = f"theirs-{preset}-{compute}-{rows}x{length}"
        if name not in self.made:
            tokens = torch.from_numpy(self.token_rows[:rows, :length])
            self.made[name] = modelopt_run.run(self.source, self.folder / name, preset, tokens, getattr(torch, compute))
        return self.made[name]

    def ours(self, preset: str, *, scale_groups: bool = True, compute: str = "bfloat16", rows: int = 8, length: int = 32) -> Path:
        """By nemoquant; ``compute`` is the dtype of calibration."""
        name = f"ours-{preset}-{scale_groups}-{compute}-{rows}x{length}"
        if name not in self.made:
            data = self.folder / f"{rows}x{length}.npy"
            np.save(data, self.token_rows[:rows, :length])
            options = RunOptions(data=data, dtype=compute, row_batch=1, scale_groups=scale_groups, threads=1)
            self.made[name] = quantize(self.source, self.folder / name, preset, options).out
        return self.made[name]


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Both tools over ``M*E-ME``: latent experts, shared expert, MTP, 8 experts a layer; rows no longer than ``chunk_size``."""
    folder = tmp_path_factory.mktemp("oracles")
    base = synthetic()
    tensors = base.random_tensors(base.CONFIG)
    edge_cases(tensors)
    source = base.write_checkpoint(folder / "source", base.CONFIG, tensors)
    return Runs(folder, source, np.random.default_rng(0).integers(3, base.CONFIG["vocab_size"], (8, 32)))


@pytest.fixture(scope="session")
def source_tensors(runs: Runs) -> dict[str, Tensor]:
    """What both tools were given."""
    return read(runs.source)
