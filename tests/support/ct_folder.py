"""A checkpoint in the compressed-tensors layout, as llm-compressor saves it: by the package's compressors."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from support.oracle_tensors import read
from support.pack_oracle import format_of

FORMAT = {
    "FP8": "float-quantized",
    "FP8_DYNAMIC": "float-quantized",
    "NVFP4": "nvfp4-pack-quantized",
    "NVFP4A16": "nvfp4-pack-quantized",
    "MXFP8": "mxfp8-quantized",
}
TARGETS = ["re:.*mixer\\.experts\\..*", "re:.*mixer\\.(in|out)_proj$", "re:.*_proj$"]
IGNORE = ["lm_head", "re:^mtp.*", "re:.*latent_proj$", "re:.*gate$"]
INPUT = 0.125  # decode scale of every input of FP8; NVFP4's global scale is 1 / it


def compressed(weight: Tensor, name: str) -> dict[str, Tensor]:
    """The parts of one weight by their names in its module, by the compressor of a preset scheme."""
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
    from compressed_tensors.quantization.utils import calculate_qparams

    scheme = preset_name_to_scheme(name, ["Linear"])
    args = scheme.weights
    assert args is not None
    state = {"weight": weight}
    w, inputs = weight.float(), torch.full((1,), INPUT)
    if name.startswith("NVFP4"):
        state["weight_global_scale"] = (448 * 6 / w.abs().amax()).reshape(1)
        blocks = w.reshape(w.shape[0], -1, 16)
        state["weight_scale"], _ = calculate_qparams(
            blocks.amin(-1), blocks.amax(-1), args, global_scale=state["weight_global_scale"]
        )
        if scheme.input_activations is not None:
            state["input_global_scale"] = 1 / inputs
    elif name == "MXFP8":
        blocks = w.reshape(w.shape[0], -1, 32)
        state["weight_scale"], _ = calculate_qparams(blocks.amin(-1), blocks.amax(-1), args)
    elif name == "FP8":
        state["weight_scale"] = (w.abs().amax() / 448).to(weight.dtype).reshape(1)
        state["input_scale"] = inputs.to(weight.dtype)
    else:
        state["weight_scale"] = (w.abs().amax(1, keepdim=True) / 448).to(weight.dtype)
    parts: dict[str, Tensor] = BaseCompressor.get_value_from_registry(FORMAT[name]).compress(state, scheme)
    return parts


def decompressed(parts: dict[str, Tensor], name: str) -> Tensor:
    """A weight decoded by the package, bf16 or float32."""
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme

    scheme = preset_name_to_scheme(name, ["Linear"])
    codec = BaseCompressor.get_value_from_registry(FORMAT[name])
    found: Tensor = codec.decompress(dict(parts), scheme)["weight"]
    return found


def config_section(name: str, **changes: Any) -> dict[str, Any]:
    """The ``quantization_config`` of a scheme, as the package writes it into config.json."""
    from compressed_tensors.quantization import QuantizationScheme
    from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES

    scheme = QuantizationScheme(targets=TARGETS, format=FORMAT[name], **PRESET_SCHEMES[name])
    group = json.loads(scheme.model_dump_json())
    section = {
        "config_groups": {"group_0": group},
        "format": FORMAT[name],
        "global_compression_ratio": None,
        "ignore": IGNORE,
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }
    return section | changes


def ct_folder(source: Path, out: Path, name: str, **changes: Any) -> Path:
    """``source`` with every projection in a scheme, in one file. ``changes`` of the section of its config."""
    shutil.copytree(source, out, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
    tensors = {}
    for key, tensor in read(source).items():
        if format_of("fp8", key) is not None:
            module = key.removesuffix(".weight")
            tensors |= {f"{module}.{part}": t.contiguous() for part, t in compressed(tensor, name).items()}
        else:
            tensors[key] = tensor
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    raw = json.loads((out / "config.json").read_text())
    raw["quantization_config"] = config_section(name, **changes)
    (out / "config.json").write_text(json.dumps(raw))
    return out
