"""AutoRound by a job (see nemotron_h.py), exported in its format `llm_compressor`. Argument: JOB.json.

Methods: `signround` (its defaults: 200 steps of signed gradient descent a block, of 8 rows each),
`signround:N` with N steps, and `rtn` (iters=0). It makes linear layers of experts by its own means. It
replays every block with the arguments of the first, so a mask for that (Mamba) block would reach attention,
which refuses it: rows are full, and are given without a mask.
"""

import json
import sys
from pathlib import Path

import torch
from auto_round import AutoRound
from nemotron_h import load, read_job
from transformers import AutoTokenizer

NVFP4 = {"bits": 4, "group_size": 16, "data_type": "nv_fp", "sym": True}
NVFP4_INPUTS = {"act_bits": 4, "act_data_type": "nv_fp4_with_static_gs", "act_group_size": 16}
SCHEMES = {
    ("nvfp4", "nvfp4"): NVFP4 | NVFP4_INPUTS | {"act_sym": True, "act_dynamic": True},
    ("nvfp4", None): NVFP4 | {"act_bits": 16},
    ("fp8", "fp8"): "FP8_STATIC",
}
AS_IT_IS = {"bits": 16, "act_bits": 16, "data_type": "fp", "act_data_type": "fp"}


def declare_predictors(path: Path) -> None:
    """Its export copies the MTP module's tensors as they are, and declares every linear layer quantized."""
    config = json.loads(path.read_text())
    config["quantization_config"]["ignore"].append("re:.*mtp.*")
    path.write_text(json.dumps(config, indent=2))


def main() -> None:
    job = read_job(sys.argv[1])
    method, _, steps = job.method.partition(":")
    (formats,) = set(job.map.values())
    model = load(job.source, separate=False)
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    kept = {name: dict(AS_IT_IS) for name in linear if name not in job.map}
    rows = [{"input_ids": row[None], "attention_mask": None} for row in job.rows]
    rounding = AutoRound(
        model,
        AutoTokenizer.from_pretrained(job.source),
        scheme=SCHEMES[formats],
        layer_config=kept,
        dataset=rows,
        nsamples=len(rows),
        seqlen=job.rows.shape[1],
        iters=0 if method == "rtn" else int(steps or 200),
        device_map="cpu",
        amp=False,
        disable_model_free=True,
    )
    rounding.quantize_and_save(job.out, format="llm_compressor")
    for folder in list(Path(job.out).iterdir()):  # it makes one there, named after the model
        for file in folder.iterdir():
            file.rename(Path(job.out) / file.name)
        folder.rmdir()
    declare_predictors(Path(job.out) / "config.json")


if __name__ == "__main__":
    main()
