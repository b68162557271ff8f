"""Jobs on SGLang, in the engines' environment. Replaced is only what needs a GPU: packages, and repacking."""

import contextlib
import importlib
import io
import logging
import re
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch

torch.set_num_threads(1)
warnings.filterwarnings("ignore")

# These look for packages that are stubs below, and choose between ways by it.
for looking in (
    "tvm_ffi",
    "llguidance",
    "xgrammar",
    "transformers.image_utils",
    "transformers.modeling_utils",
    "transformers.models.auto.processing_auto",
    "transformers.video_utils",
):
    importlib.import_module(looking)

from . import stubs  # noqa: E402

stubs.install()

import sglang.kernels.ops.quantization.fp8_kernel as fp8_kernel  # noqa: E402
import sglang.srt.layers.quantization.modelopt_quant as modelopt  # noqa: E402
import sglang.srt.runtime_context as context  # noqa: E402
from sglang.srt.arg_groups.overrides import resolving_view  # noqa: E402
from sglang.srt.configs.load_config import LoadConfig  # noqa: E402
from sglang.srt.configs.model_config import ModelConfig  # noqa: E402
from sglang.srt.distributed.parallel_state import (  # noqa: E402
    init_distributed_environment,
    initialize_model_parallel,
)
from sglang.srt.model_loader import loader  # noqa: E402
from sglang.srt.server_args import ServerArgs, prepare_server_args  # noqa: E402
from sglang.version import __version__  # noqa: E402

from . import stored  # noqa: E402
from .stored import Comparison, Loaded, Stored  # noqa: E402

GPUS = (80, 90, 100, 120)
WEIGHTS_ONLY: list[Any] = []
"""Quantization configs for W4A16_NVFP4, of the models that were built."""
QKV = ("q_proj", "k_proj", "v_proj")


def facts(sm: int, cuda: bool) -> dict[str, Any]:
    """What SGLang asks of the machine, for a GPU of that capability."""
    return {
        "is_cuda": cuda,
        "is_sm90": sm // 10 == 9,
        "is_sm100": sm // 10 == 10,
        "is_sm100_or_sm110": sm // 10 in (10, 11),
        "is_sm110": sm // 10 == 11,
        "is_sm120": sm // 10 == 12,
        "is_blackwell": sm >= 100,
        "is_hopper_with_cuda_12_3": sm // 10 == 9,
        "device_capability": divmod(sm, 10),
        "device_sm": sm,
        "has_flashinfer": True,
    }


def start(folder: str) -> None:
    """One process on the CPU that takes itself for a Blackwell where it is asked which formats there are."""
    context.override_platform(**facts(100, cuda=False)).install()
    context.publish(
        ServerArgs(
            model_path=folder,
            device="cpu",
            skip_tokenizer_init=True,
            disable_cuda_graph=True,
            attention_backend="torch_native",
            disable_radix_cache=True,
            mamba_radix_cache_strategy="no_buffer",
        ),
        role="scheduler",
    )
    with tempfile.NamedTemporaryFile(delete=False) as file:
        init_distributed_environment(
            backend="gloo", world_size=1, rank=0, local_rank=0, distributed_init_method=f"file://{file.name}"
        )
    initialize_model_parallel()
    read = context.ParallelContext._read

    def read_or_one(self: Any, name: str) -> Any:  # widths that only a whole server publishes: of one process
        try:
            return read(self, name)
        except RuntimeError:
            return 0 if name.endswith("rank") else 1 if name.endswith("size") else None

    context.ParallelContext._read = read_or_one
    torch.cuda.Stream = lambda *_arguments, **_named: None  # type: ignore[assignment, misc]
    torch.Tensor.cuda = lambda self, *_arguments, **_named: self  # type: ignore[method-assign]
    modelopt.prepare_nvfp4_layer_for_marlin = lambda layer: None
    fp8_kernel.sgl_per_tensor_quant_fp8 = quantize


def quantize(values: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, is_static: bool) -> None:
    """What the kernel ``per_tensor_quant_fp8`` computes: E4M3 of the values over the scale, saturated."""
    assert is_static
    codes.copy_((values.float() * (1 / scale)).clamp(-448, 448).to(torch.float8_e4m3fn))


