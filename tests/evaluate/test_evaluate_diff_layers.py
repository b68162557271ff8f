"""``diff``'s figures by layer and module, against a plain computation.

It is the reference model over weights decoded here, with taps written here, one call a layer, on all rows at
once. The operands of all products are the same to the bit, so that the figures differ only by how sums and
differences are rounded.
"""

import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from support.files import leaves
from support.oracle_tensors import decode, read
from support.pack_oracle import E2M1
from support.synthetic import CONFIG, random_rows, random_tensors, write_checkpoint, write_rows
from torch import Tensor

import nemoquant
from nemoquant.api import RunOptions
from nemoquant.evaluate import layers
from nemoquant.evaluate.schema import Module, Report
from nemoquant.model.config import NemotronHConfig
from nemoquant.model.norm import rms_norm
from nemoquant.model.parse import load_config
from nemoquant.model.reference import ReferenceModel, layer_forward
from nemoquant.model.taps import Scope, Tap, identity, prefixed

# Sums in float64: n squares, n below 10^6, in another order, differ by n 2^-53 at the very most, and a
# logarithm by less.
FLOAT64 = 1e-10
# diff subtracts streams in float32: each difference has a relative error of at most 2^-24, for error and
# signal each. Measured: 2e-9.
DIFFERENCE = 2.0**-23

ROWS, LENGTH, EFFECT_ROWS = 6, 40, 4


# The rounding of inputs, a second implementation.

MIDPOINTS = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])


def round_fp8(x: Tensor, scale: Tensor) -> Tensor:
    return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale


def round_nvfp4(x: Tensor, scale: Tensor) -> Tensor:
    """A code is the number of midpoints below a magnitude; on a midpoint, the even code."""
    blocks = x.reshape(-1, 16)
    wanted = blocks.abs().amax(-1, keepdim=True) / (6 * scale)
    step = wanted.clamp(max=448).to(torch.float8_e4m3fn).float() * scale
    magnitude = torch.where(step > 0, blocks.abs() / step, 0)
    below = torch.searchsorted(MIDPOINTS, magnitude)  # midpoints < magnitude
    code = below + ((MIDPOINTS[below.clamp(max=6)] == magnitude) & (below % 2 == 1))
    return (E2M1[code] * step * torch.sign(blocks)).view_as(x)


@dataclass
class Sums:
    """What a tap changed in its inputs."""

    signal: float = 0.0
    error: float = 0.0
    saturated: int = 0
    flushed: int = 0
    count: int = 0

    def add(self, x: Tensor, y: Tensor, limit: float) -> None:
        self.signal += float(x.double().square().sum())
        self.error += float((x.double() - y.double()).square().sum())
        self.saturated += int((x.abs() > limit).sum())
        self.flushed += int(((x != 0) & (y == 0)).sum())
        self.count += x.numel()

    @property
    def db(self) -> float:
        return 10 * math.log10(self.signal / self.error)


