"""Recipes: which role gets which number format. YAML, read strictly: an unknown key is an error.

name: nvfp4
summary: Routed experts NVFP4, the other GEMMs FP8.
rules:                                  # first match wins; every tensor must be covered
  - roles: [experts.*]
    format: nvfp4                       # source, fp8, mxfp8 or nvfp4
    scales: max                         # max, mse or four_over_six (NVFP4 block scales), or solved with the
                                        # GEMM's inputs: hess (NVFP4) or gptq
    activations: nvfp4                  # the weight's format, or none for weights only (NVFP4 only)
  - roles: [mamba.in_proj]
    layers: [0, 2]                      # only in these layers; each must have the role
    format: fp8
  - names: ["backbone.layers.7.mixer.o_proj"]   # patterns (* ? [..]) over module or tensor names
    format: source
  - roles: ["*"]
    format: source
kv_cache: fp8                           # source or fp8
solve: {damping: 0.5, descent: 1}       # of hess and gptq: how H is damped, and sweeps afterwards
folds: [latent]                         # changes that keep the function: latent, norm, gate, expert
"""

from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from nemoquant.arguments import home_expanded
from nemoquant.errors import RecipeError, brief, listing
from nemoquant.files import read_text
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
from nemoquant.planning.modelopt.recognise import is_theirs
from nemoquant.planning.solving import DAMPING, DESCENT, FOLDS, MOST_DESCENT, FoldName
from nemoquant.shipped import recipe_folder

# Bounds far above any recipe that a person or a search would write.
MOST_BYTES = 256 << 10  # of a file; the presets have one kilobyte
MOST_RULES = 1024
MOST_PATTERNS = 512  # with wildcards, in all rules: each may be compared with every tensor
MOST_NAMES = 65_536  # in one rule
MOST_PROBLEMS = 8  # in a message
MOST_DIGITS = 40  # of a number

Pattern = Annotated[str, Field(min_length=1, max_length=200)]
Layer = Annotated[int, Field(ge=0, strict=True)]


class Rule(BaseModel):
    """One line of a recipe: what it matches, and the format that its matches get."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    roles: list[Pattern] = Field(default=[], min_length=1, max_length=MOST_PATTERNS)
    names: list[Pattern] = Field(default=[], min_length=1, max_length=MOST_NAMES)
    layers: Annotated[list[Layer], Field(min_length=1, max_length=MOST_LAYERS)] | None = None
    format: Literal["source", FormatName]
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
        return None if self.format == "source" else FORMATS[self.format]

    @property
    def activation_format(self) -> FormatName | None:
        """Format of the GEMM's input; None if it is not quantized."""
        if self.format == "source" or self.activations == "none":
            return None
        return self.format

    def __str__(self) -> str:
        where = f"roles {listing(self.roles, 20)}" if self.roles else f"names {listing(self.names, 20)}"
        return where + (f" in {len(self.layers)} layers" if self.layers is not None else "")


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


