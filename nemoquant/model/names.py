"""Published names of modules and tensors: built here, and read back here.

    backbone.embeddings                              EMBEDDINGS
    backbone.layers.3.mixer.o_proj                   layer(3) + MIXER + "o_proj"
    backbone.layers.3.mixer.k_proj.output            a tap: the keys as they enter the cache, OUTPUT
    backbone.layers.5.mixer.experts.7.up_proj        member(stack("up_proj"), 7), below layer(5) + MIXER
    backbone.layers.5.mixer.experts.up_proj          stack_of the one above: all experts of that projection
    backbone.norm_f, lm_head                         FINAL_NORM, HEAD
    mtp.layers.1.mixer.gate                          mtp_layer(1) + MIXER + ROUTER

A module's name has no dot at its end, a prefix has one. A module's weight is its name and ``.weight``. Names
inside a mixer, such as ``o_proj``, belong to the kind of its layer: see ``kinds/``. Other spellings that a
source may have are translated in ``checkpoint/spellings.py``.
"""

import re

EMBEDDINGS = "backbone.embeddings"
FINAL_NORM = "backbone.norm_f"
HEAD = "lm_head"
MIXER = "mixer."
ROUTER = "gate"
OUTPUT = ".output"  # after a K or V projection's name: the tap of what it puts into the cache
KV_PROJECTIONS = ("k_proj", "v_proj")

_MAIN, _MTP, _TRANSFORMERS = "backbone.", "mtp.", "model."
BEGINNINGS = (_MAIN, _MTP, f"{HEAD}.")  # of all names
_EXPERTS = "experts."
_IN_LAYER = re.compile(r"backbone\.layers\.(\d{1,6})\.mixer\.(.+)")
_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(\w+)")


def layer(i: int) -> str:
    """The prefix of layer ``i`` of the main model."""
    return f"backbone.layers.{i}."


def in_layer(name: str) -> tuple[int | None, str]:
    """The layer of the main model that a tensor is in, and its name in the mixer; None and "" for others."""
    found = _IN_LAYER.fullmatch(name)
    return (int(found[1]), found[2]) if found is not None else (None, "")


def mtp_layer(i: int) -> str:
    """The prefix of layer ``i`` of the multi-token-prediction modules, counted through all of them."""
    return f"mtp.layers.{i}."


def head(tied: bool) -> str:
    """The module whose weight the head multiplies with; ``tied``: the embeddings are the head too."""
    return EMBEDDINGS if tied else HEAD


def kv_projections(i: int) -> list[str]:
    """The modules of layer ``i``, an attention layer, whose outputs go into its cache."""
    return [f"{layer(i)}{MIXER}{projection}" for projection in KV_PROJECTIONS]


def mixer_of(module: str) -> str:
    """``....mixer.q_proj`` -> ``....mixer.``"""
    return module.rpartition(".")[0] + "."


def expert(number: int) -> str:
    """The prefix of a routed expert, relative to its mixer."""
    return f"{_EXPERTS}{number}."


def is_mtp(module: str) -> bool:
    """Whether a module belongs to multi-token prediction."""
    return module.startswith(_MTP)


def in_transformers(module: str) -> str:
    """``backbone.layers.3...`` -> ``model.layers.3...``, as transformers and vLLM call it."""
    return _TRANSFORMERS + module.removeprefix(_MAIN) if module.startswith(_MAIN) else module


def is_expert(module: str) -> bool:
    """Whether a module is a routed expert's."""
    return _EXPERT.fullmatch(module) is not None


def stack(projection: str) -> str:
    """``up_proj`` -> ``experts.up_proj``, all experts of a mixer as one."""
    return f"{_EXPERTS}{projection}"


def is_stack(module: str) -> bool:
    """Whether a module's name relative to its mixer is that of a stack."""
    return module.startswith(_EXPERTS)


def member(module: str, number: int) -> str:
    """``experts.up_proj`` -> ``experts.7.up_proj``; a module that is no stack stands for itself."""
    return expert(number) + module.removeprefix(_EXPERTS) if is_stack(module) else module


def stack_of(module: str) -> str:
    """``....experts.7.up_proj`` -> ``....experts.up_proj``; a module that is no expert's is unchanged."""
    found = _EXPERT.fullmatch(module)
    return f"{found[1]}.{found[3]}" if found is not None else module


def experts_of(module: str) -> str:
    """``....experts.7.up_proj`` -> ``....experts``, the module of all experts of a layer."""
    found = _EXPERT.fullmatch(module)
    assert found is not None, f"{module} is no expert's"
    return found[1]


def expert_number(module: str, projection: str) -> int | None:
    """``....experts.7.up_proj`` -> 7; None if it is not that projection of a routed expert."""
    found = _EXPERT.fullmatch(module)
    return int(found[2]) if found is not None and found[3] == projection else None
