"""Measure a trained model of models.py, and write manifest.json into its folder.

    python calib/demo_model/measure.py WORK_DIR [--model nano]

WORK_DIR as for train.py: the n-gram model needs the training tokens, the manifest the log of ``fit``.

Everything is computed by nemoquant's reference model in float32 from the saved checkpoint, on rows of works
that training never saw: perplexity, against a smoothed 5-gram model on the same rows; what perplexity becomes
when a block is taken out; tokens per expert; the top-1 accuracy of the multi-token-prediction module, if
there is one; slow heads.
"""

import argparse
import hashlib
import json
import platform
from datetime import date
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from models import CALIB, MODELS, Model
from ngram import perplexity as ngram_perplexity

from nemoquant.checkpoint.weights import LayerWeights
from nemoquant.model.reference import ReferenceModel, State, layer_forward
from nemoquant.model.taps import identity
from nemoquant.sources.source import Source, open_weights
from nemoquant.tokens.rows import load_rows

DATA = CALIB / "data"
LENGTH = 512
ABLATION_ROWS = 64
BATCH = 8


def silent_experts(name: str, t: torch.Tensor) -> torch.Tensor:
    """A layer's tap: no routed expert's down projection gets anything."""
    return t * 0 if name.startswith("mixer.experts.") and name.endswith(".down_proj") else t


