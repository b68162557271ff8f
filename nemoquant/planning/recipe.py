"""Recipes: which role gets which number format. YAML, read strictly: an unknown key is an error.

name: nvfp4
summary: Routed experts NVFP4, the other GEMMs FP8.
rules:                                  # first match wins; every tensor must be covered
  - roles: [experts.*]
    format: nvfp4                       # fp8, mxfp8 or nvfp4; source; bf16, which is source and must be it
    scales: max                         # max, mse or four_over_six (NVFP4 block scales), or solved with the
                                        # GEMM's inputs: hess (NVFP4) or gptq
    activations: nvfp4                  # the weight's format, or none for weights only (FP8 and NVFP4)
  - roles: [mamba.in_proj]
    layers: [0, 3..9, last]             # only in these layers: see layers.py; each must have the role
    format: fp8
  - names: ["backbone.layers.7.mixer.o_proj"]   # patterns (* ? [..]) over module or tensor names
    format: source
  - roles: ["*"]
    format: source
kv_cache: fp8                           # source or fp8
solve: {damping: 0.1, descent: 1}       # of hess and gptq: how H is damped, sweeps afterwards, and with
                                        # propagate: quantized, for the stream of the layers before; with
                                        # outputs: loss, errors of outputs count by the model's loss
folds: [latent]                         # changes that keep the function: latent, norm, gate, expert
headroom: 2                             # NVFP4 inputs up to so many times the largest that calibration saw

With ``extends: nvfp4`` (a preset, or a file by its path from this one) a recipe says only what differs: its
rules come before those of the other, its other keys take their place.
"""

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, TypeAdapter, ValidationError, model_validator

from nemoquant.arguments import home_expanded
from nemoquant.errors import RecipeError, brief, listing
from nemoquant.formats import (
    CACHE_FORMATS,
    FORMATS,
    SOLVED,
    CacheFormat,
    CacheName,
    Format,
    FormatName,
    Method,
)
from nemoquant.model.parse import MOST_LAYERS
from nemoquant.planning.layers import Layer, in_words
from nemoquant.planning.modelopt.recognise import PREFIX, is_theirs
from nemoquant.planning.solving import (
    DAMPING,
    DESCENT,
    FOLDS,
    MOST_DESCENT,
    MOST_HEADROOM,
    FoldName,
    Outputs,
    Overrides,
    Propagate,
)
from nemoquant.planning.strict_yaml import read_yaml
from nemoquant.shipped import recipe_folder

# Bounds far above any recipe that a person or a search would write.
MOST_RULES = 1024
MOST_PATTERNS = 512  # with wildcards, in all rules: each may be compared with every tensor
MOST_NAMES = 65_536  # in one rule
MOST_PROBLEMS = 8  # in a message
MOST_BASES = 8  # recipes that one extends, one after the other

Made = TypeVar("Made")
Pattern = Annotated[str, Field(min_length=1, max_length=200)]
Kept = Literal["source", "bf16"]  # as the source has it; bf16 says so of a tensor that must be bf16
KEPT_DTYPES: Mapping[str, str] = MappingProxyType({"bf16": "BF16"})
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
Summary = Annotated[str, Field(max_length=2000)]
Folds = Annotated[list[FoldName], Field(max_length=len(FOLDS))]
Headroom = Annotated[float, Field(ge=1, le=MOST_HEADROOM, strict=True)]


class Rule(BaseModel):
    """One line of a recipe: what it matches, and the format that its matches get."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        json_schema_extra={"oneOf": [{"required": ["roles"]}, {"required": ["names"]}]},
    )

    roles: list[Pattern] = Field(default=[], min_length=1, max_length=MOST_PATTERNS)
    names: list[Pattern] = Field(default=[], min_length=1, max_length=MOST_NAMES)
    layers: Annotated[list[Layer], Field(min_length=1, max_length=MOST_LAYERS)] | None = None
    format: Literal[Kept, FormatName]
    scales: Method = "max"
    activations: Literal[FormatName, "none"] | None = None

    @model_validator(mode="after")
    def consistent(self) -> "Rule":
        if bool(self.roles) == bool(self.names):
            raise ValueError("expected either `roles` or `names`")
        if self.layers is not None and not self.roles:
            raise ValueError("`layers` goes with `roles`; a name pattern says its layers itself")
        number = self.number
        if self.scales != "max" and (number is None or number.nearest(self.scales) != self.scales):
            having = " or ".join(
                name for name, known in FORMATS.items() if known.nearest(self.scales) == self.scales
            )
            raise ValueError(f"`scales: {self.scales}` goes with `format: {having}` only")
        if self.activations not in _activations(number):
            allowed = " or ".join(filter(None, _activations(number)))
            raise ValueError(
                f"`activations: {self.activations}` does not go with `format: {self.format}`; expected "
                f"{allowed or 'no `activations`'}"
            )
        return self

    @property
    def number(self) -> Format | None:
        """The number format; None where tensors stay as the source has them."""
        return next((number for name, number in FORMATS.items() if name == self.format), None)

    @property
    def stored(self) -> Literal["source", FormatName]:
        """The format that its matches get in the output."""
        return "source" if self.number is None else self.number.name

    @property
    def kept_dtype(self) -> str | None:
        """The dtype that its matches must have in the source; None for any."""
        return KEPT_DTYPES.get(self.format)

    @property
    def activation_format(self) -> FormatName | None:
        """Format of the GEMM's input; None if it is not quantized."""
        return None if self.number is None or self.activations == "none" else self.number.name

    def __str__(self) -> str:
        where = f"roles {listing(self.roles, 20)}" if self.roles else f"names {listing(self.names, 20)}"
        return where + (f" in {in_words(self.layers)}" if self.layers is not None else "")


