"""The command that serves a checkpoint with each engine on a given GPU, by the engines' own options.

Options and their words were read in vLLM 0.33.0, SGLang 0.5.23 and TensorRT-LLM's main branch of autumn 2026;
``python -m tests.consumers`` gives these commands to vLLM's and SGLang's own parsers.
"""

import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from nemoquant.layouts import ENGINES, RIGHT
from nemoquant.layouts.engine_rows import TURING
from nemoquant.layouts.engines import outcome
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
    chosen = GPUS[gpu or _usual(plan)]
    return [_serving(plan, engine, chosen, str(out), chat) for engine in ENGINES.values()]


def _usual(plan: Plan) -> str:
    native = (name for name in USUAL if outcome(plan, "vLLM", GPUS[name].sm).runs == "native")
    return next(native, USUAL[0])


def _serving(plan: Plan, engine: str, gpu: Gpu, out: str, chat: Chat) -> Serving:
    found = outcome(plan, engine, gpu.sm)
    if found.runs not in RIGHT:
        return Serving(engine, f"{engine} on {gpu.title}: {'; '.join((found.runs, *found.notes))}")
    gpus = _split(plan, gpu)
    if gpus is None:
        needed = size(_bytes(plan))
        return Serving(
            engine, f"{engine}: {needed} do not fit into {SPLITS[-1]} {gpu.title} of {gpu.gigabytes} GB"
        )
    where = f"{engine} {found.since} or later on {f'{gpus} ' if gpus > 1 else ''}{gpu.title} ({found.runs})"
    if engine == ENGINES["vllm"]:
        return Serving(engine, where, tuple(_vllm(plan, gpu, gpus, out, chat)))
    if engine == ENGINES["sglang"]:
        return Serving(engine, where, tuple(_sglang(plan, gpus, out, chat)))
    return Serving(engine, where, tuple(_tensorrt_llm(gpus, out, chat)), {YAML: _yaml(plan)})


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
    kv = c.num_key_value_heads
    whole = (c.mamba_num_heads, c.n_groups, c.num_attention_heads, c.n_routed_experts)
    return all(n % gpus == 0 for n in whole) and (kv % gpus == 0 or gpus % max(kv, 1) == 0)


def _vllm(plan: Plan, gpu: Gpu, gpus: int, out: str, chat: Chat) -> Iterator[str]:
    yield from ("vllm", "serve", out)
    if gpus > 1:
        yield from ("--tensor-parallel-size", str(gpus))
        if plan.config.n_routed_experts:
            yield "--enable-expert-parallel"
    if gpu.sm in TURING:
        yield from ("--dtype", "half")
    if plan.kv_layers:
        yield from ("--kv-cache-dtype", "fp8")
    yield from ("--mamba-ssm-cache-dtype", plan.config.mamba_ssm_cache_dtype)
    speculative: dict[str, Any] = {"method": "mtp", "num_speculative_tokens": DRAFTS}
    options = outcome(plan, ENGINES["vllm"], gpu.sm).options
    yield from options
    if "--moe-backend" in options:
        speculative["moe_backend"] = "triton"  # the draft's experts are bf16
    if plan.config.mtp_modules:
        yield from ("--speculative-config", json.dumps(speculative))
    if chat.thinks:
        yield from ("--reasoning-parser", "nemotron_v3")
    if chat.calls_tools:
        yield from ("--enable-auto-tool-choice", "--tool-call-parser", "qwen3_coder")


def _sglang(plan: Plan, gpus: int, out: str, chat: Chat) -> Iterator[str]:
    yield from ("python", "-m", "sglang.launch_server", "--model-path", out)
    if gpus > 1:
        yield from ("--tp-size", str(gpus))
        if plan.config.n_routed_experts:
            yield from ("--ep-size", str(gpus))
    if plan.kv_layers:
        yield from ("--kv-cache-dtype", "fp8_e4m3")
    yield from ("--mamba-ssm-dtype", plan.config.mamba_ssm_cache_dtype)
    if plan.config.mtp_modules:
        yield from ("--speculative-algorithm", "EAGLE", "--speculative-num-steps", str(DRAFTS))
        yield from ("--speculative-eagle-topk", "1", "--speculative-num-draft-tokens", str(DRAFTS + 1))
    if chat.thinks:
        yield from ("--reasoning-parser", "nemotron_3")
    if chat.calls_tools:
        yield from ("--tool-call-parser", "qwen3_coder")


YAML = "trtllm.yaml"


def _tensorrt_llm(gpus: int, out: str, chat: Chat) -> Iterator[str]:
    yield from ("trtllm-serve", out, "--config", YAML)
    if gpus > 1:
        yield from ("--tp_size", str(gpus), "--ep_size", str(gpus))
    if chat.thinks:
        yield from ("--reasoning_parser", "nemotron-v3")
    if chat.calls_tools:
        yield from ("--tool_parser", "qwen3_coder")


def _yaml(plan: Plan) -> str:
    """What ``trtllm-serve`` has no option for; JSON values are YAML too."""
    cache: dict[str, Any] = {"enable_block_reuse": False}
    cache["mamba_ssm_cache_dtype"] = plan.config.mamba_ssm_cache_dtype
    if plan.kv_layers:
        cache["dtype"] = "fp8"
    keys: dict[str, Any] = {"kv_cache_config": cache}
    if plan.config.mtp_modules:
        keys["speculative_config"] = {"decoding_type": "MTP", "num_nextn_predict_layers": DRAFTS}
    return "".join(f"{key}: {json.dumps(value)}\n" for key, value in keys.items())
