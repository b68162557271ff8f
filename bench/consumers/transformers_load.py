"""How near transformers comes to bf16 with a folder, as it loads it: KL of its logits.

    python bench/consumers/transformers_load.py MODEL FOLDER...

MODEL is the bf16 checkpoint. It needs transformers 5.19, compressed-tensors and accelerate, and nothing of
nemoquant: run it in an environment of its own. Rows have `chunk_size` tokens: beyond that transformers' torch
path of Mamba-2 (5.6 to 5.19) is wrong. Its figures are in docs/converting.md.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

ROWS = 16
TEXT = Path(__file__).parents[2] / "calib/data/evaluation.jsonl"


def load(folder: Path) -> Any:
    """The model of a folder on its torch path, without transformers' own lower limit of dt."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, use_mamba_kernels=False)
    for module in model.modules():
        if hasattr(module, "time_step_min"):
            module.time_step_min = 0.0
    return model.eval()


def rows(folder: Path) -> torch.Tensor:
    """Token ids [ROWS, chunk_size] of text that calibration did not see."""
    from tokenizers import Tokenizer

    length = json.loads((folder / "config.json").read_text())["chunk_size"]
    text = "".join(json.loads(line)["text"] for line in TEXT.read_text(encoding="utf-8").splitlines())
    ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids
    step = (len(ids) - length) // ROWS
    return torch.tensor([ids[i * step : i * step + length] for i in range(ROWS)])


@torch.no_grad()
def logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """Log probabilities [rows, tokens, vocabulary], float32."""
    model = load(folder)
    return torch.cat([model(row[None], use_cache=False).logits.float().log_softmax(-1) for row in ids])


def main() -> None:
    model, *folders = map(Path, sys.argv[1:])
    ids = rows(model)
    reference = logits(model, ids)
    for folder in folders:
        try:
            found = logits(folder, ids)
        except Exception as error:
            print(f"{folder}: {type(error).__name__}: {str(error).splitlines()[0][:200]}")
            continue
        kl = (reference.exp() * (reference - found)).sum(-1)
        top1 = (reference.argmax(-1) == found.argmax(-1)).float().mean()
        print(f"{folder}: KL {kl.mean():.5f}, median {kl.median():.5f}, top-1 {100 * top1:.2f}%")


if __name__ == "__main__":
    main()
