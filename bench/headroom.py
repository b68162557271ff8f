"""What headroom of NVFP4 input scales costs, and what it saves.

    python -m bench.headroom demo
    python -m bench.headroom nano --preset nvfp4-full --factor 1 --factor 2 --factor 16 --json FILE

Each preset is quantized once for each text of calibration (prose is the default's; code is that of the mix)
and each factor, with 32 rows of 512 tokens. Compared with the source are rows of several texts: prose of
the evaluation text, code, mathematics and conversations of the mix's, and random tokens. For each there are
KL, its difference from the first factor's paired over rows with its standard error; the share of blocks of
NVFP4 inputs that saturate (largest magnitude / (6 input_scale) > 448), how far the largest goes beyond what
can be held, and the share of blocks whose scale is too small for a normal number, or zero and they with it.

Then each model goes on by itself from the first 64 tokens of rows of the evaluation text, for 448 tokens:
greedily, and by samples at temperature 1 with fixed seeds. Printed are the share of 4-grams that stood before
in the text, the share of texts that end in a loop (the last 128 tokens repeat with a period of at most 42),
and the KL from the source on the text that the quantized model made, in all of it and in its last quarter.
"""

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor

from bench.calibration_text import domains, reference
from bench.methods import BATCH, CALIB, LENGTH, compared, logits, standard_error
from nemoquant import api
from nemoquant.checkpoint.reader import Checkpoint
from nemoquant.checkpoint.weights import LayerWeights
from nemoquant.engine.generate import Sampler
from nemoquant.formats import FORMATS
from nemoquant.model.reference import ReferenceModel
from nemoquant.model.taps import Scope, identity
from nemoquant.quantized.checkpoint import PackedCheckpoint
from nemoquant.shipped import MIX, calibration_data, evaluation_data
from nemoquant.sources.source import open_weights
from nemoquant.tokens.rows import load_rows

CALIBRATION_ROWS, PROMPT, NEW = 32, 64, 448
CODE = 6  # the largest of E2M1
LARGEST = 448  # of E4M3; its smallest normal number is 2^-6, its smallest one 2^-9
WAYS = {"greedy": 0.0, "sampled": 1.0}  # with their temperatures
Tap = Callable[[str, Tensor], Tensor]


class Blocks:
    """Counts of blocks of the inputs that have headroom, on their way into ``opened.tap()``."""

    def __init__(self, opened: PackedCheckpoint) -> None:
        self.inputs, self.round = opened.inputs, opened.tap()
        self.blocks = self.saturated = self.small = self.zeroed = 0
        self.reach = 0.0

    def tap(self, name: str, x: Tensor) -> Tensor:
        format, scale = self.inputs.get(name, ("fp8", np.float32(1)))
        block = FORMATS[format].block
        if FORMATS[format].input_headroom and block is not None and x.numel():
            # a block's own scale, before it is rounded to E4M3
            own = x.reshape(-1, block).abs().amax(1).double()
            own = own[own > 0] / (CODE * float(scale))  # rows that fill up are zero
            self.blocks += len(own)
            self.saturated += int((own > LARGEST).sum())
            self.small += int((own < 2.0**-6).sum())
            self.zeroed += int((own <= 2.0**-10).sum())  # a tie goes to the even code
            if len(own):
                self.reach = max(self.reach, float(own.max()) / LARGEST)
        return self.round(name, x)

    def json(self) -> dict[str, float]:
        count = max(1, self.blocks)
        shares = {key: getattr(self, key) / count for key in ("saturated", "small", "zeroed")}
        return shares | {"reach": self.reach}


def dense(names: list[str], weights: Any) -> dict[str, Tensor]:
    """Each of ``weights`` decoded once: generating asks for them at each token."""
    return {name: weights[name].to(torch.empty(0)) for name in names}


