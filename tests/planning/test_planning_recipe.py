"""The recipe's schema: the values of each key, and the messages for a recipe file that breaks it."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from support.places import CALIB

from nemoquant.errors import RecipeError
from nemoquant.planning.recipe import load_recipe, parse_recipe, presets
from nemoquant.shipped import recipe_folder

RULE: dict[str, Any] = {"roles": ["*"], "format": "source"}
BASE: dict[str, Any] = {"name": "mine", "summary": "What it does.", "rules": [RULE]}
HINT = "; `nemoquant recipes show fp8` prints a valid one"


def refusal(data: Any) -> str:
    with pytest.raises(RecipeError) as error:
        parse_recipe(data, "my.yaml")
    message = str(error.value)
    assert message.startswith("recipe my.yaml: ")
    assert message.endswith(HINT)
    assert "\n" not in message
    return message.removeprefix("recipe my.yaml: ").removesuffix(HINT)


def without(data: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """``data`` with keys changed; ``...`` removes one."""
    return {k: v for k, v in (data | changes).items() if v is not ...}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": ...}, "`name`: Field required"),
        ({"name": 3}, "`name`: Input should be a valid string, got 3"),
        ({"name": "a b"}, "`name`: String should match pattern '^[A-Za-z0-9][A-Za-z0-9._-]*$', got 'a b'"),
        ({"name": "../x"}, "`name`: String should match pattern '^[A-Za-z0-9][A-Za-z0-9._-]*$', got '../x'"),
        ({"summary": ...}, "`summary`: Field required"),
        ({"summary": None}, "`summary`: Input should be a valid string, got None"),
        ({"rules": ...}, "`rules`: Field required"),
        ({"rules": []}, "`rules`: List should have at least 1 item after validation, not 0, got []"),
        ({"rules": "all"}, "`rules`: Input should be a valid list, got 'all'"),
        ({"rules": ["fp8"]}, "rule 1: Input should be a valid dictionary, got 'fp8'"),
        ({"kv_cache": "int8"}, "`kv_cache`: Input should be 'source' or 'fp8', got 'int8'"),
        ({"kv_cache": True}, "`kv_cache`: Input should be 'source' or 'fp8', got True"),
        ({"kv_cache": None}, "`kv_cache`: Input should be 'source' or 'fp8', got None"),
        ({"kvcache": "fp8"}, "unknown key `kvcache`"),
    ],
)
def test_keys_of_a_recipe(changes: dict[str, Any], message: str) -> None:
    assert refusal(without(BASE, **changes)) == message


@pytest.mark.parametrize("data", [None, [], "fp8", 3])
def test_a_recipe_that_is_no_mapping(data: Any) -> None:
    assert refusal(data) == f"recipe: Input should be a valid dictionary, got {data!r}"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": ...}, "rule 1, `format`: Field required"),
        (
            {"format": "int4"},
            "rule 1, `format`: Input should be 'source', 'fp8', 'mxfp8' or 'nvfp4', got 'int4'",
        ),
        (
            {"format": "FP8"},
            "rule 1, `format`: Input should be 'source', 'fp8', 'mxfp8' or 'nvfp4', got 'FP8'",
        ),
        ({"roles": ...}, "rule 1: expected either `roles` or `names`"),
        ({"roles": []}, "rule 1, `roles`: List should have at least 1 item after validation, not 0, got []"),
        ({"roles": "experts.*"}, "rule 1, `roles`: Input should be a valid list, got 'experts.*'"),
        ({"roles": [3]}, "rule 1, `roles.0`: Input should be a valid string, got 3"),
        ({"names": ["a"]}, "rule 1: expected either `roles` or `names`"),
        (
            {"roles": ..., "names": []},
            "rule 1, `names`: List should have at least 1 item after validation, not 0, got []",
        ),
        ({"roles": ..., "names": "a"}, "rule 1, `names`: Input should be a valid list, got 'a'"),
        ({"layers": 3}, "rule 1, `layers`: Input should be a valid list, got 3"),
        (
            {"layers": []},
            "rule 1, `layers`: List should have at least 1 item after validation, not 0, got []",
        ),
        ({"layers": [0, -1]}, "rule 1, `layers.1`: Input should be greater than or equal to 0, got -1"),
        ({"layers": ["0"]}, "rule 1, `layers.0`: Input should be a valid integer, got '0'"),
        ({"layers": [True]}, "rule 1, `layers.0`: Input should be a valid integer, got True"),
        (
            {"roles": ..., "names": ["a"], "layers": [1]},
            "rule 1: `layers` goes with `roles`; a name pattern says its layers itself",
        ),
        ({"scales": "amax"}, "rule 1, `scales`: Input should be 'max', 'mse' or 'four_over_six', got 'amax'"),
        ({"scales": "mse"}, "rule 1: `scales: mse` goes with `format: nvfp4` only"),
        (
            {"format": "fp8", "scales": "four_over_six"},
            "rule 1: `scales: four_over_six` goes with `format: nvfp4` only",
        ),
        (
            {"activations": "int8"},
            "rule 1, `activations`: Input should be 'fp8', 'mxfp8', 'nvfp4' or 'none', got 'int8'",
        ),
        (
            {"activations": "fp8"},
            "rule 1: `activations: fp8` does not go with `format: source`; expected no `activations`",
        ),
        (
            {"activations": "none"},
            "rule 1: `activations: none` does not go with `format: source`; expected no `activations`",
        ),
        (
            {"format": "fp8", "activations": "nvfp4"},
            "rule 1: `activations: nvfp4` does not go with `format: fp8`; expected fp8",
        ),
        (
            {"format": "fp8", "activations": "none"},
            "rule 1: `activations: none` does not go with `format: fp8`; expected fp8",
        ),
        (
            {"format": "nvfp4", "activations": "fp8"},
            "rule 1: `activations: fp8` does not go with `format: nvfp4`; expected nvfp4 or none",
        ),
        ({"role": ["*"]}, "unknown key `role` in rule 1"),
    ],
)
def test_keys_of_a_rule(changes: dict[str, Any], message: str) -> None:
    assert refusal(BASE | {"rules": [without(RULE, **changes)]}) == message


def test_the_rule_is_named_by_its_place() -> None:
    assert refusal(BASE | {"rules": [RULE, RULE, RULE | {"format": "int4"}]}).startswith("rule 3, `format`: ")


def test_one_error_lists_all_problems() -> None:
    data = {"name": 1, "rules": [{"format": "int4", "x": 0}], "extra": 1}
    found = refusal(data).split("; ")
    assert [f.split(":")[0] for f in found] == [
        "`name`",
        "`summary`",
        "rule 1, `format`",
        "unknown key `x` in rule 1",
        "unknown key `extra`",
    ]


@pytest.mark.parametrize(
    ("rule", "activation"),
    [
        ({"format": "source"}, None),
        ({"format": "fp8"}, "fp8"),
        ({"format": "fp8", "activations": "fp8"}, "fp8"),
        ({"format": "nvfp4"}, "nvfp4"),
        ({"format": "nvfp4", "activations": "nvfp4", "scales": "mse"}, "nvfp4"),
        ({"format": "nvfp4", "activations": "none", "scales": "four_over_six"}, None),
    ],
)
def test_activations_follow_the_weights(rule: dict[str, Any], activation: str | None) -> None:
    recipe = parse_recipe(BASE | {"rules": [{"roles": ["*"]} | rule]})
    assert recipe.rules[0].activation_format == activation
    assert recipe.kv_cache == "source"
    assert parse_recipe(recipe.dump()) == recipe


def test_a_recipe_does_not_change() -> None:
    recipe = parse_recipe(BASE)
    with pytest.raises(ValueError, match="frozen"):
        recipe.kv_cache = "fp8"
    with pytest.raises(ValueError, match="frozen"):
        recipe.rules[0].format = "fp8"


# --- files and presets


def test_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        "name: mine  # a comment\nsummary: Two rules.\nrules:\n  - roles: [experts.*]\n    layers: [1, "
        "3]\n    format: nvfp4\n"
        "    scales: mse\n  - {roles: ['*'], format: source}\nkv_cache: fp8\n"
    )
    recipe = load_recipe(str(file))
    assert recipe.dump() == {
        "name": "mine",
        "summary": "Two rules.",
        "kv_cache": "fp8",
        "rules": [
            {"roles": ["experts.*"], "layers": [1, 3], "format": "nvfp4", "scales": "mse"},
            {"roles": ["*"], "format": "source"},
        ],
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "cannot be read as YAML: while parsing a flow sequence"),
        (
            "a: !!python/object:os.system x",
            "cannot be read as YAML: could not determine a constructor for the tag",
        ),
        ("\xff", "cannot be read as YAML: 'utf-8' codec can't decode"),
        ("name: a\nname: b", "cannot be read as YAML: key name stands twice"),
        ("", "recipe: Input should be a valid dictionary, got None"),
        ("fp8", "recipe: Input should be a valid dictionary, got 'fp8'"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text, encoding="latin-1")
    with pytest.raises(RecipeError) as error:
        load_recipe(str(file))
    assert (
        str(error.value)
        .replace(": cannot", " cannot")
        .startswith((f"recipe {file} {message}", f"recipe {file}: {message}"))
    )
    assert "\n" not in str(error.value)


def test_neither_file_nor_preset(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as error:
        load_recipe("fp9")
    assert str(error.value) == (
        "recipe 'fp9' is neither a file nor a preset; presets are fp8-published, fp8, mxfp8, nvfp4-full, "
        "nvfp4-w4a16, nvfp4, "
        "super-nvfp4-published"
    )
    with pytest.raises(RecipeError, match=r"cannot be read as YAML: .*Is a directory"):
        load_recipe(str(tmp_path))


def test_presets() -> None:
    assert set(presets()) == {
        "fp8",
        "fp8-published",
        "mxfp8",
        "nvfp4",
        "nvfp4-full",
        "nvfp4-w4a16",
        "super-nvfp4-published",
    }
    for name, file in presets().items():
        recipe = load_recipe(name)
        assert recipe.name == name
        assert recipe == load_recipe(str(file))
        assert recipe.summary.endswith((".", ")."))
        text = file.read_text()
        assert text.startswith("# ")  # a comment says what it is before the keys
        assert list(yaml.safe_load(text)) == ["name", "summary", "rules", "kv_cache"]
        assert parse_recipe(recipe.dump()) == recipe


def test_recipes_lie_in_the_source_tree() -> None:
    assert recipe_folder() == CALIB / "recipes"
