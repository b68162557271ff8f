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

EXPERTS, LINEAR, BESIDE = "experts", "linear", "beside others"


class On(NamedTuple):
    """What an engine does on some GPUs.

    Attributes:
        sms: compute capabilities.
        since: the first version known to do so.
        source: where that was read.
        note: what to know.
        options: of the engine's command, which it needs to be right.
    """

    sms: tuple[int, ...]
    runs: Runs
    since: str
    source: str
    note: str = ""
    options: tuple[str, ...] = ()


class Row(NamedTuple):
    """The same with what it is done to.

    Attributes:
        algorithm: of the layout; ``MIXED`` is the file that lists its modules.
        part: routed experts, all other modules, one role, or modules that stand beside other algorithms.
    """

    engine: str
    algorithm: str
    part: str
    on: On


_V_LINEAR = "model_executor/kernels/linear/__init__.py, asked"
_V_MOE = "model_executor/layers/fused_moe/oracle, asked"
_V_MODELOPT = "model_executor/layers/quantization/modelopt.py"
_S_MODELOPT = "layers/quantization/modelopt_quant.py"
_S_OVERRIDES = "arg_groups/model_overrides/nemotron_h.py"
_T_GUIDE = "_torch/modules/fused_moe/MOE_DEVELOPER_GUIDE.md"
_T_LINEAR = "_torch/modules/linear.py"
_T_MODEL = "_torch/models/modeling_nemotron_h.py, pull request 14775"
_L_CONVERTER = "conversion/base.py, run"
_ITS_OWN_LAYOUT = (
    "where all is FP8, `nemoquant convert OUT NEW --to compressed-tensors` makes what it reads as it is meant"
)
_SCALE_OF_ONE = (
    "vLLM 0.33.0 and SGLang 0.5.23 round their inputs from SM 89 on, with a scale of 1.0, without an error; "
    "quantize inputs of experts too"
)
_T_SUMMER, _T_AUTUMN = "after June 2026", "after August 2026"  # main branch; no release is known

