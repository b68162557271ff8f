"""llm-compressor by a job (see nemotron_h.py): its GPTQ in one shot, and its own export. Argument:
JOB.json.

It makes linear layers of experts by its own means. Method `gptq` is with its defaults, which calibrate
every expert on every token; `gptq:routed` calibrates an expert on the tokens that reach it.
"""

import sys

import torch
from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from nemotron_h import load, narrow, read_job

SCHEMES = {("nvfp4", "nvfp4"): "NVFP4", ("nvfp4", None): "NVFP4A16", ("fp8", "fp8"): "FP8"}
MODIFIERS = {"gptq": GPTQModifier, "max": QuantizationModifier}


def main() -> None:
    job = read_job(sys.argv[1])
    method, _, how = job.method.partition(":")
    groups: dict[str, list[str]] = {}
    for module, formats in job.map.items():
        groups.setdefault(SCHEMES[formats], []).append(module)
    config = {f"group_{i}": preset_name_to_scheme(name, groups[name]) for i, name in enumerate(groups)}
    model = load(job.source, separate=False)
    rows = Dataset.from_dict(
        {"input_ids": job.rows.tolist(), "attention_mask": torch.ones_like(job.rows).tolist()}
    )
    oneshot(
        model=model,
        dataset=rows,
        recipe=MODIFIERS[method](config_groups=config),
        num_calibration_samples=len(job.rows),
        max_seq_length=job.rows.shape[1],
        shuffle_calibration_samples=False,
        moe_calibrate_all_experts=how != "routed",
    )
    narrow(model)
    model.save_pretrained(job.out, save_compressed=True)


if __name__ == "__main__":
    main()
