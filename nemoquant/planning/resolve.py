"""Resolve a recipe against a tensor table, the only place that matches names; later stages read the rows.

The checks in order; each is an error that lists what is wrong:

1. a role in the recipe that the family does not have (a role that this config lacks is fine: it matches
   nothing)
2. a name pattern, or a layer of a rule, that matches nothing; a rule that matches only tensors that earlier
   rules take
3. a tensor that no rule covers
4. a tensor that must not be quantized, and one that must be bf16 and is not
5. an input dimension that the format's block does not divide
6. tensors that consumers fuse, with different formats
7. a recipe that quantizes nothing in this model

Rules that a recipe has from what it ``extends`` may be left with nothing to do: they are dropped, and the
plan's recipe lacks them.
"""

import re
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import translate
from functools import cached_property
from typing import Literal

from nemoquant.errors import RecipeError, brief, listing
from nemoquant.formats import FORMATS, Format, FormatName, Method
from nemoquant.model import names
from nemoquant.model.config import NemotronHConfig
from nemoquant.model.nested import TOWER
from nemoquant.model.roles import LINEAR_ROLES, ROLES, TensorSpec
from nemoquant.planning.layers import layers_of
from nemoquant.planning.plan import Plan
from nemoquant.planning.recipe import Recipe, Rule, has_wildcard
from nemoquant.planning.row import Row

MTP = "mtp."  # begins the roles of multi-token prediction
MOST_COMPARED = 1 << 23  # names with patterns, a microsecond each; those that begin as a pattern does
_REASONS = {
    "ssm.": "the recurrence multiplies their error over the whole sequence, and engines widen them to fp32",
    "router": "a rounded router sends tokens to other experts, and engines compute it in fp32",
    "norm": "norms are a few kilobytes, and no engine reads a quantized one",
    "conv1d": "the convolution is depthwise, not a GEMM, and engines always exclude it",
    "embedding": "no engine loads a quantized one of this family (vLLM 0.33 has none in the ModelOpt layout, "
    "SGLang 0.5.23 has NVFP4 ones but its Nemotron-H does not ask for them, TensorRT-LLM's is a plain table, "
    "llama.cpp refuses the scale that its converter writes beside one)",
    "mtp.": "engines load multi-token-prediction modules unquantized",
}


def resolve(
    recipe: Recipe,
    config: NemotronHConfig,
    table: list[TensorSpec],
    *,
    assumed: bool,
    scale_groups: bool = True,
) -> Plan:
    """The plan for ``table`` (with the dtypes of the source, or assumed from a bare config).

    Raises:
        RecipeError: the recipe does not fit; the message lists what does not.
    """
    own = [spec for spec in table if spec.role != TOWER]
    recipe, claims = _claim(recipe, _Index(config, own))
    given = [_Given.of(number, rule, scale_groups) for number, rule in enumerate(recipe.rules, 1)]
    rows = [given[number - 1].row(spec) for spec, number in zip(own, claims, strict=True)]
    _check_allowed(rows)
    _check_kept(rows, [given[number - 1].kept_dtype for number in claims])
    _check_divisible(rows)
    _check_fused(rows)
    rows += [_tower(spec) for spec in table if spec.role == TOWER]
    plan = Plan(recipe, config, tuple(rows), assumed=assumed, scale_groups=scale_groups)
    if not plan.quantized and not plan.kv_layers:
        why = ", which has none of the roles that it gives a format"
        raise RecipeError(
            f"recipe {recipe.name} quantizes nothing in this model"
            f"{why if any(rule.number for rule in recipe.rules) else ': all of its rules keep the source'}; "
            f"expected at least one tensor or the KV cache, choose another recipe"
        )
    return plan


def _matching(glob: str, names: Sequence[str]) -> list[str]:
    """The names that a pattern matches."""
    if not has_wildcard(glob):
        return [glob] if glob in names else []
    match = re.compile(translate(glob)).match
    return [name for name in names if match(name)]


