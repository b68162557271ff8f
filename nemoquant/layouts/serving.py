"""The command that serves a checkpoint with each engine on a given GPU, by the engines' own options.

Options and their words were read in vLLM 0.33.0, SGLang 0.5.23 and TensorRT-LLM's main branch of autumn 2026;
``python -m tests.consumers`` gives these commands to vLLM's and SGLang's own parsers.
"""

import json
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from nemoquant.layouts import ENGINES, RIGHT
from nemoquant.layouts.engine_rows import TURING
from nemoquant.layouts.engines import Mixture, mixture, outcome, why_not
from nemoquant.layouts.gpus import GPUS, Gpu
from nemoquant.model.config import NemotronHConfig
from nemoquant.planning.plan import Plan
from nemoquant.units import size

SPLITS = (1, 2, 4, 8)  # GPUs of a server
USABLE = 0.85  # of a GPU's memory, for weights and caches; engines take 0.9, and need some for themselves
SEQUENCES, CONTEXT = 16, 8192  # whose caches have room beside the weights
DRAFTS = 3  # tokens that multi-token prediction drafts, as in published commands
USUAL = ("h100", "b200")  # one of these where no GPU is named
HERE = "/path/to/this/folder"
YAML = "trtllm.yaml"


class Chat(NamedTuple):
    """What a chat template has: thoughts in ``<think>``, calls of tools as ``<function=``."""

    thinks: bool
    calls_tools: bool

    @classmethod
    def of(cls, template: str) -> "Chat":
        return cls("<think>" in template, "<function=" in template)


NEMOTRON_3 = Chat(thinks=True, calls_tools=True)


@dataclass(frozen=True)
class Serving:
    """How to serve a checkpoint with one engine.

    Attributes:
        engine: its name.
        where: in words: engine, GPUs, and how it computes there; or why there is no command.
        argv: the command, empty where there is none.
        files: name -> content of files that the command names.
    """

    engine: str
    where: str
    argv: tuple[str, ...] = ()
    files: dict[str, str] = field(default_factory=dict)

    @property
    def lines(self) -> list[str]:
        """For a shell: the files as here documents, then the command."""
        if not self.argv:
            return []
        made = [
            line
            for name, text in self.files.items()
            for line in (f"cat > {name} <<'END'", *text.splitlines(), "END")
        ]
        return [*made, shlex.join(self.argv)]

    def to_json(self) -> dict[str, Any]:
        return {"engine": self.engine, "where": self.where, "command": list(self.argv), "files": self.files}


def commands(
    plan: Plan, gpu: str | None = None, out: str | Path = HERE, chat: Chat = NEMOTRON_3
) -> list[Serving]:
    """For each serving engine the command that serves the output of a plan, or why there is none.

    Args:
        gpu: one of ``GPUS``; None is the first usual one on which vLLM computes in the plan's formats.
        out: the folder.
        chat: what its chat template has.
    """
    file = mixture(plan)
    chosen = GPUS[gpu or _usual(file)]
    found = []
    for engine in ENGINES.values():
        does = outcome(file, engine, chosen.sm)
        gpus = _split(plan, chosen)
        if does.runs not in RIGHT:
            why = why_not(file, engine, chosen.sm)
            found.append(Serving(engine, f"{engine} on {chosen.title}: {why}"))
        elif gpus is None:
            most = f"{SPLITS[-1]} {chosen.title} of {chosen.gigabytes} GB"
            found.append(Serving(engine, f"{engine}: {size(_bytes(plan))} do not fit into {most}"))
        else:
            many = f"{gpus} " if gpus > 1 else ""
            version = f" {does.since} or later" if does.since else ""  # none where nothing is quantized
            where = f"{engine}{version} on {many}{chosen.title} ({does.runs})"
            argv, files = COMMANDS[engine](_Server(plan, chosen, gpus, str(out), chat, does.options))
            found.append(Serving(engine, where, tuple(argv), files))
    return found


def _usual(file: Mixture) -> str:
    native = (name for name in USUAL if outcome(file, ENGINES["vllm"], GPUS[name].sm).runs == "native")
    return next(native, USUAL[0])


class _Server(NamedTuple):
    """What a command is for; ``options``: those that the table of engines asks for."""

    plan: Plan
    gpu: Gpu
    gpus: int
    out: str
    chat: Chat
    options: tuple[str, ...]

    @property
    def is_remote(self) -> bool:
        """Whether the class of its config comes with the checkpoint, as Puzzle's and those around a model."""
        return bool(self.plan.config.prefix or self.plan.config.layer_sizes)

    @property
    def deals_experts(self) -> bool:
        """Whether whole experts go to several GPUs: their widths don't always divide."""
        return self.gpus > 1 and self.plan.config.n_routed_experts > 0


def _bytes(plan: Plan) -> int:
    """Weights, and the caches of ``SEQUENCES`` sequences of ``CONTEXT`` tokens."""
    kv = plan.kv_cache_bytes_per_token()["planned"] * CONTEXT
    return plan.bytes_out + SEQUENCES * (kv + plan.ssm_state_bytes_per_sequence()["planned"])


