"""KL from the source on each domain of text, by what calibration saw: the default's text, or `--calib mix`.

    python -m bench.calibration_text demo fp8 nvfp4 nvfp4-full --rows 32
    python -m bench.calibration_text nano fp8 nvfp4 nvfp4-full --json FILE

Each preset is quantized twice, with 32 rows of 512 tokens, the default. KL is as `nemoquant diff`
computes it, over rows of each domain of `calib/data/mix_evaluation.jsonl`, which share no work and no package
with either text. Differences are mix less default, paired over rows: their mean and its standard error;
negative is better for the mix.
"""

import json
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from bench.methods import CALIB, LENGTH, logits, measured, standard_error
from nemoquant import api
from nemoquant.checkpoint.reader import Checkpoint
from nemoquant.checkpoint.weights import LayerWeights
from nemoquant.model.config import NemotronHConfig
from nemoquant.model.reference import ReferenceModel
from nemoquant.shipped import MIX, evaluation_data
from nemoquant.sources.source import open_weights
from nemoquant.tokens.rows import load_rows

TEXTS = {"default": None, "mix": MIX}


def domains(
    text: Path, source: Path, config: NemotronHConfig, rows: int, scratch: Path, length: int = LENGTH
) -> dict[str, np.ndarray]:
    """The first rows [rows, length] of each domain's documents of a shipped mix."""
    by_domain: dict[str, list[str]] = {}
    for line in text.read_text("utf-8").splitlines():
        by_domain.setdefault(json.loads(line)["domain"], []).append(line)
    found = {}
    for domain, lines in by_domain.items():
        path = scratch / f"{domain}.jsonl"
        path.write_text("\n".join(lines), "utf-8")
        found[domain] = load_rows(path, source, config, rows, length).ids
    return found


def reference(model: ReferenceModel, rows: np.ndarray) -> list[torch.Tensor]:
    """The source's log-probabilities, a batch at a time."""
    return [part.float() for part in logits(model, rows)]


@click.command()
@click.argument("model", type=click.Choice(["demo", "nano"]))
@click.argument("presets", nargs=-1, required=True)
@click.option("--rows", default=32, show_default=True, help="Rows of each domain to compare on.")
@click.option("--json", "json_file", type=Path)
def main(model: str, presets: tuple[str, ...], rows: int, json_file: Path | None) -> None:
    """Compare the texts on a trained model."""
    results: dict[str, Any] = {}
    source = CALIB / f"{model}_model"
    with tempfile.TemporaryDirectory() as folder, ExitStack() as end:
        scratch = Path(folder)
        checkpoint = end.enter_context(Checkpoint(source))
        with (opened := open_weights(source, "")).checkpoint:
            config = opened.config
            texts = domains(evaluation_data(Path(MIX)), source, config, rows, scratch)
        bf16 = ReferenceModel(config, lambda prefix: LayerWeights(checkpoint, prefix))
        references = {domain: reference(bf16, ids) for domain, ids in texts.items()}
        for preset in presets:
            kl: dict[str, dict[str, np.ndarray]] = {}
            for name, data in TEXTS.items():
                out = scratch / f"{preset}-{name}"
                api.quantize(source, out, preset, data=data, progress=False)
                kl[name] = {
                    domain: np.array(measured(out, ids, references[domain])["kl"])
                    for domain, ids in texts.items()
                }
            results[preset] = {name: {d: list(v) for d, v in by.items()} for name, by in kl.items()}
            for domain in texts:
                paired = kl["mix"][domain] - kl["default"][domain]
                click.echo(
                    f"{model} {preset:<11} {domain:<5} default {kl['default'][domain].mean():.5f}  "
                    f"mix {kl['mix'][domain].mean():.5f}  {paired.mean():+.5f} +- "
                    f"{standard_error(paired):.5f}"
                )
    if json_file:
        json_file.write_text(json.dumps({"model": model, "rows": rows, "kl": results}))


if __name__ == "__main__":
    main()
