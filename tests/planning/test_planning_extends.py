"""A recipe that extends another: what it is whole, and every refusal."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from support.places import DEMO, SUPER

from nemoquant import api
from nemoquant.errors import RecipeError
from nemoquant.planning.recipe import MOST_BASES, load_recipe, parse_recipe

Write = Callable[..., str]
REST = {"roles": ["*"], "format": "source"}


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a recipe; returns its path as text."""

    def make(file: str, **keys: object) -> str:
        path = tmp_path / f"{file}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(yaml.safe_dump({"name": path.stem, **keys}))
        return str(path)

    return make


def test_own_rules_come_first_and_keys_override(write: Write) -> None:
    mine = [{"roles": ["attention.*"], "layers": ["first"], "format": "bf16"}]
    whole, base = (
        load_recipe(write("mine", extends="nvfp4", rules=mine, folds=["norm"])),
        load_recipe("nvfp4"),
    )
    assert whole.dump() == base.dump() | {
        "name": "mine",
        "summary": "nvfp4 with changes.",
        "rules": mine + base.dump()["rules"],
        "folds": ["norm"],
    }
    assert load_recipe(write("other", extends="nvfp4", summary="S.", kv_cache="source", folds=[])).dump() == {
        **{key: value for key, value in base.dump().items() if key not in ("kv_cache", "folds")},
        "name": "other",
        "summary": "S.",
    }
    solve = load_recipe(write("third", extends="nvfp4", solve={"descent": 3})).solve
    assert (solve.descent, solve.damping) == (3, base.solve.damping)


def test_headroom_is_inherited_and_overridden(write: Write) -> None:
    first = write("first", extends="nvfp4", headroom=3)
    assert load_recipe(write("second", extends="first.yaml", folds=[])).headroom == 3
    assert load_recipe(write("third", extends="first.yaml", headroom=1.5)).headroom == 1.5
    plans = [api.plan(DEMO, path, headroom=other) for path, other in ((first, None), (first, 4))]
    assert [plan.recipe.headroom for plan in plans] == [3, 4]
    assert [plan.recipe.name for plan in plans] == ["first", "first-headroom4"]
    assert len({plan.sha256 for plan in plans}) == 2
    assert parse_recipe(plans[1].recipe.dump()).headroom == 4


