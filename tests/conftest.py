"""What several stages use: the synthetic checkpoint (a layer of each kind and more, latent experts, MTP, two shards), and operators alone."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from nemoquant.model.config import parse_config
from nemoquant.model.roles import tensor_table

DEMO = Path(__file__).resolve().parents[1] / "calib/demo_model"

CONFIG: dict[str, Any] = {
    "architectures": ["NemotronHForCausalLM"], "model_type": "nemotron_h", "dtype": "bfloat16",
    "hybrid_override_pattern": "M*E-ME", "num_hidden_layers": 6, "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96,
    "layer_norm_epsilon": 1e-5, "tie_word_embeddings": False, "max_position_embeddings": 256,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 2, "conv_kernel": 4, "chunk_size": 32, "use_conv_bias": True,
    "n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_latent_size": 32, "moe_intermediate_size": 48,
    "moe_shared_expert_intermediate_size": 80, "routed_scaling_factor": 2.5, "norm_topk_prob": True, "n_group": 1, "topk_group": 1,
    "num_nextn_predict_layers": 1, "mtp_hybrid_override_pattern": "*E",
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def random_tensors(raw: dict[str, Any], seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights scaled by fan-in, so that activations stay O(1); bf16, the router's bias fp32."""
    g = torch.Generator().manual_seed(seed)
    tensors = {}
    for spec in tensor_table(parse_config(raw)):
        if spec.role.endswith("norm"):
            value = torch.rand(spec.shape, generator=g) + 0.5
        elif spec.role.endswith("ssm.A_log"):
            value = torch.rand(spec.shape, generator=g) * 2.5
        elif spec.role.endswith("router.bias"):
            value = torch.zeros(spec.shape)  # so that every expert gets tokens
        elif spec.role.endswith("ssm.dt_bias"):
            value = torch.rand(spec.shape, generator=g) * 4 - 5
        else:
            value = torch.randn(spec.shape, generator=g) / spec.shape[-1] ** 0.5
        tensors[spec.name] = value.to(torch.float32 if spec.dtype == "F32" else torch.bfloat16)
    return tensors


def write_checkpoint(folder: Path, raw: dict[str, Any], tensors: dict[str, torch.Tensor], shards: int = 2) -> Path:
    """Write config, index and shards as published checkpoints have them."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(raw, indent=2))
    names = list(tensors)
    weight_map = {}
    for i in range(shards):
        part = names[i * len(names) // shards : (i + 1) * len(names) // shards]
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        save_file({n: tensors[n].contiguous() for n in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map})
    )
    return folder


@pytest.fixture
def make_checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """Makes a checkpoint: config keys changed by name, ``edit`` changes the tensors before they are written."""

    def make(
        name: str = "source", edit: Callable[[dict[str, torch.Tensor]], Any] = lambda tensors: None, seed: int = 0, **changes: Any
    ) -> Path:
        raw = {k: v for k, v in {**CONFIG, **changes}.items() if v is not None}
        raw["num_hidden_layers"] = len(raw["hybrid_override_pattern"])
        tensors = random_tensors(raw, seed)
        edit(tensors)
        return write_checkpoint(tmp_path / name, raw, tensors)

    return make


@pytest.fixture
def source(make_checkpoint: Callable[..., Path]) -> Path:
    """The base checkpoint, unchanged."""
    return make_checkpoint()


@pytest.fixture
def token_rows(tmp_path: Path) -> Path:
    """Calibration tokens for it, [8, 32], as .npy: it has no tokenizer."""
    path = tmp_path / "rows.npy"
    np.save(path, np.random.default_rng(0).integers(3, CONFIG["vocab_size"], (8, 32)))
    return path


@pytest.fixture(scope="session")
def single_op() -> Callable[..., Callable[[Mapping[str, Any]], list[Any]]]:
    """Wraps one function of the nemoquant domain in a graph that only calls it, checks that, and returns what runs it.

    ``example`` gives the inputs' dtypes and ranks; every axis is symbolic. ``stored`` are initializers by input. ``helpers`` are
    functions that it calls.
    """
    import onnx
    import onnx_ir as ir
    import onnxruntime

    def make(
        function: Any, example: Mapping[str, Any], stored: Mapping[str, Any] | None = None, helpers: Any = (), **attributes: Any
    ) -> Callable[[Mapping[str, Any]], list[Any]]:
        stored = stored or {}
        inputs = {
            name: ir.Value(
                name=name,
                type=ir.TensorType(ir.DataType.from_numpy(value.dtype)),
                shape=ir.Shape([f"{name}_{axis}" for axis in range(value.ndim)]),
            )
            for name, value in example.items()
        }
        kept = {name: ir.Value(name=name, const_value=ir.tensor(value, name=name)) for name, value in stored.items()}
        for value in kept.values():
            value.type, value.shape = ir.TensorType(value.const_value.dtype), value.const_value.shape
        known = inputs | kept
        results = [ir.Value(name=f"result_{i}") for i in range(len(function.outputs))]
        node = ir.Node(
            function.domain, function.name, [known[value.name] for value in function.inputs], outputs=results,
            attributes=[ir.convenience.convert_attribute(key, value) for key, value in attributes.items()],
        )  # fmt: skip
        imports = {"": 23, function.domain: 1}
        graph = ir.Graph(inputs.values(), results, nodes=[node], initializers=kept.values(), opset_imports=imports, name="one")
        proto = ir.to_proto(ir.Model(graph, ir_version=11, functions=[*helpers, function]))
        inferred = onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True)
        for result, found in zip(proto.graph.output, inferred.graph.output, strict=True):
            result.type.CopyFrom(found.type)
            if not result.type.tensor_type.HasField("shape"):  # what a Loop carries: as many axes as the first input
                for axis in range(next(iter(example.values())).ndim):
                    result.type.tensor_type.shape.dim.add().dim_param = f"{result.name}_{axis}"
        onnx.checker.check_model(proto, full_check=True)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(
            proto.SerializeToString(), options, providers=["CPUExecutionProvider"], disabled_optimizers=["ConstantFolding"]
        )
        return lambda feeds: session.run(None, dict(feeds))

    return make
