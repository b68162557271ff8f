"""Makes the README's table of engines: ``python docs/make_engines.py``; a test holds it equal."""

import re
from pathlib import Path

import nemoquant
from nemoquant.layouts import ENGINES
from nemoquant.layouts.engine_rows import FAMILIES
from nemoquant.layouts.engines import mixture, outcome, proof

ROOT = Path(__file__).resolve().parents[1]
README, SUPER = ROOT / "README.md", ROOT / "tests/configs/super-120b-a12b.json"
MARK = "<!-- engines -->"
OUTPUTS = {  # of presets whose files have the same algorithms
    "FP8 (`fp8`, `fp8-published`)": "fp8",
    "MXFP8 (`mxfp8`)": "mxfp8",
    "NVFP4 (`nvfp4-full`)": "nvfp4-full",
    "NVFP4 and FP8 (`nvfp4`, `super-nvfp4-published`)": "nvfp4",
    "NVFP4 weights, experts alone (`nvfp4-w4a16`)": "nvfp4-w4a16",
    "NVFP4 weights, Mamba too (`nvfp4-full-w4a16`)": "nvfp4-full-w4a16",
}


def block() -> str:
    """The README's table, and a sentence on how it is known."""
    files = {title: mixture(nemoquant.plan(SUPER, preset)) for title, preset in OUTPUTS.items()}
    (known,) = {proof(file) for file in files.values()}
    lines = [
        known,
        "",
        f"| output | engine | {' | '.join(FAMILIES)} |",
        "|---" * (2 + len(FAMILIES)) + "|",
    ]
    for title, file in files.items():
        for engine in ENGINES.values():
            cells = [str(outcome(file, engine, sms[0])) for sms in FAMILIES.values()]
            lines.append(f"| {title} | {engine} | {' | '.join(cells)} |")
    return "\n".join(lines)


def page() -> str:
    """The README with the block made again."""
    return re.sub(
        rf"{MARK}\n.*?\n{MARK.replace('<!-- ', '<!-- /')}",
        lambda _: f"{MARK}\n{block()}\n{MARK.replace('<!-- ', '<!-- /')}",
        README.read_text(encoding="utf-8"),
        flags=re.DOTALL,
    )


if __name__ == "__main__":
    README.write_text(page(), encoding="utf-8")