def has_wildcard(pattern: str) -> bool:
    """Whether a pattern may match other names than itself."""
    return any(c in pattern for c in "*?[")


def _activations(number: Format | None) -> tuple[str | None, ...]:
    """What ``activations`` may be beside a format; None stands for no such key."""
    if number is None:
        return (None,)
    return (None, number.name, "none") if number.weights_only else (None, number.name)


class Solve(BaseModel):
    """How codes are solved for, by ``scales: hess`` and ``gptq``; see ``solve/``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    damping: float = Field(default=DAMPING, ge=1e-4, le=100, strict=True)
    descent: int = Field(default=DESCENT, ge=0, le=MOST_DESCENT, strict=True)
    propagate: Propagate = "source"
    outputs: Outputs = "equal"


class Recipe(BaseModel):
    """A named list of rules, the KV cache's format, how codes are solved for, folds, headroom of inputs."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Name
    summary: Summary
    rules: list[Rule] = Field(min_length=1, max_length=MOST_RULES)
    kv_cache: Literal["source", CacheName] = "source"
    solve: Solve = Solve()
    folds: Folds = []
    headroom: Headroom = 1
    _inherited: int = PrivateAttr(0)

    @model_validator(mode="after")
    def bounded(self) -> "Recipe":
        count = sum(has_wildcard(glob) for rule in self.rules for glob in (*rule.roles, *rule.names))
        if count > MOST_PATTERNS:
            raise ValueError(
                f"its rules have {count:,} patterns with wildcards; expected at most {MOST_PATTERNS}"
            )
        return self

    @property
    def own(self) -> int:
        """How many of the rules are its own: those after them, of what it extends, may match nothing more."""
        return len(self.rules) - self._inherited

    @property
    def cache(self) -> CacheFormat | None:
        """Format of the KV cache; None where it stays as the source has it."""
        return None if self.kv_cache == "source" else CACHE_FORMATS[self.kv_cache]

    def dump(self) -> dict[str, Any]:
        """The recipe as plain data without defaults; :func:`parse_recipe` reads it again."""
        return self.model_dump(exclude_defaults=True)

    def changed(self, given: Overrides) -> "Recipe":
        """The recipe with what a user asks for instead.

        A format that lacks the method gets the nearest one (``Format.nearest``). ``max``, ``mse`` and
        ``four_over_six`` are functions of the source's weight alone: they drop the folds, unless ``folds`` is
        given. A recipe that changes has the changes in its name.
        """
        new: dict[str, Any] = {}
        if given.method is not None:
            new["rules"] = [_with_method(rule, given.method) for rule in self.rules]
            if given.method not in SOLVED:
                new["folds"] = []
        folds = None if given.folds is None else list(dict.fromkeys(given.folds))
        if folds is not None:
            new["folds"] = folds
        solving = {"descent": given.descent, "propagate": given.propagate, "outputs": given.outputs}
        solving = {key: value for key, value in solving.items() if value is not None}
        if solving:
            new["solve"] = self.solve.model_copy(update=solving)
        if given.headroom is not None:
            new["headroom"] = given.headroom
        changed = self.model_copy(update=new)
        if changed == self:
            return self
        words = [word for word in (given.method, "-".join(folds) if folds else None) if word]
        words += [f"descent{given.descent}"] * (given.descent is not None)
        words += [f"on-{given.propagate}"] * (given.propagate not in (None, self.solve.propagate))
        words += [f"by-{given.outputs}"] * (given.outputs not in (None, self.solve.outputs))
        words += ["unfolded"] * (folds is not None and not folds and bool(self.folds))
        words += [f"headroom{given.headroom:g}"] if given.headroom not in (None, self.headroom) else []
        return changed.model_copy(update={"name": "-".join([self.name, *words])[:100]})

    def without(self, numbers: Collection[int]) -> "Recipe":
        """The recipe without some of its inherited rules, by their numbers from 1."""
        if not numbers:
            return self
        rules = [rule for number, rule in enumerate(self.rules, 1) if number not in numbers]
        changed = self.model_copy(update={"rules": rules})
        changed._inherited = self._inherited - len(numbers)
        return changed


