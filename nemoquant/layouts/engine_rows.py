"""What engines do with each algorithm of the layout on each GPU: one table, every row with its source.

Rows were read, or asked of the engine's own code on a CPU, in vLLM 0.33.0 and SGLang 0.5.23, and read in
TensorRT-LLM's main branch of autumn 2026; versions before those are from release notes and pull requests.
Paths are below ``vllm/``, ``sglang/srt/`` and ``tensorrt_llm/``.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, NamedTuple

from nemoquant.layouts.modelopt import MIXED

Runs = Literal["native", "weights only", "not known", "refused", "wrong"]
"""An engine computes in the format, with decoded weights, not at all, or something else without an error."""
ORDER: tuple[Runs, ...] = ("native", "weights only", "not known", "wrong", "refused")  # the last one counts

TURING, AMPERE, ADA, HOPPER, DATACENTER, DESKTOP = (75,), (80, 86), (89,), (90,), (100, 103), (120, 121)
FAMILIES: Mapping[str, tuple[int, ...]] = MappingProxyType(
    {
        "T4": TURING,
        "A100, A10": AMPERE,
        "L40S, RTX 4090": ADA,
        "H100, H200": HOPPER,
        "B200, B300": DATACENTER,
        "RTX 5090, RTX PRO 6000, DGX Spark": DESKTOP,
    }
)
"""Compute capabilities of which all rows say the same, by their GPUs."""
BLACKWELL = DATACENTER + DESKTOP
ALL = tuple(sm for sms in FAMILIES.values() for sm in sms)
SINCE_AMPERE, SINCE_ADA = ALL[1:], ALL[3:]

EXPERTS, LINEAR, ALONE, BESIDE = "experts", "linear", "alone", "beside others"


class Row(NamedTuple):
    """What an engine does with the modules of one algorithm on some GPUs.

    Attributes:
        algorithm: of the layout; ``MIXED`` is the file that lists its modules.
        part: routed experts, all other modules, one role, or modules of an algorithm that stands alone in its
            file, or beside others.
        sms: compute capabilities.
        since: the first version known to do so.
        source: where that was read.
        note: what to know.
        options: of the engine's command, which it needs to be right.
    """

    engine: str
    algorithm: str
    part: str
    sms: tuple[int, ...]
    runs: Runs
    since: str
    source: str
    note: str = ""
    options: tuple[str, ...] = ()


_V_LINEAR = "model_executor/kernels/linear/__init__.py, asked"
_V_MOE = "model_executor/layers/fused_moe/oracle, asked"
_V_MODELOPT = "model_executor/layers/quantization/modelopt.py"
_S_MODELOPT = "layers/quantization/modelopt_quant.py"
_S_OVERRIDES = "arg_groups/model_overrides/nemotron_h.py"
_T_GUIDE = "_torch/modules/fused_moe/MOE_DEVELOPER_GUIDE.md"
_T_LINEAR = "_torch/modules/linear.py"
_T_MODEL = "_torch/models/modeling_nemotron_h.py, pull request 14775"
_T_SUMMER, _T_AUTUMN = "after June 2026", "after August 2026"  # main branch; no release is known

ROWS: tuple[Row, ...] = (
    Row("vLLM", "FP8", LINEAR, TURING + AMPERE, "weights only", "0.33.0", _V_LINEAR),
    Row("vLLM", "FP8", LINEAR, SINCE_ADA, "native", "0.12.0", _V_LINEAR),
    Row("vLLM", "FP8", EXPERTS, TURING + AMPERE, "weights only", "0.33.0", _V_MOE),
    Row("vLLM", "FP8", EXPERTS, ADA, "native", "0.33.0", _V_MOE),
    Row("vLLM", "FP8", EXPERTS, HOPPER + BLACKWELL, "native", "0.12.0", _V_MOE),
    Row("vLLM", "MXFP8", LINEAR, TURING + AMPERE + ADA + HOPPER, "weights only", "0.23.0", _V_LINEAR),
    Row("vLLM", "MXFP8", LINEAR, BLACKWELL, "native", "0.23.0", _V_LINEAR),
    Row(
        "vLLM",
        "MXFP8",
        EXPERTS,
        TURING + AMPERE + ADA + HOPPER + DESKTOP,
        "weights only",
        "0.23.0",
        f"{_V_MOE}; pull request 42958",
        "a GPU's share of an expert's width must be a multiple of 32: else --enable-expert-parallel",
    ),
    Row("vLLM", "MXFP8", EXPERTS, DATACENTER, "native", "0.23.0", _V_MOE),
    Row("vLLM", "MXFP8", BESIDE, ALL, "native", "0.25.0", "pull request 46756"),
    Row("vLLM", "NVFP4", LINEAR, TURING + AMPERE + ADA + HOPPER, "weights only", "0.33.0", _V_LINEAR),
    Row("vLLM", "NVFP4", LINEAR, BLACKWELL, "native", "0.17.1", _V_LINEAR),
    Row("vLLM", "NVFP4", EXPERTS, TURING + AMPERE + ADA + HOPPER, "weights only", "0.33.0", _V_MOE),
    Row(
        "vLLM",
        "NVFP4",
        EXPERTS,
        DATACENTER,
        "native",
        "0.17.1",
        f"{_V_MOE}; issue 52308",
        "on B200 its own choice of kernel for the experts was fluent but wrong with Nano (its issue 52308, "
        "open): --moe-backend flashinfer_cutlass",
        ("--moe-backend", "flashinfer_cutlass"),
    ),
    Row("vLLM", "NVFP4", EXPERTS, DESKTOP, "native", "0.17.1", _V_MOE),
    Row("vLLM", "W4A16_NVFP4", LINEAR, ALL, "weights only", "0.33.0", f"{_V_LINEAR}; pull request 41769"),
    Row("vLLM", "W4A16_NVFP4", EXPERTS, ALL, "weights only", "0.33.0", f"{_V_MOE}; pull request 42566"),
    Row("vLLM", MIXED, LINEAR, ALL[:-2], "native", "0.17.1", _V_MODELOPT),
    Row(
        "vLLM",
        MIXED,
        LINEAR,
        DESKTOP,
        "native",
        "0.17.1",
        f"{_V_MODELOPT}; NVIDIA/dgx-spark-playbooks issue 77",
        "0.15.1, and forks for DGX Spark made from such versions, refuse files that list their modules",
    ),
    Row("SGLang", "FP8", LINEAR, AMPERE, "weights only", "0.5.23", "layers/quantization/fp8_utils.py"),
    Row("SGLang", "FP8", LINEAR, SINCE_ADA, "native", "0.5.9", _S_MODELOPT),
    Row(
        "SGLang",
        "FP8",
        EXPERTS,
        AMPERE,
        "refused",
        "",
        f"{_S_MODELOPT}, ModelOptFp8MoEMethod.create_moe_runner",
        "FP8 experts start and then fail on SM 80 and 86",
    ),
    Row("SGLang", "FP8", EXPERTS, SINCE_ADA, "native", "0.5.9", _S_OVERRIDES),
    Row("SGLang", "MXFP8", LINEAR, BLACKWELL, "native", "0.5.19", "layers/quantization/fp8_utils.py"),
    Row("SGLang", "MXFP8", EXPERTS, DATACENTER, "native", "0.5.19", "layers/quantization/fp8.py"),
    Row("SGLang", "MXFP8", EXPERTS, DESKTOP, "refused", "", "layers/moe/moe_runner/triton.py"),
    Row(
        "SGLang",
        "MXFP8",
        BESIDE,
        ALL,
        "wrong",
        "",
        f"{_S_MODELOPT}, ModelOptMixedPrecisionConfig; model_loader/loader.py",
        "vLLM before 0.25.0 takes them as unquantized, and SGLang 0.5.23 reads their scales as zeros, both "
        "without an error; serve it with vLLM 0.25.0 or later, or give all modules this format",
    ),
    Row(
        "SGLang",
        "MXFP8",
        "lm_head",
        ALL,
        "wrong",
        "",
        "layers/quantization/fp8.py",
        "SGLang 0.5.23 reads its codes as if they were weights, without an error; give lm_head "
        "`format: source` to serve it there",
    ),
    Row("SGLang", "NVFP4", LINEAR, AMPERE + ADA + HOPPER, "weights only", "0.5.23", "pull request 25655"),
    Row("SGLang", "NVFP4", LINEAR, BLACKWELL, "native", "0.5.9", _S_MODELOPT),
    Row("SGLang", "NVFP4", EXPERTS, AMPERE + ADA + HOPPER, "weights only", "0.5.23", "pull request 25655"),
    Row("SGLang", "NVFP4", EXPERTS, BLACKWELL, "native", "0.5.9", _S_OVERRIDES),
    Row("SGLang", "W4A16_NVFP4", LINEAR, SINCE_AMPERE, "weights only", "0.5.23", "pull request 33543"),
    Row("SGLang", "W4A16_NVFP4", EXPERTS, SINCE_AMPERE, "weights only", "0.5.23", "pull request 33543"),
    Row(
        "SGLang",
        "W4A16_NVFP4",
        "mamba.in_proj",
        ALL,
        "wrong",
        "",
        "models/nemotron_h.py, load_weights; ModelOptNvFp4A16LinearMethod",
        "SGLang 0.5.23 reads its global scale from memory that nothing wrote, without an error; serve it "
        "with vLLM, or give mamba.in_proj another format",
    ),
    Row("SGLang", MIXED, LINEAR, SINCE_AMPERE, "native", "0.5.9", _S_MODELOPT),
    Row("TensorRT-LLM", "FP8", LINEAR, SINCE_ADA, "native", "1.3.0rc8", _T_LINEAR),
    Row("TensorRT-LLM", "FP8", EXPERTS, SINCE_ADA, "native", "1.3.0rc8", _T_GUIDE),
    Row("TensorRT-LLM", "FP8", LINEAR, AMPERE, "not known", "", _T_LINEAR),
    Row("TensorRT-LLM", "FP8", EXPERTS, AMPERE, "refused", "", _T_GUIDE),
    Row("TensorRT-LLM", "MXFP8", LINEAR, ALL, "not known", "", _T_LINEAR),
    Row(
        "TensorRT-LLM",
        "MXFP8",
        EXPERTS,
        ALL,
        "refused",
        "",
        "_torch/modules/fused_moe/quantization.py, MXFP8CutlassFusedMoEMethod.load_quant_scales",
        "experts without a gate fail to load: it splits their scales in two",
    ),
    Row("TensorRT-LLM", "NVFP4", LINEAR, ADA, "not known", "", _T_LINEAR),
    Row("TensorRT-LLM", "NVFP4", EXPERTS, ADA, "not known", "", _T_GUIDE),
    Row("TensorRT-LLM", "NVFP4", LINEAR, HOPPER, "weights only", _T_SUMMER, _T_MODEL),
    Row("TensorRT-LLM", "NVFP4", EXPERTS, HOPPER, "weights only", _T_SUMMER, _T_MODEL),
    Row("TensorRT-LLM", "NVFP4", LINEAR, BLACKWELL, "native", "1.3.0rc8", _T_LINEAR),
    Row("TensorRT-LLM", "NVFP4", EXPERTS, BLACKWELL, "native", "1.3.0rc8", _T_GUIDE),
    Row("TensorRT-LLM", "W4A16_NVFP4", LINEAR, SINCE_AMPERE, "weights only", _T_AUTUMN, _T_LINEAR),
    Row(
        "TensorRT-LLM",
        "W4A16_NVFP4",
        EXPERTS,
        SINCE_AMPERE,
        "weights only",
        _T_AUTUMN,
        f"{_T_GUIDE}; pull request 16511",
        "weights-only NVFP4 in a file that lists its modules gets a backend that decodes the experts at each "
        "step, slower than for a uniform file",
    ),
    Row("TensorRT-LLM", MIXED, LINEAR, SINCE_AMPERE, "native", "1.3.0rc8", _T_MODEL),
    Row(
        "transformers",
        "FP8",
        ALONE,
        ALL,
        "wrong",
        "",
        "run with 5.14 and 5.19",
        "it loads the file without an error and computes with raw codes (KL 3.2 on the demo model): "
        "`nemoquant convert OUT NEW --to compressed-tensors`, or `--to bf16`",
    ),
    *(
        Row(
            "transformers",
            name,
            LINEAR,
            ALL,
            "refused",
            "",
            "run with 5.14 and 5.19",
            "it does not load the file: `nemoquant convert OUT NEW --to bf16`",
        )
        for name in ("NVFP4", "W4A16_NVFP4", MIXED)
    ),
)

# (engine, algorithm of the whole file) -> the least compute capability that its configuration admits
LEAST: Mapping[tuple[str, str], int] = MappingProxyType(
    {
        ("vLLM", "FP8"): 80,
        ("vLLM", "MXFP8"): 80,
        ("vLLM", "NVFP4"): 75,
        ("vLLM", "W4A16_NVFP4"): 75,
        ("vLLM", MIXED): 75,
        ("SGLang", "FP8"): 89,
        ("SGLang", "MXFP8"): 100,
        ("SGLang", "NVFP4"): 80,
        ("SGLang", "W4A16_NVFP4"): 80,
        ("SGLang", MIXED): 80,
        **{("TensorRT-LLM", name): 80 for name in ("FP8", "MXFP8", "NVFP4", "W4A16_NVFP4", MIXED)},
    }
)
