"""What steps of all.sh printed, as JSON.

    python -m bench.gpu.logs step STEPS.json NAME RC SECONDS LIMIT FILE    adds a step to what is there
    python -m bench.gpu.logs tools OUT.json FILE        lines "== TOOL", what it printed, "== rc N", and so on
    python -m bench.gpu.logs junit OUT.json FILE.xml...  passed, failed, why others were skipped, not begun

A file that is missing or damaged is no error: then it says so in place of what would be in it.
"""

import argparse
import datetime
import json
import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

KEPT = 3000  # characters of a text's end
TIMED_OUT = (124, 137)  # of `timeout`, which kills what does not end


def text_of(file: Path) -> str:
    """Without the runner's lines of cases that began, and after which nothing was said."""
    if not file.is_file():
        return f"no file {file.name}"
    said = file.read_text(errors="replace")
    return re.sub(r'^\{"begins": .*\n(?=\{"(?:begins|ran)")', "", said, flags=re.M)


def add_step(out: Path, name: str, rc: int, seconds: float, limit: float, log: Path) -> None:
    """Into ``out``, by name; a damaged ``out`` is begun anew."""
    try:
        found = json.loads(out.read_text())
        steps = found if isinstance(found, dict) else {}
    except (OSError, ValueError):
        steps = {}
    steps[name] = {
        "rc": rc,
        "seconds": seconds,
        "limit_s": limit,
        "timed_out": rc in TIMED_OUT,
        "date": str(datetime.date.today()),
        "said": text_of(log)[-KEPT:],
    }
    out.write_text(json.dumps(steps, indent=0))


def tools(text: str) -> dict[str, Any]:
    """By tool: exit code, how many cases ran and were bad, errors that compute-sanitizer counted, the end."""
    found = {}
    for name, said, rc in re.findall(r"^== (\w+)\n(.*?)^== rc (\d+)$", text, re.M | re.S):
        row: dict[str, Any] = {"rc": int(rc)}
        if ran := re.search(r'\{"ran": (\d+), "bad": (\d+)\}', said):
            row |= {"ran": int(ran[1]), "bad": int(ran[2])}
        if errors := re.search(r"(?:ERROR SUMMARY: |RACECHECK SUMMARY: )(\d+)", said):
            row["errors"] = int(errors[1])
        found[name] = row | {"said": said[-KEPT:]}
    return found


def junit(files: Sequence[Path]) -> dict[str, Any]:
    """Of pytest's reports; a process that died left an empty one, which counts as a failure.

    One that is not there is of a process that was not begun.
    """
    failed, skipped, count = [], Counter[str](), 0
    not_begun = [file.stem for file in files if not file.exists()]
    for file in files:
        if file.stem in not_begun:
            continue
        try:
            root = ElementTree.parse(file).getroot()
        except (OSError, ElementTree.ParseError) as error:
            count += 1
            failed.append({"test": file.stem, "why": f"no report of pytest: {error}"[:200]})
            continue
        for test in root.iter("testcase"):
            count += 1
            for child in test:
                said = str(child.get("message"))[:300]
                if child.tag in ("failure", "error"):
                    failed.append({"test": f"{test.get('classname')}::{test.get('name')}", "why": said})
                elif child.tag == "skipped":
                    skipped[said] += 1
    lost = len({row["test"] for row in failed}) + skipped.total()
    return {"passed": count - lost, "failed": failed, "skipped": dict(skipped), "not_begun": not_begun}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    kinds = parser.add_subparsers(dest="kind", required=True)
    step = kinds.add_parser("step")
    step.add_argument("out", type=Path)
    step.add_argument("name")
    step.add_argument("rc", type=int)
    for name in ("seconds", "limit"):
        step.add_argument(name, type=float)
    step.add_argument("file", type=Path)
    for name, number in (("tools", None), ("junit", "*")):
        kind = kinds.add_parser(name)
        kind.add_argument("out", type=Path)
        kind.add_argument("file", type=Path, nargs=number)
    given = parser.parse_args()
    if given.kind == "step":
        add_step(given.out, given.name, given.rc, given.seconds, given.limit, given.file)
    else:
        found = tools(text_of(given.file)) if given.kind == "tools" else junit(given.file)
        given.out.write_text(json.dumps(found, indent=0))


if __name__ == "__main__":
    main()
