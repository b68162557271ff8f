"""Makes what pages say of engines: ``python docs/make_engines.py``; a test holds them equal.

The README's table is made from the code's, that of docs/serving.md from what ``python -m tests.consumers``
found.
"""

import importlib.util
import re
from pathlib import Path
from typing import Any

import nemoquant
from nemoquant.layouts import ENGINES
from nemoquant.layouts.engine_rows import FAMILIES
from nemoquant.layouts.engines import mixture, outcome, proof

ROOT = Path(__file__).resolve().parents[1]
README, SUPER = ROOT / "README.md", ROOT / "tests/configs/super-120b-a12b.json"
OUTPUTS = {  # of presets whose files have the same algorithms
    "FP8 (`fp8`, `fp8-published`, `nano-fp8-published`)": "fp8",
    "MXFP8 (`mxfp8`)": "mxfp8",
    "NVFP4 (`nvfp4-full`, `nano-nvfp4-published`)": "nvfp4-full",
    "NVFP4 and FP8 (`nvfp4`, `super-nvfp4-published`)": "nvfp4",
    "NVFP4 weights, experts alone (`nvfp4-w4a16`)": "nvfp4-w4a16",
    "NVFP4 weights, Mamba too (`nvfp4-full-w4a16`)": "nvfp4-full-w4a16",
    "NVFP4 weights, Mamba FP8 (`lightning-published`)": "lightning-published",
}


def block() -> str:
    """The README's table, and a sentence on how it is known."""
    files = {title: mixture(nemoquant.plan(SUPER, preset)) for title, preset in OUTPUTS.items()}
    known: dict[str, list[str]] = {}
    for title, file in files.items():
        known.setdefault(proof(file), []).append(title)
    said = [
        f"- {', '.join(titles)}: {sentence[0].lower()}{sentence[1:]}" for sentence, titles in known.items()
    ]
    lines = [
        *said,
        "",
        f"| output | engine | {' | '.join(FAMILIES)} |",
        "|---" * (2 + len(FAMILIES)) + "|",
    ]
    for title, file in files.items():
        for engine in ENGINES.values():
            cells = [str(outcome(file, engine, sms[0])) for sms in FAMILIES.values()]
            lines.append(f"| {title} | {engine} | {' | '.join(cells)} |")
    return "\n".join(lines)


def checks() -> str:
    """What the engines' own code made of outputs: a row for each, with what differs by engine."""
    results = _results()
    data: dict[str, Any] = results.read()
    made = data["engines"]
    said = [
        f"{name} {of['version']} (torch {of['torch']}, transformers {of['transformers']})"
        for word, name in ENGINES.items()
        if (of := made.get(word)) is not None
    ]
    lines = [
        f"Last run on {data['date']}, {data['machine']}: {' and '.join(said)}.",
        "",
        f"| output, or config | modules | algorithms | differs in {' | differs in '.join(_names(made))} |",
        "|---|---:|---|" + "---|" * len(said),
    ]
    for name, engines in [*sorted(data["checkpoints"].items()), *sorted(data["configs"].items())]:
        (row, *_) = engines.values()
        found = [_found(results, word, engines.get(word)) for word in ENGINES if word in made]
        algorithms = ", ".join(f"{count:,} {kind}" for kind, count in sorted(row["algorithms"].items()))
        lines.append(f"| {name} | {row['modules']:,} | {algorithms} | {' | '.join(found)} |")
    taken = ", ".join(f"{len(data['commands'][word])} by {ENGINES[word]}" for word in ENGINES if word in made)
    return "\n".join([*lines, "", f"Commands taken by the engines' own parsers: {taken}."])


def _names(made: dict[str, Any]) -> list[str]:
    return [name for word, name in ENGINES.items() if word in made]


def _found(results: Any, engine: str, row: dict[str, Any] | None) -> str:
    """What differs in a row of the results, in words; "-" where that engine was not asked."""
    if row is None:
        return "-"
    return "; ".join(results.problems(engine, row)) or results.known_text(engine, row) or "nothing"


def _results() -> Any:
    spec = importlib.util.spec_from_file_location("results", ROOT / "tests/consumers/results.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PAGES = {README: ("engines", block), ROOT / "docs/serving.md": ("consumers", checks)}


def page(path: Path) -> str:
    """A page with its block made again."""
    name, make = PAGES[path]
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    text = path.read_text(encoding="utf-8")
    return re.sub(f"{begin}\n.*?{end}", lambda _: f"{begin}\n{make()}\n{end}", text, flags=re.DOTALL)


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(page(path), encoding="utf-8")
