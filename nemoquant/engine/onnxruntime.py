"""The onnxruntime engine: ``model.onnx`` and ``mtp.onnx`` of a folder; weights stay packed in memory."""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nemoquant.checkpoint.intact import Say, check_graph, hash_once, open_settings, shards, silent
from nemoquant.engine.base import Admit, Floats, GraphEngine, Step, Tokens, admit_any
from nemoquant.engine.files import check_shards, graph_facts, read_graph
from nemoquant.errors import CheckpointError, EngineError, MissingExtraError, UsageError, brief, listing
from nemoquant.graph import MODEL, MTP, Trial
from nemoquant.progress import Progress, no_progress

NUMPY = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}
NAMED = ("batch", "length", "past")  # dimensions of inputs that differ from call to call
MOST_STATE = 1 << 28  # elements of one state of a sequence: the largest of Super has a million
SHARDS = "session.model_external_initializers_file_folder_path"  # where those of a graph in memory are
PREPACKING = "session.disable_prepacking"
# Both would unpack or widen weights when the session starts. The second, for float16 weights, also takes the
# name of a Cast for that of its output, and fails at each Cast that constant folding would have removed
# (microsoft/onnxruntime issue 32405). Naming them alike in the graph is no way out: nodes get other names
# where functions are inlined.
DISABLED = ["ConstantFolding", "FuseFp16InitializerToFp32NodeTransformer"]


