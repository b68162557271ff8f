"""The oracle: NVIDIA Model Optimizer quantizes a checkpoint folder on a CPU.

It uses ``mtq.quantize`` and ``export_hf_checkpoint``. The maps are written here in Model Optimizer's own
terms, with the names of our presets. Needs the extra `modelopt`.
"""

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

MARKS = [
    pytest.mark.skipif(
        importlib.util.find_spec("modelopt") is None,
        reason="needs nvidia-modelopt (extra: modelopt), the oracle",
    ),
    # importing modelopt runs torch.jit.script and script_method, in torch's modules and its own; torch has
    # deprecated both
    pytest.mark.filterwarnings("ignore:`torch.jit.script(_method)?` is deprecated:DeprecationWarning"),
    # its export copies scales with torch.tensor(tensor)
    pytest.mark.filterwarnings("ignore:To copy construct from a tensor, it is recommended:UserWarning"),
]

EXPERTS = ("*mixer.experts.*",)  # fused in transformers: ``experts.up_proj_weight_quantizers.7`` and so on
MLP = ("*mixer.up_proj*", "*mixer.down_proj*")
OTHERS = (
    "*mixer.shared_experts.*",
    "*mixer.[qkvo]_proj*",
    "*mixer.in_proj*",
    "*mixer.out_proj*",
)
NUMBERS: dict[str, dict[str, Any]] = {
    "fp8": {"num_bits": (4, 3), "axis": None},
    "mxfp8": {"num_bits": (4, 3), "block_sizes": {-1: 32, "type": "dynamic", "scale_bits": (8, 0)}},
    "nvfp4": {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}},
}
MAPS = {  # preset -> patterns by format
    "fp8": {"fp8": EXPERTS + MLP + OTHERS},
    "mxfp8": {"mxfp8": EXPERTS + MLP + OTHERS},
    "nvfp4-full": {"nvfp4": EXPERTS + MLP + OTHERS},
    "nvfp4": {"nvfp4": EXPERTS + MLP, "fp8": OTHERS},
    "nvfp4-w4a16": {"nvfp4": EXPERTS + MLP},
}
UNCALIBRATED = ("mxfp8", "nvfp4-w4a16")  # no scale of theirs depends on tokens
# modelopt 0.47 marks names with ".\0modelopt_name_sentinel" while it renames them. transformers' rule
# `model.` -> `backbone.` is a regular expression that matches "modelo" as well, so that the mark is not
# recognised and stays in the files.
SENTINEL = ".\0backbone.pt_name_sentinel"


def quant_config(preset: str) -> dict[str, Any]:
    """The mtq configuration, with max calibration.

    All is off first, then the map's weights and inputs are on, then the KV cache of calibrated presets.
    """
    weight_only = preset == "nvfp4-w4a16"
    entries: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    for fmt, patterns in MAPS[preset].items():
        for pattern in patterns:
            sides = ("weight_quantizer",) if weight_only else ("weight_quantizer", "input_quantizer")
            entries += [
                {"quantizer_name": pattern + side, "enable": True, "cfg": dict(NUMBERS[fmt])}
                for side in sides
            ]
    if preset not in UNCALIBRATED:
        entries.append({"quantizer_name": "*[kv]_bmm_quantizer", "enable": True, "cfg": {"num_bits": (4, 3)}})
    return {"quant_cfg": entries, "algorithm": {"method": "max"}}


def load(folder: Path, dtype: torch.dtype) -> Any:
    """transformers' model of a checkpoint folder, on its torch path, without its lower limit of dt.

    That path is wrong for sequences longer than ``chunk_size`` (its issue 47246).
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, experts_implementation="eager", use_mamba_kernels=False
    )
    for module in model.modules():
        if hasattr(module, "time_step_min"):
            module.time_step_min = 0.0
    return model.eval()


def run(
    source: Path, out: Path, preset: str, rows: torch.Tensor, dtype: torch.dtype = torch.bfloat16
) -> Path:
    """Quantizes ``source`` by a preset's map and exports it to ``out``.

    Calibration takes ``rows`` [rows, length].

    Args:
        dtype: the dtype of the loaded model and of calibration. Users take bfloat16; see
        test_oracle_modelopt_scales.py.
    """
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint

    @torch.no_grad()
    def calibrate(model: Any) -> None:
        for row in rows:
            model(row[None], use_cache=False)  # its cache does not support MLP layers

    model = load(source, dtype)
    mtq.quantize(model, quant_config(preset), calibrate)
    export_hf_checkpoint(model, export_dir=out)
    return out


def strip_sentinel(data: Any) -> Any:
    """JSON data without the mark that modelopt leaves on names."""
    return json.loads(json.dumps(data).replace(json.dumps(SENTINEL)[1:-1], ""))
