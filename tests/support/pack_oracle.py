"""A second implementation of docs/design.md, "Numbers", and of the safetensors format.

It uses only numpy and torch, nothing of nemoquant. Rounding to E4M3 is torch's own cast; rounding to E2M1
counts the midpoints that a magnitude passes.
"""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

HEADROOM = {"nvfp4": 2, "nvfp4-full": 2}  # of the presets, for the scales of NVFP4 inputs
UNCALIBRATED = ("mxfp8", "nvfp4-full-w4a16", "nvfp4-w4a16")  # by method max
PRESETS = ("fp8", "fp8-published", "mxfp8", "nvfp4", "nvfp4-full", "nvfp4-full-w4a16", "nvfp4-w4a16")

# docs/design.md, "Presets": group of modules -> format of its weights.
FORMATS = {
    "fp8": dict.fromkeys(("experts", "mlp", "shared", "attention", "mamba"), "fp8"),
    "fp8-published": dict.fromkeys(("experts", "mlp", "shared", "mamba"), "fp8"),
    "mxfp8": dict.fromkeys(("experts", "mlp", "shared", "attention", "mamba"), "mxfp8"),
    "nvfp4": {"experts": "nvfp4", "mlp": "nvfp4", "shared": "fp8", "attention": "fp8", "mamba": "fp8"},
    "nvfp4-full": dict.fromkeys(("experts", "mlp", "shared", "attention", "mamba"), "nvfp4"),
    "nvfp4-full-w4a16": dict.fromkeys(("experts", "mlp", "shared", "attention", "mamba"), "nvfp4-weights"),
    "nvfp4-w4a16": {"experts": "nvfp4-weights", "mlp": "nvfp4-weights"},
}
GROUPS = {
    "experts": r"backbone\.layers\.\d+\.mixer\.experts\.\d+\.(up|down)_proj",
    "mlp": r"backbone\.layers\.\d+\.mixer\.(up|down)_proj",
    "shared": r"backbone\.layers\.\d+\.mixer\.shared_experts\.(up|down)_proj",
    "attention": r"backbone\.layers\.\d+\.mixer\.[qkvo]_proj",
    "mamba": r"backbone\.layers\.\d+\.mixer\.(in|out)_proj",
}
DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn,
}


E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])


class Stored(NamedTuple):
    """One tensor of a file; ``start`` is the offset of its first byte from the beginning of the file."""

    dtype: str
    shape: list[int]
    data: bytes
    file: str
    start: int

    def tensor(self) -> torch.Tensor:
        return torch.frombuffer(bytearray(self.data), dtype=DTYPES[self.dtype]).reshape(self.shape)


def read(folder: Path) -> dict[str, Stored]:
    """Every tensor of every safetensors file, in the order of the bytes."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        raw = file.read_bytes()
        begin = 8 + int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8:begin])
        header.pop("__metadata__", None)
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            start, end = (begin + offset for offset in entry["data_offsets"])
            found[name] = Stored(entry["dtype"], entry["shape"], raw[start:end], file.name, start)
    return found


def scales_of(out: Path) -> dict[str, Any] | None:
    """Content of an output's scales file, None if it needed none."""
    file = out / "nemoquant_scales.json"
    return json.loads(file.read_text()) if file.exists() else None


def format_of(preset: str, name: str) -> str | None:
    """The format that a preset gives a tensor of the source; None if the tensor stays."""
    module = name.removesuffix(".weight")
    return next(
        (form for group, form in FORMATS[preset].items() if re.fullmatch(GROUPS[group], module)), None
    )


def e4m3(values: torch.Tensor) -> torch.Tensor:
    """float32 -> E4M3 codes, saturated."""
    return values.clamp(-448, 448).to(torch.float8_e4m3fn)


def e2m1(values: torch.Tensor) -> torch.Tensor:
    """float32 -> codes 0 to 15; a tie goes to the even code.

    A magnitude's code is the number of midpoints below it.
    """
    magnitude = values.abs()
    code = torch.zeros(values.shape, dtype=torch.uint8)
    for i, midpoint in enumerate((0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)):
        code += (magnitude > midpoint) | ((magnitude == midpoint) & (i % 2 == 1))
    return code + 8 * (values < 0).to(torch.uint8)


def fp8(weight: torch.Tensor, amax: float) -> tuple[bytes, np.float32]:
    """codes, weight_scale"""
    scale = np.float32(amax) / np.float32(448)
    return e4m3(weight / torch.tensor(scale)).view(torch.uint8).numpy().tobytes(), scale


