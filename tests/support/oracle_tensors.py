"""Tensors of a written folder, read by the safetensors library; an independent decoder of the formats."""

import re
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from support.pack_oracle import decode_nvfp4

SCALES = ("weight_scale", "weight_scale_2", "input_scale", "k_scale", "v_scale")


def read(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder, by name."""
    return {
        name: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def raw(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, flat."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def equal(a: Tensor, b: Tensor) -> bool:
    """The same dtype, shape and bytes (so -0.0 differs from 0.0)."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(raw(a), raw(b))


def is_scale(name: str) -> bool:
    """Whether a name is that of a scale of any kind."""
    return name.rsplit(".", 1)[1] in SCALES


def weights(tensors: dict[str, Tensor], dtype: torch.dtype) -> list[str]:
    """Names of the weights whose codes have this dtype: float8_e4m3fn for FP8 and MXFP8, uint8 for NVFP4."""
    return [name for name, tensor in tensors.items() if tensor.dtype == dtype and not is_scale(name)]


def decode(tensors: dict[str, Tensor], low_nibble_first: bool = True) -> dict[str, Tensor]:
    """The weights as float32 with the source's names, without scales; tensors that are not quantized stay."""
    result = {}
    for name, tensor in tensors.items():
        if is_scale(name):
            continue
        if tensor.dtype == torch.float8_e4m3fn:
            scale = tensors[name + "_scale"]
            if scale.dtype == torch.uint8:  # MXFP8
                scale = scale.view(torch.float8_e8m0fnu).float().repeat_interleave(32, 1)
            tensor = tensor.float() * scale
        elif tensor.dtype == torch.uint8:
            codes = tensor if low_nibble_first else tensor << 4 | tensor >> 4
            tensor = decode_nvfp4(codes, tensors[name + "_scale"], tensors[name + "_scale_2"])
        result[name] = tensor
    return result


def expert_projection(module: str) -> str | None:
    """``backbone.layers.2.mixer.experts.*.up_proj`` of an expert's module (or tensor) name, else None."""
    return (
        re.sub(r"\.experts\.\d+\.", ".experts.*.", module) if re.search(r"\.experts\.\d+\.", module) else None
    )


def sqnr(weight: Tensor, decoded: Tensor) -> float:
    """Signal over quantization noise, in dB."""
    weight, decoded = weight.double(), decoded.double()
    return float(10 * torch.log10(weight.square().sum() / (weight - decoded).square().sum()))