class Ablated(ReferenceModel):
    """The reference model without some layers' blocks (``skip``), or without some layers' routed experts
    (``mute``)."""

    skip: frozenset[int] = frozenset()
    mute: frozenset[int] = frozenset()

    def hidden_without(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for i, kind in enumerate(self.config.layers):
            if i not in self.skip:
                tap = silent_experts if i in self.mute else identity
                x, _ = layer_forward(self.config, kind, self.weights(f"backbone.layers.{i}."), x, None, tap)
        weight = self.weights("backbone.norm_f.")["weight"]
        return F.rms_norm(x, (x.shape[-1],), weight.float(), self.config.norm_eps)


def perplexity(model: Ablated, rows: torch.Tensor) -> float:
    """Over the predicted positions of ``rows`` [R, L]."""
    total = 0.0
    for batch in rows.split(BATCH):
        logits = model.logits(model.hidden_without(batch))[:, :-1]
        total += F.cross_entropy(
            logits.flatten(0, 1).double(), batch[:, 1:].flatten(), reduction="sum"
        ).item()
    return float(np.exp(total / (rows.shape[0] * (rows.shape[1] - 1))))


def ablations(model: Ablated, rows: torch.Tensor) -> dict[str, object]:
    """Perplexity without each block, and by how much that raises it."""
    base = perplexity(model, rows)
    layers = model.config.layers
    experts = [i for i, kind in enumerate(layers) if kind == "moe"]
    table: dict[str, object] = {"rows": len(rows), "whole model": round(base, 3)}

    def without(name: str, skip: list[int], mute: list[int]) -> None:
        model.skip, model.mute = frozenset(skip), frozenset(mute)
        value = perplexity(model, rows)
        table[name] = {"perplexity": round(value, 3), "rise": f"{value / base - 1:.2%}"}
        print(f"  without {name}: {value:.2f} ({value / base - 1:+.2%})", flush=True)

    without("routed experts of all layers", [], experts)
    for i, kind in enumerate(layers):
        without(
            f"routed experts of layer {i}" if kind == "moe" else f"layer {i} ({kind})",
            [] if kind == "moe" else [i],
            [i] if kind == "moe" else [],
        )
    model.skip = model.mute = frozenset()
    return table


def mtp_top1(model: Ablated, rows: torch.Tensor) -> dict[str, float]:
    """How often the MTP module's first choice is the token after next, and how often the likeliest token
    alone would be right."""
    right = count = 0
    for batch in rows.split(BATCH):
        hidden, _ = model.hidden(batch)
        logits, _, _ = model.mtp_forward(
            batch[:, 1:-1], hidden[:, :-2], State((None,) * len(model.config.mtp_layers))
        )
        right += int((logits.argmax(-1) == batch[:, 2:]).sum())
        count += batch[:, 2:].numel()
    chance = float(torch.bincount(rows[:, 2:].flatten()).max() / count)
    return {
        "top1": round(right / count, 4),
        "likeliest token": round(chance, 4),
        "uniform": round(1 / model.config.vocab_size, 5),
    }


def expert_tokens(model: Ablated, rows: torch.Tensor) -> dict[str, list[int]]:
    """MoE layer -> tokens that each expert got."""
    config = model.config
    counts = {i: [0] * config.n_routed_experts for i, kind in enumerate(config.layers) if kind == "moe"}

    def tap(name: str, x: torch.Tensor) -> torch.Tensor:
        if ".experts." in name and name.endswith("up_proj"):
            parts = name.split(".")
            counts[int(parts[2])][int(parts[5])] += x.shape[0]
        return x

    for batch in rows.split(BATCH):
        model.hidden(batch, tap=tap)
    return {str(i): c for i, c in counts.items()}


def slow_heads(source: Source) -> dict[str, int]:
    """Mamba heads whose dt at rest, softplus(dt_bias), is below 0.001: those that a floor on dt would
    change."""
    assert source.checkpoint is not None
    dt = torch.cat(
        [
            F.softplus(LayerWeights(source.checkpoint, f"backbone.layers.{i}.mixer.")["dt_bias"].float())
            for i, kind in enumerate(source.config.layers)
            if kind == "mamba"
        ]
    )
    return {"heads": dt.numel(), "below 0.001": int((dt < 0.001).sum())}


def main(m: Model, work: Path) -> None:
    source = open_weights(m.folder, "a trained model is a folder")
    checkpoint = source.checkpoint
    assert checkpoint is not None
    model = Ablated(source.config, lambda prefix: LayerWeights(checkpoint, prefix))
    rows = torch.from_numpy(load_rows(DATA / "evaluation.jsonl", m.folder, source.config, 10**6, LENGTH).ids)
    calibration = torch.from_numpy(
        load_rows(DATA / "calibration.jsonl", m.folder, source.config, 32, LENGTH).ids
    )
    print(f"{len(rows)} evaluation rows of {LENGTH} tokens")
    ngram = ngram_perplexity(
        np.fromfile(work / "train.u16", np.uint16), rows.numpy(), source.config.vocab_size
    )
    ours = perplexity(model, rows)
    print(f"perplexity {ours:.3f}, 5-gram {ngram:.3f}, {1 - ours / ngram:.1%} below", flush=True)
    tokens = expert_tokens(model, calibration)
    training = [line for line in (work / f"{m.name}.log").read_text().splitlines() if line.startswith("EVAL")]
    manifest = {
        "what": f"{m.what}, trained from scratch by train.py on the text that text.py gathers "
        "(sources in calib/data/MANIFEST.json)",
        "licence": "Apache-2.0, as the project; trained on public-domain text",
        "measured": f"{date.today()}, {platform.machine()}, float32, nemoquant's reference model",
        "parameters": sum(int(np.prod(spec.shape)) for spec in source.table),
        "training": {
            "last lines of its log": training[-3:],
            "tokens": len(np.fromfile(work / "train.u16", np.uint16)),
        },
        "evaluation": {
            "rows": len(rows),
            "length": LENGTH,
            "perplexity": round(ours, 3),
            "5-gram perplexity (modified Kneser-Ney, same training tokens, same rows)": round(ngram, 3),
            "below it by": f"{1 - ours / ngram:.1%}",
        },
        **({"multi-token prediction": mtp_top1(model, rows[:ABLATION_ROWS])} if m.predicts_two else {}),
        "mamba heads": slow_heads(source),
        "tokens per expert, 32 calibration rows": tokens,
        "perplexity without a block": ablations(model, rows[:ABLATION_ROWS]),
        "files": {
            p.name: hashlib.sha256(p.read_bytes()).hexdigest()
            for p in sorted(m.folder.iterdir())
            if p.suffix in (".safetensors", ".json", ".jinja") and p.name != "manifest.json"
        },
    }
    (m.folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    print(json.dumps({k: v for k, v in manifest.items() if k != "files"}, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path)
    parser.add_argument("--model", choices=MODELS, default="demo")
    arguments = parser.parse_args()
    main(MODELS[arguments.model], arguments.work)
