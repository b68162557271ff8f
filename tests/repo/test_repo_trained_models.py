"""The trained models match their manifests, and are good enough to test quantization with.

Every kind of block matters.
"""

import importlib.util
import json
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from support.places import CALIB, DEMO, NANO_MODEL, ROOT
from torch import Tensor

from nemoquant.checkpoint.manifest import file_sha256
from nemoquant.checkpoint.weights import LayerWeights
from nemoquant.model.reference import ReferenceModel
from nemoquant.sources.source import Source, open_source
from nemoquant.tokens.rows import load_rows

FOLDERS = {"demo": DEMO, "nano": NANO_MODEL}


@dataclass
class Trained:
    """A model, its manifest, and what it makes of eight evaluation rows of 512 tokens."""

    folder: Path
    manifest: dict
    source: Source
    rows: Tensor
    model: ReferenceModel
    hidden: Tensor
    reached: set[str] = field(default_factory=set)  # experts that some token chose


@pytest.fixture(scope="module", params=FOLDERS)
def trained(request) -> Trained:
    folder = FOLDERS[request.param]
    source = open_source(folder)
    rows = torch.from_numpy(load_rows(CALIB / "data/evaluation.jsonl", folder, source.config, 8, 512).ids)
    model = ReferenceModel(source.config, lambda prefix: LayerWeights(source.checkpoint, prefix))
    reached = set()

    def tap(name: str, x: Tensor) -> Tensor:
        if ".experts." in name:
            reached.add(name.rsplit(".", 1)[0])
        return x

    hidden, _ = model.hidden(rows, tap=tap)
    manifest = json.loads((folder / "manifest.json").read_text())
    return Trained(folder, manifest, source, rows, model, hidden, reached)


@pytest.fixture(scope="module")
def records() -> ModuleType:
    """``calib/demo_model/models.py``, which no package holds."""
    spec = importlib.util.spec_from_file_location("models", DEMO / "models.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def percent(text: str) -> float:
    return float(text.removesuffix("%")) / 100


def test_files_are_those_that_were_measured(trained: Trained) -> None:
    files = trained.manifest["files"]
    assert {name: file_sha256(trained.folder / name) for name in files} == files
    assert {p.name for p in trained.folder.iterdir() if p.suffix != ".py" and p.is_file()} == {
        *files,
        "manifest.json",
    }


def test_configs_are_those_that_training_would_write(records: ModuleType) -> None:
    assert {name: model.folder for name, model in records.MODELS.items()} == FOLDERS
    for model in records.MODELS.values():
        assert (model.folder / "config.json").read_text() == json.dumps(model.config, indent=2) + "\n"


def test_it_is_small_and_has_every_kind_of_block(trained: Trained) -> None:
    shards = list(trained.folder.glob("*.safetensors"))
    assert len(shards) == 2 and sum(p.stat().st_size for p in trained.folder.iterdir()) <= 20_000_000
    config = trained.source.config
    assert set(config.layers) == {"mamba", "moe", "attention"} and config.count("attention") >= 2
    assert config.num_key_value_heads < config.num_attention_heads
    assert config.n_routed_experts >= 16 and config.num_experts_per_tok == 4 and config.n_shared_experts
    assert not config.tie_word_embeddings and 2048 <= config.vocab_size <= 4096


def test_the_two_differ_in_what_methods_may_depend_on() -> None:
    """Blocks as in Super and as in Nano, other sizes, another order of blocks; one tokenizer."""
    demo, nano = (open_source(folder).config for folder in (DEMO, NANO_MODEL))
    assert demo.moe_latent_size and demo.mtp_layers == ("attention", "moe")
    assert not nano.moe_latent_size and not nano.mtp_layers
    assert demo.layers != nano.layers
    for size in (
        "hidden_size",
        "head_dim",
        "mamba_num_heads",
        "mamba_head_dim",
        "ssm_state_size",
        "n_routed_experts",
        "moe_intermediate_size",
        "moe_shared_expert_intermediate_size",
    ):
        assert getattr(demo, size) != getattr(nano, size), size
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (DEMO / name).read_bytes() == (NANO_MODEL / name).read_bytes()


def test_dimensions_of_products_are_multiples_of_64_in_the_nano_model() -> None:
    """So that no format and no engine has to pad: kernels take steps of 16, 32 or 64."""
    shapes = {
        spec.name: spec.shape
        for spec in open_source(NANO_MODEL).table
        if len(spec.shape) == 2 and not spec.name.endswith("gate.weight")
    }
    assert {name: shape for name, shape in shapes.items() if any(n % 64 for n in shape)} == {}
    assert len(shapes) > 100


def test_calibration_evaluation_and_training_share_no_work() -> None:
    data = json.loads((CALIB / "data/MANIFEST.json").read_text())
    calibration, evaluation = data["calibration.jsonl"], data["evaluation.jsonl"]
    assert not set(calibration["works"]) & set(evaluation["works"])
    for name in ("calibration.jsonl", "evaluation.jsonl"):
        assert file_sha256(CALIB / "data" / name) == data[name]["sha256"]
        works = {json.loads(line)["work"] for line in (CALIB / "data" / name).read_text().splitlines()}
        assert works <= set(data[name]["works"])


def test_perplexity_is_what_the_manifest_says(trained: Trained) -> None:
    """Recomputed on eight of the rows; the manifest's figure is over all rows, so the two are only near."""
    logits = trained.model.logits(trained.hidden)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).double(), trained.rows[:, 1:].flatten())
    evaluation = trained.manifest["evaluation"]
    assert loss.exp().item() == pytest.approx(evaluation["perplexity"], rel=0.25)
    ngram = next(v for k, v in evaluation.items() if k.startswith("5-gram"))
    assert evaluation["perplexity"] < ngram


