"""Every operator against float64, its bits against the host build's, repeated, in graphs, on other streams.

    python -m bench.gpu.check_ops OUT.json                 on a CUDA device
    python -m bench.gpu.check_ops OUT.json cpu             through the host build, an emulator; smaller sizes
    python -m bench.gpu.check_ops OUT.json cpu --every 12  every twelfth case of these
    python -m bench.gpu.check_ops OUT.json --only grouped  cases with this word in their names

NQ_HOST_LIB names libnemoquant_host.so: needed for cpu; on a device without it no bits are compared. The
device's library is the one that nemoquant finds. After NQ_SECONDS (default 90) no new case starts. OUT.json
is written after every case; on a device, where a fault ends a process, another goes on behind the case in
which it died. Memory that nobody wrote is NaN, so that it shows. The exit code is 1 if a case is not right,
or was late; what the library lacks is counted apart.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import torch

from bench.gpu import check_convolution, check_experts, check_graphs, check_scan
from bench.gpu.cases import DIED, Case, Run
from bench.gpu.environment import need_device
from nemoquant.ops import library


def cases(device: str, host: Path | None) -> Iterator[Case]:
    """All of a device; see :func:`check_scan.cases` for ``host``."""
    yield from check_scan.cases(device, host)
    yield from check_convolution.cases(device)
    yield from check_experts.cases(device)
    if device == "cuda":
        yield from check_graphs.cases()


def left_to_do(out: Path) -> list[str]:
    """Names of cases without a result; none where there are no results to go on from."""
    try:
        found = json.loads(out.read_text())
    except (OSError, ValueError):
        return []
    done = {found["running"], *(row["case"] for row in found["results"])}
    return [name for name in found["cases"] if name not in done]


def settle(out: Path) -> None:
    """The case that was running when the last process died becomes a wrong one."""
    if out.is_file() and json.loads(out.read_text())["running"]:
        found = json.loads(out.read_text())
        found["results"].append({"case": found["running"], "ok": False, "why": DIED})
        out.write_text(json.dumps(found | {"running": None}, indent=0))


def supervise(command: Sequence[str], out: Path, seconds: float) -> int:
    """Run a command that writes ``out``, again with ``--resume`` as long as a fault ends it.

    A case in which a process died is a wrong one, the last one too. Returns 0 if all went well, else 1.
    """
    until, resume, before, died = time.monotonic() + seconds, [], None, False
    out.unlink(missing_ok=True)
    while True:
        variables = os.environ | {"NQ_SECONDS": str(max(0.0, until - time.monotonic()))}
        code = subprocess.run([*command, *resume], env=variables, check=False).returncode
        left = left_to_do(out)
        if not left or left == before or time.monotonic() > until:
            settle(out)
            return int(bool(code) or died)
        print(f"a process ended with exit code {code}; another goes on with {left[0]}", flush=True)
        resume, before, died = ["--resume"], left, True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("out", type=Path, metavar="OUT.json")
    parser.add_argument("device", nargs="?", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="the first of every N cases alone")
    parser.add_argument("--only", default="", metavar="WORD", help="cases with this word in their names")
    parser.add_argument("--resume", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--here", action="store_true", help="in this process: a fault of the device ends it")
    options = parser.parse_args()
    seconds = float(os.environ.get("NQ_SECONDS", "90"))
    if options.device == "cuda":
        need_device()
    if options.device == "cuda" and not options.here:
        command = [sys.executable, "-m", "bench.gpu.check_ops", *sys.argv[1:], "--here"]
        raise SystemExit(supervise(command, options.out, seconds))
    host = Path(os.environ["NQ_HOST_LIB"]) if os.environ.get("NQ_HOST_LIB") else None
    if options.device == "cpu":
        if host is None:
            parser.error("cpu needs the host build: NQ_HOST_LIB=.../libnemoquant_host.so")
        library.use(host, "cpu")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    named = (case for case in cases(options.device, host) if options.only in case.name)
    chosen = list(islice(named, 0, None, options.every))
    run = Run(options.out, options.device, seconds, [case.name for case in chosen], options.resume)
    for case in chosen:
        run.run(case)
    run.write()
    print(f"{len(run.results)} cases, {run.bad()} not ok, {run.missing()} missing, {run.elapsed():.1f} s")
    raise SystemExit(bool(run.bad()))


if __name__ == "__main__":
    main()
