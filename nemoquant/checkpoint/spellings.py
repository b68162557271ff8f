"""Names of tensors as other tools write them, translated to the published ones: here and nowhere else.

    model.layers.3.mixer...                  any text may stand before ``layers.N.mixer.``: ``model.`` of
    language_model.backbone.layers.3...      transformers 5, wrappers such as ``base_model.model.`` or
    layers.3...                              ``module.``, or nothing, for the model without its head
    ...layers.3._fsdp_wrapped_module.mixer   wrappers of torch, anywhere: see ``_WRAPPERS``
    backbone.embedding.weight                transformers 5, for ``backbone.embeddings.weight``
    ....mixer.experts.up_proj [E, out, in]   transformers 5: E experts, each a view of its bytes
    ....mixer.switch_mlp.fc1.weight          mlx-lm: the same; ``fc2`` is the down projection
    ....mixer.conv1d.weight [C, K, 1]        mlx-lm; or without the dimension of 1: the same values in order

What is no weight and what engines make themselves is left out: ``rotary_emb.inv_freq``, ``_extra_state``.
Towers beside a language model keep their names, and all that they have.
"""

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace

from nemoquant.checkpoint.header import TensorInfo
from nemoquant.errors import CheckpointError, HeaderError, brief, listing
from nemoquant.model.names import BEGINNINGS
from nemoquant.model.parse import MOST_EXPERTS

STACKS = {"experts.up_proj": "up_proj", "experts.down_proj": "down_proj"} | {
    "switch_mlp.fc1": "up_proj",
    "switch_mlp.fc2": "down_proj",
}
STACK = re.compile(rf"(.+\.mixer)\.({'|'.join(map(re.escape, STACKS))})(\.weight)?")
NO_WEIGHT = re.compile(r".+\.(rotary_emb\.inv_freq|_extra_state)")
CONVOLUTION = ".mixer.conv1d.weight"
ADAPTER = re.compile(r"\.(lora_[A-Za-z_]+|base_layer|original_module|modules_to_save)\.")
_WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
_LAYER = re.compile(r"\d+\.mixer\.")
_OF_THE_ROOT = ("layers.", "embeddings.", "embedding.", "norm_f.")
_BESIDE_IT = ("lm_head.", "mtp.")
_ROOT, _MTP = "backbone", "mtp"


def root_of(names: Iterable[str], path: object) -> str:
    """What stands before ``layers.N.mixer.`` in the names of a checkpoint; ``backbone`` where nothing does.

    Raises:
        CheckpointError: two different texts do; ``path`` begins the message.
    """
    roots: dict[str, str] = {}
    for name in names:
        before, _, layer = _unwrapped(name).partition("layers.")
        root = before.removesuffix(".")
        of_mtp = root.rpartition(".")[2] == _MTP
        if root not in roots and before in ("", f"{root}.") and not of_mtp and _LAYER.match(layer):
            roots[root] = name
    if len(roots) > 1:
        raise CheckpointError(
            f"{path}: its layers have names of two kinds ({listing(list(roots.values()))}); expected one "
            f"model, with the same beginning of all"
        )
    return next(iter(roots), _ROOT)


def is_no_weight(name: str, root: str) -> bool:
    """Whether a tensor of the language model holds no weight."""
    beside = root.rpartition(".")[0]  # what begins otherwise is not the language model's
    return NO_WEIGHT.fullmatch(name) is not None and (not beside or name.startswith(f"{beside}."))


def _unwrapped(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "") if wrapper in name else name
    return name


def published(info: TensorInfo, root: str) -> list[tuple[str, TensorInfo]]:
    """The published names of a tensor with their places: one, or one for each expert of a stack.

    Raises:
        HeaderError: a stack has more experts than any model.
    """
    name = _renamed(_unwrapped(info.name), root)
    if not name.startswith(BEGINNINGS):
        return [(info.name, info)]
    stack = STACK.fullmatch(name) if len(info.shape) == 3 else None
    if stack is not None:
        return list(_experts(info, stack[1], STACKS[stack[2]]))
    if name.endswith(CONVOLUTION) and len(info.shape) in (2, 3):
        info = replace(info, shape=_convolution(info.shape))
    return [(name, info)]


def _renamed(name: str, root: str) -> str:
    begin = f"{root}." if root else ""
    if name.startswith(begin) and name.startswith(_OF_THE_ROOT, len(begin)):
        below = name[len(begin) :]
        below = below.replace("embedding.", "embeddings.", 1) if below.startswith("embedding.") else below
        return f"{_ROOT}.{below}"
    while begin:  # what belongs to the model beside its layers may have a part of their beginning
        if name.startswith(begin) and name.startswith(_BESIDE_IT, len(begin)):
            return name[len(begin) :]
        begin = begin[: begin.rfind(".", 0, -1) + 1]
    return name


def _experts(info: TensorInfo, mixer: str, projection: str) -> Iterator[tuple[str, TensorInfo]]:
    count, *shape = info.shape
    if count > MOST_EXPERTS:  # without values, a few bytes could ask for any number of them
        raise HeaderError(
            f"{info.file.name}: tensor {brief(info.name)} has {count:,} experts; expected at most "
            f"{MOST_EXPERTS:,}"
        )
    size = info.nbytes // count if count else 0
    for e in range(count):
        start = info.start + e * size
        yield (
            f"{mixer}.experts.{e}.{projection}.weight",
            replace(info, shape=tuple(shape), start=start, end=start + size),
        )


def _convolution(shape: tuple[int, ...]) -> tuple[int, ...]:
    """[C, 1, K] of a depthwise convolution's weight that has the same values in the same order."""
    channels, *rest = shape
    return (channels, 1, math.prod(rest)) if 1 in rest or len(rest) == 1 else shape
