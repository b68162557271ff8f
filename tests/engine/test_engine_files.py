"""Engine files: the checks before a GPU is used, and the calls of the runtime, through a stand-in.

No GPU is at hand here, so TensorRT never runs. The stand-in has the part of TensorRT's Python interface that
the runner uses; its names are checked against the real module. It reads and writes raw addresses as TensorRT
does, and computes with ONNX Runtime. The oracle is the onnxruntime engine.
"""

import ctypes
import hashlib
import importlib.util
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support.commands import check_parts
from support.commands import nemoquant as command
from support.places import DEMO

import nemoquant
from nemoquant import files
from nemoquant.checkpoint.manifest import file_sha256
from nemoquant.engine import TARGETS, build, gpu, targets
from nemoquant.engine.generate import Drafts, Sampler, generate
from nemoquant.engine.load import load_engine
from nemoquant.engine.onnxruntime import Graph, OnnxRuntimeEngine
from nemoquant.engine.targets import Gpu
from nemoquant.errors import CheckpointError, EngineError, NemoquantError, OutputError, UsageError

needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed (extra: rtx)"
)
GPU = Gpu("a stand-in", 100)
NAMES = {np.float32: "DataType.FLOAT", np.int64: "DataType.INT64"}


class Logger:
    ERROR, WARNING = 1, 2


