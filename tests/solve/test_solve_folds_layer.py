"""Folded models compute what the unfolded ones do: whole trained models, in float32 and bf16."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from support.outlier_copy import outlier_copy
from support.places import CALIB, DEMO, NANO_MODEL
from support.small_model import random_weights, small_config, source

from nemoquant.model.config import NemotronHConfig
from nemoquant.model.reference import ReferenceModel
from nemoquant.solve.folds import choose
from nemoquant.solve.folds import layer as layers
from nemoquant.solve.folds.layer import compose, input_transform, layer_folds
from nemoquant.solve.folds.transform import Transform, widen
from nemoquant.sources.source import open_weights
from nemoquant.tokens.rows import load_rows

ROWS, LENGTH = 4, 128
MOST_KL = 1e-5  # of a fold whose fc1 is rounded to bf16 again


def tensors(arrays):
    """float32 tensors of arrays whose uint16 are bf16 patterns; other arrays as they are."""
    return {
        name: torch.from_numpy(a).view(torch.bfloat16).float()
        if a.dtype == np.uint16
        else torch.from_numpy(a)
        for name, a in arrays.items()
    }


class Moments:
    """Sums of x x' of each module's input, and the inputs of some."""

    def __init__(self):
        self.sums, self.inputs = {}, {}

    def tap(self, name, x):
        if not name.endswith(".output"):
            self.sums[name] = self.sums.get(name, 0) + (x.mT @ x).double().numpy()
            self.inputs[name] = x.numpy()
        return x


@dataclass
class Model:
    config: NemotronHConfig
    arrays: dict[str, Any]
    rows: torch.Tensor
    seen: Moments
    logits: torch.Tensor

    def run(self, arrays, tap=None):
        return ReferenceModel(self.config, source(tensors(arrays))).forward(self.rows, tap=tap)[0]

    def folds(self, kinds):
        quantized = {name for name, a in self.arrays.items() if a.ndim == 2 and not name.startswith("mtp.")}
        found = [
            layer_folds(self.config, i, kinds, self.arrays.__getitem__, self.seen.sums, quantized)
            for i in range(len(self.config.layers))
        ]
        return compose(*found)


def opened(config, arrays, rows):
    model = Model(config, arrays, rows, Moments(), torch.empty(0))
    model.logits = model.run(arrays, model.seen.tap)
    return model


def trained(folder):
    with open_weights(folder, "weights").checkpoint as checkpoint:
        arrays = {name: checkpoint.array(name).copy() for name in checkpoint.tensors}
    config = open_weights(folder, "weights").config
    ids = load_rows(CALIB / "data/evaluation.jsonl", folder, config, ROWS, LENGTH).ids
    return opened(config, arrays, torch.from_numpy(ids))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    config, _ = small_config()
    weights = {name: w.numpy() for name, w in random_weights(config).items()}
    tokens = torch.randint(0, config.vocab_size, (2, 40), generator=torch.Generator().manual_seed(0))
    folder = tmp_path_factory.mktemp("outliers") / "model"
    scaled = outlier_copy(DEMO, folder)
    found = {
        "demo": trained(DEMO),
        "nano": trained(NANO_MODEL),
        "dense": opened(config, weights, tokens),  # random, with a dense MLP
        "outliers": trained(folder),
    }
    return found, scaled


def apply(folds, arrays):
    return {name: folds[name].apply(a) if name in folds else a for name, a in arrays.items()}


def kl(logits, other):
    p, q = (torch.log_softmax(y.double(), -1) for y in (logits, other))
    return float(((p - q) * p.exp()).sum(-1).mean())


def exponents(n, seed):
    return np.random.default_rng(seed).integers(-3, 4, n).astype(np.int8)


def random_folds(config, kind):
    """Every fold of a kind, with exponents that no choice would give."""
    found = []
    for i, name in enumerate(config.layers):
        if kind == "norm":
            found.append(layers.norm_transforms(config, i, exponents(config.hidden_size, i)))
        elif kind == "gate" and name == "mamba":
            found.append(layers.gate_transforms(config, i, exponents(config.mamba_inner, i)))
        elif kind == "expert":
            for seed, (module, (up, _)) in enumerate(layers.pairs(config, i).items()):
                found.append(layers.expert_transforms(config, i, module, exponents(up.shape[0], seed)))
    return compose(*found)


@pytest.mark.parametrize("kind", ["norm", "gate", "expert"])
@pytest.mark.parametrize("name", ["demo", "nano", "dense"])
def test_powers_of_two_change_nothing(models, name, kind):
    model = models[0][name]
    folds = random_folds(model.config, kind)
    assert folds
    folded = apply(folds, model.arrays)
    for tensor, fold in folds.items():
        assert folded[tensor].dtype == model.arrays[tensor].dtype
        assert fold.exact(model.arrays[tensor])
        back = Transform(*(None if e is None else -e for e in (fold.rows, fold.columns)))
        np.testing.assert_array_equal(back.apply(folded[tensor]), model.arrays[tensor])
    # each product is scaled exactly: what is left is the order in which nothing changes but the last bits
    torch.testing.assert_close(model.run(folded), model.logits, rtol=0, atol=1e-5 * float(model.logits.std()))


def latent_folds(model):
    return model.folds(["latent"])


@pytest.mark.parametrize("name", ["demo", "dense"])
def test_latent_keeps_the_function(models, name):
    model = models[0][name]
    folds = latent_folds(model)
    moe = [i for i, kind in enumerate(model.config.layers) if kind == "moe"]
    assert len(folds) == len(moe) * (1 + model.config.n_routed_experts)
    folded = apply(folds, model.arrays)
    assert kl(model.logits, model.run(folded)) < MOST_KL
    wide = {n: widen(a).astype(np.float32) for n, a in model.arrays.items()}
    assert kl(model.logits, model.run(apply(folds, wide))) < 1e-9  # fc1 is not rounded to bf16


@pytest.mark.parametrize("name", ["demo", "nano", "dense", "outliers"])
@pytest.mark.parametrize("worth", [choose.WORTH, np.inf])
def test_all_together_keep_the_function(models, name, worth, monkeypatch):
    model = models[0][name]
    monkeypatch.setattr(choose, "WORTH", worth)  # at inf every fold is taken
    folds = model.folds(layers.KINDS)
    assert not any(tensor.startswith("mtp.") for tensor in folds)
    assert kl(model.logits, model.run(apply(folds, model.arrays))) < MOST_KL
    if worth == np.inf:
        one_for_each = compose(
            *(random_folds(model.config, kind) for kind in ("norm", "gate", "expert")), latent_folds(model)
        )
        assert folds.keys() == one_for_each.keys()
        assert kl(model.logits, model.run(apply(one_for_each, model.arrays))) < MOST_KL


@pytest.mark.parametrize("name", ["demo", "nano"])
def test_trained_models_without_outliers_are_left_alone(models, name):
    assert models[0][name].folds(["norm", "gate"]) == {}


def test_outliers_are_found_and_brought_back(models):
    found, scaled = models
    model = found["outliers"]
    torch.testing.assert_close(model.logits, found["demo"].logits, rtol=0, atol=1e-4)
    folds = model.folds(["norm"])
    for i in range(len(model.config.layers)):
        exponents = folds[f"backbone.layers.{i}.norm.weight"].rows.astype(int)
        large, k = scaled[i] > 0, scaled[i]
        # the norm's own spread rounds to one step, and the mean over all channels is taken out
        off = exponents + k - np.median(exponents[~large])
        assert np.abs(off[large]).max() <= 2, f"layer {i}"
        assert np.abs(off[large]).mean() < 1
    assert kl(model.logits, model.run(apply(folds, model.arrays))) < 1e-9


def test_only_what_is_quantized_counts(models):
    model = models[0]["outliers"]

    def folds(quantized):
        return layer_folds(model.config, 1, ("norm",), model.arrays.__getitem__, model.seen.sums, quantized)

    names = {spec.role: spec.name for spec in layers.readers(model.config, 1)}
    assert folds({names["shared_experts.up_proj"]})
    assert not folds({"backbone.layers.1.mixer.experts.0.up_proj.weight"})  # it reads the latent input


def test_a_fold_that_would_not_be_exact_is_left_out(models):
    model = models[0]["outliers"]
    arrays = dict(model.arrays)
    arrays["backbone.layers.0.norm.weight"] = np.full_like(arrays["backbone.layers.0.norm.weight"], 0x0001)
    quantized = set(arrays)
    fold = layer_folds(model.config, 0, ("norm",), arrays.__getitem__, model.seen.sums, quantized)
    assert fold == {}


def test_folds_that_are_exact_alone_but_not_together(models, monkeypatch):
    """Norm and expert both make the shared expert's up projection smaller: the second one is left out."""
    model = models[0]["demo"]
    monkeypatch.setattr(choose, "WORTH", np.inf)
    up, down = layers.pairs(model.config, 1)["shared_experts"]
    monkeypatch.setattr(
        choose, "channel_exponents", lambda h, g, power=1: np.full(h.shape, 2 if power == 1 else -2, np.int8)
    )
    arrays = dict(model.arrays)
    arrays[up.name] = np.full_like(arrays[up.name], 0x0008)  # subnormal: eight times its smallest bf16
    folds = layer_folds(
        model.config, 1, ("norm", "expert"), arrays.__getitem__, model.seen.sums, {up.name, down.name}
    )
    assert (folds[up.name].columns == -2).all()
    assert folds[up.name].rows is None
    assert down.name not in folds
    assert folds[up.name].exact(arrays[up.name])