def built(folder: str, draft: bool, device: str = "cpu") -> tuple[torch.nn.Module, ModelConfig]:
    """The model of a folder, or its draft, by SGLang's loader."""
    config = ModelConfig(folder, is_draft_model=draft)
    load_config = LoadConfig()
    quantization = loader._get_quantization_config(config, load_config)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        WEIGHTS_ONLY.append(getattr(quantization, "nvfp4a16_config", None))
        with torch.device(device):
            return loader._initialize_model(config, load_config, quantization), config
    finally:
        torch.set_default_dtype(before)


def algorithm(module: torch.nn.Module) -> str:
    """ModelOpt's name for what a module computes with; "" where its weight is not quantized.

    Experts of W4A16_NVFP4 have the method of NVFP4, and compute with whole inputs by Marlin alone: that it is
    chosen for them is asked in :func:`backends`.
    """
    method = getattr(module, "quant_method", None)
    name = type(method).__name__
    if name == "ModelOptNvFp4FusedMoEMethod":
        return "W4A16_NVFP4" if method.quant_config in WEIGHTS_ONLY else "NVFP4"
    if name in ("Fp8LinearMethod", "Fp8MoEMethod"):
        return "MXFP8" if method.quant_config.use_mxfp8 else name
    known = {
        "ModelOptFp8LinearMethod": "FP8",
        "ModelOptFp8MoEMethod": "FP8",
        "ModelOptFp4LinearMethod": "NVFP4",
        "ModelOptNvFp4A16LinearMethod": "W4A16_NVFP4",
    }
    return known.get(name, "" if name == "NoneType" or name.startswith("Unquantized") else name)


class Cutlass:
    """SGLang's answer which runner the experts have: FlashInfer's of CUTLASS, and no other."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_arguments, **_named: name == "is_flashinfer_cutlass"


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
            self.module = modules.get(f"{parent}.experts")
        elif leaf in QKV:
            self.part, self.module = leaf, modules.get(f"{parent}.qkv_proj")
        else:
            self.module = modules.get(name)

    def tensor(self, what: str) -> torch.Tensor | None:
        """A parameter of the module: of this expert, or of this part of q, k and v."""
        prefix = "" if self.expert is None else f"{self.part}_"
        names = [f"{prefix}{what}", f"{prefix}{what}_inv"]  # MXFP8's block scales have the second name
        found = next((getattr(self.module, name) for name in names if hasattr(self.module, name)), None)
        if found is None:
            return None
        if self.expert is not None:
            return found.data[self.expert] if found.dim() else found.data
        if self.part is not None:
            if found.numel() == len(QKV):
                return found.data[QKV.index(self.part)]
            return found.data.split(self.module.output_partition_sizes)[QKV.index(self.part)]
        return found.data


def in_engine(name: str, draft: bool) -> str:
    """The name in SGLang's model of a tensor or module of the file."""
    if draft:
        return name.replace("mtp.layers.", "model.layers.")
    return name.replace("backbone.", "model.", 1).replace(".embeddings", ".embed_tokens")


def place_of(name: str) -> str:
    """The engine's module of a module or an input scale: one for all experts, and for q, k and v."""
    name = re.sub(r"\.[qkv]_proj$", ".qkv_proj", name.removesuffix(".input_scale"))
    return re.sub(r"\.experts\..*", ".experts", name)


def loaded(place: Place) -> Loaded | None:
    """A module as it was loaded."""
    if place.module is None or (place.expert is None and not hasattr(place.module, "weight")):
        return None
    weight, scale, second, inputs = map(
        place.tensor, ("weight", "weight_scale", "weight_scale_2", "input_scale")
    )
    if scale is not None and weight.dtype == torch.float8_e4m3fn and scale.dtype != torch.uint8:
        scale = scale.max()
    values = stored.decoded(weight, scale, None if second is None else second.max())
    return Loaded(algorithm(place.module), values, None if inputs is None else inputs.max().item())


