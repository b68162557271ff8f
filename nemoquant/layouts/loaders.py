"""What serving engines do with each algorithm of the layout, read in their sources; none was run here.

MXFP8 was read in vLLM 0.33.0, SGLang 0.5.23 and TensorRT-LLM's main branch of autumn 2026, the others in
sources and release notes of November 2026. For MXFP8, below ``vllm/``, ``sglang/srt/`` and ``tensorrt_llm/``:

vLLM          model_executor/layers/quantization/modelopt.py (SM 80 at least; pull request 42958 for experts
              without a gate, 46756 for mixed files), model_executor/layers/fused_moe/oracle/mxfp8.py and
              model_executor/kernels/linear/__init__.py (which kernel on which GPU)
SGLang        layers/quantization/fp8.py and modelopt_quant.py, model_loader/loader.py (scales are renamed for
              uniform MXFP8 only; review of pull request 31282), layers/quantization/utils.py (exclusions)
TensorRT-LLM  _torch/modules/fused_moe/quantization.py, MXFP8CutlassFusedMoEMethod.load_quant_scales
"""

from collections import Counter
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from nemoquant.layouts.modelopt import algorithm
from nemoquant.planning.plan import Plan


class Loader(NamedTuple):
    """An engine, the first version that loads it (None: none does), and on which GPUs, or why not."""

    engine: str
    version: str | None
    hardware: str


LOADERS: Mapping[frozenset[str], tuple[Loader, ...]] = MappingProxyType(
    {
        frozenset({"FP8"}): (
            Loader("vLLM", "0.12.0", "GPUs with FP8: SM 89 (Ada) and later"),
            Loader("SGLang", "0.5.9", "SM 89 and later"),
            Loader("TensorRT-LLM", "1.3.0rc8", "SM 89 and later"),
        ),
        frozenset({"MXFP8"}): (
            Loader(
                "vLLM",
                "0.23.0",
                "natively on SM 100 and 103, on SM 120 all but the experts; elsewhere from SM 80 on weights "
                "only, by Marlin, whose experts need a width a GPU that 64 divides",
            ),
            Loader("SGLang", "0.5.19", "SM 100 and 103; refused on SM 90, experts refused on SM 120"),
            Loader(
                "TensorRT-LLM", "none", "experts without a gate fail to load: it splits their scales in two"
            ),
        ),
        frozenset({"NVFP4"}): (
            Loader("vLLM", "0.17.1", "W4A4 on Blackwell (SM 100, 103, 120, 121)"),
            Loader("SGLang", "0.5.9", "Blackwell"),
            Loader("TensorRT-LLM", "1.3.0rc8", "Blackwell"),
        ),
        frozenset({"W4A16_NVFP4"}): (
            Loader(
                "vLLM",
                "a release after May 2026 (its pull request #41769)",
                "SM 80 (Ampere) and later, by weight-only kernels",
            ),
        ),
        frozenset({"FP8", "NVFP4"}): (
            Loader(
                "vLLM",
                "0.17.1 (0.15.1 refuses it)",
                "NVFP4 experts want Blackwell; FP8 parts want SM 89 or later",
            ),
            Loader("SGLang", "0.5.9", "Blackwell"),
            Loader("TensorRT-LLM", "1.3.0rc8", "Blackwell"),
        ),
    }
)


def loaders(plan: Plan) -> tuple[Loader, ...]:
    """What the engines do with the checkpoint of a plan; empty where nobody has looked at its mixture."""
    return LOADERS.get(frozenset(algorithm(row) for row in plan.quantized), ())


# Where an engine takes an algorithm and computes something else, without a message of its own: beside other
# algorithms, and in lm_head.
BESIDE_OTHERS: Mapping[str, str] = MappingProxyType(
    {
        "MXFP8": "vLLM before 0.25.0 takes them as unquantized, and SGLang 0.5.23 reads their scales as "
        "zeros, both without an error; serve it with vLLM 0.25.0 or later, or give all modules this format"
    }
)
IN_HEAD: Mapping[str, str] = MappingProxyType(
    {
        "MXFP8": "SGLang 0.5.23 reads its codes as if they were weights, without an error; give lm_head "
        "`format: source` to serve it there"
    }
)
# (algorithm, role) -> what becomes of it; read in the models' load_weights and the linear methods.
IN_ROLE: Mapping[tuple[str, str], str] = MappingProxyType(
    {
        (
            "W4A16_NVFP4",
            "mamba.in_proj",
        ): "SGLang 0.5.23 reads its global scale from memory that nothing wrote, without an error; serve it "
        "with vLLM, or give mamba.in_proj another format"
    }
)


def cautions(plan: Plan) -> list[str]:
    """What a user must know before serving the checkpoint of a plan, a sentence each."""
    modules = Counter(algorithm(row) for row in plan.quantized)
    by_role = Counter((algorithm(row), row.role) for row in plan.quantized)
    heads = {algorithm(row) for row in plan.quantized if row.role == "lm_head"}
    found = []
    if len(modules) > 1:
        found += [
            f"{modules[name]} modules are {name} beside other formats: {text}"
            for name, text in BESIDE_OTHERS.items()
            if name in modules
        ]
    found += [
        f"{by_role[name, role]} {role} modules are {name}: {text}"
        for (name, role), text in IN_ROLE.items()
        if (name, role) in by_role
    ]
    return found + [f"lm_head is {name}: {text}" for name, text in IN_HEAD.items() if name in heads]