class Context:
    def __init__(self, engine: "Engine") -> None:
        self.engine, self.shapes, self.addresses = engine, {}, {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return all(a in (-1, b) for a, b in zip(self.engine.get_tensor_shape(name), shape, strict=True))

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return address != 0

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:  # noqa: ARG002
        self.engine.chosen.append(profile)
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        batch, length = self.shapes["input_ids"]
        past = next((shape[2] for key, shape in self.shapes.items() if key.startswith("past_")), 0)
        sizes = {"batch": batch, "length": length, "total": past + length}
        return tuple(sizes.get(d, d) for d in self.engine.dims[name])

    def execute_async_v3(self, stream: int) -> bool:  # noqa: ARG002
        feeds = {}
        for name in self.engine.graph.inputs:
            kind = self.engine.kinds[name]
            array = np.empty(self.shapes[name], kind)
            ctypes.memmove(array.ctypes.data, self.addresses[name], array.nbytes)
            feeds[name] = array
        for name, value in zip(
            self.engine.graph.outputs, self.engine.graph.session.run(None, feeds), strict=True
        ):
            assert value.shape == self.get_tensor_shape(name)
            ctypes.memmove(self.addresses[name], np.ascontiguousarray(value).ctypes.data, value.nbytes)
        return True


class Engine:
    """Two profiles, as TensorRT's engines have: single tokens, then prompts."""

    num_optimization_profiles = 2

    def __init__(self, path: Path, limits: tuple[int, int]) -> None:
        self.graph, self.limits, self.chosen = Graph(path, 1), limits, []
        values = {v.name: v for v in (*self.graph.session.get_inputs(), *self.graph.session.get_outputs())}
        self.dims = {name: value.shape for name, value in values.items()}
        self.kinds = {
            name: {"tensor(float)": np.float32, "tensor(int64)": np.int64}[v.type]
            for name, v in values.items()
        }
        self.num_io_tensors = len(values)

    def get_tensor_name(self, index: int) -> str:
        return list(self.dims)[index]

    def get_tensor_mode(self, name: str) -> str:
        return "in" if name in self.graph.inputs else "out"

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(-1 if isinstance(d, str) else d for d in self.dims[name])

    def get_tensor_dtype(self, name: str) -> str:
        return NAMES[self.kinds[name]]

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        most, batch = self.limits
        length = {0: (1, 1, 1), 1: (1, 1, most)}[profile]
        sizes = {"batch": (1, 1, batch), "length": length, "past": (0, 0, most - 1)}
        return [tuple(sizes[d][k] if isinstance(d, str) else d for d in self.dims[name]) for k in range(3)]

    def create_execution_context(self) -> Context:
        return Context(self)


def stand_in(limits: tuple[int, int]) -> Any:
    """The module; its engine file holds the path of one of our graphs."""

    class Runtime:
        def __init__(self, logger: Any) -> None:
            self.logger = logger

        def deserialize_cuda_engine(self, data: bytes) -> Engine | None:
            if not data.startswith(b"/"):
                self.logger.log(Logger.ERROR, "this is no engine")
                return None
            return Engine(Path(data.decode()), limits)

    mode = SimpleNamespace(INPUT="in", OUTPUT="out")
    return SimpleNamespace(__version__="0", ILogger=Logger, Runtime=Runtime, TensorIOMode=mode)


def write_engine(file: Path, folder: Path, data: bytes | None = None, **changed: Any) -> Path:
    """Writes an engine file for a graph of ``folder``, with the facts that the builder writes.

    The graph is ``model.onnx`` or ``mtp.onnx``.
    """
    part = changed.get("part", "main")
    data = str(folder / ("model.onnx" if part == "main" else "mtp.onnx")).encode() if data is None else data
    manifest = folder / "nemoquant.json"
    facts = {
        "schema": 2,
        "runtime": "tensorrt",
        "version": "0",
        "sm": 100,
        "compute": "float32",
        "max_seq_len": 64,
        "max_batch": 3,
        "part": "main",
        "last_token_only": False,
        "with_hidden": True,
        "strip_weights": False,
        "weight_streaming": False,
        "plugins": None,
        "mtp": None,
        "checkpoint": folder.name,
        "plan": json.loads(manifest.read_text())["plan"]["sha256"] if manifest.exists() else None,
        "config": file_sha256(folder / "config.json"),
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    } | changed
    file.write_bytes(data)
    file.with_name(file.name + ".json").write_text(json.dumps(facts))
    return file


@pytest.fixture
def loaded(
    demo: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[gpu.TensorRTEngine, Path]]:
    def make(preset: str = "bf16", mtp: bool = True) -> tuple[gpu.TensorRTEngine, Path]:
        folder = demo(preset)
        monkeypatch.setattr(targets.Target, "package", lambda self: stand_in((64, 3)))
        file = write_engine(tmp_path / "model.engine", folder, mtp="model.mtp.engine" if mtp else None)
        write_engine(tmp_path / "model.mtp.engine", folder, part="mtp")
        return gpu.TensorRTEngine("trt", file, folder, GPU, on="cpu"), folder

    return make


def test_calls_carry_their_state(loaded: Callable[..., tuple[gpu.TensorRTEngine, Path]]) -> None:
    """A prompt, single tokens, a batch: the arrays are the same, so ONNX Runtime gives the same bytes."""
    engine, folder = loaded("nvfp4")
    beside = OnnxRuntimeEngine(folder, 1)
    tokens = np.random.default_rng(0).integers(0, 2048, (3, 12))
    ours, theirs = None, None
    for start, end in ((0, 7), (7, 8), (8, 9), (9, 12)):
        step, expected = (
            engine.forward(tokens[:, start:end], ours),
            beside.forward(tokens[:, start:end], theirs),
        )
        assert np.array_equal(step.logits, expected.logits)
        assert np.array_equal(step.hidden, expected.hidden)
        ours, theirs = step.state, expected.state
        assert {name: value.numpy().tobytes() for name, value in ours.items()} == {
            k: v.tobytes() for k, v in theirs.items()
        }
    assert engine.main.engine.chosen == [1, 0, 1], "a profile is chosen by the shapes, and kept while it fits"
    assert engine.describe() == {"engine": "trt", "version": "0", "device": "sm_100", "compute": "float32"}


def test_drafts(loaded: Callable[..., tuple[gpu.TensorRTEngine, Path]]) -> None:
    engine, folder = loaded()
    found = []
    for running in (engine, OnnxRuntimeEngine(folder, 1)):
        drafts = Drafts()
        tokens = list(
            generate(running, [5, 6, 7], max_tokens=24, stop=set(), sampler=Sampler(), mtp=2, drafts=drafts)
        )
        found.append((tokens, drafts))
    assert found[0] == found[1]
    assert found[0][1].accepted > 0


def test_larger_than_it_was_built_for(loaded: Callable[..., tuple[gpu.TensorRTEngine, Path]]) -> None:
    engine, _ = loaded()
    step = engine.forward(np.zeros((1, 60), np.int64))
    engine.forward(np.zeros((1, 4), np.int64), step.state)
    with pytest.raises(
        UsageError, match=r"65 positions: .*model.engine was built for 64 at most.*--max-seq-len"
    ):
        engine.forward(np.zeros((1, 5), np.int64), step.state)
    with pytest.raises(UsageError, match=r"4 sequences: .*model.engine was built for 3 at most.*--max-batch"):
        engine.forward(np.zeros((4, 5), np.int64))
    with pytest.raises(
        UsageError,
        match=r"10 tokens of the prompt and 55 new ones .* are 65; the trt engine was built for 64",
    ):
        next(generate(engine, [1] * 10, max_tokens=55, stop=set(), sampler=Sampler()))


def test_a_diff_asks_before_it_computes(
    loaded: Callable[..., tuple[gpu.TensorRTEngine, Path]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    engine, folder = loaded("fp8")
    monkeypatch.setattr(
        "nemoquant.engine.load.load_engine", lambda *arguments, admit, **named: (admit(engine), engine)[1]
    )
    arguments: dict[str, Any] = {"engine": "trt", "rows": 2, "card": False, "threads": 1}
    with pytest.raises(
        UsageError, match=r"rows of 65 tokens: the trt engine was built for 64 at most; give --seq-len"
    ):
        nemoquant.diff(DEMO, [folder], seq_len=65, engine_files=[tmp_path / "model.engine"], **arguments)
    with pytest.raises(UsageError, match="2 engine files for 1 checkpoints"):
        nemoquant.diff(DEMO, [folder], seq_len=16, engine_files=["a", "b"], **arguments)
    found = nemoquant.diff(
        DEMO, [folder], seq_len=32, engine_files=[tmp_path / "model.engine"], **arguments
    ).candidates[0]
    assert found.engine is not None
    assert found.engine.engine == "trt"
    assert 0 < found.engine.kl_from_torch < found.logits.kl.mean


CASES: list[tuple[str, dict[str, Any], list[str]]] = [
    (
        "another plan",
        {"plan": "0" * 64},
        ["built for the plan 000000000000", "was written by", "build it again"],
    ),
    ("another config", {"config": "0" * 64}, ["another config.json"]),
    (
        "the other TensorRT",
        {"runtime": "tensorrt_rtx"},
        ["is for TensorRT-RTX, expected TensorRT", "--engine rtx"],
    ),
    ("changed", {"sha256": "0" * 64}, ["was changed after it was built"]),
    ("shorter", {"bytes": 5}, ["was changed after it was built"]),
    ("no length", {"max_seq_len": "long"}, ["`max_seq_len` is 'long': input should be a valid integer"]),
    ("an older schema", {"schema": 1}, ["schema 1, expected 2"]),
    ("the module", {"part": "mtp"}, ["is the multi-token-prediction module"]),
    ("its module is missing", {"mtp": "model.mtp.engine"}, ["model.mtp.engine does not exist"]),
    ("another GPU", {"sm": 90}, ["built for SM 90", "is SM 100"]),
    ("no engine", {"data": b"nothing"}, ["can't load", "this is no engine"]),
    ("no plugins", {"plugins": {"file": "x", "sha256": ""}}, ["plugin library", "nemoquant plugins build"]),
]


@pytest.mark.parametrize(("changed", "parts"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_refusals(
    changed: dict[str, Any],
    parts: list[str],
    demo: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(targets.Target, "package", lambda self: stand_in((64, 3)))
    monkeypatch.setattr(targets, "PLUGINS", "NEMOQUANT_NO_SUCH_VARIABLE")
    file = write_engine(tmp_path / "model.engine", demo("fp8"), **changed)
    with pytest.raises(NemoquantError) as error:
        gpu.TensorRTEngine(
            "trt", file, demo("fp8"), GPU, tmp_path / "no.so" if changed.get("plugins") else None, on="cpu"
        )
    check_parts(parts, str(error.value))


def test_shards_that_change_while_an_engine_gets_them(
    demo: Callable[[str], Path], copied: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One without weights is refitted from the shards."""
    folder = copied(demo("fp8"))

    def refitted(file: Path, folder: Path, *given: Any) -> None:  # noqa: ARG001
        with next(folder.glob("*.safetensors")).open("ab") as f:
            f.write(b"x")

    monkeypatch.setattr(targets.Target, "package", lambda self: stand_in((64, 3)))
    monkeypatch.setattr(gpu, "Session", refitted)
    file = write_engine(tmp_path / "model.engine", folder, strip_weights=True)
    with pytest.raises(CheckpointError, match=r"safetensors changed since the checkpoint was read"):
        gpu.TensorRTEngine("trt", file, folder, GPU, on="cpu")


def test_refusals_of_the_command_line(
    demo: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First the refusals before a GPU is used, then the refusal because there is no GPU."""
    monkeypatch.setattr("nemoquant.engine.load.find_gpu", lambda: None)
    folder, file = demo("fp8"), tmp_path / "model.engine"

    def refused(*arguments: object, part: str) -> None:
        assert part in command("generate", folder, "--prompt", "a", *arguments, code=2).stderr

    refused("--engine", "rtx", part="needs the engine file that `nemoquant export trt")
    refused("--engine-file", file, part="the engine torch reads none")
    refused("--engine", "trt", "--engine-file", file, part=f"{file} does not exist")
    file.write_bytes(b"")
    refused("--engine", "trt", "--engine-file", file, part="model.engine.json is missing")
    for text in ("{", "[]", "{}", "null"):
        (tmp_path / "model.engine.json").write_text(text)
        refused("--engine", "trt", "--engine-file", file, part="is not as `export trt` writes it")
    write_engine(file, folder)
    refused(
        "--engine",
        "trt",
        "--engine-file",
        file,
        part="runs on a GPU of SM 100, and no CUDA device is usable here",
    )


@needs_rtx
def test_the_stand_in_has_only_what_the_runtime_has() -> None:
    import tensorrt_rtx

    for ours, theirs in ((Engine, tensorrt_rtx.ICudaEngine), (Context, tensorrt_rtx.IExecutionContext)):
        public = {name for name in vars(ours) if not name.startswith("_")}
        assert not public - set(dir(theirs))
    used = [
        (
            tensorrt_rtx.ICudaEngine,
            "weight_streaming_budget_v2 get_weight_streaming_automatic_budget create_engine_inspector "
            "num_layers",
        ),
        (tensorrt_rtx.OnnxParserRefitter, "refit_from_bytes"),
        (tensorrt_rtx.Refitter, "refit_cuda_engine"),
        (tensorrt_rtx.EngineInspector, "get_layer_information"),
        (tensorrt_rtx.LayerInformationFormat, "JSON"),
        (tensorrt_rtx.IPluginRegistry, "load_library all_creators"),
        (tensorrt_rtx.BuilderFlag, "STRIP_PLAN WEIGHT_STREAMING"),
    ]
    assert not [(kind, name) for kind, names in used for name in names.split() if not hasattr(kind, name)]


@pytest.fixture
def disguised(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[Any]]:
    """TensorRT-RTX in place of TensorRT, with the GPU that TensorRT would report.

    This runs the second half of the builder, up to the plugins.
    """

    def make() -> list[Any]:
        import tensorrt_rtx

        configs: list[Any] = []

        class Builder(tensorrt_rtx.Builder):  # type: ignore[misc]
            def create_builder_config(self) -> Any:
                config = super().create_builder_config()
                config.num_compute_capabilities = 1
                config.set_compute_capability(tensorrt_rtx.ComputeCapability.SM120, 0)
                configs.append(config)
                return config

        module = SimpleNamespace(
            **{n: getattr(tensorrt_rtx, n) for n in dir(tensorrt_rtx) if not n.startswith("_")}
            | {"Builder": Builder}
        )
        module.__version__ = "0"
        monkeypatch.setattr(targets.Target, "package", lambda self: module)
        stand_in = replace(TARGETS["trt"], dialect="tensorrt_rtx")
        monkeypatch.setattr(build, "TARGETS", {**TARGETS, "trt": stand_in})
        monkeypatch.setattr(build, "plugin_library", lambda given: given)
        monkeypatch.setattr(build, "load_plugins", lambda trt, library: None)
        monkeypatch.setattr(build, "_realised", lambda *arguments: ["{}"])
        return configs

    return make


@needs_rtx
@pytest.mark.slow
def test_the_other_half_of_the_builder(
    disguised: Callable[[], list[Any]], demo: Callable[[str], Path], tmp_path: Path
) -> None:
    """Two profiles; the GPU of the machine; the plugins are named in the facts.

    TensorRT-RTX has no timing cache.
    """
    configs = disguised()
    library = tmp_path / "plugins.so"
    library.write_bytes(b"plugins")
    options = build.EngineOptions("trt", None, max_seq_len=256, plugins=library, last_token_only=True)
    made = build.build(demo("nvfp4-w4a16"), options, Gpu("a stand-in", 120))
    assert configs[0].num_optimization_profiles == 2
    assert (made.facts["sm"], made.facts["realised"], made.facts["last_token_only"]) == (120, ["{}"], True)
    assert made.facts["plugins"] == {"file": "plugins.so", "sha256": hashlib.sha256(b"plugins").hexdigest()}


def test_a_timing_cache_of_another_gpu(tmp_path: Path) -> None:
    given: list[bytes] = []

    def refuses(data: bytes) -> None:
        given.append(data)

    config = SimpleNamespace(create_timing_cache=refuses)
    builder = SimpleNamespace(create_builder_config=lambda: config)
    trt = SimpleNamespace(ProfilingVerbosity=SimpleNamespace(DETAILED=2))
    options = build.EngineOptions("trt", timing_cache=tmp_path / "tactics")
    (tmp_path / "tactics").write_bytes(b"something else")
    with pytest.raises(
        UsageError, match="tactics was made by another TensorRT or for another GPU; name another file"
    ):
        build._config(trt, builder, None, {}, options, 100)
    assert (given, config.profiling_verbosity) == ([b"something else"], 2)


@pytest.mark.parametrize(
    ("options", "device", "part"),
    [
        ({"sm": 90}, GPU, "--sm 90: TensorRT builds for the GPU in the machine, a stand-in, SM 100"),
        ({}, None, "nemoquant plugins build && nemoquant export trt"),
        ({"sm": 100}, None, "nemoquant plugins build --arch sm_100"),
        ({"target": "rtx"}, None, "--sm is needed where no GPU is found"),
        ({"target": "rtx"}, GPU, "--sm 100: TensorRT-RTX does not build for data-centre GPUs"),
        (
            {"target": "rtx", "sm": 120, "weight_streaming": True},
            None,
            "--weight-streaming: only TensorRT has that",
        ),
        ({"plugins": Path("no.so")}, GPU, "no.so, the plugin library, does not exist"),
    ],
)
def test_what_can_be_built_where(
    options: dict[str, Any],
    device: Gpu | None,
    part: str,
    demo: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(targets.Target, "package", lambda self: stand_in((64, 3)))
    with pytest.raises(UsageError) as error:
        build.build(demo("fp8"), build.EngineOptions(**{"target": "trt"} | options), device)
    assert part in str(error.value)


@pytest.mark.parametrize(
    ("sm", "arch"),
    [
        (89, " --arch sm_80"),
        (90, " --arch sm_90a"),
        (100, " --arch sm_100f"),
        (103, " --arch sm_100f"),
        (120, " --arch sm_120f"),
        (121, " --arch sm_120f"),
        (75, ""),
    ],
)
def test_plugins_are_built_for_the_family_of_the_gpu(
    sm: int, arch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(targets, "ARCHITECTURES", ("80", "90a", "100f", "120f"))
    with pytest.raises(UsageError, match=f"nemoquant plugins build{arch} && nemoquant export trt OUT"):
        targets.target_sm(TARGETS["trt"], sm, None, Path("OUT"))


def test_formats_that_the_gpu_lacks(demo: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """W4A16 experts need no FP4 GPU under TensorRT: the plugin decodes them. The runtime's GEMMs need one."""
    monkeypatch.setattr(targets.Target, "package", lambda self: stand_in((64, 3)))
    hopper = Gpu("a stand-in", 90)
    for preset, part in (
        ("nvfp4-full", "holds NVFP4 outside of TensorRT's plugins"),
        ("nvfp4-w4a16", "plugin library"),
    ):
        with pytest.raises(UsageError) as error:
            build.build(demo(preset), build.EngineOptions("trt", plugins=Path("no.so")), hopper)
        assert part in str(error.value)


@needs_rtx
@pytest.mark.slow
def test_a_module_of_its_own_and_nothing_left_behind(
    demo: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "model.engine"
    facts = nemoquant.export_engine(demo("fp8"), out, target="rtx", sm=89, max_seq_len=256, mtp=True)
    assert facts["mtp"] == "model.mtp.engine"
    assert "hidden_out" in facts["outputs"]
    drafts = json.loads((tmp_path / "model.mtp.engine.json").read_text())
    assert (drafts["part"], drafts["mtp"], drafts["outputs"][:2]) == ("mtp", None, ["logits", "hidden_out"])
    with pytest.raises(NemoquantError, match=r"model.mtp.engine exists"):
        out.unlink()
        out.with_name("model.engine.json").unlink()
        nemoquant.export_engine(demo("fp8"), out, target="rtx", sm=89, mtp=True)
    left = sorted(tmp_path.iterdir())
    write = files.write_named

    def full(path: Path, data: bytes) -> None:
        if path.suffix == ".json":
            raise OSError(28, "No space left")
        write(path, data)

    monkeypatch.setattr("nemoquant.engine.export.write_named", full)
    with pytest.raises(NemoquantError, match="No space left"):
        nemoquant.export_engine(demo("fp8"), tmp_path / "other", target="rtx", sm=89, max_seq_len=256)
    assert sorted(tmp_path.iterdir()) == left


@pytest.mark.slow
@needs_rtx
def test_an_engine_that_was_built_says_all_that_loading_needs(
    demo: Callable[[str], Path], tmp_path: Path
) -> None:
    nemoquant.export_engine(demo("fp8"), tmp_path / "e", target="rtx", sm=89, max_seq_len=256)
    with pytest.raises(UsageError, match="runs on a GPU of SM 89, and no CUDA device is usable here"):
        gpu.TensorRTEngine("rtx", tmp_path / "e", demo("fp8"), None)
    other = Path(shutil.copytree(demo("nvfp4"), tmp_path / "other"))
    with pytest.raises(NemoquantError, match="built for the plan"):
        gpu.TensorRTEngine("rtx", tmp_path / "e", other, None)


def test_files_that_could_not_be_written_are_refused_first(
    demo: Callable[[str], Path], tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    cache.symlink_to(tmp_path / "of the user")
    for out, more, reason in (
        (tmp_path / ("x" * 240), {}, "its name is too long; expected at most 237 bytes"),
        (tmp_path / "model.engine", {"timing_cache": cache}, "cache: it is a link, which would be replaced"),
    ):
        with pytest.raises(OutputError, match=reason):
            nemoquant.export_engine(demo("fp8"), out, target="trt", sm=100, **more)
    assert list(tmp_path.iterdir()) == [cache]


def test_a_runtime_that_fails_gives_its_words(
    loaded: Callable[..., tuple[gpu.TensorRTEngine, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, _ = loaded()
    monkeypatch.setattr(Context, "execute_async_v3", lambda self, stream: False)
    with pytest.raises(EngineError, match=r"model.engine: TensorRT could not run it"):
        engine.forward(np.zeros((1, 3), np.int64))


@pytest.mark.parametrize("name", ["torch", "onnxruntime"])
def test_plugins_go_with_tensorrt_only(name, tmp_path):
    with pytest.raises(UsageError, match=f"the engine {name} has none; it goes with --engine trt"):
        load_engine(name, tmp_path, plugins=tmp_path / "plugins.so")