def load(folder: str, draft: bool) -> dict[str, Any]:
    """Load a checkpoint twice, and compare; see ``results.py`` for the keys."""
    file = Stored(Path(folder))
    start(folder)
    scaled = {place_of(in_engine(name, draft)) for name in file.modules(draft) if file.has_input_scale(name)}

    def keep(name: str) -> bool:
        """Scales of inputs and caches that no file needs; the engine's own default stands for those."""
        if name.endswith((".k_scale", ".v_scale")):
            return not has_cache_scales
        return name.endswith("input_scale") and place_of(name) not in scaled

    has_cache_scales = bool(file.cache_scales(draft))
    models, kept = [], {}
    for byte in stored.FILLS:
        model, config = built(folder, draft)
        kept = stored.fill(model, byte, keep)
        loader.DefaultModelLoader.load_weights_only(model, iter(file.tensors.items()), torch.device("cpu"))
        models.append(model)
    unset = stored.unwritten(*models, keep)
    model = models[-1]
    modules, comparison = dict(model.named_modules()), Comparison()
    places = {name: Place(modules, name, draft) for name in file.modules(draft)}
    for name, place in places.items():
        comparison.module(file, name, loaded(place))
    parameters = dict(model.named_parameters())
    for name, tensor in file.others(draft):
        there = in_engine(name, draft)
        if there.endswith("A_log"):
            there, tensor = there.replace("A_log", "A"), -torch.exp(tensor.float())
        comparison.other(name, tensor, parameters.get(there))
    for name, scale in file.cache_scales(draft).items():
        mixer = in_engine(name, draft).rsplit(".", 2)[0]
        found = parameters.get(f"{mixer}.attn.{name.rsplit('.', 1)[1]}")
        comparison.cache(name, scale, None if found is None else found.item())
    return vars(comparison) | {
        "engine": __version__,
        "quantization": config.quantization,
        "caches": caches(config, model),
        "cache_scales": {n: p.item() for n, p in parameters.items() if n.endswith((".k_scale", ".v_scale"))},
        "parameters": len(parameters),
        "unset": unset,
        "kept": kept,
        "processed_differ": processed(file, places),
        "least_sm": least_sm(model),
        "backends": backends(folder, bool(file.modules(True))),
    }


def least_sm(model: torch.nn.Module) -> int:
    """The least GPU by the quantization's own answer."""
    return getattr(model, "quant_config", None).get_min_capability()


def caches(config: ModelConfig, model: torch.nn.Module) -> dict[str, str]:
    """Dtypes of the KV cache and of the scan's state, where a server is not told otherwise."""
    algorithm = getattr(getattr(model, "quant_config", None), "kv_cache_quant_algo", None)
    state = config.hf_config.mamba2_cache_params.dtype.temporal
    return {"kv": str(algorithm or "auto"), "ssm": str(state).removeprefix("torch.")}


def processed(file: Stored, places: dict[str, Place]) -> list[list[Any]]:
    """Modules whose scales or codes ``process_weights_after_loading`` makes something else of.

    Linear ones, and experts' input scales, as for the runner of CUTLASS's kernels.

    Each: the module, what, the file's, and the engine's.
    """
    modelopt.get_moe_runner_backend = Cutlass
    differ: list[list[Any]] = []
    ended: dict[int, bool] = {}
    for name, place in places.items():
        module = place.module
        if module is None or not algorithm(module):
            continue
        if id(module) not in ended:  # q, k and v are one module
            if place.expert is not None:
                module._moe_runner_backend = module.quant_method._moe_runner_backend = Cutlass()
            try:
                module.quant_method.process_weights_after_loading(module)
                ended[id(module)] = True
            except Exception as error:
                # of experts scales are ready by then, and a kernel wants its layout
                ended[id(module)] = place.expert is not None
                if place.expert is None:
                    differ.append([name, type(error).__name__, "", str(error)[:200]])
        if not ended[id(module)]:
            continue
        if place.expert is not None:
            expected = file.input_scale(name)
            got = getattr(module, f"{place.part}_input_scale_quant", None)
            if got is not None and expected is not None:
                got = got.reshape(-1)[place.expert if got.numel() > 1 else 0]
                if got != 1 / torch.tensor(expected):
                    differ.append([name, "1 / input_scale", 1 / expected, got.item()])
            continue
        weight = file.tensors.get(f"{name}.weight_scale_2")
        inputs = file.tensors.get(f"{name}.input_scale")
        for what, expected in {
            "weight_global_scale": weight,
            "alpha": None if weight is None or inputs is None else weight * inputs,
            "input_scale_inv": None if inputs is None else 1 / inputs,
        }.items():
            got = getattr(module, what, None)
            if got is not None and expected is not None and got.max().item() != expected.item():
                differ.append([name, what, expected.item(), got.max().item()])
        if algorithm(module) == "FP8":  # it encodes them again, from float16
            values = module.weight.t().float() * module.weight_scale
            if place.part is not None:
                values = values.split(module.output_partition_sizes)[QKV.index(place.part)]
            if problem := stored.difference(file.values(name), values):
                differ.append([name, "codes", "", problem])
    return differ


