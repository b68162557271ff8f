"""For memory tests: programs in separate processes that report their peak, and large checkpoints."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nemoquant.checkpoint.header import encode_header
from nemoquant.model.parse import parse_config
from nemoquant.model.roles import tensor_table
from support.processes import run_python

needs_proc = pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")

LARGE = {  # a model without its layers: the experts of one take 268 MB
    "model_type": "nemotron_h",
    "vocab_size": 4096,
    "hidden_size": 1024,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 4096,
    "mamba_num_heads": 32,
    "mamba_head_dim": 64,
    "ssm_state_size": 64,
    "n_groups": 2,
    "conv_kernel": 4,
    "chunk_size": 64,
    "n_routed_experts": 128,
    "num_experts_per_tok": 4,
    "n_shared_experts": 1,
    "moe_latent_size": 512,
    "moe_intermediate_size": 1024,
    "moe_shared_expert_intermediate_size": 2048,
    "routed_scaling_factor": 1.0,
    "eos_token_id": 2,
}

PROLOGUE = '''
import json, sys
from pathlib import Path

def memory(field="VmHWM"):
    """Bytes: the peak of resident memory, or another field. (ru_maxrss would begin at the parent's.)"""
    lines = (line.split() for line in open("/proc/self/status"))
    return next(1024 * int(words[1]) for words in lines if words[0] == field + ":")
'''


def child(program: str, *arguments: object) -> Any:
    """Runs a program with ``sys.argv[1:]``; returns its output, parsed as JSON.

    The program can use ``memory``, ``json``, ``sys`` and ``Path``.
    """
    return json.loads(run_python(PROLOGUE + program, *arguments).stdout)


def large_checkpoint(
    folder: Path, config: Mapping[str, Any], rows: tuple[int, int], elements: int = 8 << 20
) -> Path:
    """Writes ``folder``/source, and tokens next to it in rows.npy.

    The tensors are finite bf16, each written from one buffer of ``elements``.

    Args:
        rows: count and length.
        elements: no tensor may have more.
    """
    source = folder / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(config))
    table = [(s.name, s.dtype, s.shape) for s in tensor_table(parse_config(dict(config)))]
    noise = (
        (torch.randn(elements, generator=torch.Generator().manual_seed(0)) * 0.03)
        .to(torch.bfloat16)
        .view(torch.int16)
        .numpy()
    )
    with (source / "model.safetensors").open("wb") as f:
        f.write(encode_header(table, {}))
        for number, (_, dtype, shape) in enumerate(table):
            count = int(np.prod(shape))
            start = number * 4099 % (len(noise) - count)
            f.write(np.zeros(count, np.float32) if dtype == "F32" else noise[start : start + count])
    np.save(folder / "rows.npy", np.random.default_rng(0).integers(3, config["vocab_size"], rows))
    return source
