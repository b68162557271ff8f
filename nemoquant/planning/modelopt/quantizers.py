"""The quantizers that Model Optimizer puts into a model of this family, and what a recipe makes of them.

Their names are those of transformers' modules (5 and later), where the routed experts of a layer are one:

    model.layers.0.mixer.in_proj.weight_quantizer, .input_quantizer, .output_quantizer; so each Linear
    model.layers.0.mixer.conv1d.weight_quantizer, .input_quantizer, .output_quantizer
    model.layers.1.mixer.q_bmm_quantizer, k_bmm_quantizer, v_bmm_quantizer, p_bmm_quantizer
    model.layers.2.mixer.experts.up_proj_weight_quantizers.7, of which a pattern may leave out ``s.7``
    model.layers.2.mixer.experts.up_proj_input_quantizer, of all experts of the projection
    model.embeddings.weight_quantizer, .output_quantizer
    lm_head.weight_quantizer, .input_quantizer, .output_quantizer

The code that comes with a checkpoint has the published names (``backbone.``) and each expert as a Linear of
its own: a pattern that matches nothing in transformers is taken by these, and told. Routers have no
quantizers, and multi-token prediction is not loaded there.

``quant_cfg`` is applied entry by entry, so that the last one wins: one with ``cfg`` replaces all attributes,
one without only switches. What no entry touches is INT8 and on, as Model Optimizer begins.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import translate
from string import digits
from typing import Literal

from nemoquant.errors import RecipeError, brief
from nemoquant.model import names
from nemoquant.model.config import NemotronHConfig
from nemoquant.model.kinds import has_cache
from nemoquant.model.roles import LINEAR_ROLES, TensorSpec
from nemoquant.planning.modelopt.entries import Attributes, Entry, Theirs

MOST_COMPARED = 1 << 22  # names with patterns, half a microsecond each
MOST_PATTERN = 400  # characters
Side = Literal["weight", "input", "output", "cache", "attention"]
ATTENTION, EXPERTS = "NemotronHAttention", "hf.NemotronHExperts"  # classes by their names there
CACHED = ("k", "v")
# The class of the module of each role that gets quantizers.
PARENTS: Mapping[str, str] = dict.fromkeys(LINEAR_ROLES, "nn.Linear") | {
    "conv1d": "nn.Conv1d",
    "embedding": "nn.Embedding",
}
_DEFAULT: tuple[Attributes, ...] = ({"num_bits": 8},)


@dataclass(frozen=True)
class State:
    """What a quantizer is at a moment: on or off, its attributes, and the pattern that said so last."""

    enabled: bool
    cfg: tuple[Attributes, ...] = _DEFAULT
    said: str | None = None

    def after(self, entry: Entry) -> "State":
        return State(entry.enable, self.cfg if entry.cfg is None else entry.cfg, entry.pattern)


@dataclass
class Quantizer:
    """One quantizer, or those of all experts of a projection in a layer.

    Attributes:
        suffix: its own name in its module, such as ``weight_quantizer``.
        modules: published names of the modules that it belongs to: one, or each expert's.
        role, layer: of its weight; of a cache the role of the projection that fills it.
        name: in transformers; of experts' weights, what stands for all of them.
        parent: the class of the module that it belongs to; None for a list of quantizers.
        tied: its weight is another module's too.
        others: states of single experts that were given another than ``state``.
    """

    side: Side
    suffix: str
    modules: tuple[str, ...]
    role: str
    layer: int | None
    name: str
    parent: str | None
    state: State
    tied: bool = False
    others: dict[int, State] = field(default_factory=dict)

    @property
    def separate(self) -> bool:
        """Whether each expert has one of its own, in transformers."""
        return len(self.modules) > 1 and self.side == "weight"

    def members(self) -> Iterator[str]:
        """The name in transformers of each expert's."""
        return (f"{self.name}s.{number}" for number in range(len(self.modules)))

    def published(self) -> Iterator[str]:
        """The name of each where the checkpoint's own code is used."""
        return (f"{module}.{self.suffix}" for module in self.modules)

    def apply(self, entry: Entry, which: Sequence[int]) -> None:
        """Take what an entry says, for these of the modules."""
        if len(which) == len(self.modules):
            self.state = self.state.after(entry)
            self.others = {number: state.after(entry) for number, state in self.others.items()}
        else:
            for number in which:
                self.others[number] = self.others.get(number, self.state).after(entry)


def quantizers(config: NemotronHConfig, table: list[TensorSpec]) -> list[Quantizer]:
    """All quantizers of a model, in the order of its tensors; on and off as Model Optimizer begins."""
    groups: dict[str, list[TensorSpec]] = defaultdict(list)
    for spec in table:
        if spec.role in PARENTS and spec.name.endswith(".weight"):
            groups[names.stack_of(spec.module)].append(spec)
    found = [made for stack, specs in groups.items() for made in _of_module(stack, specs)]
    for layer, kind in enumerate(config.layers):
        if has_cache(config, kind):
            found += _of_attention(layer)
    if config.tie_word_embeddings:  # transformers has both modules, and one weight
        head = TensorSpec(f"{names.HEAD}.weight", "lm_head", ())
        found += [replace(made, tied=True) for made in _of_module(names.HEAD, [head])]
    return found


