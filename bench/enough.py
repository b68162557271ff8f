"""KL from the source by how much text calibration saw, in more or in longer rows.

    python -m bench.enough demo --preset nvfp4-full --method max --method gptq
    python -m bench.enough nano --preset nvfp4-full-w4a16 --rows 32 --tokens 512 --tokens 1024 --json FILE
    python -m bench.enough nano --method gptq --changed propagate=source,headroom=1

ROWS are counted in rows of 512 tokens; with TOKENS a row, as many fewer rows have the same number of tokens.
They are chosen by SEED from the 190 rows of the default's text; where more are asked for, all of these and
rows of the mix's technical prose (246 together: all the prose that is shipped). KL is on rows of the
evaluation text, whose works are in neither; differences are paired over them, from 32 rows of 512 with the
same seed, with their standard error. CHANGED is of each preset, as in bench.methods. Beside it stands how
many tokens an expert got: the median, and the least. By method max, weights without quantized inputs need no
calibration.
"""

import json
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
import numpy as np

from bench.calibration_text import domains, reference
from bench.methods import CALIB, LENGTH, measured, quantized, standard_error
from nemoquant.calibrate.scales import FILE as SCALES_FILE
from nemoquant.checkpoint.reader import Checkpoint
from nemoquant.checkpoint.weights import LayerWeights
from nemoquant.model.config import NemotronHConfig
from nemoquant.model.reference import ReferenceModel
from nemoquant.shipped import MIX, calibration_data, evaluation_data
from nemoquant.sources.source import open_weights
from nemoquant.tokens.rows import load_rows

ALL = 10_000  # more rows than there are
USUAL = 32


class Text:
    """The shipped prose, as rows of any length."""

    def __init__(self, source: Path, config: NemotronHConfig, scratch: Path) -> None:
        self.source, self.config, self.scratch = source, config, scratch

    def rows(self, tokens: int, length: int, seed: int) -> np.ndarray:
        """So many tokens as rows [rows, length]."""
        own = load_rows(calibration_data(), self.source, self.config, ALL, length).ids
        chosen = own[np.random.default_rng(seed).permutation(len(own))]
        count = tokens // length
        if count > len(own):
            mix = domains(
                calibration_data(Path(MIX)), self.source, self.config, ALL, self.scratch, length=length
            )
            chosen = np.concatenate([chosen, unlike(mix["prose"], own)])
        if count > len(chosen):
            raise click.UsageError(f"{count} rows of {length}; there are {len(chosen)}")
        return chosen[:count]


def unlike(rows: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Those of ``rows`` of which less than a tenth of the runs of eight tokens are in ``known``."""
    seen = {run.tobytes() for run in np.lib.stride_tricks.sliding_window_view(known.reshape(-1), 8)}
    shares = [
        np.mean([run.tobytes() in seen for run in np.lib.stride_tricks.sliding_window_view(row, 8)])
        for row in rows
    ]
    return rows[np.array(shares) < 0.1]


def experts(out: Path) -> list[int]:
    """How many tokens each expert got."""
    counts = json.loads((out / SCALES_FILE).read_text())["tokens_per_expert"].values()
    return [count for layer in counts for count in layer]


@click.command()
@click.argument("model", type=click.Choice(["demo", "nano"]))
@click.option("--preset", "presets", multiple=True, default=["nvfp4-full", "nvfp4-full-w4a16"])
@click.option("--method", "methods", multiple=True, default=["max", "gptq"])
@click.option("--changed", default="", help="What else is changed of each preset.")
@click.option("--rows", "sizes", multiple=True, type=int, default=[USUAL, 8, 16, 64, 128, 190, 246])
@click.option("--tokens", "lengths", multiple=True, type=int, default=[LENGTH], show_default=True)
@click.option("--seed", "seeds", multiple=True, type=int, default=[1, 2], show_default=True)
@click.option("--on", "judges", default=24, show_default=True, help="Rows to compare on.")
@click.option("--first", default=64, show_default=True, help="The first of them.")
@click.option("--json", "json_file", type=Path)
def main(
    model: str,
    presets: tuple[str, ...],
    methods: tuple[str, ...],
    changed: str,
    sizes: tuple[int, ...],
    lengths: tuple[int, ...],
    seeds: tuple[int, ...],
    judges: int,
    first: int,
    json_file: Path | None,
) -> None:
    """Compare amounts of calibration on a trained model."""
    source, results = CALIB / f"{model}_model", []
    with tempfile.TemporaryDirectory() as folder, ExitStack() as end:
        scratch = Path(folder)
        checkpoint = end.enter_context(Checkpoint(source))
        with (opened := open_weights(source, "")).checkpoint:
            config = opened.config
            ids = load_rows(evaluation_data(), source, config, first + judges, LENGTH).ids[first:]
            text = Text(source, config, scratch)
            chosen = {
                (size, length, seed): text.rows(size * LENGTH, length, seed)
                for size in sizes
                for length in lengths
                for seed in seeds
            }
        bf16 = ReferenceModel(config, lambda prefix: LayerWeights(checkpoint, prefix))
        wanted = reference(bf16, ids)
        usual: dict[Any, np.ndarray] = {}
        blind: set[tuple[str, str]] = set()  # what needs no calibration is measured once
        for (_, length, seed), rows in chosen.items():
            for preset in presets:
                for method in methods:
                    if (preset, method) in blind:
                        continue
                    out = scratch / f"out{len(results)}"
                    took = quantized(source, out, f"{preset}:method={method},{changed}", scratch, rows)
                    kl = np.array(measured(out, ids, wanted)["kl"])
                    paired = kl - usual.setdefault((preset, method, seed), kl)
                    got = experts(out) if (out / SCALES_FILE).exists() else []
                    if not got:
                        blind.add((preset, method))
                    results.append(
                        {"preset": preset, "method": method, "rows": len(rows), "length": length}
                        | {"seed": seed, "kl": kl.tolist(), "experts": got}
                        | took
                    )
                    click.echo(
                        f"{model} {preset} {method} {len(rows)} rows of {length}, seed {seed}: KL "
                        f"{kl.mean():.5f}, {paired.mean():+.5f} +- "
                        f"{standard_error(paired):.5f}"
                        + (f", an expert {int(np.median(got)):,}, least {min(got):,}" if got else "")
                        + f", {took['cpu']:.0f} s of CPU, {took['peak_tree']:.2f} GB"
                    )
                    if json_file:
                        json_file.write_text(json.dumps({"model": model, "first": first, "runs": results}))


if __name__ == "__main__":
    main()
