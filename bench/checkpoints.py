"""Makes checkpoints for the other benchmarks: random bf16 weights, published names, one tensor at a time.

python -m bench.checkpoints OUT            `mid`: 0.73 B parameters, 1.6 GB, kinds of layers in turn
python -m bench.checkpoints OUT --size super --layers 4
                                           four MoE layers as large as Super's, 5.6 GB each
python -m bench.checkpoints OUT --size super --experts 64
                                           one with an eighth of the experts, as large as Super's: 0.8 GB
"""

import argparse
import json
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from nemoquant.model.parse import parse_config
from nemoquant.model.roles import TensorSpec, tensor_table

SUPER = Path(__file__).resolve().parents[1] / "tests/configs/super-120b-a12b.json"
SHARD_BYTES = 2 << 30
CHUNK = 1 << 22  # elements

MID: dict[str, Any] = {
    "architectures": ["NemotronHForCausalLM"],
    "model_type": "nemotron_h",
    "dtype": "bfloat16",
    "tie_word_embeddings": False,
    "hybrid_override_pattern": "MEM*EMEME",
    "num_hidden_layers": 9,
    "vocab_size": 8192,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "layer_norm_epsilon": 1e-5,
    "max_position_embeddings": 4096,
    "mlp_hidden_act": "relu2",
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "mamba_num_heads": 32,
    "mamba_head_dim": 64,
    "ssm_state_size": 128,
    "n_groups": 8,
    "conv_kernel": 4,
    "chunk_size": 128,
    "use_conv_bias": True,
    "time_step_min": 0.001,
    "time_step_max": 0.1,
    "time_step_floor": 0.0001,
    "time_step_limit": [0.0, {"__float__": "Infinity"}],
    "n_routed_experts": 128,
    "num_experts_per_tok": 8,
    "n_shared_experts": 1,
    "moe_latent_size": 512,
    "moe_intermediate_size": 1344,
    "moe_shared_expert_intermediate_size": 2688,
    "routed_scaling_factor": 5.0,
    "norm_topk_prob": True,
    "n_group": 1,
    "topk_group": 1,
    "num_nextn_predict_layers": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def config(size: str, layers: int | None = None, experts: int | None = None) -> dict[str, Any]:
    """The config of ``mid``, or of ``layers`` MoE layers of Super with a vocabulary of 1,024 and no MTP.

    With fewer ``experts`` a token goes to as many fewer of them, rounded up: each gets no fewer tokens.
    """
    if size == "mid":
        return MID
    raw: dict[str, Any] = json.loads(SUPER.read_text())
    raw.pop("layers_block_type", None)
    count, routed = layers or 1, experts or raw["n_routed_experts"]
    return raw | {
        "n_routed_experts": routed,
        "num_experts_per_tok": -(-raw["num_experts_per_tok"] * routed // raw["n_routed_experts"]),
        "hybrid_override_pattern": "E" * count,
        "num_hidden_layers": count,
        "vocab_size": 1024,
        "num_nextn_predict_layers": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }


def _size(spec: TensorSpec) -> int:
    return int(np.prod(spec.shape)) * (4 if spec.dtype == "F32" else 2)


def _write(file: BinaryIO, spec: TensorSpec, pool: np.ndarray, rng: np.random.Generator) -> None:
    """Normal weights from a pool of random numbers, scaled by fan-in; SSM parameters near usual values."""
    count, scale, offset = int(np.prod(spec.shape)), spec.shape[-1] ** -0.5, 0.0
    if spec.role.endswith("norm"):
        scale, offset = 0.1, 1.0
    elif spec.role.endswith("ssm.A_log"):
        scale, offset = 0.3, 1.0
    elif spec.role.endswith("ssm.dt_bias"):
        scale, offset = 0.5, -3.0
    for start in range(0, count, CHUNK):
        length = min(CHUNK, count - start)
        shift = int(rng.integers(len(pool) - length + 1))
        values = pool[shift : shift + length] * np.float32(scale) + np.float32(offset)
        file.write(
            (values if spec.dtype == "F32" else (values.view(np.uint32) >> 16).astype(np.uint16)).tobytes()
        )


def make(out: Path, raw: dict[str, Any], seed: int = 1) -> int:
    """Write the checkpoint into the new folder ``out``; returns the bytes of its tensors."""
    out.mkdir(parents=True)
    table = tensor_table(parse_config(raw))
    shards: list[list[TensorSpec]] = [[]]
    for spec in table:
        if shards[-1] and sum(map(_size, shards[-1])) + _size(spec) > SHARD_BYTES:
            shards.append([])
        shards[-1].append(spec)
    rng = np.random.default_rng(seed)
    pool = rng.standard_normal(2 * CHUNK, dtype=np.float32)
    weight_map, total = {}, 0
    for number, specs in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for spec in specs:
            header[spec.name] = {
                "dtype": "F32" if spec.dtype == "F32" else "BF16",
                "shape": list(spec.shape),
                "data_offsets": [offset, offset + _size(spec)],
            }
            offset += _size(spec)
            weight_map[spec.name] = name
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (out / name).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for spec in specs:
                _write(file, spec, pool, rng)
        total += offset
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    (out / "config.json").write_text(json.dumps(raw, indent=2))
    return total


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", choices=["mid", "super"], default="mid")
    parser.add_argument("--layers", type=int, default=1, help="MoE layers of size super")
    parser.add_argument("--experts", type=int, help="routed experts of a layer of size super, 1 to 512")
    args = parser.parse_args()
    print(f"{make(args.out, config(args.size, args.layers, args.experts)) / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
