"""A small language model inside another: an Omni of the synthetic checkpoint, with towers of odd dtypes."""

from pathlib import Path
from typing import Any

import torch

from support.synthetic import CONFIG, WIDE, random_tensors, write_checkpoint

PREFIX = "language_model."
OMNI: dict[str, Any] = {
    "architectures": ["NemotronH_Nano_Omni_Reasoning_V3"],
    "model_type": "NemotronH_Nano_Omni_Reasoning_V3",
    "auto_map": {"AutoConfig": "configuration.Config", "AutoModel": "modeling.Model"},
    "llm_config": CONFIG | WIDE,
    "vision_config": {"auto_map": {"AutoConfig": "configuration_radio.RadioConfig"}, "image_size": 16},
    "sound_config": {"model_type": "parakeet", "hidden_size": 8},
    "torch_dtype": "bfloat16",
}


def towers() -> dict[str, torch.Tensor]:
    """Tensors beside the language model: integers, flags, scalars, an empty one, infinities, odd lengths."""
    g = torch.Generator().manual_seed(5)
    return {
        "vision_model.radio_model.model.patch_generator.embedder.weight": torch.randn(24, 12, generator=g),
        "vision_model.radio_model.model.blocks.0.attn.qkv.weight": torch.randn(48, 16, generator=g).half(),
        "vision_model.radio_model.input_conditioner.norm_mean": torch.randn(3, 1, 1, generator=g),
        "vision_model.radio_model.summary_idxs": torch.arange(3),
        "vision_model.radio_model.mask": torch.tensor([True, False, True]),
        "vision_model.radio_model.bias_table": torch.tensor([0.0, -torch.inf, torch.nan]),
        "mlp1.0.weight": torch.randn(16, generator=g).bfloat16(),
        "mlp1.1.weight": torch.randn(64, 16, generator=g).bfloat16(),
        "sound_encoder.encoder.layers.0.conv.batch_norm.num_batches_tracked": torch.tensor(7),
        "sound_encoder.encoder.layers.0.self_attn.linear_q.weight": torch.randn(8, 8, generator=g).double(),
        "sound_encoder.encoder.layers.0.rotary_emb.inv_freq": torch.randn(4, generator=g),
        "sound_encoder.encoder.feature.window": torch.zeros(0),
        "sound_encoder.codes": torch.arange(5, dtype=torch.uint8),
        "sound_projection.linear1.weight": torch.randn(64, 8, generator=g).to(torch.float8_e4m3fn),
    }


def omni_tensors(raw: dict[str, Any] = OMNI, seed: int = 0) -> dict[str, torch.Tensor]:
    """All tensors of such a checkpoint, by their names in files."""
    inner = random_tensors(raw["llm_config"], seed)
    return {PREFIX + name: tensor for name, tensor in inner.items()} | towers()


def omni_checkpoint(folder: Path, raw: dict[str, Any] = OMNI) -> Path:
    """The checkpoint, with the files of processors and of remote code beside it."""
    write_checkpoint(folder, raw, omni_tensors(raw))
    texts = {
        "configuration.py": "from .configuration_radio import RadioConfig\n",
        "configuration_radio.py": "",
        "modeling.py": "from .evs import select\nfrom . import audio_model\n",
        "evs.py": "",
        "audio_model.py": "",
        "processing.py": "",
        "unrelated.py": "",
        "preprocessor_config.json": '{"auto_map": {"AutoProcessor": "processing.Processor"}}',
        "video_preprocessor_config.json": "{}",
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
    return folder