class Recipe(BaseModel):
    """A named list of rules, the KV cache's format, how codes are solved for, and folds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)
    summary: str = Field(max_length=2000)
    rules: list[Rule] = Field(min_length=1, max_length=MOST_RULES)
    kv_cache: Literal["source", CacheName] = "source"
    solve: Solve = Solve()
    folds: list[FoldName] = Field(default=[], max_length=len(FOLDS))

    @model_validator(mode="after")
    def bounded(self) -> "Recipe":
        count = sum(has_wildcard(glob) for rule in self.rules for glob in (*rule.roles, *rule.names))
        if count > MOST_PATTERNS:
            raise ValueError(
                f"its rules have {count:,} patterns with wildcards; expected at most {MOST_PATTERNS}"
            )
        return self

    @property
    def cache(self) -> CacheFormat | None:
        """Format of the KV cache; None where it stays as the source has it."""
        return None if self.kv_cache == "source" else CACHE_FORMATS[self.kv_cache]

    def dump(self) -> dict[str, Any]:
        """The recipe as plain data without defaults; :func:`parse_recipe` reads it again."""
        return self.model_dump(exclude_defaults=True)

    def changed(
        self, method: Method | None, folds: Sequence[FoldName] | None = None, descent: int | None = None
    ) -> "Recipe":
        """The recipe with another method for all weights, other folds, another number of sweeps.

        A format that lacks the method gets the nearest one (``Format.nearest``). ``max``, ``mse`` and
        ``four_over_six`` are functions of the source's weight alone: they drop the folds, unless ``folds`` is
        given. A recipe that changes has the changes in its name.
        """
        new: dict[str, Any] = {}
        if method is not None:
            new["rules"] = [_with_method(rule, method) for rule in self.rules]
            if method not in SOLVED:
                new["folds"] = []
        if folds is not None:
            new["folds"] = folds = list(dict.fromkeys(folds))
        if descent is not None:
            new["solve"] = self.solve.model_copy(update={"descent": descent})
        changed = self.model_copy(update=new)
        if changed == self:
            return self
        words = [word for word in (method, "-".join(folds) if folds else None) if word]
        words += [f"descent{descent}"] * (descent is not None)
        words += ["unfolded"] * (folds is not None and not folds and bool(self.folds))
        return changed.model_copy(update={"name": "-".join([self.name, *words])[:100]})


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
    """A preset by its name, or a recipe file.

    Raises:
        RecipeError: there is no such preset or file, the file does not follow the schema, or it is one of
            Model Optimizer, which ``planning/choose.py`` takes for a model.
    """
    shipped = presets()
    if is_foreign(name_or_path):
        raise RecipeError(
            f"recipe {brief(name_or_path)} is one of Model Optimizer, whose meaning depends on the model; "
            f"`nemoquant recipes show {name_or_path} --model MODEL` converts it"
        )
    path = shipped.get(name_or_path, Path(home_expanded(name_or_path)))
    try:
        data = yaml.load(read_text(path, MOST_BYTES), _Strict)  # a SafeLoader
    except FileNotFoundError:
        raise RecipeError(
            f"recipe {brief(name_or_path)} is neither a file nor a preset; presets are "
            f"{listing(list(shipped), 20)}"
        ) from None
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise RecipeError(
            f"recipe {name_or_path} cannot be read as YAML: {' '.join(str(error).split())[:500]}"
        ) from None
    return parse_recipe(data, name_or_path)


def parse_recipe(data: object, source: str = "recipe") -> Recipe:
    """Check plain data against the schema; ``source`` names it in messages.

    Raises:
        RecipeError: names the key, what it held, and what was expected.
    """
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        problems = [_problem(e) for e in error.errors(include_url=False)[:MOST_PROBLEMS]]
        if error.error_count() > MOST_PROBLEMS:
            problems.append(f"and {error.error_count() - MOST_PROBLEMS:,} more")
        raise RecipeError(
            f"recipe {source}: {'; '.join(problems)}; `nemoquant recipes show fp8` prints a valid one"
        ) from None


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


class _Strict(yaml.SafeLoader):
    """YAML whose mappings have each key once; plain YAML would silently take the last one.

    Anchors and aliases are refused: nine lines of them can stand for more values than memory holds. So are
    tags, which give a value a kind that it does not look like: PyYAML fails on some in ways of its own.
    """

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.NodeEvent) and event.anchor is not None:
            sign = "*" if isinstance(event, yaml.AliasEvent) else "&"
            raise yaml.YAMLError(
                f"{sign}{event.anchor[:80]} is an anchor or alias of YAML, which a recipe may not have; put "
                f"a pattern that begins with {sign} in quotes{event.start_mark}"
            )
        if getattr(event, "tag", None) is not None:
            raise yaml.YAMLError(
                f"{brief(event.tag)} is a tag of YAML, which a recipe may not have; write the value alone"
                f"{event.start_mark}"
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Hashable] = set()
        for inner, _ in node.value:
            key = self.construct_object(inner, deep=True)
            if not isinstance(key, Hashable):
                continue  # YAML itself refuses it
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {brief(key)} stands twice", inner.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_number(self, node: yaml.ScalarNode) -> Any:
        """A number of a readable length: of ``1:1:1:...`` YAML makes one in quadratic time."""
        if len(node.value) > MOST_DIGITS:
            raise yaml.constructor.ConstructorError(
                None, None, f"a number of {len(node.value):,} characters", node.start_mark
            )
        kind = (
            yaml.SafeLoader.construct_yaml_int
            if node.tag.endswith(":int")
            else yaml.SafeLoader.construct_yaml_float
        )
        return kind(self, node)


for _tag in ("int", "float"):
    _Strict.add_constructor(f"tag:yaml.org,2002:{_tag}", _Strict.construct_number)
