"""Times of every operator; beside them the floor, torch, and mamba_ssm's kernels where they can be imported.

    python -m bench.gpu.bench_ops OUT.json           Super's shapes: what fits into two minutes
    python -m bench.gpu.bench_ops OUT.json --wide    Nano's too; more batches, lengths, formats and products

Needs a CUDA device and its kernels: `nemoquant plugins build`, or NEMOQUANT_KERNELS. After NQ_SECONDS
(default 110; a wide table needs more) no new row starts. Times are medians over replayed graphs of calls that
work on more memory than the L2 cache holds. Floors come from a copy and a bf16 product, measured first.
"""

import argparse
import os
from pathlib import Path

from bench.gpu import bench_convolution, bench_experts, bench_scan
from bench.gpu.environment import need_device
from bench.gpu.timing import Table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("out", type=Path, metavar="OUT.json")
    parser.add_argument("--wide", action="store_true", help="more models, shapes and formats")
    options = parser.parse_args()
    need_device()
    table = Table(options.out, float(os.environ.get("NQ_SECONDS", "110")))
    print(table.limits.json(), flush=True)
    for operator in (bench_experts, bench_convolution, bench_scan):  # the last one ends with others' kernels
        operator.rows(table, options.wide)
    table.finish()
    print(f"{table.elapsed():.1f} s")


if __name__ == "__main__":
    main()
