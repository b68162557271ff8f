"""Ends ``python -m pytest tests/gpu`` with how many tests ran, and for want of what the others did not."""

from collections import defaultdict
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Skips are easily taken for a pass: each reason with its files, and in red if nothing ran at all."""
    root = terminalreporter.config.rootpath
    reports: dict[str, list[pytest.TestReport | pytest.CollectReport]] = {
        kind: [
            report
            for report in terminalreporter.stats.get(kind, [])
            if FOLDER in (root / report.nodeid.split("::")[0]).parents
        ]
        for kind in ("passed", "failed", "error", "skipped")
    }
    skipped: dict[str, list[str]] = defaultdict(list)
    for report in reports["skipped"]:
        assert isinstance(report.longrepr, tuple)
        reason = report.longrepr[2].removeprefix("Skipped: ").removeprefix("needs ")
        skipped[reason].append(Path(report.nodeid.split("::")[0]).name)
    ran, unable = len(reports["passed"]) + len(reports["failed"]), len(reports["error"])
    if not (ran or unable or skipped):
        return
    count = sum(map(len, skipped.values()))
    color = {"red": True} if unable or not ran else {"yellow": True} if count else {"green": True}
    said = [f"{ran} ran" if ran else "NOTHING RAN", f"{count} skipped"]
    if unable:
        said.append(f"{unable} could not begin")
    terminalreporter.section("tests/gpu", **color)
    terminalreporter.write_line(f"tests/gpu: {', '.join(said)}", **color)
    for reason, files in sorted(skipped.items(), key=lambda pair: -len(pair[1])):
        terminalreporter.write_line(f"  {len(files)} for want of {reason}: {', '.join(sorted(set(files)))}")