def resolved(words: list[str], sm: int) -> Any:
    """A server's arguments as SGLang resolves them on a GPU of that capability."""
    with context.override_platform(**facts(sm, cuda=True)):
        arguments = prepare_server_args([*words, "--device", "cuda"])
        arguments.resolve_once()
        return resolving_view(arguments)


def backends(folder: str, draft: bool) -> dict[str, dict[str, str]]:
    """For each GPU, what SGLang's own resolution takes for experts and attention, and with a draft."""
    found = {}
    for sm in GPUS:
        answers = found[str(sm)] = {}
        for suffix, words in {"": [], ", MTP": ["--speculative-algorithm", "NEXTN"]}.items():
            if suffix and not draft:
                continue
            try:
                view = resolved(["--model-path", folder, *words], sm)
            except (Exception, SystemExit) as error:
                answers[f"refused{suffix}"] = f"{type(error).__name__}: {str(error)[:160]}"
                continue
            answers[f"experts{suffix}"] = view.moe_runner_backend
            answers[f"attention{suffix}"] = view.attention_backend
    return found


def names(folder: str, plan: dict[str, str]) -> dict[str, Any]:
    """The algorithm of every module of a bare config against a plan's; no weights are made."""
    start(folder)
    differ: list[list[Any]] = []
    for draft in (False, True):
        modules = {name: text for name, text in plan.items() if name.startswith("mtp.") == draft}
        if not modules:
            continue
        model, config = built(folder, draft, "meta")
        there = dict(model.named_modules())
        for name, expected in modules.items():
            module = Place(there, name, draft).module
            got = "no such module" if module is None else algorithm(module)
            if got != expected:
                differ.append([name, expected, got])
    return {
        "engine": __version__,
        "quantization": config.quantization,
        "least_sm": least_sm(model),
        "backends": backends(folder, False),
        "modules": len(plan),
        "algorithms": Counter(text or stored.PLAIN for text in plan.values()),
        "expert_algorithms": Counter(
            text or stored.PLAIN for name, text in plan.items() if ".experts." in name
        ),
        "algorithm_differs": differ,
    }


def commands(lines: list[tuple[int, list[str]]]) -> dict[str, Any]:
    """What SGLang's own command line makes of commands: (SM, words from ``python`` or ``sglang`` on)."""
    return {"engine": __version__, "commands": [check_command(sm, words) for sm, words in lines]}


def check_command(sm: int, words: list[str]) -> dict[str, Any]:
    """Parse ``python -m sglang.launch_server ...`` or ``sglang serve ...``, and resolve it on a GPU."""
    start_of = {"python": 3, "sglang": 2}
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            view = resolved(words[start_of[words[0]] :], sm)
    except (Exception, SystemExit) as error:
        text = said.getvalue().strip().splitlines()[-1:] if isinstance(error, SystemExit) else [str(error)]
        return {
            "sm": sm,
            "words": words,
            "refused": f"{type(error).__name__}: {' '.join(' '.join(text).split())[:400]}",
        }
    wanted = (
        "tp_size kv_cache_dtype mamba_ssm_dtype quantization reasoning_parser tool_call_parser "
        "speculative_algorithm speculative_num_steps speculative_num_draft_tokens"
    )
    return {"sm": sm, "words": words, "became": {name: getattr(view, name) for name in wanted.split()}}


logging.getLogger().setLevel(logging.WARNING)