@dataclass
class Straight:
    """A checkpoint, computed without evaluate/: weights as float32, taps with the scales in the file."""

    tensors: dict[str, Tensor]
    config: NemotronHConfig
    sums: dict[str, Sums] = field(default_factory=dict)

    @cached_property
    def dense(self) -> dict[str, Tensor]:
        return {name: weight.float() for name, weight in decode(self.tensors).items()}

    @cached_property
    def rounded(self) -> dict[str, tuple[str, Tensor]]:
        """Tap -> format and scale."""
        found = {}
        for name, scale in self.tensors.items():
            module, _, kind = name.rpartition(".")
            if kind == "input_scale":
                found[module] = (
                    ("nvfp4" if self.tensors[module + ".weight"].dtype == torch.uint8 else "fp8"),
                    scale,
                )
            if kind in ("k_scale", "v_scale"):
                found[module + ".output"] = "fp8", scale
        return found

    def scope(self, prefix: str) -> Scope:
        return Scope(self.dense, prefix)

    def tap(self, only: Callable[[str], bool] = lambda name: True, keep: bool = False) -> Tap:
        def through(name: str, x: Tensor) -> Tensor:
            if name not in self.rounded or not only(name):
                return x
            form, scale = self.rounded[name]
            y = (round_fp8 if form == "fp8" else round_nvfp4)(x, scale)
            if keep:
                self.sums.setdefault(name, Sums()).add(
                    x, y, float(scale) * (448 if form == "fp8" else 2688) * (1 + 2.0**-20)
                )
            return y

        return through

    def layer(self, i: int, x: Tensor, tap: Tap) -> tuple[Tensor, Tensor | None]:
        """The stream after layer i, and the scan's state."""
        prefix = f"backbone.layers.{i}."
        y, state = layer_forward(
            self.config, self.config.layers[i], self.scope(prefix), x, None, prefixed(tap, prefix)
        )
        return y, getattr(state, "ssm", None)

    def choices(self, i: int, x: Tensor) -> list[set[int]]:
        """The experts of each token: the largest of sigmoid plus bias."""
        layer = self.scope(f"backbone.layers.{i}.")
        normed = rms_norm(x, layer["norm.weight"], self.config.norm_eps).flatten(0, 1)
        scores = (
            torch.sigmoid(normed @ layer["mixer.gate.weight"].mT)
            + layer["mixer.gate.e_score_correction_bias"]
        )
        return [set(ids) for ids in scores.topk(self.config.num_experts_per_tok).indices.tolist()]

    def logits(self, x: Tensor, tap: Tap) -> Tensor:
        """Computed from the stream after the last layer."""
        normed = rms_norm(x, self.dense["backbone.norm_f.weight"], self.config.norm_eps)
        return tap("lm_head", normed.flatten(0, 1)) @ self.dense["lm_head.weight"].mT


def relative(found: Tensor, expected: Tensor, base: Tensor | float = 0.0) -> float:
    found, expected = found.double(), expected.double()
    return float((found - expected).norm() / (expected - base).norm())


@dataclass
class Run:
    """The report on one candidate, and both models to compute with."""

    report: Report
    ids: Tensor
    source: Straight
    candidate: Straight
    folder: Path

    @cached_property
    def streams(self) -> list[Tensor]:
        """The source's streams, before each layer and after the last."""
        x = [self.source.dense["backbone.embeddings.weight"][self.ids]]
        for i in range(len(self.source.config.layers)):
            x.append(self.source.layer(i, x[-1], identity)[0])
        return x

    @cached_property
    def own_streams(self) -> list[Tensor]:
        """The candidate's streams."""
        x = [self.candidate.dense["backbone.embeddings.weight"][self.ids]]
        for i in range(len(self.source.config.layers)):
            x.append(self.candidate.layer(i, x[-1], self.candidate.tap())[0])
        return x

    def mixed(self, names: set[str]) -> Straight:
        """The source with some modules taken from the candidate."""
        mixed = Straight({}, self.source.config)
        changed = {n: w for n, w in self.candidate.dense.items() if n.removesuffix(".weight") in names}
        mixed.__dict__["dense"] = self.source.dense | changed
        return mixed


@pytest.fixture(scope="module")
def threads() -> Iterator[None]:
    """One thread: products whose size depends on the number of threads are not tested here."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten tokens are likely, so that a draft of the random MTP module is sometimes right."""
    tensors = random_tensors(CONFIG)
    tensors["lm_head.weight"][10:] *= 0.25
    return write_checkpoint(tmp_path_factory.mktemp("layers") / "source", CONFIG, tensors)