class _Index:
    """A tensor table by what rules ask for: places of tensors by name or module, and by role and layer."""

    def __init__(self, config: NemotronHConfig, table: list[TensorSpec]) -> None:
        self.table = table
        self.schedules = {"": len(config.layers), MTP: config.mtp_modules * len(config.mtp_layers)}
        self.named: dict[str, list[int]] = defaultdict(list)
        self.placed: dict[tuple[str, int | None], list[int]] = defaultdict(list)
        for i, spec in enumerate(table):
            for name in {spec.name, spec.module}:
                self.named[name].append(i)
            self.placed[spec.role, spec.layer].append(i)
        self.compared = 0

    @cached_property
    def sorted_names(self) -> list[str]:
        return sorted(self.named)

    def of_roles(self, rule: Rule, where: str) -> list[int]:
        """The places of the tensors that have a rule's roles, in its layers.

        Raises:
            RecipeError: one of its layers has none; ``where`` begins the message.
        """
        wanted = _roles(rule)
        having = [key for key in self.placed if key[0] in wanted]
        if rule.layers is not None:
            having = self._in_layers(rule.layers, having, f"{where}: layers", listing(rule.roles))
        return [i for key in having for i in self.placed[key]]

    def _in_layers(
        self, entries: Sequence[int | str], keys: list[tuple[str, int | None]], where: str, roles: str
    ) -> list[tuple[str, int | None]]:
        """The keys of ``placed`` whose layers ``entries`` mean, in the main model and in MTP modules."""
        found: list[tuple[str, int | None]] = []
        missing = dict.fromkeys(entries)
        for prefix, schedule in self.schedules.items():
            here = [key for key in keys if key[0].startswith(MTP) == bool(prefix)]
            having = sorted({layer for _, layer in here if layer is not None})
            layers: set[int] = set()
            for entry in dict.fromkeys(entries):
                meant = layers_of(entry, schedule, having)
                layers.update(meant)
                if meant:
                    missing.pop(entry, None)
            found += [key for key in here if key[1] in layers]
        if missing:
            plain = all(isinstance(entry, int) and entry >= 0 for entry in missing)
            raise RecipeError(
                f"{where} {listing(list(map(str, missing)))} "
                + (
                    f"have no tensor of the roles {roles}; "
                    if plain
                    else f"mean no layers, of the model's {self.schedules['']}, that have the roles {roles}; "
                )
                + "expected layers that have them, is the recipe for another model?"
            )
        return found

    def of_names(self, glob: str, where: str) -> list[int]:
        """The places of the tensors whose name, or whose module's, a pattern matches.

        Raises:
            RecipeError: there are none, or it would take too long; ``where`` begins the message.
        """
        found = [glob] if glob in self.named else []
        if has_wildcard(glob):  # compared with the names that begin as it does
            begin = re.split(r"[*?[]", glob, maxsplit=1)[0]
            first = bisect_left(self.sorted_names, begin)
            after = bisect_right(self.sorted_names, begin, first, key=lambda name: name[: len(begin)])
            self.compared += after - first
            if self.compared > MOST_COMPARED:
                raise RecipeError(
                    f"{where}: the name patterns up to {brief(glob)} would be compared with "
                    f"{self.compared:,} names; expected at most {MOST_COMPARED:,}, begin them as the names "
                    f"begin, or use `roles` and `layers`"
                )
            found = _matching(glob, self.sorted_names[first:after])
        if not found:
            raise RecipeError(
                f"{where}: the name pattern {brief(glob)} matches none of the {len(self.table):,} tensors; "
                f"names look like {self.table[min(len(self.table) - 1, 2)].name!r}"
            )
        return [i for name in found for i in self.named[name]]


def _claim(recipe: Recipe, index: _Index) -> tuple[Recipe, list[int]]:
    """For each tensor the number (from 1) of the first rule that matches it, in the recipe returned.

    That is ``recipe`` without those of its inherited rules that have nothing left to do.
    """
    for rule in recipe.rules:
        unknown = [g for g in rule.roles if not _matching(g, ROLES)]
        if unknown:
            raise RecipeError(
                f"recipe {recipe.name}: no role matches {listing(unknown)}; roles are {listing(ROLES, 99)}"
            )
    claims: list[int | None] = [None] * len(index.table)
    idle: list[int] = []
    taken_roles: set[str] = set()  # roles that earlier rules take in all layers
    for number, rule in enumerate(recipe.rules, 1):
        inherited = number > recipe.own
        where = f"recipe {recipe.name}: rule {number}{', of what it extends' if inherited else ''}"
        if rule.names:
            matched = sorted({i for glob in rule.names for i in index.of_names(glob, where)})
        else:
            matched = index.of_roles(rule, where)
        unclaimed = [i for i in matched if claims[i] is None]
        roles = _roles(rule)
        # A rule for whole roles may have nothing to take in this model, if it would have in another.
        dead = roles <= taken_roles if rule.roles and rule.layers is None else not unclaimed
        if dead and not inherited:
            raise RecipeError(
                f"{where} ({rule}) does nothing: earlier rules take all "
                f"{len(matched)} tensors that it "
                "matches; the first match wins, move it up or remove it"
            )
        if dead:
            idle.append(number)
        if rule.layers is None:
            taken_roles |= roles
        for i in unclaimed:
            claims[i] = number
    uncovered = [spec.name for spec, claim in zip(index.table, claims, strict=True) if claim is None]
    if uncovered:
        raise RecipeError(
            f"recipe {recipe.name}: no rule covers {len(uncovered)} tensors: {listing(uncovered)}; end the "
            f"rules with "
            '`- roles: ["*"]` and `format: source`'
        )
    kept = [number for number in range(1, len(recipe.rules) + 1) if number not in idle]
    place = {number: i for i, number in enumerate(kept, 1)}
    return recipe.without(idle), [place[number] for number in claims if number is not None]


def _roles(rule: Rule) -> set[str]:
    return {role for glob in rule.roles for role in _matching(glob, ROLES)}


