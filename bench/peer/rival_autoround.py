"""AutoRound by a job (see nemotron_h.py), exported in its format `llm_compressor`. Argument: JOB.json.

Methods: `signround` (its defaults: 200 steps of signed gradient descent a block, of 8 rows each),
`signround:N` with N steps, and `rtn` (iters=0). It makes linear layers of experts by its own means. It
replays every block with the arguments of the first, so a mask for that (Mamba) block would reach attention,
which refuses it: rows are full, and are given without a mask.
"""

import json
import sys
from collections import Counter
from pathlib import Path

import torch
from auto_round import AutoRound
from nemotron_h import load, read_job
from transformers import AutoTokenizer

NVFP4 = {"bits": 4, "group_size": 16, "data_type": "nv_fp", "sym": True}
NVFP4_INPUTS = {"act_bits": 4, "act_data_type": "nv_fp4_with_static_gs", "act_group_size": 16}
FP8 = {"bits": 8, "group_size": 0, "data_type": "fp", "sym": True}  # 0: one scale a tensor
FP8_INPUTS = {
    "act_bits": 8,
    "act_data_type": "fp",
    "act_group_size": 0,
    "act_sym": True,
    "act_dynamic": False,
}
SCHEMES = {
    ("nvfp4", "nvfp4"): NVFP4 | NVFP4_INPUTS | {"act_sym": True, "act_dynamic": True},
    ("nvfp4", None): NVFP4 | {"act_bits": 16},
    ("fp8", "fp8"): FP8 | FP8_INPUTS,
}
AS_IT_IS = {"bits": 16, "act_bits": 16, "data_type": "fp", "act_data_type": "fp"}


def declare(path: Path, weights_only: bool) -> None:
    """Say what the export is: it declares linear layers of the MTP module, whose tensors are copied as they
    are, quantized too, and weights without quantized inputs as NVFP4 with them."""
    config = json.loads(path.read_text())
    config["quantization_config"]["ignore"].append("re:.*mtp.*")
    if weights_only:
        for group in config["quantization_config"]["config_groups"].values():
            group["input_activations"] = None
    path.write_text(json.dumps(config, indent=2))


def main() -> None:
    job = read_job(sys.argv[1])
    method, _, steps = job.method.partition(":")
    # The scheme that is not by layer must be that of the experts, which are no linear layers yet.
    (formats, _), *others = Counter(job.map.values()).most_common()
    model = load(job.source, separate=False)
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    kept = {name: dict(AS_IT_IS) for name in linear if name not in job.map}
    kept |= {name: dict(SCHEMES[given]) for name, given in job.map.items() if given in dict(others)}
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
    declare(Path(job.out) / "config.json", weights_only=all(inputs is None for _, inputs in job.map.values()))


if __name__ == "__main__":
    main()
