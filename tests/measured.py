"""What tests of memory share: programs in processes of their own, which tell how much they took, and checkpoints large enough to show."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nemoquant.checkpoint.header import encode_header
from nemoquant.model.config import parse_config
from nemoquant.model.roles import tensor_table

needs_proc = pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")

PROLOGUE = '''
import json, sys
from pathlib import Path

def memory(field="VmHWM"):
    """Bytes: the peak of resident memory, or another field. (ru_maxrss would begin at the parent's, at the fork.)"""
    return next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field + ":"))
'''


def child(program: str, *arguments: object) -> Any:
    """Run a program, which has ``memory``, ``json``, ``sys`` and ``Path``, with ``sys.argv[1:]``; returns what it printed, as JSON."""
    command = [sys.executable, "-c", PROLOGUE + program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def large_checkpoint(folder: Path, config: Mapping[str, Any], rows: tuple[int, int], elements: int = 8 << 20) -> Path:
    """``folder``/source, of finite bf16 written from one buffer of ``elements`` a tensor at a time, and tokens beside it in rows.npy.

    Args:
        rows: count and length.
        elements: no tensor may have more.
    """
    source = folder / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(config))
    table = [(s.name, s.dtype, s.shape) for s in tensor_table(parse_config(dict(config)))]
    noise = (
        (torch.randn(elements, generator=torch.Generator().manual_seed(0)) * 0.03).to(torch.bfloat16).view(torch.int16).numpy()
    )
    with (source / "model.safetensors").open("wb") as f:
        f.write(encode_header(table, {}))
        for number, (_, dtype, shape) in enumerate(table):
            count = int(np.prod(shape))
            start = number * 4099 % (len(noise) - count)
            f.write(np.zeros(count, np.float32) if dtype == "F32" else noise[start : start + count])
    np.save(folder / "rows.npy", np.random.default_rng(0).integers(3, config["vocab_size"], rows))
    return source