_CASES: Mapping[tuple[str, str, str], tuple[On, ...]] = {
    ("vLLM", "FP8", LINEAR): (
        On(TURING + AMPERE, "weights only", "0.33.0", _V_LINEAR),
        On(SINCE_ADA, "native", "0.12.0", _V_LINEAR),
    ),
    ("vLLM", "FP8", EXPERTS): (
        On(TURING + AMPERE, "weights only", "0.33.0", _V_MOE),
        On(ADA, "native", "0.33.0", _V_MOE),
        On(HOPPER + BLACKWELL, "native", "0.12.0", _V_MOE),
    ),
    ("vLLM", "W8A16_FP8", LINEAR): (
        On(TURING + AMPERE, "weights only", "0.33.0", f"{_V_LINEAR}; kernels/linear/scaled_mm/marlin.py"),
        On(
            SINCE_ADA,
            "wrong",
            "",
            f"{_V_MODELOPT}, KFp8StaticTensor: FP8 there has quantized inputs",
            note="vLLM 0.33.0 rounds their inputs from SM 89 on, with a scale that no file sets, without an "
            f"error; {_ITS_OWN_LAYOUT}, or quantize inputs too",
        ),
    ),
    ("vLLM", "W8A16_FP8", EXPERTS): (
        On(TURING + AMPERE, "weights only", "0.33.0", _V_MOE),
        On(
            SINCE_ADA,
            "wrong",
            "",
            f"{_V_MODELOPT}, ModelOptFp8MoEMethod.create_weights",
            note=_SCALE_OF_ONE,
        ),
    ),
    ("vLLM", "MXFP8", LINEAR): (
        On(TURING + AMPERE + ADA + HOPPER, "weights only", "0.23.0", _V_LINEAR),
        On(BLACKWELL, "native", "0.23.0", _V_LINEAR),
    ),
    ("vLLM", "MXFP8", EXPERTS): (
        On(
            TURING + AMPERE + ADA + HOPPER + DESKTOP,
            "weights only",
            "0.23.0",
            f"{_V_MOE}; pull request 42958",
            note="a GPU's share of an expert's width must be a multiple of 32: else --enable-expert-parallel",
        ),
        On(DATACENTER, "native", "0.23.0", _V_MOE),
    ),
    ("vLLM", "MXFP8", BESIDE): (On(ALL, "native", "0.25.0", "pull request 46756"),),
    ("vLLM", "NVFP4", LINEAR): (
        On(TURING + AMPERE + ADA + HOPPER, "weights only", "0.33.0", _V_LINEAR),
        On(BLACKWELL, "native", "0.17.1", _V_LINEAR),
    ),
    ("vLLM", "NVFP4", EXPERTS): (
        On(TURING + AMPERE + ADA + HOPPER, "weights only", "0.33.0", _V_MOE),
        On(
            DATACENTER,
            "native",
            "0.17.1",
            f"{_V_MOE}; issue 52308",
            note="on B200 its own choice of kernel for the experts was fluent but wrong with Nano (its issue "
            "52308, open): --moe-backend flashinfer_cutlass",
            options=("--moe-backend", "flashinfer_cutlass"),
        ),
        On(DESKTOP, "native", "0.17.1", _V_MOE),
    ),
    ("vLLM", "W4A16_NVFP4", LINEAR): (On(ALL, "weights only", "0.33.0", f"{_V_LINEAR}; pull request 41769"),),
    ("vLLM", "W4A16_NVFP4", EXPERTS): (On(ALL, "weights only", "0.33.0", f"{_V_MOE}; pull request 42566"),),
    ("vLLM", MIXED, LINEAR): (
        On(ALL[:-2], "native", "0.17.1", _V_MODELOPT),
        On(
            DESKTOP,
            "native",
            "0.17.1",
            f"{_V_MODELOPT}; NVIDIA/dgx-spark-playbooks issue 77",
            note="0.15.1, and forks for DGX Spark made from such versions, refuse files that list their "
            "modules",
        ),
    ),
    ("SGLang", "FP8", LINEAR): (
        On(AMPERE, "weights only", "0.5.23", "layers/quantization/fp8_utils.py"),
        On(SINCE_ADA, "native", "0.5.9", _S_MODELOPT),
    ),
    ("SGLang", "FP8", EXPERTS): (
        On(
            AMPERE,
            "refused",
            "",
            f"{_S_MODELOPT}, ModelOptFp8MoEMethod.create_moe_runner",
            note="FP8 experts start and then fail on SM 80 and 86",
        ),
        On(SINCE_ADA, "native", "0.5.9", _S_OVERRIDES),
    ),
    ("SGLang", "W8A16_FP8", LINEAR): (
        On(AMPERE, "weights only", "0.5.23", f"{_S_MODELOPT}, ModelOptFp8LinearMethod"),
        On(
            SINCE_ADA,
            "wrong",
            "",
            f"{_S_MODELOPT}, ModelOptFp8LinearMethod",
            note="SGLang 0.5.23 rounds their inputs from SM 89 on, with a scale that no file sets, without "
            "an error; set SGLANG_FORCE_FP8_MARLIN=1 (read, not run), or quantize inputs too",
        ),
    ),
    ("SGLang", "W8A16_FP8", EXPERTS): (
        On(AMPERE, "refused", "", f"{_S_MODELOPT}, ModelOptFp8MoEMethod.create_moe_runner"),
        On(
            SINCE_ADA,
            "wrong",
            "",
            f"{_S_MODELOPT}, ModelOptFp8MoEMethod.create_weights",
            note=_SCALE_OF_ONE,
        ),
    ),
    ("SGLang", "MXFP8", LINEAR): (On(BLACKWELL, "native", "0.5.19", "layers/quantization/fp8_utils.py"),),
    ("SGLang", "MXFP8", EXPERTS): (
        On(DATACENTER, "native", "0.5.19", "layers/quantization/fp8.py"),
        On(DESKTOP, "refused", "", "layers/moe/moe_runner/triton.py"),
    ),
    ("SGLang", "MXFP8", BESIDE): (
        On(
            ALL,
            "wrong",
            "",
            f"{_S_MODELOPT}, ModelOptMixedPrecisionConfig; model_loader/loader.py",
            note="vLLM before 0.25.0 takes them as unquantized, and SGLang 0.5.23 reads their scales as "
            "zeros, both without an error; serve it with vLLM 0.25.0 or later, or give all modules this "
            "format",
        ),
    ),
    ("SGLang", "MXFP8", "lm_head"): (
        On(
            ALL,
            "wrong",
            "",
            "layers/quantization/fp8.py",
            note="SGLang 0.5.23 reads its codes as if they were weights, without an error; give lm_head "
            "`format: source` to serve it there",
        ),
    ),
    ("SGLang", "NVFP4", LINEAR): (
        On(AMPERE + ADA + HOPPER, "weights only", "0.5.23", "pull request 25655"),
        On(BLACKWELL, "native", "0.5.9", _S_MODELOPT),
    ),
    ("SGLang", "NVFP4", EXPERTS): (
        On(AMPERE + ADA + HOPPER, "weights only", "0.5.23", "pull request 25655"),
        On(BLACKWELL, "native", "0.5.9", _S_OVERRIDES),
    ),
    ("SGLang", "W4A16_NVFP4", LINEAR): (On(SINCE_AMPERE, "weights only", "0.5.23", "pull request 33543"),),
    ("SGLang", "W4A16_NVFP4", EXPERTS): (On(SINCE_AMPERE, "weights only", "0.5.23", "pull request 33543"),),
    ("SGLang", "W4A16_NVFP4", "mamba.in_proj"): (
        On(
            ALL,
            "wrong",
            "",
            "models/nemotron_h.py, load_weights; ModelOptNvFp4A16LinearMethod",
            note="SGLang 0.5.23 reads its global scale from memory that nothing wrote, without an error; "
            "serve it with vLLM, or give mamba.in_proj another format",
        ),
    ),
    ("SGLang", MIXED, LINEAR): (On(SINCE_AMPERE, "native", "0.5.9", _S_MODELOPT),),
    ("TensorRT-LLM", "FP8", LINEAR): (
        On(SINCE_ADA, "native", "1.3.0rc8", _T_LINEAR),
        On(AMPERE, "not known", "", _T_LINEAR),
    ),
    ("TensorRT-LLM", "FP8", EXPERTS): (
        On(SINCE_ADA, "native", "1.3.0rc8", _T_GUIDE),
        On(AMPERE, "refused", "", _T_GUIDE),
    ),
    ("TensorRT-LLM", "W8A16_FP8", LINEAR): (
        On(
            SINCE_ADA,
            "native",
            _T_AUTUMN,
            f"{_T_LINEAR}, FP8QDQLinearMethod.process_weights_after_loading_vanilla",
            note="it has no FP8 weights with whole inputs: it rounds them to FP8, with a scale found at run "
            "time",
        ),
        On(AMPERE, "not known", "", _T_LINEAR),
    ),
    ("TensorRT-LLM", "W8A16_FP8", EXPERTS): (On(SINCE_AMPERE, "not known", "", _T_GUIDE),),
    ("TensorRT-LLM", "MXFP8", LINEAR): (On(ALL, "not known", "", _T_LINEAR),),
    ("TensorRT-LLM", "MXFP8", EXPERTS): (
        On(
            ALL,
            "refused",
            "",
            "_torch/modules/fused_moe/quantization.py, MXFP8CutlassFusedMoEMethod.load_quant_scales",
            note="experts without a gate fail to load: it splits their scales in two",
        ),
    ),
    ("TensorRT-LLM", "NVFP4", LINEAR): (
        On(ADA, "not known", "", _T_LINEAR),
        On(HOPPER, "weights only", _T_SUMMER, _T_MODEL),
        On(BLACKWELL, "native", "1.3.0rc8", _T_LINEAR),
    ),
    ("TensorRT-LLM", "NVFP4", EXPERTS): (
        On(ADA, "not known", "", _T_GUIDE),
        On(HOPPER, "weights only", _T_SUMMER, _T_MODEL),
        On(BLACKWELL, "native", "1.3.0rc8", _T_GUIDE),
    ),
    ("TensorRT-LLM", "W4A16_NVFP4", LINEAR): (On(SINCE_AMPERE, "weights only", _T_AUTUMN, _T_LINEAR),),
    ("TensorRT-LLM", "W4A16_NVFP4", EXPERTS): (
        On(
            SINCE_AMPERE,
            "weights only",
            _T_AUTUMN,
            f"{_T_GUIDE}; pull request 16511",
            note="weights-only NVFP4 in a file that lists its modules gets a backend that decodes the "
            "experts at each step, slower than for a uniform file",
        ),
    ),
    ("TensorRT-LLM", MIXED, LINEAR): (On(SINCE_AMPERE, "native", "1.3.0rc8", _T_MODEL),),
}
_RAW = "it loads the file without an error and computes with raw codes"
_READERS: Mapping[tuple[str, str], On] = {  # of whole files, on any GPU
    **{
        ("transformers", name): On(
            ALL,
            "wrong",
            "",
            "run with 5.14 and 5.19",
            note=f"{_RAW} (KL 2.2 on the demo model): `nemoquant convert OUT NEW --to compressed-tensors` if "
            f"all is FP8, or `--to bf16`",
        )
        for name in ("FP8", "W8A16_FP8")
    },
    ("transformers", "MXFP8"): On(
        ALL,
        "wrong",
        "",
        "run with 5.14 and 5.19",
        note=f"{_RAW} (KL 4.0 on the demo model): `nemoquant convert OUT NEW --to bf16`",
    ),
    **{
        ("transformers", name): On(
            ALL,
            "refused",
            "",
            "run with 5.14 and 5.19",
            note="it does not load the file: `nemoquant convert OUT NEW --to bf16`",
        )
        for name in ("NVFP4", "W4A16_NVFP4")
    },
    ("transformers", MIXED): On(ALL, "native", "5.14", "the list is not read"),
    ("llama.cpp", MIXED): On(ALL, "weights only", "October 2026", _L_CONVERTER),
    **{
        ("llama.cpp", name): On(
            ALL,
            "weights only",
            "October 2026",
            _L_CONVERTER,
            note="its converter decodes FP8 to bf16, as large as the source",
        )
        for name in ("FP8", "W8A16_FP8")
    },
    ("llama.cpp", "MXFP8"): On(ALL, "refused", "", _L_CONVERTER, note="its converter fails on MXFP8"),
    ("llama.cpp", "NVFP4"): On(ALL, "weights only", "October 2026", _L_CONVERTER),
    ("llama.cpp", "W4A16_NVFP4"): On(
        ALL,
        "weights only",
        "October 2026",
        f"{_L_CONVERTER}; _flush_nvfp4_experts",
        note="its converter does not see that experts are weights only, so that their inputs get 4 bits on "
        "Blackwell: GGML_CUDA_MMQ_PREC=q8 there",
    ),
}
ROWS: tuple[Row, ...] = (
    *(Row(*case, on) for case, each in _CASES.items() for on in each),
    *(Row(*case, part, on) for case, on in _READERS.items() for part in (LINEAR, EXPERTS)),
)

# (engine, algorithm of the whole file) -> the least compute capability that its configuration admits
LEAST: Mapping[tuple[str, str], int] = MappingProxyType(
    {
        ("vLLM", "FP8"): 80,
        ("vLLM", "MXFP8"): 80,
        ("vLLM", "NVFP4"): 75,
        ("vLLM", "W4A16_NVFP4"): 75,
        ("vLLM", "W8A16_FP8"): 75,
        ("vLLM", MIXED): 75,
        ("SGLang", "FP8"): 89,
        ("SGLang", "MXFP8"): 100,
        ("SGLang", "NVFP4"): 80,
        ("SGLang", "W4A16_NVFP4"): 80,
        ("SGLang", "W8A16_FP8"): 80,
        ("SGLang", MIXED): 80,
        **{
            ("TensorRT-LLM", name): 80
            for name in ("FP8", "MXFP8", "NVFP4", "W4A16_NVFP4", "W8A16_FP8", MIXED)
        },
    }
)
