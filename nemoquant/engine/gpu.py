"""Running TensorRT engines of both kinds; states stay on the GPU between calls, in the engine's dtypes."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nemoquant.checkpoint.intact import Say, hash_once, silent
from nemoquant.checkpoint.manifest import read_if_there
from nemoquant.engine import TARGETS
from nemoquant.engine.base import Admit, Floats, GraphEngine, Step, admit_any
from nemoquant.engine.build import EngineOptions, engine_graph
from nemoquant.engine.enginefile import mtp_file, read_facts
from nemoquant.engine.messages import logger
from nemoquant.engine.targets import Gpu, load_plugins, plugin_library
from nemoquant.errors import EngineError, UsageError
from nemoquant.progress import Progress, no_progress
from nemoquant.quantized.checkpoint import PackedCheckpoint

DTYPES = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "FP8": torch.float8_e4m3fn,
    "INT64": torch.int64,
}


class Session:
    """One loaded engine.

    Attributes:
        shapes: input or output -> its axes, -1 where they depend on the call.
        states: inputs that are state; each has an output ``present_...``.
    """

    def __init__(
        self, file: Path, folder: Path, facts: dict[str, Any], target: str, on: str = "cuda"
    ) -> None:
        """Load ``file``, which ``facts`` (checked by ``read_facts``) describe.

        Args:
            on: torch's name of the device for the engine's tensors.
        Raises:
            EngineError: the runtime can't load it; includes its message.
        """
        self.target, self.facts, self.file, self.on = TARGETS[target], facts, file, on
        self.trt = trt = self.target.package()
        self.messages = logger(trt)
        self.runtime = trt.Runtime(self.messages)
        self.engine = self.runtime.deserialize_cuda_engine(file.read_bytes())
        if self.engine is None:
            raise EngineError(
                f"{self.target.title} {trt.__version__} can't load {file}, built by {facts['version']} for "
                f"SM {facts['sm']}: {self.messages.text()}"
            )
        if facts["strip_weights"]:
            self._refit(folder)
        if facts["weight_streaming"]:
            self.engine.weight_streaming_budget_v2 = self.engine.get_weight_streaming_automatic_budget()
        self.context = self.engine.create_execution_context()
        if self.context is None:
            raise EngineError(f"{file}: no memory for an execution context: {self.messages.text()}")
        names = [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]
        self.inputs = [n for n in names if self.engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT]
        self.outputs = [n for n in names if n not in self.inputs]
        self.shapes = {n: list(self.engine.get_tensor_shape(n)) for n in names}
        self.dtypes = {
            n: DTYPES[str(self.engine.get_tensor_dtype(n)).removeprefix("DataType.")] for n in names
        }
        self.states = [n for n in self.inputs if n not in ("input_ids", "hidden")]
        self.profile = 0

    def _refit(self, folder: Path) -> None:
        """Give the checkpoint's weights to an engine that was written without them."""
        facts = self.facts
        options = EngineOptions(
            self.target.name,
            facts["sm"],
            facts["compute"],
            last_token_only=facts["last_token_only"],
            with_hidden=facts["with_hidden"],
        )
        opened = PackedCheckpoint(folder)
        with opened.checkpoint:
            graph = engine_graph(opened, options, facts["part"] == "mtp")[2]
            refitter = self.trt.Refitter(self.engine, self.messages)
            parser = self.trt.OnnxParserRefitter(refitter, self.messages)
            if (
                not parser.refit_from_bytes(graph, str(folder / "model.onnx"))
                or not refitter.refit_cuda_engine()
            ):
                raise EngineError(
                    f"{self.file} has no weights and {folder}'s can't be put into it: {self.messages.text()}"
                )

    def empty_state(self, batch: int) -> dict[str, Tensor]:
        """Zeros for all states, with no past positions."""
        state = {}
        for name in self.states:
            past = 2 if name.startswith("past_") else None
            dims = [
                batch if axis == 0 else 0 if axis == past else size
                for axis, size in enumerate(self.shapes[name])
            ]
            state[name] = torch.zeros(
                dims,
                dtype=torch.uint8 if self.dtypes[name].itemsize == 1 else self.dtypes[name],
                device=self.on,
            )
        return {name: value.view(self.dtypes[name]) for name, value in state.items()}

    def step(self, feeds: dict[str, Any], state: dict[str, Tensor] | None) -> Step:
        """One call. ``feeds`` are numpy arrays [batch, length, ...], cast to the engine's dtypes.

        Raises:
            UsageError: more positions or sequences than the engine was built for.
            EngineError: the runtime refused; includes its message.
        """
        batch, length = next(iter(feeds.values())).shape[:2]
        before = state or self.empty_state(batch)
        past = next((value.shape[2] for name, value in before.items() if name.startswith("past_")), 0)
        check_shape(self.facts, self.file, batch, past + length)
        given = {
            name: torch.from_numpy(np.ascontiguousarray(x)).to(self.on, self.dtypes[name])
            for name, x in feeds.items()
        } | before
        outputs = self.run(given)
        hidden = outputs.get("hidden_out")
        after = {name: outputs["present_" + name.removeprefix("past_")] for name in self.states}
        return Step(_numpy(outputs["logits"]), None if hidden is None else _numpy(hidden), after)

    def run(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        """Run once; returns all outputs by name, on the device."""
        stream = torch.cuda.current_stream().cuda_stream if self.on == "cuda" else 0
        self._choose_profile(given, stream)
        kept = [torch.empty(1, device=self.on)]  # an empty tensor has no address, and the runtime needs one
        for name in self.inputs:
            value = given[name].contiguous()
            kept.append(value)
            done = self.context.set_input_shape(name, tuple(value.shape))
            done = done and self.context.set_tensor_address(name, value.data_ptr() or kept[0].data_ptr())
            if not done:
                raise EngineError(f"{self.file}: {name} can't be {list(value.shape)}: {self.messages.text()}")
        outputs = {}
        for name in self.outputs:
            dims = tuple(self.context.get_tensor_shape(name))
            outputs[name] = torch.empty(dims, dtype=self.dtypes[name], device=self.on)
            self.context.set_tensor_address(name, outputs[name].data_ptr() or kept[0].data_ptr())
        if not self.context.execute_async_v3(stream):
            raise EngineError(f"{self.file}: {self.target.title} could not run it: {self.messages.text()}")
        if self.on == "cuda":
            torch.cuda.current_stream().synchronize()  # the inputs in ``kept`` are read until here
        return outputs

    def _choose_profile(self, given: dict[str, Tensor], stream: int) -> None:
        """Choose the first profile that admits the shapes; that of single tokens comes before prompts."""
        for profile in range(self.engine.num_optimization_profiles):
            if all(self._admits(profile, name, given[name]) for name in self.inputs):
                if profile != self.profile:
                    self.context.set_optimization_profile_async(profile, stream)
                    self.profile = profile
                return
        shapes = {name: list(given[name].shape) for name in self.inputs}
        raise EngineError(
            f"{self.file}: none of its {self.engine.num_optimization_profiles} profiles admits {shapes}"
        )

    def _admits(self, profile: int, name: str, value: Tensor) -> bool:
        least, _, most = self.engine.get_tensor_profile_shape(name, profile)
        return all(low <= size <= high for low, size, high in zip(least, value.shape, most, strict=True))


class TensorRTEngine(GraphEngine[Session]):
    """An engine file of either TensorRT, for ``generate`` and ``diff``."""

    def __init__(
        self,
        target: str,
        file: Path,
        folder: Path,
        device: Gpu | None,
        plugins: Path | None = None,
        on: str = "cuda",
        say: Say = silent,
        progress: Progress = no_progress,
        threads: int | None = None,
        admit: Admit = admit_any,
    ) -> None:
        """Load ``file`` for the checkpoint in ``folder``; ``on`` is torch's name of the device for tensors.

        Args:
            say, progress, threads: of hashing the folder's shards, where the weights come from them.
        Raises:
            NemoquantError: see ``enginefile.read_facts`` and ``check_device``; a missing extra or plugin
                library; an engine of the multi-token-prediction module.
        """
        self.name = target
        facts = read_facts(file, folder, target)
        if facts["part"] != "main":
            raise UsageError(
                f"{file} is the multi-token-prediction module; expected the main model's engine, "
                f"{facts['checkpoint']}"
            )
        drafts = None
        if facts["mtp"] is not None:
            drafts = read_facts(mtp_file(file), folder, target)
        check_device(facts, file, device)
        self.facts = facts
        self.max_seq_len: int | None = facts["max_seq_len"]
        self.has_mtp = drafts is not None
        admit(self)
        trt = TARGETS[target].package()
        if facts["plugins"] is not None:
            load_plugins(trt, plugin_library(plugins))
        signed = read_if_there(folder) if facts["strip_weights"] else None
        self.intact = None if signed is None else hash_once(folder, signed, say, progress, threads)
        self.main = Session(file, folder, facts, target, on)
        self.mtp = None if drafts is None else Session(mtp_file(file), folder, drafts, target, on)
        if self.intact is not None:
            self.intact.check_unchanged()

    def describe(self) -> dict[str, Any]:
        version = self.main.trt.__version__
        return {
            "engine": self.name,
            "version": version,
            "device": f"sm_{self.facts['sm']}",
            "compute": self.facts["compute"],
        }


def check_device(facts: dict[str, Any], file: Path, device: Gpu | None) -> None:
    """Raises UsageError where there is no GPU, or not the kind that the engine was built for."""
    if device is None:
        raise UsageError(
            f"{file} runs on a GPU of SM {facts['sm']}, and no CUDA device is usable here; --engine "
            f"onnxruntime runs on the CPU"
        )
    if device.sm != facts["sm"]:
        raise UsageError(
            f"{file} was built for SM {facts['sm']}, and {device.name} is SM {device.sm}; build one for it "
            f"with `nemoquant export trt`"
        )


def check_shape(facts: dict[str, Any], file: Path, batch: int, total: int) -> None:
    """Raises UsageError where a call exceeds the engine's limits; ``total`` counts past and new positions."""
    if total > facts["max_seq_len"]:
        raise UsageError(
            f"{total:,} positions: {file} was built for {facts['max_seq_len']:,} at most; build it again "
            f"with a larger --max-seq-len"
        )
    if batch > facts["max_batch"]:
        raise UsageError(
            f"{batch} sequences: {file} was built for {facts['max_batch']} at most; build it again with a "
            f"larger --max-batch"
        )


def _numpy(x: Tensor) -> Floats:
    values: Floats = x.float().cpu().numpy()
    return values
