"""The recipe's schema: the values of each key, and the messages for a recipe file that breaks it."""

import os
import time
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
NO_LAYER = "expected a layer's number, first or last, or a range such as 3..9 or -4..last"


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
            "rule 1, `format`: Input should be 'source', 'bf16', 'fp8', 'mxfp8' or 'nvfp4', got 'int4'",
        ),
        (
            {"format": "FP8"},
            "rule 1, `format`: Input should be 'source', 'bf16', 'fp8', 'mxfp8' or 'nvfp4', got 'FP8'",
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
        ({"layers": [0, 5000]}, "rule 1, `layers.1`: expected a layer from -4,096 to 4,095, got 5000"),
        *(
            ({"layers": [value]}, f"rule 1, `layers.0`: {NO_LAYER}, got {value!r}")
            for value in ("0", True, None, 1.0, "middle", "3..", "..3", "1-3", "3...9", "1..2..3", "00001..3")
        ),
        (
            {"roles": ..., "names": ["a"], "layers": [1]},
            "rule 1: `layers` goes with `roles`; a name pattern says its layers itself",
        ),
        (
            {"scales": "amax"},
            "rule 1, `scales`: Input should be 'max', 'mse', 'four_over_six', 'hess' or 'gptq', got 'amax'",
        ),
        ({"scales": "mse"}, "rule 1: `scales: mse` goes with `format: nvfp4` only"),
        ({"scales": "gptq"}, "rule 1: `scales: gptq` goes with `format: fp8 or mxfp8 or nvfp4` only"),
        ({"format": "fp8", "scales": "hess"}, "rule 1: `scales: hess` goes with `format: nvfp4` only"),
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
            "rule 1: `activations: nvfp4` does not go with `format: fp8`; expected fp8 or none",
        ),
        (
            {"format": "bf16", "activations": "none"},
            "rule 1: `activations: none` does not go with `format: bf16`; expected no `activations`",
        ),
        (
            {"format": "mxfp8", "activations": "none"},
            "rule 1: `activations: none` does not go with `format: mxfp8`; expected mxfp8",
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
        ({"format": "bf16"}, None),
        ({"format": "fp8", "activations": "fp8"}, "fp8"),
        ({"format": "fp8", "activations": "none"}, None),
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
            "cannot be read as YAML: 'tag:yaml.org,2002:python/object:os.system' is a tag of YAML",
        ),
        ("\xff", "cannot be read as YAML: 'utf-8' codec can't decode"),
        ("name: a\nname: b", "cannot be read as YAML: key 'name' stands twice"),
        ("a: [3:9]", "cannot be read as YAML: 3:9 is another number to YAML than it looks; write it in dec"),
        ("a: [010]", "cannot be read as YAML: 010 is another number to YAML than it looks"),
        ("a: 1_0.5", "cannot be read as YAML: 1_0.5 is another number to YAML than it looks"),
        (
            "name: &a x",
            "cannot be read as YAML: &a is an anchor or alias of YAML, which a recipe may not have",
        ),
        ("a: [*, b]", "cannot be read as YAML: while scanning an alias"),
        ("a: *b", "cannot be read as YAML: *b is an anchor or alias of YAML"),
        (
            "? [1, 2]\n: 3",
            'cannot be read as YAML: while constructing a mapping in "<unicode string>", line 1',
        ),
        ("a: " + "1:" * 100_000 + "1", "cannot be read as YAML: a number of 200,001 characters"),
        ("a: 0x" + "f" * 100_000, "cannot be read as YAML: a number of 100,002 characters"),
        ("a: 1." + "0" * 100_000, "cannot be read as YAML: a number of"),
        ("a: 2000-99-99", "cannot be read as YAML: month must be in 1..12"),
        ("[" * 100_000, "cannot be read as YAML: maximum recursion"),
        ("- " * 100_000, "cannot be read as YAML: maximum recursion"),
        ("#" * (256 << 10) + "#", "cannot be read as YAML: it has more than 262,144 bytes"),
        ('name: "\\ud800"\nsummary: s\nrules: []', "`name`: Input should be a valid string, unable to parse"),
        (
            'name: n\nsummary: "\\udfff"\nrules: []',
            "`summary`: Input should be a valid string, unable to parse",
        ),
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


