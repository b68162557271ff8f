"""The recipe that a name or file stands for, for a model: a preset, a file of ours, or Model Optimizer's."""

from nemoquant.model.config import NemotronHConfig
from nemoquant.model.nested import TOWER
from nemoquant.model.roles import TensorSpec
from nemoquant.planning.modelopt.convert import Fitted, convert
from nemoquant.planning.modelopt.library import load
from nemoquant.planning.recipe import is_foreign, load_recipe


def choose(name_or_path: str, config: NemotronHConfig, table: list[TensorSpec]) -> Fitted:
    """The recipe for a model.

    Raises:
        RecipeError: there is none, it does not follow the schema, or asks for what can't be done.
        MissingExtraError: it is one of Model Optimizer, which is not installed.
    """
    if not is_foreign(name_or_path):
        return Fitted(load_recipe(name_or_path), ())
    own = [spec for spec in table if spec.role != TOWER]
    return convert(load(name_or_path), config, own)
