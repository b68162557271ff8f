"""YAML of recipes, read strictly: bounded, each key once, no anchors, aliases or tags."""

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from nemoquant.errors import RecipeError, brief
from nemoquant.files import read_text

MOST_BYTES = 256 << 10  # of a file; the presets have one kilobyte
MOST_DIGITS = 40  # of a number
_DECIMAL = re.compile(r"[-+]?((0|[1-9][0-9]*)?(\.[0-9]*)?([eE][-+]?[0-9]+)?|\.inf|\.nan)", re.IGNORECASE)


def read_yaml(path: Path, name: str) -> object:
    """The data of a file; ``name`` is what messages call it.

    Raises:
        FileNotFoundError: there is no such file.
        RecipeError: it can't be read, or is no YAML that a recipe may have.
    """
    try:
        return yaml.load(read_text(path, MOST_BYTES), _Strict)  # a SafeLoader
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise RecipeError(
            f"recipe {name} cannot be read as YAML: {' '.join(str(error).split())[:500]}"
        ) from None


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
        """A number of a readable length that is what it looks like.

        Of ``3:9`` YAML makes 189, of ``010`` 8, and of ``1:1:1:...`` a number in quadratic time.
        """
        if len(node.value) <= MOST_DIGITS and not _DECIMAL.fullmatch(node.value):
            raise yaml.constructor.ConstructorError(
                None,
                None,
                f"{node.value} is another number to YAML than it looks; write it in decimal digits, and a "
                f"range of layers as 3..9",
                node.start_mark,
            )
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
