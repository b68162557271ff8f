"""The JSON schema of recipe files against what the loader takes, read by the jsonschema package."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator
from support.places import ROOT

from nemoquant.errors import RecipeError
from nemoquant.planning.recipe import load_recipe, presets, schema

VALIDATOR = Draft202012Validator(json.loads((ROOT / "docs/recipe.schema.json").read_text()))
RULE: dict[str, Any] = {"roles": ["*"], "format": "source"}
BASE: dict[str, Any] = {"name": "mine", "summary": "s", "rules": [RULE]}
OWN = sorted((ROOT / "tests/consumers/recipes").glob("*.yaml"))


def test_the_file_is_the_model() -> None:
    Draft202012Validator.check_schema(schema())
    assert VALIDATOR.schema == schema(), "run nemoquant recipes schema > docs/recipe.schema.json"


@pytest.mark.parametrize("path", [*presets().values(), *OWN], ids=lambda path: path.stem)
def test_recipes_of_the_repository(path: Path) -> None:
    VALIDATOR.validate(yaml.safe_load(path.read_text()))


@pytest.mark.parametrize(
    ("data", "valid"),
    [
        (BASE, True),
        ({"name": "mine", "extends": "fp8"}, True),
        ({"name": "mine", "extends": "fp8", "rules": [RULE], "kv_cache": "fp8", "folds": ["norm"]}, True),
        (BASE | {"rules": [RULE | {"layers": ["first", "last", "3..9", -1, "-4..last", 7]}]}, True),
        (BASE | {"rules": [{"names": ["a*"], "format": "fp8", "activations": "none"}]}, True),
        (BASE | {"rules": [RULE | {"format": "bf16"}]}, True),
        (BASE | {"solve": {"damping": 0.1, "descent": 2}}, True),
        ({"summary": "s", "rules": [RULE]}, False),
        ({"extends": "fp8"}, False),
        (BASE | {"rules": []}, False),
        (BASE | {"rule": [RULE]}, False),
        (BASE | {"kv_cache": "int8"}, False),
        (BASE | {"rules": [RULE | {"format": "int4"}]}, False),
        (BASE | {"rules": [RULE | {"names": ["a"]}]}, False),
        (BASE | {"rules": [{"format": "fp8"}]}, False),
        *(
            (BASE | {"rules": [RULE | {"layers": [entry]}]}, False)
            for entry in ("0", "middle", "3..", "1-3", True, 1.5, 5000)
        ),
        (BASE | {"solve": {"damping": 0}}, False),
        (BASE | {"folds": ["norms"]}, False),
        (BASE | {"headroom": 1.5}, True),
        ({"name": "mine", "extends": "nvfp4", "headroom": 2}, True),
        *((BASE | {"headroom": wrong}, False) for wrong in (0.5, 17, "2", True, None)),
    ],
)
def test_it_says_what_the_loader_says(data: dict[str, Any], valid: bool, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(json.dumps(data))
    try:
        load_recipe(str(tmp_path / "mine.yaml"))
    except RecipeError:
        assert not valid
    else:
        assert valid
    assert VALIDATOR.is_valid(data) == valid
