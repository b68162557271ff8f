"""What is in a checkpoint, and what a recipe would do with it: from headers, or a config alone."""

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from nemoquant import arguments
from nemoquant.arguments import PathLike
from nemoquant.formats import Method
from nemoquant.planning.plan import Plan
from nemoquant.planning.recipe import load_recipe
from nemoquant.planning.resolve import resolve
from nemoquant.planning.solving import FoldName
from nemoquant.run.options import RunOptions
from nemoquant.sources.source import BareConfig, Source, open_source


def plan(
    source: PathLike,
    recipe: PathLike,
    *,
    scale_groups: bool = True,
    method: Method | None = None,
    folds: Sequence[FoldName] | None = None,
    descent: int | None = None,
) -> Plan:
    """Resolve a recipe (preset name or file) for a checkpoint folder's headers, or a bare ``config.json``.

    Args:
        method, folds, descent: take the place of the recipe's own; see :class:`RunOptions`.
        scale_groups: q, k, v share their scales, experts of a layer and projection their input scale.
    Raises:
        CheckpointError, RecipeError, UsageError
    """
    options = RunOptions(scale_groups=scale_groups, method=method, folds=folds, descent=descent)
    name = recipe_text(recipe)
    return resolved(open_source(arguments.path("source", source)), name, options)


def recipe_text(recipe: PathLike) -> str:
    """The name of a preset, or of a file.

    Raises:
        UsageError: it is neither str nor Path.
    """
    name = os.fspath(recipe) if isinstance(recipe, str | os.PathLike) else None
    if not isinstance(name, str):
        raise arguments.refuse("recipe", recipe, "the name of a preset, or a recipe file")
    return name


def resolved(source: Source | BareConfig, recipe: str, options: RunOptions) -> Plan:
    """The plan of an opened source."""
    assumed = isinstance(source, BareConfig)
    chosen = load_recipe(recipe).changed(options.method, options.folds, options.descent)
    made = resolve(chosen, source.config, source.table, assumed=assumed, scale_groups=options.scale_groups)
    return replace(made, warnings=source.warnings)


def inspect(path: PathLike, *, context: int | None = None) -> dict[str, Any]:
    """Describe a checkpoint folder or a bare ``config.json``: layers, parameters, formats, cache sizes.

    The small files of a checkpoint that nemoquant wrote are held against its manifest first; its shards are
    not read.

    Args:
        context: tokens for ``kv_cache.bytes_at_context``; None is the config's ``max_position_embeddings``.
    Raises:
        CheckpointError, UsageError
    """
    folder = arguments.path("path", path)
    tokens = None if context is None else arguments.whole("context", context, 1)
    from nemoquant.sources.summary import summarize

    return summarize(folder, tokens)