@contextmanager
def opened_model(folder: Path, others: float) -> Iterator[tuple[ReferenceModel, PackedCheckpoint]]:
    """``others``: what the scales of other inputs than those that have headroom are multiplied by."""
    opened = PackedCheckpoint(folder)
    for name in opened.inputs.keys() & {spec.module for spec in opened.table}:
        format, scale = opened.inputs[name]
        if not FORMATS[format].input_headroom:
            opened.inputs[name] = format, np.float32(scale * others)
    arrays = dense(list(opened.stored), opened.weights(""))
    yield ReferenceModel(opened.config, lambda prefix: Scope(arrays, prefix)), opened
    opened.checkpoint.close()


@torch.no_grad()
def generated(model: ReferenceModel, prompts: np.ndarray, tap: Tap) -> dict[str, np.ndarray]:
    """Prompts [rows, PROMPT] with what the model goes on with, [rows, PROMPT + NEW]; no token ends it."""
    samplers = [Sampler(warmth, seed) for warmth in WAYS.values() for seed in range(len(prompts))]
    tokens, state = np.concatenate([prompts] * len(WAYS)), None
    parts = [tokens]
    for place in range(NEW):
        hidden, state = model.hidden(torch.from_numpy(tokens), state, tap)
        found = model.logits(hidden[:, -1:], tap)[:, 0].numpy()
        tokens = np.array(
            [[choose(row, place)] for choose, row in zip(samplers, found, strict=True)], np.int64
        )
        parts.append(tokens)
    rows = np.concatenate(parts, axis=1)
    return {way: rows[i * len(prompts) : (i + 1) * len(prompts)] for i, way in enumerate(WAYS)}


def repeated(tokens: np.ndarray) -> float:
    """The share of 4-grams that stood before."""
    grams = np.lib.stride_tricks.sliding_window_view(tokens, 4)
    return 1 - len(np.unique(grams, axis=0)) / len(grams)


