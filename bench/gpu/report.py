"""What the folders of results say, in bench/RESULTS.md and in README.md's Status; goals, met or not.

    python -m bench.gpu.report                      writes both, between <!-- gpu --> and <!-- /gpu -->
    python -m bench.gpu.report --check              exit code 1 where they are not what the JSON says
    python -m bench.gpu.report --summary FOLDER     FOLDER/summary.json: the goals and the counts, printed too

The results are the folders of bench/gpu/results, as all.sh wrote them, those without a device left out. A
step whose JSON is missing or damaged is said to be missing. Needs nothing but Python.
"""

import argparse
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from nemoquant.ops.proven import OPERATORS, PROVEN, Proof

ROOT = Path(__file__).resolve().parents[2]
BEGIN, END = "<!-- gpu -->", "<!-- /gpu -->"
FILES = {  # step: its file, and what a whole one is
    "env": ("env.json", dict),
    "steps": ("steps.json", dict),
    "runner": ("runner.json", dict),
    "correct": ("correct.json", dict),
    "sanitizer": ("sanitizer.json", dict),
    "pack": ("pack.json", list),
    "triton": ("triton.json", list),
    "timing": ("timing.json", dict),
    "grouped": ("grouped.json", dict),
    "grouped_runner": ("grouped_runner.json", dict),
    "pytest": ("pytest.json", dict),
}
NOT_RUN = """\
Nothing here has been run on a GPU yet: none was at hand. That concerns `--device cuda` (its kernels were
run in Triton's interpreter, byte for byte, and compiled for SM 80, 90 and 120; streams, pinned memory and
speed were not tried), every TensorRT and TensorRT-RTX engine and the code that calls it (RTX engines were
built; the code was tested over a stand-in for the runtime), and the CUDA kernels of `plugins/` (run on the
CPU by an emulator).
`tests/gpu` and `bench/gpu` are there for whoever has one. No kernel that no GPU has run is a default
for torch's operators ([table](bench/RESULTS.md#on-a-gpu)).
"""
NEVER_RUN = """\
No TensorRT or TensorRT-RTX engine was run (RTX engines were built; the code that calls them was tested over a
stand-in for the runtime).
"""
WIDE = 60  # characters of a name in a table


# ---- what is there


class Folder:
    """The results of one run of all.sh."""

    def __init__(self, path: Path) -> None:
        self.name = path.name
        self.missing: dict[str, str] = {}  # step: why
        self._found = {step: self._read(step, path / file, kind) for step, (file, kind) in FILES.items()}

    def _read(self, step: str, file: Path, kind: type) -> Any:
        try:
            found = json.loads(file.read_text())
        except FileNotFoundError:
            self.missing[step] = f"no {file.name}"
        except (OSError, ValueError):
            self.missing[step] = f"{file.name} is damaged"
        else:
            if isinstance(found, kind):
                return found
            self.missing[step] = f"{file.name} is damaged"
        return kind()

    def table(self, step: str) -> dict[str, Any]:
        """The JSON of a step that writes an object; empty where it is missing."""
        found: dict[str, Any] = self._found[step]
        return found

    def rows(self, step: str, key: str | None = None) -> list[dict[str, Any]]:
        """The rows of a step, or those under a key of it; without any that is no object."""
        found = self._found[step].get(key) if key else self._found[step]
        return [row for row in found if isinstance(row, dict)] if isinstance(found, list) else []

    def timing(self) -> dict[str, dict[str, Any]]:
        """Rows with a time, by case."""
        rows = self.rows("timing", "rows")
        return {str(row["case"]): row for row in rows if number(row.get("us")) and "case" in row}

    @property
    def device(self) -> str:
        """Its name; "unknown device" where no step says it, or torch found none."""
        found = str(self.table("env").get("device") or self.table("timing").get("device") or "FAILED")
        return "unknown device" if found.startswith("FAILED") else found

    @property
    def date(self) -> str:
        return str(self.table("env").get("date") or self.table("timing").get("date") or "no date")


