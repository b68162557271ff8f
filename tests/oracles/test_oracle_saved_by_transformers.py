"""Checkpoints as transformers and PEFT really save them: each is quantized, and is the model it was."""

import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import modelopt_run

from nemoquant import api
from nemoquant.sources.source import Source, open_source

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("transformers", "peft")),
    reason="needs transformers and peft (extra: modelopt), which save the checkpoints",
)
NO_MTP = "declares 1 multi-token-prediction modules"


def as_published(model: Any, out: Path) -> None:
    model.save_pretrained(out)


def in_its_own_form(model: Any, out: Path) -> None:
    model.save_pretrained(out, save_original_format=False)


def resized(model: Any, out: Path) -> None:
    model.resize_token_embeddings(100, pad_to_multiple_of=32)
    model.save_pretrained(out)


def merged(model: Any, out: Path) -> None:
    from peft import LoraConfig, get_peft_model

    with_adapters = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "in_proj"]))
    with_adapters.merge_and_unload().save_pretrained(out)


def head_trained_too(model: Any, out: Path) -> None:
    from peft import LoraConfig, get_peft_model

    adapters = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    get_peft_model(model, adapters).merge_and_unload().save_pretrained(out)


@pytest.mark.parametrize("save", [as_published, in_its_own_form, resized, merged, head_trained_too])
def test_saved(save: Callable[[Any, Path], None], source: Path, tmp_path: Path) -> None:
    saved, out = tmp_path / "saved", tmp_path / "out"
    save(modelopt_run.load(source, torch.bfloat16), saved)
    made = api.quantize(saved, out, "nvfp4-w4a16", method="mse", progress=False)
    assert [NO_MTP in text for text in made.warnings] == [True]
    assert api.verify(out, saved, progress=False)["ok"]

    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers import AutoConfig

    theirs = AutoConfig.from_pretrained(out)
    assert theirs.hybrid_override_pattern == "M*E-ME"
    assert theirs.vocab_size == (128 if save is resized else 96)
    raw = json.loads((out / "config.json").read_text())
    assert (raw["num_nextn_predict_layers"], raw["num_hidden_layers"]) == (0, 6)

    published, again = open_source(source), open_source(saved)
    assert isinstance(published, Source) and isinstance(again, Source)
    with published.checkpoint as before, again.checkpoint as after:
        for name in after.tensors:
            rows = before.array(name)
            assert (after.array(name)[: len(rows)] == rows).all(), name