def compare(source: Path, name: str, preset: str) -> Run:
    """Calibrated on two short rows, so that other rows go beyond the calibrated range."""
    folder = source.parent
    write_rows(folder / "rows.npy", (ROWS, LENGTH), seed=1)
    calibration = write_rows(folder / "calibration.npy", (2, 16))
    options = RunOptions(method="max", headroom=1, data=calibration, dtype="float32", threads=1)
    out = nemoquant.quantize(source, folder / name, preset, options).out
    report = nemoquant.diff(source, [out], data=folder / "rows.npy", card=False, threads=1)
    config = load_config(source)[0]
    ids = torch.from_numpy(random_rows((ROWS, LENGTH), seed=1))
    return Run(report, ids, Straight(read(source), config), Straight(read(out), config), out)


RECIPE = """
name: all
summary: All that can be quantized, head and latent projections too.
rules:
  - {roles: [experts.*, latent.*], format: nvfp4}
  - {roles: [mamba.*, attention.*, shared_experts.*, mlp.*, lm_head], format: fp8}
  - {roles: ["*"], format: source}
kv_cache: fp8
"""


@pytest.fixture(scope="module", params=["nvfp4", "nvfp4-full", "all"])
def run(request: pytest.FixtureRequest, source: Path, threads: None) -> Run:  # noqa: ARG001
    if request.param == "all":
        recipe = source.parent / "all.yaml"
        recipe.write_text(RECIPE)
        return compare(source, "all", str(recipe))
    return compare(source, request.param, request.param)


def layer_of(run: Run, name: str) -> Any:
    return next(layer for layer in run.report.candidates[0].layers if layer.name == name)


def layer_numbers(run: Run) -> range:
    return range(len(run.source.config.layers))


def test_the_run_takes_every_path(run: Run) -> None:
    """Both formats of inputs, a cache, inputs beyond their scale, MTP, all kinds of layers."""
    modules = run.report.candidates[0].modules
    assert {"nvfp4", "fp8"} == {m.input_format for m in modules}
    assert {m.role for m in modules} >= {
        "kv_cache",
        "mamba.in_proj",
        "experts.up_proj",
        "shared_experts.down_proj",
        "mlp.up_proj",
    }
    assert set(run.source.config.layers) == {"mamba", "attention", "moe", "mlp"}
    assert sum(m.input is not None and m.input.saturated > 0 for m in modules) > 5
    assert run.report.effect_rows == EFFECT_ROWS < ROWS


def test_the_stream(run: Run) -> None:
    for i in layer_numbers(run):
        expected = relative(run.own_streams[i + 1], run.streams[i + 1])
        assert layer_of(run, str(i)).stream.relative == pytest.approx(expected, rel=DIFFERENCE), i
        assert layer_of(run, str(i)).stream.sqnr_db == pytest.approx(
            -20 * math.log10(expected), abs=20 * DIFFERENCE
        ), i


def test_each_layer_alone(run: Run) -> None:
    """The layer's input is the source's stream; the error is that of what the block adds to it."""
    for i in layer_numbers(run):
        found, _ = run.candidate.layer(i, run.streams[i], run.candidate.tap())
        expected = relative(found, run.streams[i + 1], run.streams[i])
        assert layer_of(run, str(i)).alone.relative == pytest.approx(expected, rel=DIFFERENCE), i
        assert 0.005 < expected < 1, i


def test_the_head_alone(run: Run) -> None:
    """Error of the logits, computed from the source's stream of four rows."""
    x = run.streams[-1][:EFFECT_ROWS]
    expected = relative(run.candidate.logits(x, run.candidate.tap()), run.source.logits(x, identity))
    assert (expected > 0) == ("lm_head" in run.candidate.rounded)
    assert layer_of(run, "head").alone.relative == pytest.approx(expected, rel=DIFFERENCE, abs=0)


def test_the_scans_state(run: Run) -> None:
    """The state in the candidate's own stream."""
    for i in layer_numbers(run):
        _, expected = run.source.layer(i, run.streams[i], identity)
        _, found = run.candidate.layer(i, run.own_streams[i], run.candidate.tap())
        state = layer_of(run, str(i)).ssm_state
        if expected is None or found is None:
            assert state is None
        else:
            assert state.relative == pytest.approx(relative(found, expected), rel=DIFFERENCE), i


