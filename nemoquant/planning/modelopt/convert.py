"""A recipe of Model Optimizer as one of ours, for one model: what it means there decides.

Theirs is a list of patterns over quantizers, of which the last wins; ours gives formats to roles and layers.
So it is applied to the quantizers of the model, and what each GEMM has in the end becomes rules. What ours
can't say is refused, all of it in one line; what is done in another way than there is told.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from nemoquant.errors import RecipeError, listing
from nemoquant.formats import CACHE_FORMATS, FORMATS, SOLVED, CacheName
from nemoquant.model import names
from nemoquant.model.config import NemotronHConfig
from nemoquant.model.roles import LINEAR_ROLES, ROLES, TensorSpec
from nemoquant.planning.modelopt.algorithm import TRIES_TWO, Algorithm
from nemoquant.planning.modelopt.entries import Theirs
from nemoquant.planning.modelopt.numerics import number, words
from nemoquant.planning.modelopt.problems import Problems
from nemoquant.planning.modelopt.quantizers import Applied, Quantizer, State
from nemoquant.planning.modelopt.told import Told, Treatment
from nemoquant.planning.recipe import Recipe, parse_recipe
from nemoquant.planning.resolve import why_kept
from nemoquant.words import plain

CACHE_PATTERN = "*[kv]_bmm_quantizer"


class Fitted(NamedTuple):
    """A recipe for a model, and what is told with it: what it means otherwise here, a sentence each."""

    recipe: Recipe
    notes: tuple[str, ...]


def convert(theirs: Theirs, config: NemotronHConfig, table: list[TensorSpec]) -> Fitted:
    """The recipe of ours that means the same for a model with this tensor table.

    Raises:
        RecipeError: the message lists what can't be done, and what to do.
    """
    algorithm, told = Algorithm(theirs), Told()
    problems = Problems(algorithm)
    applied = Applied(theirs, config, table)
    by_name = {q.name: q for q in applied.quantizers}
    treatments: dict[tuple[str, int | None], Treatment] = {}
    for q in applied.quantizers:
        _check_experts(q, problems)
        if q.side == "weight":
            beside = by_name.get(q.name.removesuffix(q.suffix) + "input_quantizer")
            other = State(enabled=False) if beside is None else beside.state
            found = _treatment(q, other, algorithm, told)
            if isinstance(found, str):
                leaf = names.stack_of(q.modules[0]).rpartition(".")[2]
                problems.add(q.state, q.modules[0], found, f"*{leaf}*")
            elif found is not None:
                treatments[q.role, q.layer] = found
        elif q.side == "output" and q.state.enabled:
            what = f"{words(q.state.cfg)} outputs, which no engine reads"
            problems.add(q.state, q.modules[0], what, f"*{q.suffix}")
    cache = _cache([q for q in applied.quantizers if q.side == "cache"], problems, told)
    error = problems.error(theirs)
    if error is not None:
        raise error
    if not treatments and cache is None:
        raise RecipeError(
            f"recipe {theirs.name} quantizes nothing in this model: "
            + (f"{listing(applied.idle)} match none of its quantizers, " if applied.idle else "")
            + "what others switch on is switched off by later ones, which win; expected patterns over names "
            f"such as {applied.quantizers[-1].name}; is it for another model?"
        )
    recipe = _recipe(theirs, treatments, cache, algorithm, table)
    notes = told.notes(applied, algorithm, treatments, config)
    return Fitted(recipe, tuple(f"{theirs.title}: {note}" for note in notes))


def _check_experts(q: Quantizer, problems: Problems) -> None:
    """All experts of a projection have one state, as engines run them as one."""
    for member, state in q.others.items():
        if (state.enabled, state.cfg if state.enabled else None) != (
            q.state.enabled,
            q.state.cfg if q.state.enabled else None,
        ):
            what = "another format for some routed experts of a layer, which engines run as one"
            problems.add(state, q.modules[member], what, state.said or "*")


def _treatment(q: Quantizer, other: State, algorithm: Algorithm, told: Told) -> Treatment | str | None:
    """What a weight gets, whose quantizer is ``q`` and whose input has the state ``other``.

    None where it stays; a text where it can't be done, which says what is asked for and why not.
    """
    if not q.state.enabled:
        told.inputs_alone += other.enabled
        return None
    what, weights = words(q.state.cfg), number(q.state.cfg)
    if q.role not in LINEAR_ROLES:
        return f"{what} weights of the role {q.role}, which stays as it is: {why_kept(q.role)}"
    if q.tied:
        return f"{what} weights of a head that is tied to the embedding"
    if weights is None:
        return f"{what} weights, a format that is not written here"
    if weights.constant:
        return f"{what} weights with a constant scale"
    method, form = algorithm.method(weights), FORMATS[weights.format]
    if method is None:
        return f"four_over_six by another algorithm than {TRIES_TWO}"
    if not other.enabled:
        if not form.weights_only:
            return f"{what} weights whose inputs are not quantized"
        return Treatment(weights.format, method, activations=False)
    inputs = number(other.cfg)
    if inputs is None or inputs.format != weights.format or inputs.static or inputs.four_over_six:
        return f"{words(other.cfg)} inputs of {what} weights (expected inputs of the same format)"
    told.constant_inputs += inputs.constant
    return Treatment(weights.format, method, activations=True)


def _cache(caches: Sequence[Quantizer], problems: Problems, told: Told) -> CacheName | None:
    """The format of the KV cache; None where it stays as the source has it."""
    on = [q for q in caches if q.state.enabled]
    found: set[CacheName] = set()
    for q in on:
        held = number(q.state.cfg)
        name = next((n for n, cache in CACHE_FORMATS.items() if held and held.format == cache.number), None)
        if name is None:
            problems.add(q.state, q.modules[0], f"a KV cache of {words(q.state.cfg)}", CACHE_PATTERN)
        else:
            found.add(name)
            told.constant_cache |= held is not None and held.constant
    if on and len(on) < len(caches):
        off = next(q for q in caches if not q.state.enabled)
        what = "a KV cache of which some layers, or K or V alone, are quantized"
        problems.add(off.state, off.modules[0], what, CACHE_PATTERN)
    return next(iter(found), None)


def _recipe(
    theirs: Theirs,
    treatments: Mapping[tuple[str, int | None], Treatment],
    cache: CacheName | None,
    algorithm: Algorithm,
    table: Iterable[TensorSpec],
) -> Recipe:
    """Rules for roles; with layers where a role has not the same in all of its layers."""
    layers: dict[str, list[int | None]] = defaultdict(list)
    for spec in table:
        if spec.role in LINEAR_ROLES and spec.layer not in layers[spec.role][-1:]:
            layers[spec.role].append(spec.layer)
    roles: dict[tuple[Treatment, tuple[int, ...] | None], list[str]] = defaultdict(list)
    for role in LINEAR_ROLES:
        by_treatment: dict[Treatment, list[int | None]] = defaultdict(list)
        for layer in layers.get(role, ()):
            if (role, layer) in treatments:
                by_treatment[treatments[role, layer]].append(layer)
        for treatment, having in by_treatment.items():
            whole = having == layers[role]
            roles[treatment, None if whole else tuple(i for i in having if i is not None)].append(role)
    rules = [_rule(treatment, where, having) for (treatment, where), having in roles.items()]
    data: dict[str, object] = {
        "name": theirs.title,
        "summary": _summary(theirs),
        "rules": [*rules, {"roles": ["*"], "format": "source"}],
    }
    if cache is not None:
        data["kv_cache"] = cache
    if algorithm.descent is not None and any(t.scales in SOLVED for t in treatments.values()):
        data["solve"] = {"descent": algorithm.descent}
    return parse_recipe(data, theirs.name)


def _rule(treatment: Treatment, layers: tuple[int, ...] | None, roles: list[str]) -> dict[str, object]:
    rule: dict[str, object] = {"roles": _shortened(roles)}
    if layers is not None:
        rule["layers"] = list(layers)
    rule["format"] = treatment.format
    if treatment.scales != "max":
        rule["scales"] = treatment.scales
    if not treatment.activations:
        rule["activations"] = "none"
    return rule


def _shortened(roles: Sequence[str]) -> list[str]:
    """``experts.*`` for all roles that begin so."""
    short: list[str] = []
    for role in roles:
        begin = role.partition(".")[0] + "."
        same = [known for known in ROLES if known.startswith(begin)]
        text = f"{begin}*" if len(same) > 1 and set(same) <= set(roles) else role
        if text not in short:
            short.append(text)
    return short


def _summary(theirs: Theirs) -> str:
    """Its description; text from elsewhere, which goes into the card."""
    text = plain(" ".join(theirs.description.split()), 1800).rstrip(".")
    return f"{text or 'No description'} (from a recipe of Model Optimizer)."
