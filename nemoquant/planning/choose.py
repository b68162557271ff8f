"""The recipe that a name or file stands for, for a model: a preset, a file of ours, or Model Optimizer's."""

from typing import NamedTuple

from nemoquant.model.config import NemotronHConfig
from nemoquant.model.roles import TensorSpec
from nemoquant.planning.recipe import Recipe, is_foreign, load_recipe


class Chosen(NamedTuple):
    """A recipe, and what is told with it: what was read in another way than it was meant, a sentence each."""

    recipe: Recipe
    notes: tuple[str, ...]


def choose(name_or_path: str, config: NemotronHConfig, table: list[TensorSpec]) -> Chosen:
    """The recipe for a model.

    Raises:
        RecipeError: there is none, it does not follow the schema, or asks for what can't be done.
        MissingExtraError: it is one of Model Optimizer, which is not installed.
    """
    if not is_foreign(name_or_path):
        return Chosen(load_recipe(name_or_path), ())
    from nemoquant.planning.modelopt.convert import convert
    from nemoquant.planning.modelopt.library import load

    return Chosen(*convert(load(name_or_path), config, table))
