"""Jobs on vLLM, in its environment. Replaced is what needs a GPU: the choice of kernels, and repacking."""

import contextlib
import functools
import importlib
import io
import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

torch.set_num_threads(1)

import vllm  # noqa: E402
import vllm.model_executor.layers.fused_moe.config as moe_config  # noqa: E402
import vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method as unquantized  # noqa: E402
import vllm.model_executor.layers.quantization.modelopt as modelopt  # noqa: E402
from vllm.config import VllmConfig, set_current_vllm_config  # noqa: E402
from vllm.distributed import init_distributed_environment, initialize_model_parallel  # noqa: E402
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs  # noqa: E402
from vllm.model_executor.layers.fused_moe.oracle import fp8, nvfp4  # noqa: E402
from vllm.model_executor.model_loader import get_model_loader  # noqa: E402
from vllm.model_executor.model_loader.utils import initialize_model  # noqa: E402
from vllm.platforms import current_platform  # noqa: E402
from vllm.platforms.interface import DeviceCapability, PlatformEnum  # noqa: E402
from vllm.utils.torch_utils import set_default_torch_dtype  # noqa: E402
from vllm.v1.attention.backends.registry import AttentionBackendEnum  # noqa: E402

from . import stored  # noqa: E402
from .stored import Comparison, Loaded, Stored  # noqa: E402

COMPILED = {  # what vLLM's compiled kernels say that they serve: a name, and the least SM
    "scaled_mm_supports_fp8": 89,
    "scaled_mm_supports_fp4": 100,
    "scaled_mm_supports_block_fp8": 90,
    "group_gemm_supported": 90,
}
PROCESSED = ("ModelOptLinearMethod", "ModelOptKVCacheMethod", "CompressedTensorsLinearMethod")
GPUS = (80, 90, 100, 120)
COMPRESSED_TENSORS = (
    "compressed_tensors_moe.compressed_tensors_moe_w8a8_fp8",
    "schemes.compressed_tensors_w8a8_fp8",
    "schemes.compressed_tensors_w8a16_fp8",
)
QKV = ("q_proj", "k_proj", "v_proj")
ASKED: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]] = {}
"""The first question of each kind for a kernel: the engine's function, and what it was asked with."""


class OnCpu(type(current_platform)):  # type: ignore[misc]
    """The CPU, which attends over any KV cache: none is computed here."""

    @classmethod
    def get_attn_backend_cls(cls, *_arguments: Any, **_named: Any) -> str:
        return AttentionBackendEnum.CPU_ATTN.get_path()


current_platform.__class__ = OnCpu


class NoKernel:
    """Stands for a linear layer's kernel, and repacks nothing."""

    supports_pre_processed_weights = False

    def __init__(self) -> None:
        self.config = SimpleNamespace()

    def process_weights_after_loading(self, layer: object) -> None:
        pass

    def input_quant_key(self) -> None:
        return None


def instead(module: ModuleType, name: str, kind: str, answer: Any) -> None:
    """Give ``answer`` where the engine asks for a kernel, and remember what it asked."""
    asked = getattr(module, name)

    def answered(*arguments: Any, **named: Any) -> Any:
        activations = named.get("activation_key", arguments[2] if len(arguments) > 2 else None)
        weights_only = named.get("use_a16", "nvfp4" in name and "moe" in name and activations is None)
        ASKED.setdefault(f"W4A16_{kind}" if weights_only else kind, (asked, arguments, named))
        return answer

    setattr(module, name, answered)


