"""``diff`` of weights alone, against transformers.

Two models in float32: one with the source's weights, one with weights decoded here. The expected figures use
no code of nemoquant: the safetensors library reads the checkpoint, a table decodes it, transformers'
NemotronHForCausalLM computes hidden states and logits, and the figures follow from their formulas in float64.
Rows have 64 tokens, one chunk: transformers' torch path is wrong beyond one chunk (its issue 47246).
"""

import importlib.util
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support.modelopt_run import load
from support.oracle_tensors import decode, read
from support.places import DEMO
from torch import Tensor

import nemoquant
from nemoquant.evaluate.schema import Report
from nemoquant.model.parse import load_config
from nemoquant.shipped import evaluation_data
from nemoquant.tokens.rows import load_rows

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("transformers") is None,
        reason="needs transformers (extra: modelopt), which computes the logits",
    ),
]

ROWS, LENGTH = 16, 64

# Two float32 models with the same weights have logits that differ by a relative 1e-6. KL is about the square
# of the logits' differences, here 0.1: 2e-5 of it at a position, less in the mean. Measured: mean 7e-7,
# median 6e-7, p99 8e-6, max 1.2e-5; perplexity 4e-8; residual streams, whose errors are sums over 200000
# values, 3e-8.
KL, PERPLEXITY, STREAM = 1e-4, 1e-6, 1e-6


def dense(folder: Path) -> dict[str, Tensor]:
    """The model's tensors, in float32."""
    return {name: weight.float() for name, weight in decode(read(folder)).items()}


@dataclass
class Outputs:
    """Results of transformers in float64: logits, and the stream after each layer.

    Shapes are [rows, length, vocabulary] and [rows, length, hidden].
    """

    logits: Tensor
    streams: list[Tensor]

    @property
    def log_probabilities(self) -> Tensor:
        """At positions whose next token is known."""
        return torch.log_softmax(self.logits[:, :-1], -1)


@torch.no_grad()
def outputs(tensors: dict[str, Tensor], folder: Path, tokens: Tensor) -> Outputs:
    folder.mkdir()
    (folder / "config.json").write_bytes((DEMO / "config.json").read_bytes())
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model = load(folder, torch.float32)
    streams: list[Tensor] = []
    for layer in model.model.layers:
        layer.register_forward_hook(
            lambda _, __, out: streams.append((out[0] if isinstance(out, tuple) else out).double())
        )
    return Outputs(model(tokens, use_cache=False).logits.double(), streams)


@dataclass
class Compared:
    report: Report
    tokens: Tensor
    source: Outputs
    candidate: Outputs

    @property
    def kl(self) -> Tensor:
        """At every predicted position."""
        p, q = self.source.log_probabilities, self.candidate.log_probabilities
        return (p.exp() * (p - q)).sum(-1)


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Compared]:
    """The demo model in NVFP4, weights only, over text that it was not trained on."""
    folder, threads = tmp_path_factory.mktemp("compared"), torch.get_num_threads()
    torch.set_num_threads(1)
    ids = load_rows(evaluation_data(), DEMO, load_config(DEMO)[0], ROWS, LENGTH).ids
    np.save(folder / "rows.npy", ids)
    out = nemoquant.quantize(
        DEMO, folder / "nvfp4", "nvfp4-w4a16", nemoquant.RunOptions(method="max", threads=1)
    ).out
    report = nemoquant.diff(DEMO, [out], data=folder / "rows.npy", card=False, threads=1)
    tokens = torch.from_numpy(ids)
    models = [outputs(dense(of), folder / name, tokens) for of, name in ((DEMO, "source"), (out, "decoded"))]
    yield Compared(report, tokens, *models)
    torch.set_num_threads(threads)


def test_the_candidate_is_what_the_test_means(compared: Compared) -> None:
    """Experts are in NVFP4, no input is rounded at run time, and the error is large enough to compare."""
    candidate = compared.report.candidates[0]
    assert compared.tokens.shape == (ROWS, LENGTH)
    assert compared.report.data.predicted_positions == ROWS * (LENGTH - 1)
    assert {(m.format, m.input_format) for m in candidate.modules} == {("nvfp4", None)}
    assert candidate.logits.kl.mean > 1e-3
    assert 0.8 < candidate.logits.top1_agreement < 1


def test_kl(compared: Compared) -> None:
    found, kl = compared.report.candidates[0].logits.kl, compared.kl.numpy()
    expected = {"mean": kl.mean(), "median": np.median(kl), "p99": np.percentile(kl, 99), "max": kl.max()}
    error = {name: abs(getattr(found, name) / value - 1) for name, value in expected.items()}
    print({name: f"{value:.1e}" for name, value in error.items()})
    assert {name: value for name, value in error.items() if value > KL} == {}


def test_kl_by_position(compared: Compared) -> None:
    ranges = compared.report.candidates[0].logits.kl_by_position
    found = np.concatenate([[r.kl] * (r.last - r.first + 1) for r in ranges])
    np.testing.assert_allclose(found, compared.kl.mean(0).numpy(), rtol=KL)


def test_perplexities(compared: Compared) -> None:
    following = compared.tokens[:, 1:, None]
    expected = [
        float((-x.log_probabilities.gather(-1, following)).mean().exp())
        for x in (compared.source, compared.candidate)
    ]
    found, reference = compared.report.candidates[0].logits, compared.report.reference
    assert reference.perplexity == pytest.approx(expected[0], rel=PERPLEXITY)
    assert found.perplexity == pytest.approx(expected[1], rel=PERPLEXITY)
    assert found.perplexity_ratio == pytest.approx(expected[1] / expected[0], rel=PERPLEXITY)
    assert abs(expected[1] / expected[0] - 1) > 1e-3  # otherwise the two could be confused


def test_likeliest_tokens(compared: Compared) -> None:
    """No position is so near a tie that float32 decides it: only the order of a sum differs."""
    first, second = (x.logits[:, :-1] for x in (compared.source, compared.candidate))
    top1 = float((first.argmax(-1) == second.argmax(-1)).double().mean())
    best, own = (x.topk(5).indices for x in (first, second))
    top5 = float((best[..., :, None] == own[..., None, :]).sum((-1, -2)).double().mean()) / 5
    found = compared.report.candidates[0].logits
    assert found.top1_agreement == pytest.approx(top1, rel=1e-12)
    assert found.top5_agreement == pytest.approx(top5, rel=1e-12)


def test_the_stream_after_every_layer(compared: Compared) -> None:
    kinds = json.loads((DEMO / "config.json").read_text())["hybrid_override_pattern"]
    layers = [
        layer for layer in compared.report.candidates[0].layers if layer.name not in ("embedding", "head")
    ]
    assert len(layers) == len(kinds) == len(compared.source.streams)
    for i, layer in enumerate(layers):
        first, second = compared.source.streams[i], compared.candidate.streams[i]
        expected = float((second - first).norm() / first.norm())
        assert (layer.name, expected == 0) == (
            str(i),
            "E" not in kinds[: i + 1],
        )  # up to the first experts nothing differs
        assert layer.stream.relative == pytest.approx(expected, rel=STREAM, abs=0), f"layer {i}, {layer.kind}"


def test_the_logits_as_a_layer(compared: Compared) -> None:
    head = compared.report.candidates[0].layers[-1]
    first, second = compared.source.logits, compared.candidate.logits
    assert head.name == "head"
    assert head.stream.relative == pytest.approx(float((second - first).norm() / first.norm()), rel=STREAM)
    assert (head.alone.relative, head.alone.sqnr_db) == (0.0, None)  # norm and head are the source's