def _split(plan: Plan, gpu: Gpu) -> int | None:
    """The fewest GPUs that hold a plan's output and divide what engines divide; None if 8 don't."""
    room = gpu.gigabytes * 1e9 * USABLE
    return next((n for n in SPLITS if _bytes(plan) <= n * room and _divides(plan.config, n)), None)


def _divides(c: NemotronHConfig, gpus: int) -> bool:
    """Whether engines can divide a model: heads and groups of Mamba, query heads, KV heads or their copies.

    Experts are not divided but dealt out whole. vLLM: ``mamba_mixer2.py``, ``models/nemotron_h.py``; SGLang:
    ``layers/attention/mamba/mamba.py``; TensorRT-LLM: ``modeling_nemotron_h.py``.
    """
    for own in {c.of_layer(i) for i in range(len(c.layers))}:
        kv = own.num_key_value_heads
        whole = (own.mamba_num_heads, own.n_groups, own.num_attention_heads, own.n_routed_experts)
        if any(n % gpus for n in whole) or (kv % gpus and gpus % max(kv, 1)):
            return False
    return True


def _vllm(of: _Server) -> tuple[list[str], dict[str, str]]:
    argv = ["vllm", "serve", of.out]
    if of.is_remote:
        argv += ["--trust-remote-code"]
    if of.gpus > 1:
        argv += ["--tensor-parallel-size", str(of.gpus)]
    if of.deals_experts:
        argv += ["--enable-expert-parallel"]
    if of.gpu.sm in TURING:
        argv += ["--dtype", "half"]
    if of.plan.kv_layers:
        argv += ["--kv-cache-dtype", "fp8"]
    argv += ["--mamba-ssm-cache-dtype", of.plan.config.mamba_ssm_cache_dtype, *of.options]
    if of.plan.config.mtp_modules:
        draft: dict[str, Any] = {"method": "mtp", "num_speculative_tokens": DRAFTS}
        if "--moe-backend" in of.options:
            draft["moe_backend"] = "triton"  # its experts are bf16
        argv += ["--speculative-config", json.dumps(draft)]
    if of.chat.thinks:
        argv += ["--reasoning-parser", "nemotron_v3"]
    if of.chat.calls_tools:
        argv += ["--enable-auto-tool-choice", "--tool-call-parser", "qwen3_coder"]
    return argv, {}


def _sglang(of: _Server) -> tuple[list[str], dict[str, str]]:
    argv = ["python", "-m", "sglang.launch_server", "--model-path", of.out]
    if of.is_remote:
        argv += ["--trust-remote-code"]
    if of.gpus > 1:
        argv += ["--tp-size", str(of.gpus)]
    if of.deals_experts:
        argv += ["--ep-size", str(of.gpus)]
    if of.plan.kv_layers:
        argv += ["--kv-cache-dtype", "fp8_e4m3"]
    argv += ["--mamba-ssm-dtype", of.plan.config.mamba_ssm_cache_dtype, *of.options]
    if of.plan.config.mtp_modules:
        argv += ["--speculative-algorithm", "EAGLE", "--speculative-num-steps", str(DRAFTS)]
        argv += ["--speculative-eagle-topk", "1", "--speculative-num-draft-tokens", str(DRAFTS + 1)]
    if of.chat.thinks:
        argv += ["--reasoning-parser", "nemotron_3"]
    if of.chat.calls_tools:
        argv += ["--tool-call-parser", "qwen3_coder"]
    return argv, {}


def _tensorrt_llm(of: _Server) -> tuple[list[str], dict[str, str]]:
    """The file has what ``trtllm-serve`` has no option for; JSON values are YAML too."""
    argv = ["trtllm-serve", of.out, "--config", YAML]
    if of.is_remote:
        argv += ["--trust_remote_code"]
    if of.gpus > 1:
        argv += ["--tp_size", str(of.gpus)]
    if of.deals_experts:
        argv += ["--ep_size", str(of.gpus)]
    if of.chat.thinks:
        argv += ["--reasoning_parser", "nemotron-v3"]
    if of.chat.calls_tools:
        argv += ["--tool_parser", "qwen3_coder"]
    cache: dict[str, Any] = {"enable_block_reuse": False}
    cache["mamba_ssm_cache_dtype"] = of.plan.config.mamba_ssm_cache_dtype
    if of.plan.kv_layers:
        cache["dtype"] = "fp8"
    keys: dict[str, Any] = {"kv_cache_config": cache}
    if of.plan.config.mtp_modules:
        keys["speculative_config"] = {"decoding_type": "MTP", "num_nextn_predict_layers": DRAFTS}
    return [*argv, *of.options], {YAML: "".join(f"{key}: {json.dumps(v)}\n" for key, v in keys.items())}


COMMANDS: Mapping[str, Callable[[_Server], tuple[list[str], dict[str, str]]]] = MappingProxyType(
    dict(zip(ENGINES.values(), (_vllm, _sglang, _tensorrt_llm), strict=True))
)
"""Engine -> its command and the files that it names."""