def mxfp8(weight: torch.Tensor) -> tuple[bytes, bytes]:
    """codes, block scales; the exponent by comparing with every power of two"""
    blocks = weight.reshape(weight.shape[0], -1, 32)
    quotient = (blocks.abs().amax(-1) / 448).double()
    exponents = torch.searchsorted(torch.exp2(torch.arange(-127, 128, dtype=torch.float64)), quotient)
    codes = e4m3((blocks.double() * torch.exp2(127 - exponents.double())[..., None]).float())
    return codes.view(torch.uint8).numpy().tobytes(), exponents.to(torch.uint8).numpy().tobytes()


def nvfp4(weight: torch.Tensor, amax: float) -> tuple[bytes, bytes, np.float32]:
    """packed codes, block scales, weight_scale_2"""
    scale = np.float32(amax) / np.float32(6 * 448)
    blocks = weight.reshape(weight.shape[0], -1, 16)
    block_amax = blocks.abs().amax(-1)
    wanted = (block_amax / torch.tensor(np.float32(6) * scale)).clamp(2.0**-9, 448)
    block_scales = e4m3(torch.where(block_amax == 0, torch.ones(()), wanted))
    step = block_scales.float() * torch.tensor(scale)
    codes = e2m1(blocks / step[..., None]).reshape(weight.shape)
    packed = codes[:, 0::2] | codes[:, 1::2] << 4
    return packed.numpy().tobytes(), block_scales.view(torch.uint8).numpy().tobytes(), scale


def decode_nvfp4(codes: torch.Tensor, block_scales: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Decodes from a table: [out, in/2], [out, in/16] -> float32 [out, in]."""
    values = torch.stack([E2M1[(codes & 15).long()], E2M1[(codes >> 4).long()]], -1).flatten(1)
    return values * (block_scales.float() * scale).repeat_interleave(16, 1)


def scalar(value: np.float32) -> tuple[str, list[int], bytes]:
    return "F32", [], np.float32(value).tobytes()


def expected(
    source: Path, preset: str, scales: dict[str, Any] | None, groups: bool = True
) -> dict[str, tuple[str, list[int], bytes]]:
    """Name -> (dtype, shape, bytes) of every tensor that ``preset`` makes from ``source``.

    ``scales`` is the scales file's content.
    """
    tensors = read(source)
    amax = {name: float(t.tensor().float().abs().max()) for name, t in tensors.items()}
    inputs = scales["input_amax"] if scales else {}
    result = {}
    for name, stored in tensors.items():
        form = format_of(preset, name)
        if form is None:
            result[name] = (stored.dtype, stored.shape, stored.data)
            continue
        module = name.removesuffix(".weight")
        weight = stored.tensor().float()
        if form == "mxfp8":
            codes, block_scales = mxfp8(weight)
            out, columns = stored.shape
            result[f"{module}.weight"] = ("F8_E4M3", [out, columns], codes)
            result[f"{module}.weight_scale"] = ("U8", [out, columns // 32], block_scales)
            continue
        largest, seen = amax[name], inputs.get(module)
        if groups and (qkv := re.fullmatch(r"(.+\.mixer\.)[qkv]_proj", module)):
            largest = max(amax[f"{qkv[1]}{p}_proj.weight"] for p in "qkv")
            seen = max(inputs[f"{qkv[1]}{p}_proj"] for p in "qkv") if scales else None
        if expert := re.fullmatch(r"(.+\.experts)\.\d+\.(.+)", module):
            layer = [
                v for m, v in inputs.items() if re.fullmatch(rf"{re.escape(expert[1])}\.\d+\.{expert[2]}", m)
            ]
            seen = (max(layer) if layer else None) if groups or seen is None else seen
        out, columns = stored.shape
        if form == "fp8":
            codes, scale = fp8(weight, largest)
            result[f"{module}.weight"] = ("F8_E4M3", [out, columns], codes)
            result[f"{module}.weight_scale"] = scalar(scale)
            result[f"{module}.input_scale"] = scalar(np.float32(seen) / np.float32(448))
        else:
            codes, block_scales, scale = nvfp4(weight, largest)
            result[f"{module}.weight"] = ("U8", [out, columns // 2], codes)
            result[f"{module}.weight_scale"] = ("F8_E4M3", [out, columns // 16], block_scales)
            result[f"{module}.weight_scale_2"] = scalar(scale)
            if form == "nvfp4":
                result[f"{module}.input_scale"] = scalar(
                    np.float32(HEADROOM[preset]) * (np.float32(seen) / np.float32(2688))
                )
    if preset not in UNCALIBRATED:
        for module, value in scales["kv_amax"].items():
            exact = torch.tensor(np.float32(value) / np.float32(448))
            up = exact.bfloat16()
            if up < exact:
                up = torch.nextafter(up, torch.tensor(torch.inf, dtype=torch.bfloat16))
            result[f"{module}.{module[-6]}_scale"] = scalar(np.float32(up.item()))
    return result