def test_a_file_at_home(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write("base", extends="fp8", kv_cache="source")
    assert load_recipe(write("deeper/mine", extends="~/base.yaml")).kv_cache == "source"


def test_a_chain_of_files_beside_each_other(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Paths are from the file that has them, wherever the command runs."""
    write("bases/one", extends="fp8", kv_cache="source")
    write("bases/two", extends="one.yaml", rules=[{"roles": ["lm_head"], "format": "fp8"}])
    last = write("last", extends="bases/two.yaml", rules=[{"roles": ["mamba.*"], "format": "source"}])
    monkeypatch.chdir(tmp_path.parent)
    whole = load_recipe(last)
    assert whole.kv_cache == "source"
    assert [rule.roles for rule in whole.rules[:2]] == [["mamba.*"], ["lm_head"]]
    assert [rule.roles for rule in whole.rules[2:]] == [rule.roles for rule in load_recipe("fp8").rules]


def test_rules_that_are_overridden_are_dropped_from_the_plan(write: Write) -> None:
    """What is written is the recipe whole: read again from a manifest, it gives the same plan."""
    mine = [{"roles": ["experts.*", "mamba.*", "mlp.*"], "format": "fp8"}]
    plan = api.plan(DEMO, write("mine", extends="nvfp4", rules=mine))
    formats = {row.role.split(".")[0]: row.format for row in plan.quantized}
    assert formats == {"mamba": "fp8", "experts": "fp8", "shared_experts": "fp8", "attention": "fp8"}
    assert [rule.roles for rule in plan.recipe.rules] == [
        ["experts.*", "mamba.*", "mlp.*"],
        ["shared_experts.*"],
        ["attention.*"],
        ["*"],
    ]
    written = parse_recipe(plan.recipe.dump())
    assert written.dump() == plan.recipe.dump()
    again = api.plan(DEMO, write("again", **written.dump()))
    assert again.sha256 == plan.sha256
    assert {row.reason for row in plan.rows if row.role == "norm"} == {"rule 4: roles *"}


def test_layers_of_a_published_map_may_be_overridden(write: Write) -> None:
    plan = api.plan(
        SUPER, write("mine", extends="super-nvfp4-published", rules=[{"roles": ["mamba.*"], "format": "fp8"}])
    )
    assert len({row.name for row in plan.quantized if row.role.startswith("mamba.")}) == 80
    assert not any(rule.layers and rule.roles[0].startswith("mamba.") for rule in plan.recipe.rules)


def test_own_rules_must_do_something(write: Write) -> None:
    rules = [{"roles": ["mamba.*"], "format": "fp8"}, {"roles": ["mamba.in_proj"], "format": "source"}]
    with pytest.raises(RecipeError, match=r"rule 2 \(roles mamba.in_proj\) does nothing"):
        api.plan(DEMO, write("mine", extends="nvfp4", rules=rules))


def test_a_rule_of_the_base_that_does_not_fit_is_named(write: Write) -> None:
    with pytest.raises(
        RecipeError, match=r"recipe mine: rule 3, of what it extends: layers 8, 76 have no tensor"
    ):
        api.plan(DEMO, write("mine", extends="super-nvfp4-published"))


def refusal(path: str) -> str:
    with pytest.raises(RecipeError) as error:
        load_recipe(path)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_circles(write: Write) -> None:
    assert "recipe one.yaml extends itself, in a circle of 1;" in refusal(write("one", extends="one.yaml"))
    write("a", extends="b.yaml")
    assert "recipe b.yaml extends itself, in a circle of 2;" in refusal(write("b", extends="a.yaml"))


def test_long_chains(write: Write) -> None:
    write("r0", summary="s", rules=[{"roles": ["mamba.*"], "format": "fp8"}, REST])
    paths = [write(f"r{i}", extends=f"r{i - 1}.yaml") for i in range(1, MOST_BASES + 2)]
    assert load_recipe(paths[MOST_BASES - 1]).kv_cache == "source"
    assert (
        refusal(paths[MOST_BASES])
        == f"recipe r0.yaml: 9 recipes extend one another; expected at most {MOST_BASES}"
    )


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"extends": "fp9"}, "extends 'fp9', which is neither a preset nor a file beside it; presets are "),
        ({"extends": "."}, "extends '.', which is neither a preset nor a file beside it; presets are "),
        ({"extends": 3}, "`extends`: Input should be a valid string, got 3"),
        ({"extends": "fp8", "rule": []}, "unknown key `rule`"),
        (
            {"extends": "fp8", "rules": [{"roles": ["*"], "format": "fp9"}]},
            "rule 1, `format`: Input should be ",
        ),
        ({"extends": "fp8", "name": ...}, "`name`: Field required"),
        (
            {"extends": "fp8", "rules": [REST] * 1023},
            "`rules`: List should have at most 1024 items after validation, not 1027",
        ),
    ],
)
def test_files_that_are_refused(tmp_path: Path, keys: dict[str, object], message: str) -> None:
    given = {key: value for key, value in {"name": "mine", **keys}.items() if value is not ...}
    path = tmp_path / "mine.yaml"
    path.write_text(json.dumps(given))  # which is YAML too, without aliases
    assert message in refusal(str(path))


def test_a_base_that_is_refused_is_named(write: Write) -> None:
    write("base", summary="s", rules=[])
    assert refusal(write("mine", extends="base.yaml")).startswith(
        "recipe base.yaml: `rules`: List should have"
    )
