"""A copy of a checkpoint that computes the same, with outliers: channels of norms times powers of two."""

import json
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from nemoquant.model.parse import parse_config
from nemoquant.model.roles import mixer_table

SHARE, LEAST, MOST = 0.1, 3, 6  # of the channels of each norm; their k
READERS = {
    "mamba": ["mamba.in_proj"],
    "attention": ["attention.q_proj", "attention.k_proj", "attention.v_proj"],
    "mlp": ["mlp.up_proj"],
}


def outlier_copy(model: Path, folder: Path, seed: int = 0) -> dict[int, NDArray[np.int64]]:
    """Write the copy of ``model`` into a new folder; k of each layer's channels, 0 for most.

    ``norm.weight`` is multiplied by 2^k, the columns of all that reads the norm are divided by it. Written
    without the package's folds: tests hold these against it.
    """
    folder.mkdir(parents=True)
    raw = json.loads((model / "config.json").read_text())
    config, rng = parse_config(raw), np.random.default_rng(seed)
    chosen, factors = {}, {}
    for layer, kind in enumerate(config.layers):
        picked = rng.random(config.hidden_size) < SHARE
        k = np.where(picked, rng.integers(LEAST, MOST + 1, config.hidden_size), 0)
        factor = torch.from_numpy(2.0**k).float()
        moe = ["router", "shared_experts.up_proj"]
        moe.append("latent.fc1" if config.moe_latent_size else "experts.up_proj")
        prefix = f"backbone.layers.{layer}."
        factors[f"{prefix}norm.weight"] = factor
        for spec in mixer_table(config, kind, f"{prefix}mixer.", layer):
            if spec.role in READERS.get(kind, moe):
                factors[spec.name] = 1 / factor
        chosen[layer] = k
    for path in model.iterdir():
        if path.suffix == ".safetensors":
            tensors = load_file(path)
            for name in tensors.keys() & factors.keys():
                tensors[name] = (tensors[name].float() * factors[name]).to(tensors[name].dtype)
            save_file(tensors, folder / path.name, metadata={"format": "pt"})
        elif path.suffix in (".json", ".jinja") and path.name != "manifest.json":
            (folder / path.name).write_bytes(path.read_bytes())
    return chosen