def number(value: object) -> float | None:
    """``value`` if it is a number, else None."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


class Counts(NamedTuple):
    """Of checks: how many were right, were not run, and the names of the wrong ones."""

    right: int
    not_run: int
    wrong: list[str]

    def __str__(self) -> str:
        checks = f"{self.right} of {self.right + len(self.wrong)} right"
        late = f", {self.not_run} not run" if self.not_run else ""
        return checks + late + (f"; wrong: {listed(self.wrong)}" if self.wrong else "")


def counts(rows: Iterable[dict[str, Any]], all_of_them: object = None) -> Counts:
    """Of rows with ``ok``: true, false, or null for what was not run; those that have no row were not run."""
    checks = [row for row in rows if "ok" in row]
    wrong = [
        str(row.get("case") or row.get("check") or row.get("step")) for row in checks if row["ok"] is False
    ]
    right = sum(row["ok"] is True for row in checks)
    count = max(len(checks), len(all_of_them) if isinstance(all_of_them, list) else 0)
    return Counts(right, count - right - len(wrong), wrong)


def operators(folder: Folder, step: str) -> Counts:
    """Of a step that check_ops wrote."""
    return counts(folder.rows(step, "results"), folder.table(step).get("cases"))


def ended_badly(folder: Folder) -> list[str]:
    """Steps whose exit code was not 0."""
    return [
        f"{step} (exit code {row.get('rc')}{', time was over' * bool(row.get('timed_out'))})"
        for step, row in folder.table("steps").items()
        if isinstance(row, dict) and row.get("rc") != 0
    ]


def listed(names: Sequence[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(name[:WIDE] for name in names[:most]) + more


# ---- the goals


@dataclass(frozen=True)
class Goal:
    """A figure that is to be reached.

    Attributes:
        goal: what is measured, in words.
        needs: the least that is enough.
        got: the worst of what was measured; None where nothing was.
        met: None where nothing was measured.
        of: where the worst was.
    """

    goal: str
    needs: float
    got: float | None
    met: bool | None
    of: str


def goal(text: str, needs: float, found: dict[str, float | None]) -> Goal:
    """By the least of what was found, by name; a missing one leaves it open, unless another fails it."""
    known = {name: value for name, value in found.items() if value is not None}
    if not known:
        return Goal(text, needs, None, None, "not measured")
    worst = min(known, key=lambda name: known[name])
    met = known[worst] >= needs and (True if len(known) == len(found) else None)
    return Goal(text, needs, round(known[worst], 3), met, worst)


def goals(folder: Folder) -> list[Goal]:
    """All of them, computed from the JSON of the steps."""
    timing = folder.timing()
    # speed counts where the bytes are right: else nothing is said of it
    codes = [] if counts(folder.rows("triton")).wrong else folder.rows("triton")
    stages_of = [] if counts(folder.rows("pack")).wrong else folder.rows("pack")
    rates = {str(row.get("case")): number(row.get("GB_s")) for row in codes}
    threads = [number(row.get("GB_s_bf16_in")) for row in codes]
    bus = rates.get("pinned host to device")
    packed = {str(row.get("stage")): number(row.get("times")) for row in stages_of}
    decodes = [f"scan decode B{b} state {dtype}" for dtype in ("float32", "float16") for b in (8, 64)]
    prefills = [f"scan prefill {length}" for length in (512, 4096, 65536)]

    def ratio(value: float | None, to: float | None) -> float | None:
        return value / to if value is not None and to else None

    def of_floor(names: list[str]) -> dict[str, float | None]:
        return {name: number(timing.get(name, {}).get("of_floor")) for name in names}

    def ahead(name: str) -> float | None:
        row = timing.get(name, {})
        return ratio(number(row.get("mamba_ssm_us")), number(row.get("us")))

    found = [
        goal("scan decode, B >= 8: share of measured bandwidth", 0.8, of_floor(decodes)),
        goal("scan prefill: mamba_ssm's time over ours", 1.0, {name: ahead(name) for name in prefills}),
    ]
    for tokens in (1, 16, 256, 4096):
        names = [f"experts Super {format} {tokens}" for format in ("nvfp4", "fp8", "bf16", "w4a16")]
        text = f"experts, {tokens} tokens: floor over time"
        found.append(goal(text, 0.667, of_floor(names)))  # a time within 1.5 of the floor
    kernels = ("mxfp8", "nvfp4 max", "nvfp4 four_over_six", "nvfp4 mse")
    best = max((rate for rate in threads if rate is not None), default=None)
    return [
        *found,
        goal(
            "Triton encoders alone, over pinned host to device",
            1.0,
            {name: ratio(rates.get(f"kernel {name}"), bus) for name in kernels},
        ),
        goal(
            "Triton encode from host to host, several threads, over pinned host to device",
            0.8,
            {"the best number of threads": ratio(best, bus)},
        ),
        goal(
            "calibration: all processors' time over the device's",
            10.0,
            {"calibrate": packed.get("calibrate")},
        ),
        goal(
            "encode by mse: all processors' time over the device's",
            5.0,
            {"encode": packed.get("encode nvfp4-mse")},
        ),
    ]


# ---- what is a default


class Default(NamedTuple):
    """A kernel or a way, whether it is used without being asked for, and the results that show it."""

    what: str
    used: str
    shown: str


def defaults(proofs: Sequence[Proof] = PROVEN) -> list[Default]:
    """The rows of the table."""

    def operator(name: str) -> Default:
        shown = [proof for proof in proofs if proof.operator == name]
        where = ", ".join(f"SM {major}{minor}" for major, minor in (proof.capability for proof in shown))
        used = (
            f"on {where}; elsewhere NEMOQUANT_KERNELS names it" if shown else "no: NEMOQUANT_KERNELS names it"
        )
        folders = ", ".join(f"bench/gpu/results/{proof.results}" for proof in shown)
        return Default(f"`{name}` of `plugins/` for torch", used, folders or "-")

    return [
        *map(operator, OPERATORS),
        Default("`routed_experts`: native FP4 products (SM 12.x)", "no: by name only", "-"),
        Default("`routed_experts`: CUTLASS's grouped products", "no: by name only", "-"),
        Default("Triton kernels of the formats", "no: with `--device cuda`", "-"),
        Default("plugins of TensorRT", "where the engine's graph has the operator", "-"),
    ]


# ---- Markdown


def cell(value: object) -> str:
    return str(value).replace("|", "/").replace("\n", " ")


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(map(cell, line))} |\n" for line in lines)


def met(one: Goal) -> str:
    return "open" if one.met is None else "yes" if one.met else "**no**"


def checks(folder: Folder) -> list[str]:
    """A line for each kind of check that was run."""
    lines = []
    for step, what in (("correct", "operators"), ("grouped", "CUTLASS's grouped products")):
        if step not in folder.missing:
            where = ", through the host build" * (folder.table(step).get("device") == "cpu")
            lines.append(f"{what}{where}: {operators(folder, step)}")
    for step, what in (("triton", "formats' kernels"), ("pack", "`quantize` and `diff`")):
        if step not in folder.missing:
            lines.append(f"{what}: {counts(folder.rows(step))}")
    for step in ("runner", "sanitizer", "grouped_runner"):
        for tool, found in folder.table(step).items():
            if isinstance(found, dict):
                lines.append(f"{'grouped, ' * (step == 'grouped_runner')}{tool}: {tool_line(found)}")
    if "pytest" not in folder.missing:
        lines.append(f"`tests/gpu`: {pytest_line(folder.table('pytest'))}")
    return lines


def tool_line(found: dict[str, Any]) -> str:
    """Of the runner, alone or under a tool of compute-sanitizer."""
    errors = f", {found['errors']} errors" if "errors" in found else ""
    if "ran" in found:
        return f"{found['ran']} cases, {found.get('bad')} bad{errors}, exit code {found.get('rc')}"
    return f"not finished, exit code {found.get('rc')}{errors}"


def pytest_line(found: dict[str, Any]) -> str:
    if "passed" not in found:
        return str(found.get("error", "no report"))
    failed, skipped = found.get("failed"), found.get("skipped")
    rows = failed if isinstance(failed, list) else []
    failed = [str(row.get("test")) if isinstance(row, dict) else str(row)[:WIDE] for row in rows]
    count = sum(int(number(n) or 0) for n in skipped.values()) if isinstance(skipped, dict) else 0
    names = f" ({listed(failed)})" if failed else ""
    late = found.get("not_begun")
    begun = f"; not begun: {listed(list(map(str, late)))}" if isinstance(late, list) and late else ""
    return f"{found['passed']} passed, {len(failed)} failed{names}, {count} skipped{begun}"


def times(folder: Folder) -> str:
    """The table of times; other kernels' times stand in one column."""
    rows = [
        (
            name,
            row["us"],
            row.get("floor_us", "-"),
            row.get("of_floor", "-"),
            ", ".join(
                f"{key.removesuffix('_us')} {value}"
                for key, value in row.items()
                if key.endswith("_us") and key != "floor_us"
            ),
        )
        for name, row in folder.timing().items()
    ]
    lost = [row for row in folder.rows("timing", "rows") if "us" not in row]
    if not rows:
        return ""
    said = f"\nWithout a time: {listed([str(row.get('case')) for row in lost])}.\n" if lost else ""
    return "\n" + table(("case", "us", "floor", "of floor", "others, us"), rows) + said