def test_routing(run: Run) -> None:
    """Routing in the candidate's own stream."""
    for i in layer_numbers(run):
        found = layer_of(run, str(i)).routing
        if run.source.config.layers[i] != "moe":
            assert found is None
            continue
        expected = run.source.choices(i, run.streams[i])
        own = run.candidate.choices(i, run.own_streams[i])
        lost = [len(a - b) for a, b in zip(expected, own, strict=True)]
        assert found.flipped == pytest.approx(sum(lost) / (2 * ROWS * LENGTH), rel=FLOAT64)
        assert found.tokens_with_flip == sum(n > 0 for n in lost) / (ROWS * LENGTH) > 0
        assert found.tokens_per_expert == [sum(e in ids for ids in own) for e in range(8)]
        assert found.tokens_per_expert_reference == [sum(e in ids for ids in expected) for e in range(8)]


def parts(run: Run, module: Module) -> set[str]:
    """The checkpoint's modules that one module of the report stands for."""
    names = {name.removesuffix(".weight") for name in run.source.tensors}
    experts = {module.name.replace(".experts.", f".experts.{e}.") for e in range(8)}
    return (experts if module.experts else {module.name}) & names


def test_the_effect_of_every_module(run: Run) -> None:
    """The effect on the module's layer, whose input is the source's stream of four rows.

    The layer has this module's weights and rounded inputs; everything else is the source's. For the head it
    is the effect on the logits.
    """
    modules = run.report.candidates[0].modules
    for module in modules:
        names = parts(run, module)
        taps = names or {module.name.replace("kv_cache", f"{p}_proj.output") for p in "kv"}
        mixed, tap = run.mixed(names), run.candidate.tap(lambda name, t=taps: name in t)
        if module.layer is None:
            x = run.streams[-1][:EFFECT_ROWS]
            found, expected = mixed.logits(x, tap), run.source.logits(x, identity)
        else:
            x, expected = (run.streams[module.layer + after][:EFFECT_ROWS] for after in (0, 1))
            found, _ = mixed.layer(module.layer, x, tap)
        assert module.effect == pytest.approx(relative(found, expected), rel=DIFFERENCE), module.name
        assert 1e-4 < module.effect < 1, module.name
    ordered = sorted(modules, key=lambda m: -m.effect)
    assert run.report.candidates[0].worst_modules == [m.name for m in ordered[:10]]


def test_every_module_that_is_not_the_sources_is_there_once(run: Run) -> None:
    names = [name for module in run.report.candidates[0].modules for name in parts(run, module)]
    stored = {
        n.removesuffix(".weight")
        for n, t in run.candidate.tensors.items()
        if t.dtype in (torch.uint8, torch.float8_e4m3fn)
    }
    assert sorted(names) == sorted(name for name in stored if not name.endswith("_scale"))
    caches = [module.name for module in run.report.candidates[0].modules if module.role == "kv_cache"]
    assert caches == ["backbone.layers.1.mixer.kv_cache"]