def test_aliases_are_refused_before_they_grow(tmp_path: Path) -> None:
    """Nine lines that stand for 10^9 values: 400 bytes that were never read to the end."""
    lines = ["a0: &a0 [x,x,x,x,x,x,x,x,x,x]"]
    lines += [f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    (tmp_path / "mine.yaml").write_text("\n".join(lines))
    with pytest.raises(RecipeError, match=r"&a0 is an anchor or alias of YAML"):
        load_recipe(str(tmp_path / "mine.yaml"))


@pytest.mark.parametrize("name", ["", ".", "/"])
def test_a_folder_is_no_recipe(name: str) -> None:
    with pytest.raises(RecipeError, match=f"^recipe '{name}' is neither a file nor a preset; presets are "):
        load_recipe(name)


def test_a_key_that_stands_twice_among_many_is_found_at_once(tmp_path: Path) -> None:
    keys = "\n".join(f"k{i}: 1" for i in range(10_000))
    (tmp_path / "mine.yaml").write_text(f"{keys}\n{keys}\n")
    began = time.process_time()
    with pytest.raises(RecipeError, match=r"key 'k0' stands twice .*line 10001"):
        load_recipe(str(tmp_path / "mine.yaml"))
    assert time.process_time() - began < 10, "YAML itself takes most of it"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rules": [RULE] * 1025},
            "`rules`: List should have at most 1024 items after validation, not 1025, got [",
        ),
        ({"name": "n" * 101}, "`name`: String should have at most 100 characters, got 'nnn"),
        ({"summary": "n" * 2001}, "`summary`: String should have at most 2000 characters, got 'nnn"),
        (
            {"rules": [{"roles": ["r"] * 513, "format": "fp8"}]},
            "rule 1, `roles`: List should have at most 512 items after validation, not 513, got [",
        ),
        (
            {"rules": [{"names": ["n" * 201], "format": "fp8"}]},
            "rule 1, `names.0`: String should have at most 200 characters, got 'nnn",
        ),
        (
            {"rules": [{"names": ["a*"] * 300, "format": "fp8"}, {"names": ["b?"] * 213, "format": "fp8"}]},
            "recipe: its rules have 513 patterns with wildcards; expected at most 512",
        ),
        (
            {"rules": [RULE | {"layers": [0] * 4097}]},
            "rule 1, `layers`: List should have at most 4096 items after validation, not 4097, got [",
        ),
        ({"k" * 100_000: 1}, "unknown key `" + "k" * 80 + "`"),
        ({"summary": 10**5000}, "`summary`: Input should be a valid string, got <16,610 bits>"),
    ],
)
def test_recipes_without_bounds(changes: dict[str, Any], message: str) -> None:
    refused = refusal(BASE | changes)
    assert refused.startswith(message)
    assert len(refused) < 400


def test_a_message_tells_a_few_of_many_problems() -> None:
    refused = refusal(BASE | {"rules": [RULE | {"format": "int4"}] * 500})
    assert refused.count("`format`") == 8
    assert refused.endswith("; and 492 more")


def test_neither_file_nor_preset(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as error:
        load_recipe("fp9")
    assert str(error.value) == (
        "recipe 'fp9' is neither a file nor a preset; presets are fp8-published, fp8, lightning-published, "
        "mxfp8, nano-fp8-published, nano-nvfp4-published, nvfp4-full-w4a16, nvfp4-full, nvfp4-w4a16, "
        "nvfp4, super-nvfp4-published"
    )
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(RecipeError, match=r"cannot be read as YAML: .*not a regular file"):
        load_recipe(str(tmp_path / "pipe"))


def test_presets() -> None:
    assert set(presets()) == {
        "fp8",
        "fp8-published",
        "lightning-published",
        "mxfp8",
        "nano-fp8-published",
        "nano-nvfp4-published",
        "nvfp4",
        "nvfp4-full",
        "nvfp4-full-w4a16",
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
        given = recipe.dump()
        keys = [
            "name",
            "summary",
            "rules",
            "kv_cache",
            *(k for k in ("solve", "folds", "headroom") if k in given),
        ]
        assert list(yaml.safe_load(text)) == keys
        assert parse_recipe(recipe.dump()) == recipe


def test_recipes_lie_in_the_source_tree() -> None:
    assert recipe_folder() == CALIB / "recipes"


@pytest.mark.parametrize(
    "value", ["!!timestamp x", "!!bool maybe", "!!python/object:os.system x", "!!binary '%'"]
)
def test_tags_are_refused(value, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(f"name: mine\nsummary: {value}\nrules:\n- roles: ['*']\n  format: source\n")
    with pytest.raises(
        RecipeError,
        match=r"is a tag of YAML, which a recipe may not have",
    ):
        load_recipe(str(path))
