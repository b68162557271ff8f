"""A checkpoint's tensors decoded, plainly, and compared with what an engine has loaded.

It runs in the engines' environment, where nemoquant is not installed: a second decoder, nothing of ours.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
FILLS = (
    0x00,
    0x7F,
)  # bytes of parameters before loading; 0x7f is huge as float32: the maximum of scales shows it
PLAIN = "unquantized"  # in counts of algorithms
FP8_WEIGHTS = "W8A16_FP8"
DERIVED = ("_blockscale_swizzled",)  # parameters that SGLang makes from others after loading


def nvfp4(codes: Tensor, block_scales: Tensor, scale: Tensor) -> Tensor:
    """Values [out, in] of codes U8 [out, in / 2], block scales E4M3 [out, in / 16] and a scale."""
    values = torch.stack([E2M1[(codes & 15).long()], E2M1[(codes >> 4).long()]], -1)
    return (values.reshape(len(codes), -1, 16) * (block_scales.float() * scale.float())[..., None]).flatten(1)


def mxfp8(codes: Tensor, block_scales: Tensor) -> Tensor:
    """Values [out, in] of codes E4M3 [out, in] and exponents U8 [out, in / 32]."""
    scales = torch.exp2(block_scales.float() - 127)
    return (codes.float().reshape(len(codes), -1, 32) * scales[..., None]).flatten(1)


def decoded(weight: Tensor, scale: Tensor | None, second: Tensor | None) -> Tensor:
    """Values of a weight by its dtype and those of its scales; unquantized ones as float32."""
    if weight.dtype == torch.uint8:
        return nvfp4(weight, scale, second)
    if weight.dtype == torch.float8_e4m3fn:
        return mxfp8(weight, scale) if scale.dtype == torch.uint8 else weight.float() * scale.float()
    return weight.float()


class Stored:
    """All tensors of a checkpoint in the ModelOpt layout."""

    def __init__(self, folder: Path) -> None:
        self.tensors: dict[str, Tensor] = {}
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, "pt") as opened:
                self.tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118

    def modules(self, draft: bool) -> list[str]:
        """Those of the model, or of its multi-token prediction, that have a weight."""
        names = [name.removesuffix(".weight") for name in self.tensors if name.endswith(".weight")]
        return sorted(name for name in names if name.startswith("mtp.") == draft)

    def algorithm(self, module: str) -> str:
        """ModelOpt's name for how a module is quantized, by its tensors; "" where it is not.

        FP8 whose inputs are not quantized has no name there, and one of ours here: engines take it for FP8.
        """
        weight = self.tensors[f"{module}.weight"]
        if weight.dtype == torch.uint8:
            return "NVFP4" if f"{module}.input_scale" in self.tensors else "W4A16_NVFP4"
        if weight.dtype == torch.float8_e4m3fn:
            if self.tensors[f"{module}.weight_scale"].dtype == torch.uint8:
                return "MXFP8"
            return "FP8" if f"{module}.input_scale" in self.tensors else FP8_WEIGHTS
        return ""

    def has_input_scale(self, module: str) -> bool:
        """Whether engines have one for its algorithm, be it in the file or not."""
        return self.algorithm(module) in ("FP8", "NVFP4", FP8_WEIGHTS)

    def values(self, module: str) -> Tensor:
        """Its weight, decoded."""
        scales = [self.tensors.get(f"{module}.{name}") for name in ("weight_scale", "weight_scale_2")]
        return decoded(self.tensors[f"{module}.weight"], *scales)

    def input_scale(self, module: str) -> float | None:
        found = self.tensors.get(f"{module}.input_scale")
        return None if found is None else found.item()

    def cache_scales(self, draft: bool) -> dict[str, float]:
        """Scales of the K and V caches by name."""
        return {
            name: tensor.item()
            for name, tensor in self.tensors.items()
            if name.endswith((".k_scale", ".v_scale")) and name.startswith("mtp.") == draft
        }

    def others(self, draft: bool) -> Iterator[tuple[str, Tensor]]:
        """Tensors that are neither weights of modules nor scales."""
        for name, tensor in self.tensors.items():
            if name.startswith("mtp.") == draft and not name.endswith((".weight", "_scale", "_scale_2")):
                yield name, tensor


@dataclass(frozen=True)
class Loaded:
    """A module as an engine has it: algorithm, decoded values, the scale of its input where it keeps one."""

    algorithm: str
    values: Tensor
    input_scale: float | None = None


@dataclass
class Comparison:
    """What an engine has loaded against the file; lists have the module, the file's, and the engine's."""

    modules: int = 0
    others: int = 0
    algorithms: Counter[str] = field(default_factory=Counter)
    expert_algorithms: Counter[str] = field(default_factory=Counter)
    algorithm_differs: list[list[Any]] = field(default_factory=list)
    values_differ: list[list[Any]] = field(default_factory=list)
    input_scales_differ: list[list[Any]] = field(default_factory=list)
    kv_scales_differ: list[list[Any]] = field(default_factory=list)

    def module(self, stored: Stored, module: str, loaded: Loaded | None) -> None:
        """Compare one module; None: the engine has none of that name."""
        self.modules += 1
        expected, values = stored.algorithm(module), stored.values(module)
        self.algorithms[expected or PLAIN] += 1
        if ".experts." in module:
            self.expert_algorithms[expected or PLAIN] += 1
        if loaded is None:
            self.values_differ.append([module, expected, "no such module"])
            return
        if loaded.algorithm != ("FP8" if expected == FP8_WEIGHTS else expected):
            self.algorithm_differs.append([module, expected, loaded.algorithm])
        if problem := difference(values, loaded.values):
            self.values_differ.append([module, expected, problem])
        scale = stored.input_scale(module)
        if scale is not None and loaded.input_scale != scale:
            self.input_scales_differ.append([module, scale, loaded.input_scale])

    def other(self, name: str, expected: Tensor, loaded: Tensor | None) -> None:
        """Compare a tensor that belongs to no module."""
        self.others += 1
        if loaded is None:
            self.values_differ.append([name, "", "no such parameter"])
        elif problem := difference(expected.float(), loaded.float()):
            self.values_differ.append([name, "", problem])

    def cache(self, name: str, expected: float, loaded: float | None) -> None:
        if loaded != expected:
            self.kv_scales_differ.append([name, expected, loaded])


def difference(expected: Tensor, loaded: Tensor) -> str:
    """ "" where the values are the same; an engine may have more rows, of a padded vocabulary."""
    one, two = expected.flatten(), loaded.flatten()
    if two.numel() < one.numel() or (two.numel() > one.numel() and expected.shape[1:] != loaded.shape[1:]):
        return f"shape {list(loaded.shape)} for {list(expected.shape)}"
    two = two[: one.numel()]
    different = int((one != two).sum())
    return f"{different} of {one.numel()} values" if different else ""


def unwritten(
    first: torch.nn.Module, second: torch.nn.Module, keep: Callable[[str], bool]
) -> list[list[Any]]:
    """Parameters that differ between two models which were filled differently: [name, shape, bytes]."""
    others = dict(second.named_parameters())
    found = []
    for name, parameter in first.named_parameters():
        one, two = raw(parameter), raw(others[name])
        if not keep(name) and not name.endswith(DERIVED) and not torch.equal(one, two):
            found.append([name, list(parameter.shape), int((one != two).sum())])
    return found


def raw(parameter: Tensor) -> Tensor:
    """A parameter's bytes."""
    return parameter.data.reshape(-1).view(torch.uint8)


def fill(model: torch.nn.Module, byte: int, keep: Callable[[str], bool]) -> dict[str, int]:
    """Fill all parameters with a byte but those that are kept; how many these are, by their last name."""
    kept: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        if keep(name):
            kept[name.rsplit(".", 1)[1]] += 1
        elif parameter.data.is_contiguous():
            raw(parameter).fill_(byte)
        else:
            same = torch.full_like(parameter.data.contiguous().view(torch.uint8), byte)
            parameter.data.copy_(same.view(parameter.dtype))
    return kept
