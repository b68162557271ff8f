"""llm-compressor: data-free quantization of what our recipes quantize. Arguments: SRC SCHEME OUT; SCHEME is
NVFP4A16 or FP8_DYNAMIC."""

import sys

from llmcompressor import model_free_ptq

source, scheme, out = sys.argv[1:]
ignore = [
    "re:.*conv1d.*",
    r"re:backbone\.embedding.*",
    "re:.*_latent_proj.*",
    r"re:.*mixer.gate\..*",
    "backbone.norm_f",
    "lm_head",
]
if scheme == "NVFP4A16":  # routed experts alone
    ignore += ["re:.*shared_experts.*", "re:.*in_proj", "re:.*out_proj", "re:.*[qkvo]_proj"]
model_free_ptq(
    model_stub=source, save_directory=out, scheme=scheme, ignore=ignore, max_workers=2, device="cpu"
)