def quantize(values: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the kernel ``scaled_fp8_quant`` computes: E4M3 of the values over the scale, saturated."""
    return (values.float() * (1 / scale)).clamp(-448, 448).to(torch.float8_e4m3fn), scale


def replace_kernels() -> None:
    """Everything that would choose a kernel by the GPU, and the one that loading itself runs."""
    importlib.import_module("vllm._custom_ops").scaled_fp8_quant = quantize
    other = list(fp8.Fp8MoeBackend)[-1], object
    instead(modelopt, "select_nvfp4_moe_backend", "NVFP4 experts", (nvfp4.NvFp4MoeBackend.EMULATION, object))
    instead(modelopt, "select_fp8_moe_backend", "FP8 experts", other)
    instead(modelopt, "select_mxfp8_moe_backend", "MXFP8 experts", other)
    instead(
        unquantized,
        "select_unquantized_moe_backend",
        "unquantized experts",
        (next(iter(unquantized.UnquantizedMoeBackend)), None),
    )
    for path in COMPRESSED_TENSORS:
        module = importlib.import_module(f"{modelopt.__package__}.compressed_tensors.{path}")
        if hasattr(module, "select_fp8_moe_backend"):
            instead(module, "select_fp8_moe_backend", "FP8 experts", other)
        elif hasattr(module, "init_fp8_linear_kernel"):
            instead(module, "init_fp8_linear_kernel", "FP8 linear", NoKernel())
        else:
            instead(module, "init_wfp8_a16_linear_kernel", "FP8 weights linear", NoKernel())
    instead(modelopt, "init_nvfp4_linear_kernel", "NVFP4 linear", NoKernel())
    instead(modelopt, "init_fp8_linear_kernel", "FP8 linear", NoKernel())
    instead(modelopt, "init_mxfp8_linear_kernel", "MXFP8 linear", NoKernel())
    initialize = moe_config.FusedMoEConfig.__post_init__

    def initialized(self: Any) -> None:  # it refuses experts without a gate where there is no GPU
        with on_gpu(100):
            initialize(self)

    moe_config.FusedMoEConfig.__post_init__ = initialized


class OnGpu(OnCpu):
    """A CUDA device of the capability ``sm``, by the platform's answers."""

    _enum = PlatformEnum.CUDA
    device_name = device_type = "cuda"
    sm = 0

    @classmethod
    def get_device_capability(cls, device_id: int = 0) -> DeviceCapability:  # noqa: ARG003
        return DeviceCapability(*divmod(OnGpu.sm, 10))

    @classmethod
    def supports_fp8(cls) -> bool:
        return OnGpu.sm >= 89

    @classmethod
    def num_compute_units(cls, device_id: int = 0) -> int:  # noqa: ARG003
        return 148


@contextlib.contextmanager
def on_gpu(sm: int) -> Iterator[None]:
    """All of vLLM shares one platform object: for a while it answers as a GPU."""
    before, OnGpu.sm = current_platform.__class__, sm
    current_platform.__class__ = OnGpu
    try:
        yield
    finally:
        current_platform.__class__ = before


def engine_config(folder: str, draft: bool = False) -> VllmConfig:
    """What ``vllm serve`` makes of a folder."""
    return EngineArgs(
        model=folder,
        enforce_eager=True,
        max_model_len=256,
        max_num_seqs=2,
        max_num_batched_tokens=256,
        dtype="bfloat16",
        enable_prefix_caching=False,
        speculative_config={"method": "mtp", "num_speculative_tokens": 1} if draft else None,
    ).create_engine_config()


def start(config: VllmConfig) -> None:
    """Groups of one process."""
    with set_current_vllm_config(config), tempfile.NamedTemporaryFile(delete=False) as file:
        init_distributed_environment(
            world_size=1, rank=0, distributed_init_method=f"file://{file.name}", local_rank=0, backend="gloo"
        )
        initialize_model_parallel(1, 1)


def built(config: VllmConfig, draft: bool, device: str = "cpu") -> tuple[torch.nn.Module, Any]:
    """The model of a config, or its draft, and the part of the config that it is of."""
    model_config = config.speculative_config.draft_model_config if draft else config.model_config
    config.compilation_config.static_forward_context.clear()
    with set_current_vllm_config(config), set_default_torch_dtype(torch.bfloat16), torch.device(device):
        return initialize_model(vllm_config=config, model_config=model_config), model_config


def algorithm(module: torch.nn.Module) -> str:
    """ModelOpt's name for what a module computes with; "" where its weight is not quantized."""
    method = getattr(module, "quant_method", None)
    name = type(method).__name__
    if name == "ModelOptLinearMethod":
        weight, inputs = method.spec.weight, method.spec.activation
        if weight == modelopt.kNvfp4Static:
            return "NVFP4" if inputs else "W4A16_NVFP4"
        return {modelopt.kFp8StaticTensorSym: "FP8", modelopt.kMxfp8Static: "MXFP8"}.get(weight, str(weight))
    if name == "ModelOptNvFp4FusedMoE":
        return "W4A16_NVFP4" if method.use_a16 else "NVFP4"
    known = {
        "ModelOptFp8MoEMethod": "FP8",
        "ModelOptMxFp8FusedMoE": "MXFP8",
        "CompressedTensorsW8A8Fp8MoEMethod": "FP8",
    }
    if name == "CompressedTensorsLinearMethod":
        name = type(module.scheme).__name__
        known |= {"CompressedTensorsW8A8Fp8": "FP8", "CompressedTensorsW8A16Fp8": "FP8"}
    return known.get(name, "" if name == "NoneType" or name.startswith("Unquantized") else name)


def in_engine(name: str, draft: bool) -> str:
    """The name in vLLM's model of a tensor or module of the file."""
    if draft:
        return name.replace("mtp.layers.", "model.layers.")
    return name.replace("backbone.", "model.", 1).replace(".embeddings", ".embed_tokens")


def place_of(name: str) -> str:
    """The engine's module of a module or an input scale: one for all experts, and for q, k and v."""
    name = re.sub(r"\.[qkv]_proj$", ".qkv_proj", name.removesuffix(".input_scale"))
    return re.sub(r"\.experts\..*", ".experts", name)


class Place:
    """Where a module of the file is in the engine: its module there, and the expert or the part of it."""

    def __init__(self, modules: dict[str, torch.nn.Module], name: str, draft: bool) -> None:
        name = in_engine(name, draft)
        parent, _, leaf = name.rpartition(".")
        self.expert = self.part = None
        if ".mixer.experts." in name:
            parent, _, rest = name.partition(".experts.")
            expert, leaf = rest.split(".")
            self.expert, self.part = int(expert), "w13" if leaf == "up_proj" else "w2"
            inner, outer = f"{parent}.experts.routed_experts", f"{parent}.experts"
            self.module = modules.get(inner, modules.get(outer))
        elif leaf in QKV and name not in modules:
            self.part = leaf
            self.module = modules.get(f"{parent}.qkv_proj")
        else:
            self.module = modules.get(name)


def loaded(place: Place) -> Loaded | None:
    """A module after ``process_weights_after_loading`` (experts: before; that repacks them for a kernel)."""
    module = place.module
    if module is None or (place.expert is None and not hasattr(module, "weight")):
        return None
    name = algorithm(module)
    if place.expert is not None:

        def of(what: str) -> torch.Tensor | None:
            found = getattr(module, f"{place.part}_{what}", None)
            return None if found is None else found.data[place.expert]

        weight, scale, second, inputs = map(of, ("weight", "weight_scale", "weight_scale_2", "input_scale"))
        if name == "FP8":
            scale = scale.reshape(-1)[0]
        second = None if second is None else second.reshape(-1)[0]
        return Loaded(
            name,
            stored.decoded(weight, scale, second),
            inputs.reshape(-1)[0].item() if inputs is not None else None,
        )
    weight, scale = module.weight.data, getattr(module, "weight_scale", None)
    if name == "FP8":
        weight = weight.t()
    second = getattr(module, "weight_global_scale", None)
    values = stored.decoded(weight, scale, second)
    if place.part is not None:  # of q, k and v
        sizes = dict(zip(QKV, module.output_sizes, strict=True))
        values = values.split(list(sizes.values()))[QKV.index(place.part)]
    inputs = getattr(module, "input_global_scale" if "NVFP4" in name else "input_scale", None)
    return Loaded(name, values, inputs.item() if inputs is not None else None)


def load(folder: str, draft: bool) -> dict[str, Any]:
    """Load a checkpoint twice, and compare; see ``results.py`` for the keys."""
    replace_kernels()
    file = Stored(Path(folder))
    config = engine_config(folder, draft)
    start(config)
    has_cache_scales = bool(file.cache_scales(draft))
    scaled = {place_of(in_engine(name, draft)) for name in file.modules(draft) if file.has_input_scale(name)}

    def keep(name: str) -> bool:
        """Scales of inputs and caches that no file needs; the engine's own default stands for those."""
        if name.endswith((".q_scale", ".prob_scale", "_zero_point")):
            return True
        if name.endswith((".k_scale", ".v_scale")):
            return not has_cache_scales
        if name.endswith("_input_scale") and config.model_config.quantization == "compressed-tensors":
            return (
                True  # of experts: it refuses a second tensor that differs from what is there, but not from 1
            )
        return name.endswith("input_scale") and place_of(name) not in scaled

    models, kept = [], {}
    for byte in stored.FILLS:
        model, model_config = built(config, draft)
        kept = stored.fill(model, byte, keep)
        loader = get_model_loader(config.load_config)
        loader.enable_weights_track = False
        with set_current_vllm_config(config), contextlib.redirect_stderr(io.StringIO()):
            loader.load_weights(model, model_config)
        models.append(model)
    unset = stored.unwritten(*models, keep)
    model = models[-1]
    modules, comparison = dict(model.named_modules()), Comparison()
    caches = {}
    for name, module in modules.items():
        method = getattr(module, "quant_method", None)
        if type(method).__name__ in PROCESSED:
            if type(method).__name__ == "ModelOptKVCacheMethod":
                module.kv_cache_dtype = config.cache_config.cache_dtype
            with set_current_vllm_config(config):
                method.process_weights_after_loading(module)
        if hasattr(module, "_k_scale_float"):
            caches[name] = [module._k_scale_float, module._v_scale_float]
    for name in file.modules(draft):
        comparison.module(file, name, loaded(Place(modules, name, draft)))
    parameters = dict(model.named_parameters())
    for name, tensor in file.others(draft):
        there = in_engine(name, draft)
        if there.endswith("A_log"):
            there, tensor = there.replace("A_log", "A"), -torch.exp(tensor.float())
        comparison.other(name, tensor, parameters.get(there))
    for name, scale in file.cache_scales(draft).items():
        mixer = in_engine(name, draft).rsplit(".", 2)[0]
        found = caches.get(f"{mixer}.attn")
        comparison.cache(name, scale, found and found[name.endswith(".v_scale")])
    return vars(comparison) | {
        "engine": vllm.__version__,
        "quantization": config.model_config.quantization,
        "caches": {"kv": config.cache_config.cache_dtype, "ssm": config.cache_config.mamba_ssm_cache_dtype},
        "cache_scales": caches,
        "parameters": len(parameters),
        "unset": unset,
        "kept": kept,
        "least_sm": config.quant_config.get_min_capability(),
        "backends": backends(config),
    }


def backends(config: VllmConfig) -> dict[str, dict[str, str]]:
    """For each GPU and kind of product, the kernel that vLLM's own selection takes, or why it takes none.

    FlashInfer and vLLM's compiled kernels are taken as there, as they are where vLLM is installed.
    """
    from . import stubs

    stubs.install(frozenset({"flashinfer", "flashinfer_cubin"}))
    flashinfer = importlib.import_module("vllm.utils.flashinfer")
    for known in vars(flashinfer).values():  # answers from before the stub
        if isinstance(known, functools._lru_cache_wrapper):
            known.cache_clear()
    for name, least in COMPILED.items():
        setattr(torch.ops._C, f"cutlass_{name}", lambda sm, least=least: sm >= least)
    found: dict[str, dict[str, str]] = {}
    for sm in GPUS:
        answers = found[str(sm)] = {}
        for kind, (function, arguments, named) in sorted(ASKED.items()):
            with on_gpu(sm), set_current_vllm_config(config):
                try:
                    answer = function(*arguments, **named)
                except Exception as error:
                    answers[kind] = f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"
                else:
                    answers[kind] = answer[0].value if isinstance(answer, tuple) else type(answer).__name__
    return found


def names(folder: str, plan: dict[str, str]) -> dict[str, Any]:
    """The algorithm of every module of a bare config against a plan's; no weights are made."""
    replace_kernels()
    differ: list[list[Any]] = []
    started = False
    for draft in (False, True):
        modules = {name: text for name, text in plan.items() if name.startswith("mtp.") == draft}
        if not modules:
            continue
        config = engine_config(folder, draft)
        if not started:
            start(config)
            started = True
        model, _ = built(config, draft, "meta")
        there = dict(model.named_modules())
        for name, expected in modules.items():
            module = Place(there, name, draft).module
            got = "no such module" if module is None else algorithm(module)
            if got != expected:
                differ.append([name, expected, got])
    return {
        "engine": vllm.__version__,
        "quantization": config.model_config.quantization,
        "least_sm": config.quant_config.get_min_capability(),
        "backends": backends(config),
        "modules": len(plan),
        "algorithms": Counter(text or stored.PLAIN for text in plan.values()),
        "expert_algorithms": Counter(
            text or stored.PLAIN for name, text in plan.items() if ".experts." in name
        ),
        "algorithm_differs": differ,
    }


def commands(lines: list[tuple[int, list[str]]]) -> dict[str, Any]:
    """What vLLM's own command line makes of commands: (SM, words from ``vllm`` on)."""
    return {"engine": vllm.__version__, "commands": [check_command(sm, words) for sm, words in lines]}


def check_command(sm: int, words: list[str]) -> dict[str, Any]:
    """Parse ``vllm serve ...``, and make the engine's config, on the CPU; ``sm`` is only noted."""
    from vllm.entrypoints.cli.serve import cmd_init
    from vllm.entrypoints.common.cli_args import validate_api_server_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            parser = FlexibleArgumentParser(prog="vllm")
            [serve] = cmd_init()
            serve.subparser_init(parser.add_subparsers(required=True, dest="subparser"))
            options = parser.parse_args(words[1:])
            serve.validate(options)
            validate_api_server_args(options)
            options.model = options.model_tag or options.model
            config = AsyncEngineArgs.from_cli_args(options).create_engine_config()
    except (Exception, SystemExit) as error:
        text = said.getvalue().strip().splitlines()[-1:] if isinstance(error, SystemExit) else [str(error)]
        return {"sm": sm, "words": words, "refused": " ".join(" ".join(text).split())[:400]}
    drafted = config.speculative_config
    return {
        "sm": sm,
        "words": words,
        "became": {
            "tensor_parallel_size": config.parallel_config.tensor_parallel_size,
            "kv_cache_dtype": config.cache_config.cache_dtype,
            "mamba_ssm_cache_dtype": config.cache_config.mamba_ssm_cache_dtype,
            "quantization": config.model_config.quantization,
            "speculative": drafted and [drafted.method, drafted.num_speculative_tokens],
            "reasoning_parser": options.reasoning_parser,
            "tool_call_parser": options.tool_call_parser,
        },
    }