def stages(folder: Folder) -> str:
    """The table of pack's stages."""
    rows = [
        (row["stage"], row.get("cpu_s"), row.get("device_s"), row.get("times"))
        for row in folder.rows("pack")
        if "stage" in row
    ]
    return "\n" + table(("2 GB model: stage", "processors, s", "device, s", "times"), rows) if rows else ""


def section(folder: Folder) -> str:
    """One folder's part of RESULTS.md."""
    env, limits = folder.table("env"), folder.table("timing").get("limits")
    versions = ", ".join(f"{name} {env[name]}" for name in ("torch", "triton") if name in env)
    text = f"### {cell(folder.device)}, {cell(folder.date)}\n\n"
    text += f"[{folder.name}](gpu/results/{folder.name}/){f'; {cell(versions)}' if versions else ''}.\n"
    if isinstance(limits, dict):
        text += f"Measured limits: {', '.join(f'{name} {value}' for name, value in limits.items())}.\n"
    if failed := ended_badly(folder):
        text += f"Steps that did not end well: {listed(failed, 20)}.\n"
    if folder.missing:
        text += f"Missing: {', '.join(folder.missing.values())}.\n"
    text += "".join(["\n", *(f"- {cell(line)}\n" for line in checks(folder))])
    rows = [
        (one.goal, one.needs, "-" if one.got is None else one.got, one.of, met(one)) for one in goals(folder)
    ]
    text += "\n" + table(("goal", "at least", "measured, the worst", "of", "met"), rows)
    return text + times(folder) + stages(folder) + "\n"