@dataclass(frozen=True)
class _Given:
    """What a rule gives to each of its tensors: found once for a rule, which may have tens of thousands."""

    form: Format | None
    stored: Literal["source", FormatName]
    method: Method | None
    activation_format: FormatName | None
    kept_dtype: str | None
    shares_weight: bool
    shares_input: bool
    reason: str

    @classmethod
    def of(cls, number: int, rule: Rule, scale_groups: bool) -> "_Given":
        form, activation_format = rule.number, rule.activation_format
        calibrated = form is not None and form.calibrated and activation_format is not None
        return cls(
            form=form,
            stored=rule.stored,
            method=None if form is None else rule.scales,
            activation_format=activation_format,
            kept_dtype=rule.kept_dtype,
            shares_weight=scale_groups and form is not None and form.global_scale,
            shares_input=scale_groups and calibrated,
            reason=f"rule {number}: {rule}",
        )

    def row(self, spec: TensorSpec) -> Row:
        return Row(
            name=spec.name,
            role=spec.role,
            layer=spec.layer,
            expert=spec.expert,
            shape=spec.shape,
            source_dtype=spec.dtype,
            format=self.stored,
            scale_method=self.method,
            activation_format=self.activation_format,
            weight_group=_weight_group(spec) if self.shares_weight else None,
            input_group=_input_group(spec) if self.shares_input else None,
            reason=self.reason,
        )


def _tower(spec: TensorSpec) -> Row:
    """A tensor beside the language model: recipes are about the language model alone."""
    return Row(
        name=spec.name,
        role=spec.role,
        layer=None,
        expert=None,
        shape=spec.shape,
        source_dtype=spec.dtype,
        format="source",
        scale_method=None,
        activation_format=None,
        weight_group=None,
        input_group=None,
        reason="beside the language model: copied as it is",
    )


def _weight_group(spec: TensorSpec) -> str | None:
    """Engines load q, k and v as one GEMM with one scale."""
    if spec.role in ("attention.q_proj", "attention.k_proj", "attention.v_proj"):
        return names.mixer_of(spec.module) + "qkv_proj"
    return None


def _input_group(spec: TensorSpec) -> str | None:
    """q, k and v read one tensor; all experts of a layer and projection run as one grouped GEMM."""
    if spec.expert is not None:
        return names.stack_of(spec.module)
    return _weight_group(spec)


def why_kept(role: str) -> str:
    """Why a role that is no GEMM's stays as the source has it."""
    return next(text for prefix, text in _REASONS.items() if role.startswith(prefix))


def _check_allowed(rows: list[Row]) -> None:
    for row in rows:
        if row.format != "source" and row.role not in LINEAR_ROLES:
            raise RecipeError(
                f"{row.name} (role {row.role}) can't be given the format {row.format}: {why_kept(row.role)}; "
                f"give it `format: source` ({row.reason})"
            )


def _check_kept(rows: list[Row], dtypes: list[str | None]) -> None:
    """What a recipe says is bf16, and not just as the source has it, is bf16 there."""
    wrong = [
        f"{row.name} is {row.source_dtype} ({row.reason})"
        for row, dtype in zip(rows, dtypes, strict=True)
        if dtype not in (None, row.source_dtype)
    ]
    if wrong:
        raise RecipeError(
            f"{len(wrong)} tensors that the recipe gives `format: bf16` are not bf16 in the source: "
            f"{listing(wrong)}; nothing is converted, give them `format: source`"
        )


def _check_divisible(rows: list[Row]) -> None:
    problems = []
    for row in rows:
        if row.number is not None:
            problem = row.number.indivisible(row.shape)
            if problem:
                problems.append(f"{row.name}: {problem}")
    if problems:
        fitting = " or ".join([name for name, number in FORMATS.items() if number.block is None] + ["source"])
        raise RecipeError(
            f"{len(problems)} tensors don't fit their format: {listing(problems, 3)}; give them {fitting}"
        )


def _check_fused(rows: list[Row]) -> None:
    """q, k, v of a layer, and all experts of a layer, are one kernel in every engine: one format each."""
    fused: Mapping[str, dict[str, str]] = defaultdict(dict)
    for row in rows:
        group = _fused_operation(row)
        if group:
            fused[group].setdefault(_fused_format(row), row.name)
    for group, formats in fused.items():
        if len(formats) > 1:
            got = ", ".join(f"{name} {form}" for form, name in formats.items())
            raise RecipeError(
                f"{group} run as one fused operation in vLLM, SGLang and TensorRT-LLM, but got {got}; "
                f"expected one format"
            )


def _fused_format(row: Row) -> str:
    """The part of a row's format that must be the same in all rows of a fused operation.

    The scale method belongs to it where the weights share their scale.
    """
    words: list[str] = [row.format]
    if row.number is not None and row.activation_format is None:
        words.append("weights only")
    if row.number is not None and len(row.number.methods) > 1 and row.expert is None:
        words.append(f"with {row.scale_method} scales")
    return " ".join(words)


def _fused_operation(row: Row) -> str | None:
    """The operation that a row's weight is part of in every engine, in words; None if it is not fused."""
    if row.role.startswith("mtp."):
        return None
    if row.expert is not None:
        return f"all experts of layer {row.layer}"
    if row.role in ("attention.q_proj", "attention.k_proj", "attention.v_proj"):
        return f"q, k and v of layer {row.layer}"
    return None
