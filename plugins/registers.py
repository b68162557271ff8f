"""Turns a build log into registers and spills: `registers.tsv`, and the table in each operator's README.

    python plugins/registers.py build.log            print the tables
    python plugins/registers.py build.log --write    write registers.tsv, and the READMEs' tables
    python plugins/registers.py build.log --check    fail where registers.tsv is out of date

The log is that of `nemoquant plugins build` (nvcc with -Xptxas=-v). registers.tsv has a line for each kernel
and architecture: architecture, folder, kernel, registers, bytes of stack, bytes of spill stores and loads,
bytes of static shared memory. A README's table stands between the lines `<!-- registers -->` and `<!--
/registers -->`, and sums up the variants of a kernel: fewest and most registers, most spills.
"""

import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
BEGIN, END = "<!-- registers -->", "<!-- /registers -->"
SHORTER = (("__nv_bfloat16", "bf16"), ("__half", "fp16"), ("float", "fp32"))


@dataclass(frozen=True)
class Kernel:
    """One instance of a kernel for one architecture; sizes in bytes."""

    arch: str
    folder: str
    name: str
    registers: int
    stack: int
    stores: int
    loads: int
    shared: int

    def line(self) -> str:
        return "\t".join(str(value) for value in vars(self).values())

    @property
    def template(self) -> str:
        """The name without its arguments."""
        return self.name.split("<")[0]


def demangled(names: list[str]) -> list[str]:
    """``causal_conv1d<bf16, fp32, 4, 1>``: without namespaces, result and parameters."""
    found = subprocess.run(
        ["c++filt"], input="\n".join(names), check=True, capture_output=True, text=True
    ).stdout.splitlines()
    short = []
    for name in found:
        name = re.sub(r"\((?:[^()]|\([^()]*\))*\)$", "", name.removeprefix("void "))
        head, angle, rest = name.partition("<")
        for long, brief in SHORTER:
            rest = rest.replace(long, brief)
        short.append(head.split("::")[-1] + angle + re.sub(r"\((?:int|bool|unsigned int|long)\)", "", rest))
    return short


def read(lines: Iterable[str]) -> list[Kernel]:
    """The kernels of a log, in its order; but for CUTLASS's, which are built on request only."""
    folder, arch, mangled, left_out = "", "", "", False
    spills = (0, 0, 0)
    found: list[tuple[str, str, str, int, tuple[int, int, int], int]] = []
    for line in lines:
        if step := re.match(r"\[\d+/\d+\] Building CUDA object \S*?/([\w.]+)/([\w.]+)\.o", line):
            folder, left_out = step[1], step[2].startswith("grouped_")
        elif left_out:
            continue
        elif entry := re.search(r"Compiling entry function '(\w+)' for '(\w+)'", line):
            mangled, arch = entry[1], entry[2]
        elif sizes := re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line
        ):
            spills = (int(sizes[1]), int(sizes[2]), int(sizes[3]))
        elif used := re.search(r"Used (\d+) registers", line):
            shared = re.search(r"(\d+) bytes smem", line)
            found.append((arch, folder, mangled, int(used[1]), spills, int(shared[1]) if shared else 0))
            spills = (0, 0, 0)
    names = demangled([mangled for _, _, mangled, *_ in found])
    return [Kernel(a, f, name, r, *s, m) for (a, f, _, r, s, m), name in zip(found, names, strict=True)]


def parse(text: str) -> list[Kernel]:
    """``registers.tsv`` back."""
    rows = (line.split("\t") for line in text.splitlines() if not line.startswith("#"))
    return [Kernel(arch, folder, name, *map(int, rest)) for arch, folder, name, *rest in rows]


def table(kernels: list[Kernel]) -> str:
    """Markdown: a row for each kernel, a column for each architecture."""
    archs = sorted({k.arch for k in kernels}, key=lambda a: int(re.sub(r"\D", "", a)))
    lines = [f"| kernel (variants) | {' | '.join(archs)} |", f"|---|{'---|' * len(archs)}"]
    for name in sorted({k.template for k in kernels}):
        cells = []
        for arch in archs:
            mine = [k for k in kernels if k.template == name and k.arch == arch]
            if not mine:  # of an architecture alone
                cells.append("")
                continue
            few, most, spilt = (
                min(k.registers for k in mine),
                max(k.registers for k in mine),
                [k for k in mine if k.stores or k.loads],
            )
            cell = f"{few}" if few == most else f"{few} to {most}"
            if spilt:
                cell += f"; {len(spilt)} spill, at most {max(k.stores + k.loads for k in spilt)} bytes"
            cells.append(cell)
        count = max(sum(k.template == name and k.arch == arch for k in kernels) for arch in archs)
        lines.append(f"| `{name}` ({count}) | {' | '.join(cells)} |")
    return "\n".join(lines)


def write(kernels: list[Kernel]) -> None:
    """registers.tsv, and the tables of the READMEs that have the two lines."""
    head = "# " + "\t".join(
        ("architecture", "folder", "kernel", "registers", "stack", "spill stores", "spill loads", "shared")
    )
    ordered = sorted(kernels, key=lambda k: (k.folder, k.name, len(k.arch), k.arch))
    (HERE / "registers.tsv").write_text(
        "\n".join([head, *(k.line() for k in ordered)]) + "\n", encoding="utf-8"
    )
    for folder in sorted({k.folder for k in kernels}):
        path = HERE / folder / "README.md"
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        before, begin, rest = text.partition(f"{BEGIN}\n")
        _, end, after = rest.partition(END)
        if not begin or not end:
            print(f"{path} has no {BEGIN} and {END}; its table was not written", file=sys.stderr)
            continue
        path.write_text(
            f"{before}{begin}{table([k for k in kernels if k.folder == folder])}\n{end}{after}",
            encoding="utf-8",
        )


def check(kernels: list[Kernel], kept: list[Kernel]) -> list[str]:
    """What ``kept`` says otherwise or does not know, of those that were built; and what it knows that a
    folder built here no longer has."""
    known, built = {k.line() for k in kept}, {k.line() for k in kernels}
    same = {(k.folder, k.arch) for k in kernels}
    return [f"built: {k.line()}" for k in kernels if k.line() not in known] + [
        f"kept:  {k.line()}" for k in kept if k.line() not in built and (k.folder, k.arch) in same
    ]


def main(log: str, *options: str) -> None:
    kernels = read(Path(log).read_text(encoding="utf-8").splitlines())
    if not kernels:
        sys.exit(
            f"{log} names no kernel; expected the log of a whole build, made anew by `nemoquant plugins "
            f"build --out NEW_FOLDER`"
        )
    if options == ("--write",):
        write(kernels)
        return
    if options == ("--check",):
        differences = check(kernels, parse((HERE / "registers.tsv").read_text(encoding="utf-8")))
        if differences:
            sys.exit(
                "\n".join(
                    [
                        *differences,
                        "registers.tsv is not of these sources; expected `registers.py LOG --write` after a "
                        "whole build",
                    ]
                )
            )
        return
    for folder in sorted({k.folder for k in kernels}):
        print(f"{folder}\n\n{table([k for k in kernels if k.folder == folder])}\n")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(*sys.argv[1:])
