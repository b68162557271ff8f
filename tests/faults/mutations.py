"""Damaged files made from good ones: a value in a tree replaced, bytes flipped, cut, copied or inserted."""

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

# They stand for what no Python value is, or is too large to be copied often; `json_bytes` writes them out.
DEEP, TWICE, WIDE = "\x01deep", "\x01twice", "\x01wide"
NASTY: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    1,
    2,
    1.5,
    0.1,
    -0.0,
    1e308,
    float("nan"),
    float("inf"),
    float("-inf"),
    1 << 15,
    (1 << 31) - 1,
    1 << 31,
    1 << 53,
    (1 << 63) - 1,
    1 << 63,
    -(1 << 63),
    1 << 64,
    10**8,
    10**30,
    10**400,
    "",
    " ",
    "0",
    "-1",
    "nan",
    "inf",
    "null",
    "\ud800",
    "a\udfffb",
    "\x00",
    "\x1b[31mred\x1b[0m",
    "# heading\n\n- item",
    "../../etc/passwd",
    "/dev/zero",
    "*",
    "**",
    "[",
    "[!",
    "x" * 300,
    "x" * 70_000,
    "M" * 70_000,
    "*a" * 60 + "b",
    [],
    {},
    [[]],
    [None],
    [-1],
    [1 << 63],
    ["x"] * 3,
    ["*"] * 2_000,
    [0] * 20_000,
    {"": None},
    {"a": {"b": [None]}},
    {"__float__": "Infinity"},
    {"__float__": {"__float__": []}},
    {"\ud800": 1},
    {str(i): i for i in range(5_000)},
    DEEP,
)
Path = tuple[Any, ...]


def places(tree: Any, path: Path = ()) -> Iterator[Path]:
    """The paths of all values of a tree, the tree itself first."""
    yield path
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield from places(value, (*path, key))


def at(tree: Any, path: Path) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def put(tree: Any, path: Path, value: Any) -> Any:
    """The tree with another value in a place; the tree itself is changed, where the place is not the root."""
    if not path:
        return value
    at(tree, path[:-1])[path[-1]] = value
    return tree


def replaced(tree: Any, path: Path, value: Any) -> Any:
    """A copy of a tree with another value in a place."""
    return put(copy.deepcopy(tree), path, copy.deepcopy(value))


def changed(tree: Any, rng: random.Random) -> Any:
    """A copy of a tree with one to four changes of its structure; of a thousand one is made large."""
    tree = copy.deepcopy(tree)
    if not rng.randrange(1000):
        return put(tree, rng.choice(list(places(tree))), WIDE)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        path = rng.choice(list(places(tree)))
        value = at(tree, path)
        parent = at(tree, path[:-1]) if path else None
        match rng.randrange(9):
            case 0 if parent is not None:
                del parent[path[-1]]
            case 1 if isinstance(parent, dict) and isinstance(path[-1], str):
                parent[TWICE + path[-1]] = copy.deepcopy(value)
            case 2 if isinstance(parent, dict):
                parent[rng.choice(("", "x" * 300, "\ud800", "extra", "\x1b[2J", "1"))] = parent.pop(path[-1])
            case 3:
                tree = put(tree, path, [value])
            case 4:
                tree = put(tree, path, {"x": value})
            case 5 if isinstance(value, list) and value:
                tree = put(tree, path, [copy.deepcopy(v) for v in value * rng.choice((2, 50))])
            case 6 if isinstance(value, str):
                tree = put(
                    tree, path, rng.choice((value + "\ud800", value * 40, value[:-1], value + "\n\x1b[H"))
                )
            case 7 if isinstance(value, int | float) and abs(value) < 1e300:  # what a float holds
                tree = put(
                    tree, path, rng.choice((-value, value + 1, value * 1000, str(value), float(value)))
                )
            case 8:
                tree = put(tree, path, copy.deepcopy(at(tree, rng.choice(list(places(tree))))))
            case _:
                tree = put(tree, path, copy.deepcopy(rng.choice(NASTY)))
        if len(json.dumps(tree)) > 4_000_000:
            break
    return tree


def json_bytes(tree: Any) -> bytes:
    """JSON as a hostile program writes it: NaN, half surrogates, a key twice, lists in lists without end."""
    text = json.dumps(tree)
    text = text.replace(json.dumps(TWICE)[:-1], '"')
    text = text.replace(json.dumps(DEEP), "[" * 100_000 + "]" * 100_000)
    return text.replace(json.dumps(WIDE), "[" + "{}," * 1_500_000 + "{}]").encode()


def damaged(data: bytes, words: tuple[bytes, ...], rng: random.Random) -> bytes:
    """Bytes with one to four changes; ``words`` mean something in the file's language."""
    new = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        place = rng.randrange(len(new) + 1)
        end = min(len(new), place + rng.choice((1, 4, 16, 256)))
        match rng.randrange(8):
            case 0 | 1 if place < len(new):
                new[place] ^= 1 << rng.randrange(8)
            case 2:
                del new[place:]
            case 3:
                del new[place:end]
            case 4:
                new[place:place] = new[place:end] * rng.choice((1, 3, 1000))
            case 5:
                new[place:end] = rng.randbytes(end - place)
            case 6:
                new[place:end] = rng.choice((b"\0", b"\xff", b"9", b"[", b'"', b"{", b" ")) * (end - place)
            case _ if words:
                new[place : rng.choice((place, end))] = rng.choice(words) * rng.choice((1, 1, 1, 500))
            case _:
                first = rng.randrange(len(new) + 1)
                new[place:end] = new[first : first + end - place]
        del new[4_000_000:]
    return bytes(new)