def test_the_noise_of_every_module(run: Run) -> None:
    """Weights against the source's weights; inputs with the source's stream as the layer's input."""
    run.candidate.sums.clear()
    for i in layer_numbers(run):
        run.candidate.layer(i, run.streams[i], run.candidate.tap(keep=True))
    run.candidate.logits(run.streams[-1][:EFFECT_ROWS], run.candidate.tap(keep=True))
    for module in run.report.candidates[0].modules:
        names = sorted(parts(run, module), key=lambda name: [int(n) for n in name.split(".") if n.isdigit()])
        weights, inputs = [], []
        for name in names:
            w, q = run.source.dense[name + ".weight"], run.candidate.dense[name + ".weight"]
            weights.append(Sums())
            weights[-1].add(w, q, math.inf)
            inputs.append(run.candidate.sums.get(name))
        if module.role == "kv_cache":
            inputs = [run.candidate.sums[module.name.replace("kv_cache", f"{p}_proj.output")] for p in "kv"]
        for found, sums in ((module.weight, weights), (module.input, [s for s in inputs if s])):
            if not sums:
                assert found is None
                continue
            assert found is not None
            total = {
                key: sum(getattr(s, key) for s in sums)
                for key in ("signal", "error", "saturated", "flushed", "count")
            }
            assert found.sqnr_db == pytest.approx(Sums(**total).db, rel=FLOAT64), module.name
            assert found.flushed == total["flushed"] / total["count"], module.name
            assert found.saturated == total["saturated"] / total["count"], module.name
        if module.experts:
            assert module.experts.weight_sqnr_db == pytest.approx([s.db for s in weights], rel=FLOAT64)
            assert module.experts.input_sqnr_db == pytest.approx([s and s.db for s in inputs], rel=FLOAT64)
            assert module.experts.input_saturated == [s and s.saturated / s.count for s in inputs]
            assert module.experts.worst_expert == min(range(8), key=lambda e: weights[e].db)
        else:
            assert module.experts is None


def test_sizes_of_modules(run: Run) -> None:
    for module in run.report.candidates[0].modules:
        names = parts(run, module)
        kinds = [
            f"{name}.{kind}"
            for name in names
            for kind in ("weight", "weight_scale", "weight_scale_2", "input_scale")
        ]
        if module.role == "kv_cache":
            mixer = module.name.removesuffix(".kv_cache")
            kinds = [f"{mixer}.k_proj.k_scale", f"{mixer}.v_proj.v_scale"]
        stored = [run.candidate.tensors[kind] for kind in kinds if kind in run.candidate.tensors]
        assert module.bytes == sum(t.numel() * t.element_size() for t in stored), module.name
        assert module.elements == sum(run.source.tensors[name + ".weight"].numel() for name in names), (
            module.name
        )


def test_acceptance_of_multi_token_prediction(run: Run) -> None:
    """The module gets the main model's hidden state at t and the token at t + 1.

    Its choice is compared with the main model's own choice at t + 1.
    """
    for model, tap, found in (
        (run.source, identity, run.report.reference.mtp_acceptance),
        (run.candidate, run.candidate.tap(), run.report.candidates[0].mtp_acceptance),
    ):
        reference = ReferenceModel(run.source.config, model.scope)
        hidden, _ = reference.hidden(run.ids, tap=tap)
        choice = reference.logits(hidden, tap).argmax(-1)
        drafted, _, _ = reference.mtp_forward(run.ids[:, 1:], hidden[:, :-1], tap=tap)
        assert found == float((drafted.argmax(-1) == choice[:, 1:]).double().mean())
        assert 0.02 < found < 0.5


def test_logits(run: Run) -> None:
    """Mean KL, perplexities and the head's error, from ReferenceModel's logits."""
    first, second = (
        ReferenceModel(run.source.config, model.scope).forward(run.ids, tap=tap)[0].double()
        for model, tap in ((run.source, identity), (run.candidate, run.candidate.tap()))
    )
    p, q = (x[:, :-1].log_softmax(-1) for x in (first, second))
    found = run.report.candidates[0].logits
    assert found.kl.mean == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=FLOAT64)
    following = run.ids[:, 1:, None]
    for perplexity, x in ((run.report.reference.perplexity, p), (found.perplexity, q)):
        assert perplexity == pytest.approx(float(x.gather(-1, following).mean().neg().exp()), rel=FLOAT64)
    assert layer_of(run, "head").stream.relative == pytest.approx(relative(second, first), rel=DIFFERENCE)


# Batches and segments.