def test_weights_that_are_not_finite(models):
    """Packing reports them, by name; here they give no fold."""
    model = models[0]["outliers"]
    arrays = dict(model.arrays)
    for spec in layers.readers(model.config, 1) + [up for up, _ in layers.pairs(model.config, 1).values()]:
        arrays[spec.name] = arrays[spec.name].copy()
        arrays[spec.name][0, 0] = 0x7FC0
    kinds = ("norm", "latent")
    assert layer_folds(model.config, 1, kinds, arrays.__getitem__, model.seen.sums, set(arrays)) == {}
    assert layer_folds(model.config, 1, kinds, model.arrays.__getitem__, {}, set(arrays)) == {}


@pytest.mark.parametrize("name", ["demo", "nano", "dense"])
def test_inputs_of_the_folded_model(models, name):
    """What the folded model's taps see is the unfolded inputs, transformed."""
    model = models[0][name]
    folds = compose(
        *(random_folds(model.config, kind) for kind in ("norm", "gate", "expert")), latent_folds(model)
    )
    wide = {n: widen(a).astype(np.float32) for n, a in model.arrays.items()}
    after = Moments()
    model.run(apply(folds, wide), after.tap)
    changed = 0
    for module, before in model.seen.inputs.items():
        transform = input_transform(folds, module)
        got, expected = after.inputs[module], transform(before)
        assert expected.dtype == np.float32
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-3 * np.abs(expected).max(), err_msg=module)
        changed += not np.array_equal(expected, before)
        h = transform(transform(model.seen.sums[module]).T)
        size = np.abs(after.sums[module]).max()
        np.testing.assert_allclose(after.sums[module], h, rtol=0, atol=1e-3 * size, err_msg=module)
    assert changed > len(model.config.layers)


def test_experts_that_got_no_token(models):
    model = models[0]["dense"]
    moe = model.config.layers.index("moe")
    sums = {name: h for name, h in model.seen.sums.items() if ".experts.3." not in name}
    folds = layer_folds(model.config, moe, layers.KINDS, model.arrays.__getitem__, sums, set(model.arrays))
    up, down = layers.pairs(model.config, moe)["experts.3"]
    assert folds[up.name].rows is None
    assert folds[up.name].right is not None
    assert down.name not in folds


def test_exponents_that_do_not_fit(models):
    config = models[0]["dense"].config
    with pytest.raises(ValueError, match="exponents: got -160 to -160, expected -128 to 127"):
        width = config.moe_shared_expert_intermediate_size
        moe = config.layers.index("moe")
        layers.expert_transforms(config, moe, "shared_experts", np.full(width, 80, np.int8))
