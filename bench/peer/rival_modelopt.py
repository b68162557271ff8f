"""Model Optimizer by a job (see nemotron_h.py): calibrates, solves and exports. Argument: JOB.json.

Methods: max, mse, local_hessian, gptq, awq_lite, svdquant; settings as in its own recipes
(`fp8_scale_sweep`, GPTQ layer by layer). Three of its functions are there as kernels for a GPU only: what
stands here in their place computes the same in torch. GPTQ, awq_lite and svdquant take linear layers only
(GPTQ leaves fused experts as they are, with plain scales), so they are given separate ones; `:fused` after
a method leaves the experts as they are loaded.
"""

import sys
import types

import modelopt.torch.kernels.quantization.gemm as kernels
import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.export import export_hf_checkpoint
from modelopt.torch.quantization import tensor_quant
from modelopt.torch.quantization.nn.modules import tensor_quantizer
from nemotron_h import load, narrow, read_job
from torch import Tensor

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
BOUNDS = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5])
UP = torch.tensor([False, True, False, True, False, True, False])  # a tie rounds to the even code


def rounded(x: Tensor, scale: Tensor) -> Tensor:
    """Its ``nvfp4_scalar_quant``; x [blocks, size] float32, scale [blocks, 1] float32."""
    safe = torch.where((scale == 0) | ~scale.isfinite(), 1.0, scale)
    magnitude = x.abs() / safe
    code = torch.bucketize(magnitude, BOUNDS)  # a value on a bound goes below it
    code += ((magnitude[..., None] == BOUNDS) & UP).any(-1)
    value = E2M1[code] * safe
    return torch.where(scale == 0, 0.0, torch.where(x >= 0, value, -value))


def static_blocks(
    x: Tensor,
    amax: Tensor,
    global_amax: Tensor | None = None,
    quantize_block_scales: bool = True,
    fp8_max_for_normalization: float = 448.0,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Its ``static_blockwise_fp4_fake_quant``: block scales from given maxima."""
    scale = amax.float() / 6
    if quantize_block_scales:
        top = (amax.max() if global_amax is None else global_amax).float()
        scale = tensor_quant.scaled_e4m3_impl(scale, top * (448.0 / fp8_max_for_normalization) / 6)
    blocks = x.reshape(amax.numel(), -1).float()
    return rounded(blocks, scale.reshape(-1, 1)).reshape(x.shape).to(out_dtype or x.dtype)


def dynamic_blocks(inputs: Tensor, block_size: int, amax: Tensor, *_: object) -> Tensor:
    """Its ``fp4_fake_quant_block``: block scales from the blocks' own maxima."""
    blocks = inputs.reshape(-1, block_size).float()
    unit = (amax.float().amax() / (6 * 448)).clamp_min(0)
    unit = torch.where(unit > 0, unit, 1e-12)
    scale = (blocks.abs().amax(-1, keepdim=True) / (6 * unit)).clamp_max(448)
    scale = scale.to(torch.float8_e4m3fn).float() * unit
    scale = torch.where(scale >= 1e-5, scale, 1.0)
    return rounded(blocks, scale).reshape(inputs.shape).to(inputs.dtype)


def solved_block(
    weight: Tensor, amax: Tensor, unit: float, factor: Tensor, size: int, start: int
) -> tuple[Tensor, Tensor]:
    """Its ``gptq_fused_block_scalar``: columns one after the other, errors passed on by the factor's rows.

    weight [out, columns], amax [out, blocks], factor [columns, columns]; returns rounded weights and errors.
    """
    scales = (amax / (6 * unit)).clamp_max(448).to(torch.float8_e4m3fn).float() * unit
    left, values, errors = weight.clone(), torch.empty_like(weight), torch.empty_like(weight)
    for column in range(weight.shape[1]):
        scale = scales[:, (start + column) // size, None]
        values[:, column] = rounded(left[:, column, None], scale)[:, 0]
        errors[:, column] = (left[:, column] - values[:, column]) / factor[column, column]
        left[:, column + 1 :] -= errors[:, column, None] * factor[column, column + 1 :]
    return values, errors


def on_a_cpu() -> None:
    fused = types.ModuleType("gptq_fused_kernel")
    fused.gptq_fused_block_scalar = solved_block
    sys.modules[f"{kernels.__name__}.gptq_fused_kernel"] = fused
    kernels.IS_AVAILABLE = True
    kernels.static_blockwise_fp4_fake_quant = static_blocks
    tensor_quant.dynamic_block_quantize_op = dynamic_blocks
    assert tensor_quantizer.static_blockwise_fp4_fake_quant is tensor_quant.static_blockwise_fp4_fake_quant


FP8 = {"num_bits": (4, 3), "axis": None}
NVFP4 = {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}}
STATIC = {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "static", "scale_bits": (4, 3)}}
SEARCHED = ("mse", "local_hessian", "gptq")
LINEAR_ONLY = ("gptq", "awq_lite", "svdquant")


def quantizers(module: str, separate: bool) -> tuple[str, str]:
    """Names of a module's weight and input quantizer."""
    head, found, tail = module.partition(".experts.")
    if not found or separate or "shared" in head:
        return f"{module}.weight_quantizer", f"{module}.input_quantizer"
    number, proj = tail.split(".")
    return f"{head}.experts.{proj}_weight_quantizers.{number}", f"{head}.experts.{proj}_input_quantizer"


def main() -> None:
    job = read_job(sys.argv[1])
    method, _, experts = job.method.partition(":")
    separate = method in LINEAR_ONLY and experts != "fused"
    on_a_cpu()
    entries = [{"quantizer_name": "*", "enable": False}]
    for module, (weights, inputs) in job.map.items():
        weight, given = quantizers(module, separate)
        static = STATIC if method in SEARCHED else NVFP4
        numbers = {"fp8": (FP8, FP8), "nvfp4": (static, NVFP4)}
        entries.append({"quantizer_name": weight, "enable": True, "cfg": dict(numbers[weights][0])})
        if inputs:
            entries.append({"quantizer_name": given, "enable": True, "cfg": dict(numbers[inputs][1])})
    algorithm = {"method": method}
    if method == "mse":
        algorithm["fp8_scale_sweep"] = any(weights == "nvfp4" for weights, _ in job.map.values())
    if method == "gptq":
        algorithm |= {"layerwise": {"enable": True}, "fused": True}
    model = load(job.source, separate)

    @torch.no_grad()
    def calibrate(model: torch.nn.Module) -> None:
        for row in job.rows:
            model(row[None], use_cache=False)

    mtq.quantize(model, {"quant_cfg": entries, "algorithm": algorithm}, calibrate)
    on = {name for name, m in model.named_modules() if getattr(m, "is_enabled", False)}
    missing = {quantizers(module, separate)[0] for module in job.map} - on
    if missing:
        raise SystemExit(f"no quantizer is on under {sorted(missing)[:3]}, {len(missing)} in all")
    narrow(model)
    export_hf_checkpoint(model, export_dir=job.out)


if __name__ == "__main__":
    main()
