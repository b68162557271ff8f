"""What is in a checkpoint, and what a recipe would do with it: from headers, or a config alone."""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from nemoquant import arguments
from nemoquant.api.model import found
from nemoquant.arguments import PathLike
from nemoquant.formats import Method
from nemoquant.planning.choose import choose
from nemoquant.planning.plan import Plan
from nemoquant.planning.resolve import resolve
from nemoquant.planning.solving import FoldName, Outputs, Propagate
from nemoquant.run.options import RunOptions
from nemoquant.sources.hub import SETTINGS
from nemoquant.sources.source import BareConfig, Source, open_source


def plan(
    source: PathLike,
    recipe: PathLike,
    *,
    scale_groups: bool = True,
    method: Method | None = None,
    folds: Sequence[FoldName] | None = None,
    descent: int | None = None,
    propagate: Propagate | None = None,
    outputs: Outputs | None = None,
    headroom: float | None = None,
    download: bool = False,
    say: Callable[[str], None] | None = None,
) -> Plan:
    """Resolve a recipe (preset name or file) for a checkpoint folder's headers, or a bare ``config.json``.

    A file may be a recipe of Model Optimizer, and ``modelopt:NAME`` is one of its library.

    Args:
        source: a path, or a model's name on the hub; of that the config alone where its cache lacks weights.
        method, folds, descent, propagate, outputs, headroom: take the place of the recipe's own; see
            :class:`RunOptions`.
        scale_groups: q, k, v share their scales, experts of a layer and projection their input scale.
        download: of a name on the hub, fetch the config; without it nothing reaches a network.
        say: called with a line of text on what a name on the hub stands for.
    Raises:
        CheckpointError, RecipeError, UsageError, MissingExtraError
    """
    options = RunOptions(
        scale_groups=scale_groups,
        method=method,
        folds=folds,
        descent=descent,
        propagate=propagate,
        outputs=outputs,
        headroom=headroom,
    )
    name = recipe_text(recipe)
    path = found("source", source, SETTINGS, download=download, say=say)
    return resolved(open_source(path), name, options)


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
    chosen, notes = choose(recipe, source.config, source.table)
    made = resolve(
        chosen.changed(options.overrides),
        source.config,
        source.table,
        assumed=assumed,
        scale_groups=options.scale_groups,
    )
    return replace(made, warnings=(*source.warnings, *notes))


def inspect(
    path: PathLike,
    *,
    context: int | None = None,
    download: bool = False,
    say: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Describe a checkpoint folder or a bare ``config.json``: layers, parameters, formats, cache sizes.

    The small files of a checkpoint that nemoquant wrote are held against its manifest first; its shards are
    not read.

    Args:
        path: a path, or a model's name on the hub; of that the config alone where its cache lacks weights.
        context: tokens for ``kv_cache.bytes_at_context``; None is the config's ``max_position_embeddings``.
        download: of a name on the hub, fetch the config; without it nothing reaches a network.
        say: called with a line of text on what a name on the hub stands for.
    Raises:
        CheckpointError, UsageError
    """
    tokens = None if context is None else arguments.whole("context", context, 1)
    folder = found("path", path, SETTINGS, download=download, say=say)
    from nemoquant.sources.summary import summarize

    return summarize(folder, tokens)