class Extension(BaseModel):
    """A recipe that says only what differs from another: keys that it lacks are the other's."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Name
    extends: str = Field(min_length=1, max_length=1000)
    summary: Summary | None = None
    rules: list[Rule] = Field(default=[], max_length=MOST_RULES)
    kv_cache: Literal["source", CacheName] | None = None
    solve: Solve | None = None
    folds: Folds | None = None
    headroom: Headroom | None = None

    def of(self, base: Recipe) -> Recipe:
        """The whole recipe; raises ValidationError where both together exceed a bound."""
        given = {key: value for key, value in self if value is not None and key not in ("extends", "rules")}
        kept = {key: value for key, value in base if key not in ("name", "summary", "rules")}
        made = Recipe.model_validate(
            {"summary": f"{base.name} with changes."} | kept | given | {"rules": [*self.rules, *base.rules]}
        )
        made._inherited = len(base.rules)
        return made


def _with_method(rule: Rule, method: Method) -> Rule:
    number = rule.number
    return rule if number is None else rule.model_copy(update={"scales": number.nearest(method)})


def presets() -> dict[str, Path]:
    """Shipped recipes by name."""
    return {path.stem: path for path in sorted(recipe_folder().glob("*.yaml"))}


def is_foreign(name_or_path: str) -> bool:
    """Whether a name or file is a recipe of Model Optimizer, and no preset."""
    return name_or_path not in presets() and is_theirs(name_or_path)


def load_recipe(name_or_path: str) -> Recipe:
    """A preset by its name, or a recipe file, with what it extends.

    Raises:
        RecipeError: there is no such preset or file, the file does not follow the schema, or it is one of
            Model Optimizer, which ``planning/choose.py`` takes for a model.
    """
    return _load(presets().get(name_or_path, Path(home_expanded(name_or_path))), name_or_path, ())


def _load(path: Path, name: str, before: tuple[Path, ...]) -> Recipe:
    """A recipe file; ``name`` is what messages call it, ``before`` are those that extend it, in order."""
    if is_theirs(name if name.startswith(PREFIX) else str(path)):
        where = f"recipe {before[-1]} extends {brief(name)}, which" if before else f"recipe {brief(name)}"
        raise RecipeError(
            f"{where} is a recipe of Model Optimizer, whose meaning depends on the model; `nemoquant recipes "
            f"show {name} --model MODEL` converts it"
        )
    if path.resolve() in before:
        raise RecipeError(
            f"recipe {name} extends itself, in a circle of {len(before) - before.index(path.resolve())}; "
            f"expected a chain that ends at a recipe without `extends`"
        )
    if len(before) > MOST_BASES:
        raise RecipeError(
            f"recipe {name}: {len(before)} recipes extend one another; expected at most {MOST_BASES}"
        )
    try:
        if path.is_dir():  # of no name too: that is the folder here
            raise FileNotFoundError(path)
        data = read_yaml(path, name)
    except FileNotFoundError:
        known = f"presets are {listing(list(presets()), 20)}"
        if before:
            raise RecipeError(
                f"recipe {before[-1]} extends {brief(name)}, which is neither a preset nor a file beside it; "
                f"{known}"
            ) from None
        raise RecipeError(f"recipe {brief(name)} is neither a file nor a preset; {known}") from None
    if not (isinstance(data, dict) and "extends" in data):
        return parse_recipe(data, name)
    own = _checked(lambda: Extension.model_validate(data), name)
    there = presets().get(own.extends, path.parent / home_expanded(own.extends))
    base = _load(there, str(own.extends), (*before, path.resolve()))
    return _checked(lambda: own.of(base), name)


def parse_recipe(data: object, source: str = "recipe") -> Recipe:
    """Check plain data against the schema; ``source`` names it in messages.

    Raises:
        RecipeError: names the key, what it held, and what was expected.
    """
    return _checked(lambda: Recipe.model_validate(data), source)


def _checked(make: Callable[[], Made], source: str) -> Made:
    try:
        return make()
    except ValidationError as error:
        problems = [_problem(e) for e in error.errors(include_url=False)[:MOST_PROBLEMS]]
        if error.error_count() > MOST_PROBLEMS:
            problems.append(f"and {error.error_count() - MOST_PROBLEMS:,} more")
        raise RecipeError(
            f"recipe {source}: {'; '.join(problems)}; `nemoquant recipes show fp8` prints a valid one"
        ) from None


def schema() -> dict[str, Any]:
    """The JSON schema of recipe files, for editors."""
    made = TypeAdapter(Recipe | Extension).json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "Recipe of nemoquant", **made}


def _problem(error: Any) -> str:
    """One of pydantic's errors in a line; rules are counted from 1, as everywhere."""
    place = list(error["loc"])
    rule = f"rule {place[1] + 1}" if len(place) > 1 and place[0] == "rules" else ""
    key = ".".join(str(p)[:80] for p in (place[2:] if rule else place))
    if error["type"] == "extra_forbidden":
        return f"unknown key `{key}`" + (f" in {rule}" if rule else "")
    where = ", ".join(part for part in (rule, f"`{key}`" if key else "") if part) or "recipe"
    message = error["msg"].removeprefix("Value error, ")
    message = message.removesuffix(" or instance of Rule").removesuffix(" or instance of Recipe")
    return f"{where}: {message}" + (
        "" if isinstance(error["input"], dict | Recipe | Rule) else f", got {brief(error['input'])}"
    )
