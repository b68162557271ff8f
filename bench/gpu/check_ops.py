"""Every operator against float64, its bits against the host build's, repeated, in graphs, on other streams.

    python -m bench.gpu.check_ops OUT.json                 on a CUDA device
    python -m bench.gpu.check_ops OUT.json cpu             through the host build, an emulator; smaller sizes
    python -m bench.gpu.check_ops OUT.json cpu --every 12  every twelfth case of these
    python -m bench.gpu.check_ops OUT.json --only grouped  cases with this word in their names

NQ_HOST_LIB names libnemoquant_host.so: needed for cpu; on a device without it no bits are compared. The
device's library is the one that nemoquant finds. After NQ_SECONDS (default 90) no new case starts. OUT.json
is written after every case, so that a crash leaves those before it. Memory that nobody wrote is NaN, so that
it shows. The exit code is 1 if a case is not right, or was late; what the library lacks is counted apart.
"""

import argparse
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch

from bench.gpu import check_convolution, check_experts, check_graphs, check_scan
from bench.gpu.cases import Case, Run
from bench.gpu.environment import need_device
from nemoquant.ops import library


def cases(device: str, host: Path | None) -> Iterator[Case]:
    """All of a device; see :func:`check_scan.cases` for ``host``."""
    yield from check_scan.cases(device, host)
    yield from check_convolution.cases(device)
    yield from check_experts.cases(device)
    if device == "cuda":
        yield from check_graphs.cases()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("out", type=Path, metavar="OUT.json")
    parser.add_argument("device", nargs="?", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="the first of every N cases alone")
    parser.add_argument("--only", default="", metavar="WORD", help="cases with this word in their names")
    options = parser.parse_args()
    host = Path(os.environ["NQ_HOST_LIB"]) if os.environ.get("NQ_HOST_LIB") else None
    if options.device == "cpu":
        if host is None:
            parser.error("cpu needs the host build: NQ_HOST_LIB=.../libnemoquant_host.so")
        library.use(host, "cpu")
    else:
        need_device()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    run = Run(options.out, options.device, float(os.environ.get("NQ_SECONDS", "90")))
    chosen = (case for case in cases(options.device, host) if options.only in case.name)
    for case in islice(chosen, 0, None, options.every):
        run.run(case)
    run.write()
    print(f"{len(run.results)} cases, {run.bad()} not ok, {run.missing()} missing, {run.elapsed():.1f} s")
    raise SystemExit(bool(run.bad()))


if __name__ == "__main__":
    main()