def test_every_block_matters(trained: Trained) -> None:
    table = trained.manifest["perplexity without a block"]
    assert percent(table["routed experts of all layers"]["rise"]) >= 0.20
    singles = {k: percent(v["rise"]) for k, v in table.items() if "layer " in k}
    assert len(singles) == len(trained.source.config.layers)
    assert {k: v for k, v in singles.items() if v < 0.01} == {}


def test_every_expert_gets_tokens(trained: Trained) -> None:
    config = trained.source.config
    assert len(trained.reached) == config.n_routed_experts * config.count("moe")
    counts = trained.manifest["tokens per expert, 32 calibration rows"]
    assert min(min(of_layer) for of_layer in counts.values()) > 0


def test_multi_token_prediction_is_far_above_chance(trained: Trained) -> None:
    """Of the demo model; the other has no such module, and its manifest claims none."""
    if not trained.source.config.mtp_layers:
        assert "multi-token prediction" not in trained.manifest
        return
    rows = trained.rows
    logits, _, _ = trained.model.mtp_forward(rows[:, 1:-1], trained.hidden[:, :-2])
    right = (logits.argmax(-1) == rows[:, 2:]).double().mean().item()
    likeliest = (torch.bincount(rows[:, 2:].flatten()).max() / rows[:, 2:].numel()).item()
    assert right > 3 * likeliest, f"top-1 {right:.3f}, the likeliest token alone {likeliest:.3f}"


def test_some_heads_are_slower_than_the_floor_of_other_implementations(trained: Trained) -> None:
    assert trained.manifest["mamba heads"]["below 0.001"] > 0


def test_the_wheel_has_the_demo_model_alone() -> None:
    """The other model is for tests and benches: 9 MB that no run needs."""
    targets = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]
    assert targets["wheel"]["packages"] == ["nemoquant"]
    taken = targets["wheel"]["force-include"]
    assert [path for path in taken if (ROOT / path) in (NANO_MODEL, *NANO_MODEL.parents)] == []
    assert [path for path in taken if path.startswith(f"{NANO_MODEL.relative_to(ROOT)}/")] == []
    assert sum(path.startswith("calib/demo_model/") for path in taken) == 8
