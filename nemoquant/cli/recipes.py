"""``nemoquant recipes``: list and show the shipped recipes."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from nemoquant.cli.shared import MODEL, download_option, json_option, local, print_json, say, show, table
from nemoquant.words import plain

if TYPE_CHECKING:
    from nemoquant.planning.recipe import Recipe


@click.group("recipes")
def command() -> None:
    """List and show the shipped recipes, and the schema of such files.

    \b
    Examples:
      nemoquant recipes list
      nemoquant recipes show nvfp4 > my.yaml                start from a preset
      nemoquant recipes show my.yaml --resolved             with what it extends
      nemoquant recipes schema > recipe.schema.json         for an editor
    """


@command.command("list")
@json_option
def list_recipes(as_json: bool) -> None:
    """The presets, a line each."""
    from nemoquant.planning.recipe import load_recipe, presets

    recipes = [load_recipe(name) for name in presets()]
    if as_json:
        print_json([{"name": r.name, "summary": r.summary, "kv_cache": r.kv_cache} for r in recipes])
    else:
        table([(r.name, r.kv_cache, r.summary) for r in recipes], ("preset", "KV cache", "what it does"))


@command.command("show")
@click.argument("name")
@click.option(
    "--resolved", is_flag=True, help="The whole recipe: with the rules and keys of what it extends."
)
@click.option(
    "--model",
    type=MODEL,
    help="A checkpoint folder, its config.json or a name on the hub: what a recipe of Model Optimizer means "
    "depends on it.",
)
@download_option
@json_option
def show_recipe(name: str, resolved: bool, model: str | None, download: bool, as_json: bool) -> None:
    """Print a recipe: a preset's file as it is, comments and all, or one of Model Optimizer converted.

    With --json it is --resolved too.

    \b
    Examples:
      nemoquant recipes show nvfp4
      nemoquant recipes show theirs.yaml --model MODEL > ours.yaml            for this model
      nemoquant recipes show modelopt:general/ptq/nvfp4_default-kv_fp8 --model config.json
    """
    from nemoquant.arguments import home_expanded
    from nemoquant.files import read_text
    from nemoquant.planning.choose import choose
    from nemoquant.planning.recipe import is_foreign, load_recipe, presets

    notes: tuple[str, ...] = ()
    converted = model is not None and is_foreign(name)
    if model is not None and converted:
        from nemoquant.sources.source import open_source

        source = open_source(local(model, download=download, weights=False, quiet=as_json))
        recipe, notes = choose(name, source.config, source.table)
    else:
        recipe = load_recipe(name)
    if as_json:
        for note in notes:
            say(f"warning: {note}", err=True)
        print_json(recipe.dump())
    elif resolved or converted:
        show(_as_yaml(recipe, notes))
    else:
        show(read_text(presets().get(name, Path(home_expanded(name)))))


def _as_yaml(recipe: "Recipe", notes: Sequence[str]) -> str:
    """A recipe as a file, with notes as comments above it."""
    import yaml

    comments = [f"# {plain(note)}" for note in notes]
    data = yaml.safe_dump(
        recipe.dump(), sort_keys=False, default_flow_style=None, width=110, allow_unicode=True
    )
    return "\n".join([*comments, data])


@command.command("schema")
def show_schema() -> None:
    """Print the JSON schema of recipe files, which editors check and complete them by."""
    from nemoquant.planning.recipe import schema

    print_json(schema())