# Products of other sizes, and a scan in other chunks, round differently: by 1e-7 of the stream, whose errors
# here are 0.1 of it. Measured: 5e-6, for KL.
FLOAT32 = 1e-4


def numbers(data: Any) -> dict[str, float | None]:
    """Every figure of a report, by its path."""
    return {
        path: leaf for path, leaf in leaves(data).items() if leaf is None or isinstance(leaf, (int, float))
    }


CUTS = [
    pytest.param({"BATCH_BYTES": 1}, id="a row at a time"),
    pytest.param({"SEGMENT": 7}, id="seven positions at a time"),
    pytest.param({"BATCH_BYTES": 1, "SEGMENT": 1}, id="a row and a position at a time"),
    pytest.param(
        {"BATCH_BYTES": 300_000, "SEGMENT": 33}, id="some rows, one of them short, and 33 positions of 40"
    ),
]


@pytest.fixture(scope="module")
def weights_only(source: Path, threads: None) -> Run:  # noqa: ARG001
    return compare(source, "weights", "nvfp4-w4a16")


@pytest.mark.slow
@pytest.mark.parametrize("cut", CUTS)
def test_batches_and_segments_do_not_matter(
    cut: dict[str, int], weights_only: Run, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights only: with rounded inputs a last bit could move a value to the next code, another number."""
    for name, value in cut.items():
        monkeypatch.setattr(layers, name, value)
    report = nemoquant.diff(
        source, [weights_only.folder], data=source.parent / "rows.npy", card=False, threads=1
    )
    expected, found = numbers(weights_only.report.model_dump()), numbers(report.model_dump())
    assert found.keys() == expected.keys()
    error = {
        key: abs(found[key] / value - 1) for key, value in expected.items() if value and ".sqnr_db" not in key
    }
    print(cut, f"{max(error.values()):.1e}", max(error, key=lambda key: error[key]))
    assert {key: value for key, value in error.items() if value > FLOAT32} == {}
    assert {key for key, value in expected.items() if not value} == {
        key for key, value in found.items() if not value
    }


@pytest.mark.slow
def test_noise_of_inputs_is_of_all_batches_and_segments(
    run: Run, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Noise is measured over all batches and segments, not only the last segment.

    Last bits of the stream differ, and move one value in a hundred thousand to the next code: measured 7e-5
    dB at most. With the last segment alone, a module's noise would differ by 0.1 dB and more.
    """
    monkeypatch.setattr(layers, "BATCH_BYTES", 1)
    monkeypatch.setattr(layers, "SEGMENT", 7)
    report = nemoquant.diff(source, [run.folder], data=source.parent / "rows.npy", card=False, threads=1)
    found, expected = ([m for m in r.candidates[0].modules if m.input] for r in (report, run.report))
    assert [m.name for m in found] == [m.name for m in expected]
    error = {a.name: abs(a.input.sqnr_db - b.input.sqnr_db) for a, b in zip(found, expected, strict=True)}
    print(f"{max(error.values()):.1e} dB")
    assert {name: db for name, db in error.items() if db > 1e-3} == {}


@pytest.mark.parametrize("cut", CUTS)
def test_a_copy_has_no_error_at_all_in_any_cut(
    cut: dict[str, int], source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference is cut in the same way as the candidate."""
    for name, value in cut.items():
        monkeypatch.setattr(layers, name, value)
    rows = write_rows(tmp_path / "rows.npy", (ROWS, LENGTH), seed=1)
    copy = shutil.copytree(source, tmp_path / "copy")
    report = nemoquant.diff(source, [copy], data=rows, card=False, threads=1)
    candidate = report.candidates[0]
    assert {(layer.stream.relative, layer.alone.relative) for layer in candidate.layers} == {(0.0, 0.0)}
    assert candidate.logits.kl.max == 0
    assert candidate.modules == []
    assert candidate.mtp_acceptance == report.reference.mtp_acceptance