def _of_module(stack: str, specs: list[TensorSpec]) -> Iterator[Quantizer]:
    """Those of a Linear, a convolution or an embedding; or of all experts of a projection."""
    first = specs[0]
    expert = first.expert is not None
    begin = names.in_transformers(stack) + ("_" if expert else ".")
    parent = PARENTS[first.role]
    modules = tuple(spec.module for spec in specs)

    def quantizer(side: Side, owner: str | None, *, enabled: bool = True) -> Quantizer:
        suffix = f"{side}_quantizer"
        return Quantizer(
            side=side,
            suffix=suffix,
            modules=modules,
            role=first.role,
            layer=first.layer,
            name=begin + suffix,
            parent=owner,
            state=State(enabled=enabled),
        )

    yield quantizer("weight", None if expert else parent)
    if parent != PARENTS["embedding"]:  # its input are numbers of tokens, and never quantized
        yield quantizer("input", EXPERTS if expert else parent)
    if not expert:
        yield quantizer("output", parent, enabled=False)


def _of_attention(layer: int) -> Iterator[Quantizer]:
    """Those of the queries, keys, values and probabilities of an attention layer."""
    mixer = names.mixer_of(names.kv_projections(layer)[0]).removesuffix(".")
    for letter in ("q", "k", "v", "p"):
        suffix = f"{letter}_bmm_quantizer"
        yield Quantizer(
            side="cache" if letter in CACHED else "attention",
            suffix=suffix,
            modules=(mixer,),
            role="attention",
            layer=layer,
            name=f"{names.in_transformers(mixer)}.{suffix}",
            parent=ATTENTION,
            state=State(enabled=True),
        )


class Applied:
    """A model's quantizers after a recipe, and which of its patterns did what.

    Attributes:
        quantizers: with their last states.
        idle: patterns that switch something on, and match nothing.
        published: patterns that match by the names of the checkpoint's own code alone.
        partial: patterns that by those names would match routed experts, which they don't in transformers.
    """

    def __init__(self, theirs: Theirs, config: NemotronHConfig, table: list[TensorSpec]) -> None:
        """Raises:
        RecipeError: its patterns are too long, or too many for the model.
        """
        self.quantizers = quantizers(config, table)
        self.idle: list[str] = []
        self.published: list[str] = []
        self.partial: list[str] = []
        self._compared = 0
        for entry in theirs.entries:
            if len(entry.pattern) > MOST_PATTERN:
                raise RecipeError(
                    f"recipe {theirs.name}: the pattern {brief(entry.pattern)} has "
                    f"{len(entry.pattern):,} characters; expected at most {MOST_PATTERN}"
                )
            self._apply(entry)
            if self._compared > MOST_COMPARED:
                raise RecipeError(
                    f"recipe {theirs.name}: its patterns up to {brief(entry.pattern)} were compared with "
                    f"more than {MOST_COMPARED:,} names; expected fewer entries for a model of this size"
                )

    def _apply(self, entry: Entry) -> None:
        pattern = Pattern(entry.pattern)
        fitting = [q for q in self.quantizers if entry.parent in (None, q.parent)]
        chosen = [self._here(q, pattern) for q in fitting]
        if any(chosen):
            taken = {q.name for q, which in zip(fitting, chosen, strict=True) if which}
            wide = (q for q in self.quantizers if len(q.modules) > 1 and q.name not in taken)
            fitting_there = (q for q in wide if entry.parent in (None, PARENTS[q.role]))
            if any(pattern.matches(next(q.published())) for q in fitting_there):
                self.partial.append(entry.pattern)
        else:
            chosen = [self._there(q, pattern) for q in fitting]
            if any(chosen):
                self.published.append(entry.pattern)
            elif entry.enable:
                self.idle.append(entry.pattern + (f" of {entry.parent}" if entry.parent else ""))
        for q, which in zip(fitting, chosen, strict=True):
            if which:
                q.apply(entry, which)

    def _here(self, q: Quantizer, pattern: "Pattern") -> Sequence[int]:
        """Of which of its modules a quantizer matches by transformers' names."""
        self._compared += 1
        if pattern.matches(q.name):
            return range(len(q.modules))
        # Members' names go on with a letter and a number.
        if not q.separate or not all(piece.rstrip(digits) in f"{q.name}s." for piece in pattern.pieces):
            return ()
        self._compared += len(q.modules)
        return [number for number, name in enumerate(q.members()) if pattern.matches(name)]

    def _there(self, q: Quantizer, pattern: "Pattern") -> Sequence[int]:
        """The same by published names, in which an expert's number stands in the middle."""
        self._compared += 1
        if not all(
            part in next(q.published()) for piece in pattern.pieces for part in re.split(r"\d+", piece)
        ):
            return ()
        self._compared += len(q.modules)
        return [number for number, name in enumerate(q.published()) if pattern.matches(name)]


class Pattern:
    """A pattern with wildcards, as ``fnmatch`` has them.

    Attributes:
        pieces: text between wildcards, which a name must have in order to match: looking for it spares most
            comparisons with the names of thousands of experts.
    """

    def __init__(self, text: str) -> None:
        self._match = re.compile(translate(text)).match
        self.pieces = [piece for piece in re.split(r"\*|\?|\[!?\]?[^\]]*\]", text) if piece]

    def matches(self, name: str) -> bool:
        return self._match(name) is not None
