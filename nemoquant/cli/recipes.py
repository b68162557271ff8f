"""``nemoquant recipes``: list and show the shipped recipes."""

import click

from nemoquant.cli.shared import json_option, print_json, show, table


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
@json_option
def show_recipe(name: str, resolved: bool, as_json: bool) -> None:
    """Print a recipe: a preset's file as it is, comments and all. With --json it is --resolved too."""
    from pathlib import Path

    from nemoquant.arguments import home_expanded
    from nemoquant.files import read_text
    from nemoquant.planning.recipe import load_recipe, presets

    recipe = load_recipe(name)
    if as_json:
        print_json(recipe.dump())
    elif resolved:
        import yaml

        show(yaml.safe_dump(recipe.dump(), sort_keys=False, allow_unicode=True, width=100))
    else:
        show(read_text(presets().get(name, Path(home_expanded(name)))))


@command.command("schema")
def show_schema() -> None:
    """Print the JSON schema of recipe files, which editors check and complete them by."""
    from nemoquant.planning.recipe import schema

    print_json(schema())