def results_text(folders: Sequence[Folder], ways: Sequence[Default]) -> str:
    """The GPU section of RESULTS.md."""
    text = "What is used without being asked for, and what shows that it should be:\n\n"
    text += table(("kernel or way", "used by default", "shown by"), ways) + "\n"
    return text + ("".join(map(section, folders)) or "There are no results of a GPU.\n")


def status_text(folders: Sequence[Folder]) -> str:
    """The GPU paragraph of the README's Status."""
    if not folders:
        return NOT_RUN
    text = "What has been run on a GPU, and what came out "
    text += "([results](bench/RESULTS.md#on-a-gpu), and what is a default):\n\n"
    for folder in folders:
        known = [one for one in goals(folder) if one.met is not None]
        reached = f"{sum(bool(one.met) for one in known)} of {len(known)} measured goals met"
        text += (
            f"- {cell(folder.device)}, {cell(folder.date)}: operators {cell(operators(folder, 'correct'))}; "
        )
        text += reached
        for what, names in (
            ("steps that did not end well", ended_badly(folder)),
            ("missing", [*folder.missing]),
        ):
            text += f"; {what}: {cell(', '.join(names))}" if names else ""
        text += ".\n"
    return f"{text}\n{NEVER_RUN}"


def between(text: str, made: str, name: str) -> str:
    """``text`` with ``made`` between its markers."""
    found = re.findall(rf"{BEGIN}\n.*?{END}", text, re.S)
    if len(found) != 1:
        raise SystemExit(
            f"{name}: got {len(found)} parts between {BEGIN} and {END}, expected one; put it back"
        )
    return text.replace(found[0], f"{BEGIN}\n{made}{END}")


def pages(root: Path = ROOT) -> dict[Path, Callable[[str], str]]:
    """Both files, and what makes their new text of the old one."""
    paths = sorted((root / "bench/gpu/results").glob("*/"))
    folders = [Folder(path) for path in paths if not path.name.endswith("-no-device")]
    made = {"bench/RESULTS.md": results_text(folders, defaults()), "README.md": status_text(folders)}
    return {root / name: lambda old, n=name, t=text: between(old, t, n) for name, text in made.items()}


def summary(folder: Folder) -> dict[str, Any]:
    """What is worth knowing at once."""
    found = goals(folder)
    return {
        "device": folder.device,
        "date": folder.date,
        "checks": checks(folder),
        "steps that did not end well": ended_badly(folder),
        "goals": [asdict(one) for one in found],
        "missing": folder.missing,
    }


def main(root: Path = ROOT) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("--summary", type=Path, metavar="FOLDER")
    options = parser.parse_args()
    if options.summary:
        folder = Folder(options.summary)
        (options.summary / "summary.json").write_text(json.dumps(summary(folder), indent=0))
        print("\n".join(checks(folder)))
        for one in goals(folder):
            print(f"{met(one).strip('*'):>4}  {one.goal}: {one.got}, at least {one.needs} ({one.of})")
        print(
            *(f"did not end well: {step}" for step in ended_badly(folder)), *folder.missing.values(), sep="\n"
        )
        return
    differ = []
    for path, made in pages(root).items():
        old = path.read_text(encoding="utf-8")
        if made(old) != old:
            differ.append(path.name)
            if not options.check:
                path.write_text(made(old), encoding="utf-8")
    if options.check and differ:
        raise SystemExit(f"{', '.join(differ)}: not what bench/gpu/results says; python -m bench.gpu.report")


if __name__ == "__main__":
    main()
