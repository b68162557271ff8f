"""Solved and folded folders, decoded by Model Optimizer's and compressed-tensors' own readers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from support.modelopt_run import MARKS
from support.oracle_tensors import read, weights
from support.synthetic import random_rows
from torch import Tensor

import nemoquant

pytestmark = [*MARKS, pytest.mark.slow]


def by_model_optimizer(tensors: dict[str, Tensor], name: str) -> Tensor:
    """A weight as Model Optimizer decodes it, float32."""
    from modelopt.torch.quantization.qtensor import FP8QTensor, MXFP8QTensor, NVFP4QTensor

    codes, scale = tensors[name], tensors[f"{name}_scale"]
    if codes.dtype == torch.uint8:
        shape = torch.Size((codes.shape[0], 2 * codes.shape[1]))
        return NVFP4QTensor(shape, torch.float32, codes).dequantize(
            torch.float32, scale=scale, double_scale=tensors[f"{name}_scale_2"], block_sizes={-1: 16}
        )
    if scale.dtype == torch.uint8:
        return MXFP8QTensor(codes.shape, torch.float32, codes).dequantize(torch.float32, scale=scale)
    return FP8QTensor(codes.shape, torch.float32, codes).dequantize(
        torch.float32, scale=scale, block_sizes=None
    )


@pytest.mark.parametrize("preset", ["fp8", "mxfp8", "nvfp4", "nvfp4-full", "nvfp4-full-w4a16"])
def test_other_readers_decode_the_same(preset: str, runs, tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", random_rows())
    options = nemoquant.RunOptions(data=tmp_path / "rows.npy", dtype="float32", threads=1, method="gptq")
    folds = nemoquant.plan(runs.source(preset), preset).recipe.folds
    made = nemoquant.quantize(runs.source(preset), tmp_path / "out", preset, options, progress=False)
    assert made.plan.recipe.folds == folds
    tensors = read(made.out)
    ours = read(nemoquant.convert(made.out, tmp_path / "bf16", "bf16", progress=False).out)
    names = [*weights(tensors, torch.uint8), *weights(tensors, torch.float8_e4m3fn)]
    assert len(names) == len(made.plan.quantized) == 46
    for name in names:
        theirs = by_model_optimizer(tensors, name)
        assert torch.equal(ours[name].float(), theirs.bfloat16().float()), name


def test_compressed_tensors_unpacks_the_same_codes(runs, tmp_path: Path) -> None:
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8

    np.save(tmp_path / "rows.npy", random_rows())
    options = nemoquant.RunOptions(data=tmp_path / "rows.npy", dtype="float32", threads=1)
    made = nemoquant.quantize(runs.source("nvfp4"), tmp_path / "out", "nvfp4-full", options, progress=False)
    tensors = read(made.out)
    for name in weights(tensors, torch.uint8):
        out, half = tensors[name].shape
        values = unpack_fp4_from_uint8(tensors[name], out, 2 * half, torch.float32)
        blocks = tensors[f"{name}_scale"].float() * tensors[f"{name}_scale_2"]
        theirs = (values.unflatten(1, (-1, 16)) * blocks[..., None]).flatten(1)
        assert torch.equal(by_model_optimizer(tensors, name), theirs), name