def package() -> Any:
    """The onnxruntime module.

    From 1.29 on it reports its use to Microsoft, from its import on, unless this variable forbids it.

    Raises:
        MissingExtraError: it is not installed.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        import onnxruntime
    except ImportError:
        raise MissingExtraError(
            "the engine onnxruntime needs the extra `ort`: pip install 'nemoquant[ort]'"
        ) from None
    return onnxruntime


class Graph:
    """One session: runs a graph, and separates the names of its states from its other inputs."""

    def __init__(self, path: Path, threads: int | None = None, content: bytes | None = None) -> None:
        """Load it; the file and its shards are checked already.

        Args:
            content: of a graph that is not written yet, to see whether it loads: no weight is laid out anew
                for the products then, so that they all stay mapped.
        Raises:
            CheckpointError: ONNX Runtime refuses it, or it has other inputs and outputs than an export.
        """
        runtime = package()
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads or 0
        options.log_severity_level = 4  # an error is raised, too: one line for the user
        if content is not None:
            options.add_session_config_entry(SHARDS, str(path.parent))
            options.add_session_config_entry(PREPACKING, "1")
        try:
            self.session = runtime.InferenceSession(
                str(path) if content is None else content,
                options,
                providers=["CPUExecutionProvider"],
                disabled_optimizers=DISABLED,
            )
        except Exception as error:  # its exceptions have no common base class
            raise CheckpointError(
                f"{path}: ONNX Runtime {runtime.__version__} can't load it ({error}); export it again"
            ) from None
        self.inputs = {value.name: value for value in self.session.get_inputs()}
        self.outputs = [value.name for value in self.session.get_outputs()]
        self.states = [name for name in self.inputs if name not in ("input_ids", "hidden")]
        self.path = path
        wrong = self._wrong()
        if wrong:
            raise CheckpointError(
                f"{path} is no graph that nemoquant exported: {listing(wrong)}; export it again"
            )

    def _wrong(self) -> list[str]:
        """What this class could not feed or take."""
        sizes = {name: [d for d in value.shape if isinstance(d, int)] for name, value in self.inputs.items()}
        found = [
            f"its input {name} is {value.type} {brief(value.shape)}"
            for name, value in self.inputs.items()
            if value.type not in NUMPY
            or any(d not in NAMED for d in value.shape if not isinstance(d, int))
            or math.prod(sizes[name]) > MOST_STATE
        ]
        found += [f"it has no output {p}" for p in map(_present, self.states) if p not in self.outputs]
        logits = next((value for value in self.session.get_outputs() if value.name == "logits"), None)
        if logits is not None and (logits.type not in NUMPY or len(logits.shape) != 3):
            found.append(f"its logits are {logits.type} {brief(logits.shape)}")
        return found

    def empty_state(self, batch: int) -> dict[str, Any]:
        """Zeros for all states, with no past positions."""
        sizes = {"batch": batch, "past": 0}
        return {
            name: np.zeros([sizes.get(d, d) for d in self.inputs[name].shape], NUMPY[self.inputs[name].type])
            for name in self.states
        }

    def run(self, feeds: dict[str, Any], state: dict[str, Any] | None) -> dict[str, Any]:
        """Run once; returns all outputs by name. ``feeds`` are cast to the graph's dtypes.

        Raises EngineError where ONNX Runtime fails.
        """
        batch = len(next(iter(feeds.values())))
        given = {
            name: np.ascontiguousarray(value, NUMPY[self.inputs[name].type]) for name, value in feeds.items()
        }
        try:
            found = self.session.run(None, given | (state or self.empty_state(batch)))
        except Exception as error:  # its exceptions have no common base class
            raise EngineError(
                f"{self.path}: ONNX Runtime {package().__version__} fails in it ({error}); export it again"
            ) from None
        return dict(zip(self.outputs, found, strict=True))

    def step(self, feeds: dict[str, Any], state: dict[str, Any] | None) -> Step:
        """One call of a graph that ends with the head."""
        outputs = self.run(feeds, state)
        hidden = outputs.get("hidden_out")
        after = {name: outputs[_present(name)] for name in self.states}
        return Step(
            outputs["logits"].astype(np.float32, copy=False),
            None if hidden is None else hidden.astype(np.float32, copy=False),
            after,
        )


def trial(dialect: str) -> Trial:
    """How an export in ``dialect`` is tried: loaded here, where this machine and ONNX Runtime can."""
    from nemoquant.graph.dialects import DIALECTS  # needs onnx_ir, and running a graph does not

    if not DIALECTS[dialect].onnxruntime:
        return Trial(None, f"ONNX Runtime runs no graph of the {dialect} dialect")
    try:
        runtime = package()
    except MissingExtraError as error:
        return Trial(None, str(error))
    return Trial(f"ONNX Runtime {runtime.__version__}", load=_load_once)


def _load_once(content: bytes, path: Path) -> None:
    """Raises EngineError where the graph with these bytes does not load."""
    try:
        Graph(path, 1, content)
    except CheckpointError as error:
        raise EngineError(
            f"the graph is not written, because it would not load: {error}, with the onnxruntime of "
            f"constraints.txt, or where none is installed"
        ) from None


def _present(state: str) -> str:
    """The output that has a state after a call."""
    return "present_" + state.removeprefix("past_")


class OnnxRuntimeEngine(GraphEngine[Graph]):
    """Runs an exported folder on the CPU."""

    name = "onnxruntime"
    max_seq_len: int | None = None

    def __init__(
        self,
        path: Path,
        threads: int | None = None,
        say: Say = silent,
        progress: Progress = no_progress,
        admit: Admit = admit_any,
    ) -> None:
        """Load ``model.onnx``, and ``mtp.onnx`` where it stands beside it; shards are read last.

        Raises:
            MissingExtraError: onnxruntime or onnx is not installed.
            CheckpointError: a graph or its shards are missing, damaged or of another export.
            UsageError: the graph holds some layers only.
        """
        package()
        signed = open_settings(path)
        self.facts, inputs, outputs = _checked(path / MODEL, signed)
        if "logits" not in outputs or "input_ids" not in inputs:
            raise UsageError(f"{path / MODEL} holds some layers only; export the whole model")
        drafts = (path / MTP).exists()
        if drafts:
            _checked(path / MTP, signed)
        self.has_mtp = drafts and "hidden_out" in outputs
        admit(self)
        self.intact = None if signed is None else hash_once(path, signed, say, progress, threads)
        self.main = Graph(path / MODEL, threads)
        self.mtp = Graph(path / MTP, threads) if drafts else None
        self._check_unchanged()

    def _check_unchanged(self) -> None:
        if self.intact is not None:
            self.intact.check_unchanged()

    def forward(self, tokens: Tokens, state: Any = None) -> Step:
        step = super().forward(tokens, state)
        self._check_unchanged()  # shards are mapped as long as a session lives
        return step

    def draft(self, tokens: Tokens, hidden: Floats, state: Any = None) -> Step:
        step = super().draft(tokens, hidden, state)
        self._check_unchanged()
        return step

    def describe(self) -> dict[str, Any]:
        return {
            "engine": self.name,
            "version": package().__version__,
            "device": "cpu",
            "compute": self.facts["compute"],
        }


def _checked(path: Path, signed: Mapping[str, Any] | None) -> tuple[dict[str, Any], set[str], set[str]]:
    """Facts, inputs and outputs of a graph that is what the manifest lists, and for the shards beside it."""
    if signed is not None:
        check_graph(path, signed)
    model = read_graph(path)
    facts = graph_facts(model, path)
    check_shards(path, facts, "onnxruntime", None if signed is None else shards(signed))
    return facts, {value.name for value in model.graph.input}, {value.name for value in model.graph.output}
