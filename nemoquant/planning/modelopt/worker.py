"""Loads one recipe by Model Optimizer's own loader, in a process of its own.

Importing Model Optimizer brings transformers and more: seconds, hundreds of megabytes that a run with
``--memory`` has promised not to take, lines on standard output, and changes in other libraries. Of that
nothing stays with whoever asked. A third of the seconds goes into libraries that it does without where they
are not installed, and whose classes a recipe may name: it gets them where one does.

A script, not a module of the package: it imports nothing of it. ``library.py`` starts it with the path of a
recipe, or ``quant_cfg`` before a path for a file without sections, and has checked the files. The answer is
one object of JSON on standard output: ``description``, ``entries`` and ``algorithms`` (see ``entries.py``),
or ``refused`` with the loader's reason.
"""

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

OPTIONAL = ("accelerate", "datasets", "deepspeed", "diffusers", "peft", "transformers")
PLAIN = "quant_cfg"  # before the path, in the arguments
WITH_OPTIONAL = "with-optional"  # the same


class UnknownClassError(ValueError):
    """A recipe names a class that Model Optimizer has not registered."""


def described(path: Path, plain: bool) -> dict[str, Any]:
    """A recipe as JSON data.

    Args:
        path: absolute; a folder, or a file.
        plain: the file is a ``quant_cfg`` with its ``algorithm`` and nothing around them.
    Raises:
        UnknownClassError: a class in it is not known with the libraries that are there.
        Exception: whatever its loader raises.
    """
    import modelopt.torch.quantization as mtq
    from modelopt.recipe import load_recipe
    from modelopt.recipe.loader import load_config
    from modelopt.torch.quantization.nn import QuantModuleRegistry

    if plain:
        description, found = "", load_config(path, schema_type=mtq.config.QuantizeConfig)
    else:
        recipe = load_recipe(path)
        description, found = recipe.description, recipe.quantize
    entries = [_entry(entry) for entry in found.quant_cfg]
    parents = {entry["parent"] for entry in entries} - {None, *OF_THE_MODEL}
    for parent in sorted(parents):
        try:
            QuantModuleRegistry[parent]
        except KeyError:
            raise UnknownClassError(f"parent_class {parent!r} is not a class that it quantizes") from None
    given = found.algorithm if isinstance(found.algorithm, list) else [found.algorithm]
    algorithms = [_algorithm(algorithm) for algorithm in given if algorithm is not None]
    return {"description": description, "entries": entries, "algorithms": algorithms}


# Classes that it registers only when it meets them in a model of this family.
OF_THE_MODEL = ("NemotronHAttention", "hf.NemotronHExperts")


def _entry(entry: Any) -> dict[str, Any]:
    cfg = entry.cfg
    if cfg is not None:
        cfg = [_attributes(one) for one in (cfg if isinstance(cfg, list) else [cfg])]
    return {
        "pattern": entry.quantizer_name,
        "parent": entry.parent_class,
        "enable": entry.enable,
        "cfg": cfg,
    }


def _attributes(one: Any) -> Any:
    data: Any = one.model_dump(exclude_defaults=True)
    return data


def _algorithm(given: Any) -> Any:
    """``max``, a mapping, or one of its objects: as a mapping with the options that are set."""
    if isinstance(given, str):
        return {"method": given}
    return (
        dict(given)
        if isinstance(given, dict)
        else {"method": given.method, **given.model_dump(exclude_unset=True)}
    )


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)  # what is printed on the way is no answer
    warnings.simplefilter("ignore")
    *words, path = sys.argv[1:]
    if WITH_OPTIONAL not in words:
        sys.modules.update(dict.fromkeys(OPTIONAL))  # type: ignore[arg-type]  # None: not to be found
    try:
        answer = described(Path(path), plain=PLAIN in words)
    except UnknownClassError as error:
        if WITH_OPTIONAL not in words:
            os.dup2(answers.fileno(), 1)
            os.execv(sys.executable, [sys.executable, "-P", __file__, WITH_OPTIONAL, *sys.argv[1:]])
        answer = refused(error)
    except Exception as error:  # its loader raises whatever its parts do
        answer = refused(error)
    json.dump(answer, answers, default=str)
    answers.close()


def refused(error: Exception) -> dict[str, Any]:
    return {"refused": f"{type(error).__name__}: {error}"[:4000]}


if __name__ == "__main__":
    main()
