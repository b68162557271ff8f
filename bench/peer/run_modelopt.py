"""Model Optimizer: load, calibrate, export. Arguments: SRC RECIPE ROWS.npy OUT; RECIPE is a name in
modelopt.torch.quantization."""

import sys

import numpy as np
import torch
from modelopt.torch import quantization
from modelopt.torch.export import export_hf_checkpoint
from transformers import AutoModelForCausalLM

source, recipe, rows, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
model.config._experts_implementation = "eager"  # its hooks see experts only there
tokens = torch.from_numpy(np.load(rows))
with torch.no_grad():
    quantization.quantize(model, getattr(quantization, recipe), lambda m: [m(row[None]) for row in tokens])
export_hf_checkpoint(model, export_dir=out)
