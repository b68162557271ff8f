"""The committed results: complete, of every preset, and without a difference that is not known."""

import copy

import pytest

import nemoquant
from nemoquant.layouts.modelopt import algorithm
from nemoquant.planning.recipe import presets

from . import results
from .rows import DEMO, ENGINES, OF_ONE, RECIPES, bare, checkpoints, converted

DATA = results.read()
OF_A_ROW = {"inputs", "quantization", "modules", "algorithms", "expert_algorithms", "algorithm_differs"}
OF_A_CHECKPOINT = OF_A_ROW | {
    *("values_differ", "input_scales_differ", "kv_scales_differ", "unset", "kept", "parameters", "others"),
    *("cache_scales", "caches", "backends", "least_sm"),
}


@pytest.mark.parametrize("engine", ENGINES)
def test_every_preset_was_loaded(engine):
    names = {row.name for row in checkpoints()}
    drafts = {f"{row.name}, draft" for row in checkpoints() if row.source == DEMO}
    found = {name for name, engines in DATA["checkpoints"].items() if engine in engines}
    assert found == names | drafts | ({row.name for row in converted()} if engine == "vllm" else set())
    assert {row.recipe for row in checkpoints()} >= set(presets()) - set(OF_ONE)
    assert {name for name, engines in DATA["configs"].items() if engine in engines} == {
        row.name for row in bare()
    }


def test_rows_have_every_key():
    for kind, keys in {"checkpoints": OF_A_CHECKPOINT, "configs": OF_A_ROW}.items():
        for name, engines in DATA[kind].items():
            for engine, row in engines.items():
                assert keys <= row.keys(), (name, engine, keys - row.keys())
                assert row["modules"] == sum(row["algorithms"].values()) > 0
    assert DATA.keys() == {"engines", "checkpoints", "configs", "commands", "date", "machine", "python"}
    assert set(DATA["engines"]) == set(ENGINES)
    assert all(set(found) == {"version", "torch", "transformers"} for found in DATA["engines"].values())


def test_nothing_differs_but_what_is_known():
    assert not results.any_problem(DATA), results.table(DATA)
    for engine in ENGINES:
        assert len(DATA["commands"][engine]) > 10
        assert all(row["became"] for row in DATA["commands"][engine])


def test_results_hold_no_path_of_a_machine():
    assert '"/' not in results.FILE.read_text(encoding="utf-8")


def test_a_known_fault_is_still_there():
    """One that is gone should go from ``KNOWN``, and from what nemoquant tells its users."""
    for known in results.KNOWN:
        rows = [engines.get(known.engine, {}) for engines in DATA["checkpoints"].values()]
        assert any(results.known_text(known.engine, row) for row in rows)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_recipes_mix_what_they_say(path):
    plan = nemoquant.plan(DEMO, path)
    by_role = {}
    for row in plan.quantized:
        by_role.setdefault(row.role.split(".")[0], set()).add(algorithm(row))
    expected = {
        "mixed": {
            "attention": {"NVFP4"},
            "experts": {"FP8", "NVFP4"},
            "latent": {"FP8"},
            "lm_head": {"FP8"},
            "mamba": {"FP8", "NVFP4"},
            "shared_experts": {"FP8"},
        },
        "fp8-weights-only": {
            "experts": {"FP8"},
            "lm_head": {"W8A16_FP8"},
            "mamba": {"FP8", "W8A16_FP8"},
            "shared_experts": {"W8A16_FP8"},
        },
        "weights-only": {
            "experts": {"W4A16_NVFP4"},
            "lm_head": {"W4A16_NVFP4"},
            "mamba": {"W4A16_NVFP4"},
            "shared_experts": {"NVFP4"},
        },
    }
    assert by_role == expected[path.stem]


ROW = {"modules": 2, "algorithms": {"W4A16_NVFP4": 2}, "expert_algorithms": {}, "backends": {}}


@pytest.mark.parametrize(
    ("engine", "change", "expected"),
    [
        ("vllm", {}, []),
        ("vllm", {"failed": "exit 1: so"}, ["exit 1: so"]),
        ("vllm", {"unset": [["a", [1], 4], ["b", [1], 4]]}, ["2 unset: a [1] 4"]),
        (
            "vllm",
            {"values_differ": [["a.in_proj", "FP8", "1 of 2"]]},
            ["1 values differ: a.in_proj FP8 1 of 2"],
        ),
        ("sglang", {"values_differ": [["a.in_proj", "W4A16_NVFP4", "1 of 2"]]}, []),
        (
            "sglang",
            {
                "expert_algorithms": {"W4A16_NVFP4": 1},
                "backends": {"90": {"experts": "marlin"}, "100": {"experts": "flashinfer_trtllm"}},
            },
            ["weights-only experts run by flashinfer_trtllm on SM 100"],
        ),
    ],
)
def test_what_a_problem_is(engine, change, expected):
    assert results.problems(engine, copy.deepcopy(ROW) | change) == expected


def test_a_refused_command_is_a_problem():
    empty = {
        "checkpoints": {},
        "configs": {},
        "commands": {"vllm": [{"sm": 90, "words": ["vllm"], "became": {}}]},
    }
    assert not results.any_problem(empty)
    empty["commands"]["vllm"].append({"sm": 90, "words": ["vllm", "--no"], "refused": "unknown"})
    assert results.any_problem(empty)
    assert "    SM 90: vllm --no: unknown" in results.table(empty).splitlines()