def loops(tokens: np.ndarray, last: int = 128) -> bool:
    """Whether the end repeats, three times at least."""
    end = tokens[-last:]
    return any(bool((end[p:] == end[:-p]).all()) for p in range(1, last // 3 + 1))


def mean(values: Any) -> tuple[float, float]:
    """With its standard error."""
    found = np.array(values, np.float64)
    return float(found.mean()), standard_error(found)


def free_running(model: ReferenceModel, tap: Tap, bf16: ReferenceModel, prompts: np.ndarray) -> Any:
    """What becomes of the text that a model makes by itself; by way of choosing tokens."""
    found = {}
    for way, rows in generated(model, prompts, tap).items():
        kl = []
        for start in range(0, len(rows), BATCH):
            some = rows[start : start + BATCH]
            p, q = (next(logits(m, some, t)) for m, t in ((bf16, None), (model, tap)))
            kl.append(((p.exp() * (p - q)).sum(-1))[:, PROMPT - 1 : -1].numpy())
        by_place = np.concatenate(kl)
        found[way] = {
            "repeated": [repeated(row[PROMPT:]) for row in rows],
            "loops": [loops(row[PROMPT:]) for row in rows],
            "kl": by_place.mean(1).tolist(),
            "kl_end": by_place[:, -NEW // 4 :].mean(1).tolist(),
        }
    return found


def say_texts(head: str, factor: float, found: Any, first: Any) -> None:
    for text, one in found.items():
        kl, error = mean(one["kl"])
        change, paired = mean(np.array(one["kl"]) - np.array(first[text]["kl"]))
        click.echo(
            f"{head} on {text:<6} headroom {factor:g}: KL {kl:.5f} +- {error:.5f}, {change:+.5f} +- "
            f"{paired:.5f} ({change / (kl - change):+.1%}), saturated {one['saturated']:.2e}, up to "
            f"{one['reach']:.2f} of what fits, small {one['small']:.2e}, zeroed "
            f"{one['zeroed']:.2e}"
        )


def say_free(head: str, found: Any, first: Any) -> None:
    for way, one in found.items():
        figures = {key: mean(values) for key, values in one.items()}
        change, paired = mean(np.array(one["kl"]) - np.array(first[way]["kl"]))
        click.echo(
            f"{head} {way}: repeated {figures['repeated'][0]:.1%} +- {figures['repeated'][1]:.1%}, loops "
            f"{figures['loops'][0]:.1%} +- {figures['loops'][1]:.1%}, KL {figures['kl'][0]:.4f} +- "
            f"{figures['kl'][1]:.4f} ({change:+.4f} +- {paired:.4f}), at the end {figures['kl_end'][0]:.4f} "
            f"+- {figures['kl_end'][1]:.4f}"
        )


@click.command()
@click.argument("model", type=click.Choice(["demo", "nano"]))
@click.option("--preset", "presets", multiple=True, default=["nvfp4-full", "nvfp4"], show_default=True)
@click.option("--factor", "factors", multiple=True, type=float, default=[1, 2, 4], show_default=True)
@click.option("--calib", "calibs", multiple=True, default=["prose", "code"], show_default=True)
@click.option("--method", help="Instead of the presets' own; with max, codes are the same for each factor.")
@click.option("--propagate", help="Instead of the presets' own.")
@click.option(
    "--others", is_flag=True, help="An experiment: headroom of FP8 inputs too, once codes are there."
)
@click.option("--rows", default=16, show_default=True, help="Rows of each text to compare on.")
@click.option("--prompts", default=24, show_default=True, help="Texts to go on from; 0 for none.")
@click.option("--json", "json_file", type=Path)
def main(
    model: str,
    presets: tuple[str, ...],
    factors: tuple[float, ...],
    calibs: tuple[str, ...],
    method: Any,
    propagate: Any,
    others: bool,
    rows: int,
    prompts: int,
    json_file: Path | None,
) -> None:
    """Compare factors on a trained model."""
    source = CALIB / f"{model}_model"
    results: dict[str, Any] = {"model": model, "method": method, "texts": {}, "free": {}}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as end:
        scratch = Path(folder)
        checkpoint = end.enter_context(Checkpoint(source))
        with (opened := open_weights(source, "")).checkpoint:
            config = opened.config
            evaluation = load_rows(evaluation_data(), source, config, rows + prompts, LENGTH).ids
            texts = domains(evaluation_data(Path(MIX)), source, config, rows, scratch)
            texts |= {"prose": evaluation[:rows]}
            vocabulary = np.random.default_rng(0).integers(0, config.vocab_size, (rows, LENGTH))
            texts["random"] = vocabulary.astype(np.int64)
            seen = domains(calibration_data(Path(MIX)), source, config, CALIBRATION_ROWS, scratch)
            seen["prose"] = load_rows(calibration_data(), source, config, CALIBRATION_ROWS, LENGTH).ids
        arrays = dense(list(checkpoint.tensors), LayerWeights(checkpoint, ""))
        bf16 = ReferenceModel(config, lambda prefix: Scope(arrays, prefix))
        references = {text: reference(bf16, ids) for text, ids in texts.items()}
        starts = evaluation[rows:, :PROMPT]
        if prompts:
            free = results["free"]["bf16"] = free_running(bf16, identity, bf16, starts)
            say_free(f"{model} bf16", free, free)
        for preset in presets:
            for calib in calibs:
                np.save(scratch / "rows.npy", seen[calib])
                for factor in factors:
                    out = scratch / f"{preset}-{calib}-{factor:g}"
                    api.quantize(
                        *(source, out, preset),
                        data=scratch / "rows.npy",
                        headroom=factor,
                        method=method,
                        propagate=propagate,
                        progress=False,
                    )
                    head, key = f"{model} {preset}, calibrated on {calib}", f"{preset} {calib} {factor:g}"
                    first = f"{preset} {calib} {factors[0]:g}"
                    with opened_model(out, factor if others else 1) as (candidate, packed):
                        found = results["texts"][key] = {}
                        for text, ids in texts.items():
                            watched = Blocks(packed)
                            kl = compared(candidate, ids, references[text], watched.tap)["kl"]
                            found[text] = {"kl": kl} | watched.json()
                        say_texts(head, factor, found, results["texts"][first])
                        if prompts:
                            free = free_running(candidate, packed.tap(), bf16, starts)
                            results["free"][key] = free
                            say_free(f"{head} headroom {factor:g}", free, results["free"][first])
                    if json_file:
                        json_file.write_text(json.dumps(results))


if __name__ == "__main__":
    main()
