"""What is printed of a plan claims what its tensors have, for every preset on models of every make."""

import json
import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.places import NANO, SUPER
from support.synthetic import WIDE

from nemoquant import api
from nemoquant.errors import RecipeError
from nemoquant.model.roles import LINEAR_ROLES
from nemoquant.pack.card import Told, card
from nemoquant.planning.plan import Plan
from nemoquant.planning.recipe import presets
from nemoquant.planning.shown import GROUPS, role_data, role_table
from nemoquant.sources.source import Source, open_source

Make = Callable[..., Path]
MODELS = {  # schedule -> what it lacks
    "M*EME": "mlp",
    "M-M*-": "experts",
    "M-M-": "experts and attention",
    "MEM": "mlp and attention",
    "M*M": "mlp and experts",
    "M*E-": "nothing",
}
TITLES = {  # for people -> roles that it stands for
    "routed experts": "experts.",
    "shared experts": "shared_experts.",
    "the MLP": "mlp.",
    "attention": "attention.",
    "Mamba projections": "mamba.",
    "latent projections": "latent.",
    "lm_head": "lm_head",
}


def claims(sentence: str) -> dict[str, set[tuple[str, bool]]]:
    """Format, in the words of a sentence -> what it says to have it, and whether all of that."""
    found: dict[str, set[tuple[str, bool]]] = defaultdict(set)
    text = sentence[0].lower() + sentence[1:].removesuffix(".")
    for clause in text.replace("mamba projections", "Mamba projections").split("; "):
        match = re.fullmatch(r"(.*) (NVFP4 weights only|FP8 weights only|NVFP4|FP8|MXFP8)", clause)
        if match:
            for part in re.split(", | and ", match[1]):
                found[match[2]].add((part.removeprefix("part of "), not part.startswith("part of ")))
        else:
            assert clause in ("all else as the source", "no weights quantized"), clause
    return found


def held(plan: Plan) -> dict[str, set[tuple[str, bool]]]:
    """The same from the plan's rows, by a plain reading."""
    found: dict[str, set[tuple[str, bool]]] = defaultdict(set)
    for title, prefix in TITLES.items():
        rows = [row for row in plan.rows if row.role.startswith(prefix)]
        words = {
            row.name: f"{row.format.upper()}{'' if row.activation_format else ' weights only'}"
            for row in rows
            if row.format != "source"
        }
        for word in set(words.values()):
            found[word].add((title, len(set(words.values())) == 1 and len(words) == len(rows)))
    if plan.kv_layers:
        found["FP8"].add(("KV cache", True))
    return found


@pytest.fixture
def planned(make_checkpoint: Make) -> Callable[[str, str], tuple[Source, Plan] | None]:
    """The source and the plan of a preset on a schedule; None where the preset does not fit it."""

    def make(preset: str, pattern: str) -> tuple[Source, Plan] | None:
        mtp = {"num_nextn_predict_layers": 0, "mtp_hybrid_override_pattern": None}
        folder = make_checkpoint("source", hybrid_override_pattern=pattern, **WIDE, **mtp)
        source = open_source(folder)
        assert isinstance(source, Source)
        try:
            return source, api.plan(folder, preset)
        except RecipeError:
            return None

    return make


@pytest.mark.parametrize("pattern", MODELS)
@pytest.mark.parametrize("preset", sorted(presets()))
def test_words_of_a_plan_and_its_card(
    preset: str, pattern: str, planned: Callable[[str, str], tuple[Source, Plan] | None]
) -> None:
    made = planned(preset, pattern)
    if made is None:
        assert "published" in preset or pattern == "M*M", "only a preset for one model, or of lacking roles"
        return
    source, plan = made
    assert claims(plan.headline) == held(plan)
    text = card(source, plan, None, Told("none.", [], [], []))
    head, title, sentence = text.split("---\n")[1], *re.findall(r"(?m)^# (.*)\n\n(.*)$", text)[0]
    assert sentence == plan.headline
    told = {word for word in ("NVFP4", "MXFP8", "FP8") if re.search(rf"\b{word}\b", title)}
    kept = {row.format.upper() for row in plan.quantized}
    assert told == kept
    assert {tag for tag in re.findall(r"(?m)^- (.*)$", head) if tag in ("fp8", "mxfp8", "nvfp4")} == {
        name.lower() for name in kept
    }
    sections = text.split("## Map")[1].split("## What loads it")[0]
    assert {word for word in ("`nvfp4`: ", "`mxfp8`: ", "`fp8`: ") if word in sections} == {
        f"`{name.lower()}`: " for name in kept
    }


def test_titles_are_of_all_roles_that_can_be_quantized() -> None:
    assert set(GROUPS) == {role.split(".")[0] for role in LINEAR_ROLES}
    assert set(GROUPS.values()) == set(TITLES)


def test_the_sentences_of_published_models() -> None:
    """Read by eye; dense models, and a map with parts."""
    assert api.plan(NANO, "nvfp4").headline == (
        "Routed experts NVFP4; Mamba projections, shared experts and attention FP8; KV cache FP8; "
        "all else as the source."
    )
    dense = NANO.parent / "nano-9b-v2.json"
    assert api.plan(dense, "nvfp4").headline == (
        "Mamba projections and attention FP8; the MLP NVFP4; KV cache FP8; all else as the source."
    )
    assert api.plan(dense, "nvfp4-w4a16").headline == "The MLP NVFP4 weights only; all else as the source."
    assert api.plan(SUPER, "super-nvfp4-published").headline == (
        "Routed experts and part of shared experts NVFP4; part of Mamba projections, part of shared experts, "
        "part of attention and part of latent projections FP8; KV cache FP8; all else as the source."
    )


def test_a_dense_model_gets_its_mlp_in_nvfp4() -> None:
    """By the published sizes of Nano 9B v2: 25 MLPs of 4480 x 15680, 27 Mamba layers, 4 of attention."""
    mlp, mamba, attention = 50 * 4480 * 15680, 27 * (22656 + 10240) * 4480, 4 * 2 * (5120 + 1024) * 4480
    elements = {"mlp": mlp, "mamba": mamba, "attention": attention}
    plan = api.plan(NANO.parent / "nano-9b-v2.json", "nvfp4")
    found: dict[tuple[str, str], int] = defaultdict(int)
    for row in plan.quantized:
        found[row.role.split(".")[0], row.format] += row.elements
    assert found == {
        ("mlp", "nvfp4"): elements["mlp"],
        ("mamba", "fp8"): elements["mamba"],
        ("attention", "fp8"): elements["attention"],
    }
    (nvfp4, fp8) = (sum(row.bytes_out for row in plan.quantized if row.format == f) for f in ("nvfp4", "fp8"))
    assert (nvfp4, fp8) == (mlp * 9 // 16 + 50 * 8, mamba + attention + 8 * (54 + 16))


def test_layers_where_a_role_has_several_formats(tmp_path: Path) -> None:
    raw: dict[str, Any] = json.loads(NANO.read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw))
    (tmp_path / "mine.yaml").write_text(
        "name: mine\nextends: fp8\n"
        "rules: [{roles: [mamba.in_proj], layers: [0, 7..12, last], format: bf16}]\n"
    )
    plan = api.plan(tmp_path / "config.json", tmp_path / "mine.yaml")
    shown = [
        (row.weights, row.tensors, row.layers) for row in role_table(plan.rows) if row.role == "mamba.in_proj"
    ]
    assert shown == [
        ("source", 5, "0, 7..11, 50"),
        ("fp8 (gptq)", 18, "2, 4, 14..48"),
    ]
    assert {row.layers for row in role_table(plan.rows) if row.role != "mamba.in_proj"} == {""}
    data = {(entry["role"], entry["weights"]): entry for entry in role_data(plan.rows)}
    assert data["mamba.in_proj", "source"] == {
        "role": "mamba.in_proj",
        "weights": "source",
        "inputs": "-",
        "tensors": 5,
        "bytes": 5 * 2 * 10304 * 2688,
        "layers": [0, 7, 9, 11, 50],
    }
    assert data["embedding", "source"]["layers"] == []
    assert sum(entry["tensors"] for entry in data.values()) == len(plan.rows)
    assert sum(entry["bytes"] for entry in data.values()) + 4 * 2 * 6 == plan.bytes_out
