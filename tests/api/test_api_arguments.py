"""A wrong word or an impossible number is a UsageError that says what was got and what is known."""

import inspect
import re
from pathlib import Path

import numpy as np
import pytest
from support.places import SUPER as CONFIG

import nemoquant
from nemoquant import arguments
from nemoquant.errors import NemoquantError, RecipeError, UsageError
from nemoquant.planning.recipe import presets

PLACE = Path("nowhere")
CALLS = {
    "diff": (nemoquant.diff, (PLACE, PLACE)),
    "estimate": (nemoquant.estimate, (PLACE, "fp8")),
    "export_engine": (nemoquant.export_engine, (PLACE, PLACE)),
    "export_onnx": (nemoquant.export_onnx, (PLACE,)),
    "generate": (nemoquant.generate, (PLACE, "Once")),
    "inspect": (nemoquant.inspect, (PLACE,)),
    "plan": (nemoquant.plan, (PLACE, "fp8")),
    "quantize": (nemoquant.quantize, (PLACE, PLACE, "fp8")),
    "verify": (nemoquant.verify, (PLACE,)),
}
METHODS = [
    ("method", "best", "method is 'best'; expected max, mse, four_over_six, hess or gptq"),
    ("method", 7, "method is 7; expected max, mse, four_over_six, hess or gptq"),
    ("folds", "none", "folds is 'none'; expected latent, norm, gate or expert"),
    ("folds", ["latent", 7], "folds is 7; expected latent, norm, gate or expert"),
    ("folds", 7, "folds is 7; expected"),
    ("descent", -1, "descent is -1; expected at least 0"),
    ("descent", 17, "descent is 17; expected at most 16"),
    ("descent", "much", "descent is 'much'; expected a whole number of at least 0"),
    ("headroom", 0.99, "headroom is 0.99; expected a number from 1 to 16"),
    ("headroom", 16.1, "headroom is 16.1; expected a number from 1 to 16"),
    ("headroom", float("nan"), "headroom is nan; expected a number from 1 to 16"),
    ("headroom", True, "headroom is True; expected a number from 1 to 16"),
    ("headroom", "2", "headroom is '2'; expected a number from 1 to 16"),
]
OPTIONS = [
    *METHODS,
    ("rows", 0, "rows is 0; expected at least 1"),
    ("rows", "many", "rows is 'many'; expected a whole number of at least 1"),
    ("rows", 2.5, "rows is 2.5; expected a whole number of at least 1"),
    ("rows", True, "rows is True; expected a whole number of at least 1"),
    ("rows", None, "rows is None; expected a whole number of at least 1"),
    ("seq_len", -3, "seq_len is -3; expected at least 1"),
    ("row_batch", 0, "row_batch is 0; expected at least 1"),
    ("memory", "4G", "memory is '4G'; expected a whole number of at least 1"),
    ("threads", 0, "threads is 0; expected at least 1"),
    ("shard_bytes", 0, "shard_bytes is 0; expected at least 1"),
    ("device", "foo", "device is 'foo'; expected cpu or cuda"),
    ("device", 0, "device is 0; expected cpu or cuda"),
    ("dtype", "foo", "dtype is 'foo'; expected float32 or bfloat16"),
    ("on", "foo", "on is 'foo'; expected local or ray"),
    ("scale_groups", "no", "scale_groups is 'no'; expected True or False"),
    ("resume", 1, "resume is 1; expected True or False"),
    ("data", 7, "data is 7; expected a path, as str or Path"),
    ("columns", 7, "columns is 7; expected names of columns"),
    ("columns", ["a", 7], "columns is 7; expected the name of a column"),
    ("columns", "", "columns is ''; expected the name of a column"),
    ("columns", "\ud800", "columns is '\\ud800'; expected the name of a column without lone surrogates"),
    ("scales", b"x", "scales is b'x'; expected a path, as str or Path"),
    ("address", 7, "address is 7; expected HOST:PORT or auto"),
]
PROGRESS = "progress is 'yes'; expected None (shown in a terminal or notebook), False or a function"
WRONG = {
    "diff": [
        ("engine", "foo", "engine is 'foo'; expected torch, onnxruntime, rtx or trt"),
        ("engine", None, "engine is None; expected torch, onnxruntime, rtx or trt"),
        ("columns", [b"a"], "columns is b'a'; expected the name of a column"),
        ("device", "foo", "device is 'foo'; expected cpu or cuda"),
        ("rows", 0, "rows is 0; expected at least 1"),
        ("seq_len", 1, "seq_len is 1; expected at least 2"),
        ("seq_len", "long", "seq_len is 'long'; expected a whole number of at least 2"),
        ("threads", 2000, "threads is 2000; expected at most 1024"),
        ("threads", 0, "threads is 0; expected at least 1"),
        ("card", "no", "card is 'no'; expected True or False"),
        ("engine_files", b"out", "engine_files is b'out'; expected a path, or a list of paths"),
        ("engine_files", ["out", ""], "engine_files is ''; expected a path"),
        ("data", 7, "data is 7; expected a path, as str or Path"),
        ("reference_cache", 7, "reference_cache is 7; expected a path, as str or Path"),
        ("engine_files", 7, "engine_files is 7; expected a path, or a list of paths"),
        ("engine_files", [7], "engine_files is 7; expected a path, as str or Path"),
        ("plugins", 7, "plugins is 7; expected a path, as str or Path"),
        ("progress", "yes", PROGRESS),
        ("progress", True, PROGRESS.replace("'yes'", "True")),
    ],
    "estimate": [*OPTIONS, ("out", 7, "out is 7; expected a path, as str or Path")],
    "export_engine": [
        ("target", "foo", "target is 'foo'; expected rtx or trt"),
        ("compute", "foo", "compute is 'foo'; expected float32, float16 or bfloat16"),
        ("compute", None, "compute is None; expected float32, float16 or bfloat16"),
        ("sm", "hopper", "sm is 'hopper'; expected a whole number of at least 1"),
        ("max_seq_len", 1, "max_seq_len is 1; expected at least 2"),
        ("max_batch", 0, "max_batch is 0; expected at least 1"),
        ("workspace", 0, "workspace is 0; expected at least 1"),
        ("workspace", "4G", "workspace is '4G'; expected a whole number of at least 1"),
        ("last_token_only", 1, "last_token_only is 1; expected True or False"),
        ("mtp", 2, "mtp is 2; expected True or False"),
        ("strip_weights", None, "strip_weights is None; expected True or False"),
        ("weight_streaming", "on", "weight_streaming is 'on'; expected True or False"),
        ("timing_cache", 7, "timing_cache is 7; expected a path, as str or Path"),
        ("plugins", 7, "plugins is 7; expected a path, as str or Path"),
        ("say", "yes", "say is 'yes'; expected a function"),
    ],
    "export_onnx": [
        ("out", 7, "out is 7; expected a path, as str or Path"),
        ("dialect", "foo", "dialect is 'foo'; expected onnxruntime, tensorrt_rtx or tensorrt"),
        ("compute", "foo", "compute is 'foo'; expected float32, float16 or bfloat16"),
        ("last_token_only", 1, "last_token_only is 1; expected True or False"),
        (
            "layers",
            3,
            "layers is 3; expected two whole numbers, the first layer and the index after the last",
        ),
        ("layers", "0:3", "layers is '0:3'; expected two whole numbers"),
        ("layers", (0, "end"), "layers[1] is 'end'; expected a whole number of at least 0"),
        ("mtp", "yes", "mtp is 'yes'; expected True or False"),
        ("copy", "no", "copy is 'no'; expected True or False"),
        ("progress", "yes", PROGRESS),
    ],
    "generate": [
        ("prompt", 7, "prompt is 7; expected text"),
        ("chat", "yes", "chat is 'yes'; expected True or False"),
        ("engine", "foo", "engine is 'foo'; expected torch, onnxruntime, rtx or trt"),
        ("engine_file", 7, "engine_file is 7; expected a path, as str or Path"),
        ("plugins", 7, "plugins is 7; expected a path, as str or Path"),
        ("max_tokens", 0, "max_tokens is 0; expected at least 1"),
        ("temperature", -1, "temperature is -1; expected 0 (greedy), or a number from"),
        ("temperature", "hot", "temperature is 'hot'; expected 0 (greedy), or a number from"),
        ("temperature", float("nan"), "temperature is nan; expected 0 (greedy), or a number from"),
        ("seed", -1, "seed is -1; expected at least 0"),
        ("mtp", "two", "mtp is 'two'; expected a whole number of at least 0"),
        ("threads", 0, "threads is 0; expected at least 1"),
        ("ready", 7, "ready is 7; expected a function"),
        ("stream", "yes", "stream is 'yes'; expected a function"),
    ],
    "inspect": [
        ("context", 0, "context is 0; expected at least 1"),
        ("context", "long", "context is 'long'; expected a whole number of at least 1"),
    ],
    "plan": [*METHODS, ("scale_groups", None, "scale_groups is None; expected True or False")],
    "quantize": [
        *OPTIONS,
        ("dry_run", "no", "dry_run is 'no'; expected True or False"),
        ("planned", 7, "planned is 7; expected a function"),
        ("expected", 7, "expected is 7; expected a function"),
        ("say", 7, "say is 7; expected a function"),
        ("progress", "yes", PROGRESS),
    ],
    "verify": [
        ("against", 7, "against is 7; expected a path, as str or Path"),
        ("progress", "yes", PROGRESS),
    ],
}


def says(error: pytest.ExceptionInfo[UsageError], expected: str) -> None:
    assert str(error.value).startswith(expected)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("function", "name", "got", "expected"),
    [(function, *case) for function, cases in WRONG.items() for case in cases],
    ids=lambda value: value if isinstance(value, str) and len(value) < 20 else "",
)
def test_a_wrong_word_or_number(function, name, got, expected):
    call, positional = CALLS[function]
    if name == "prompt":
        positional = positional[:-1]
    with pytest.raises(UsageError) as error:
        call(*positional, **{name: got})
    says(error, expected)


@pytest.mark.parametrize("function", CALLS)
def test_every_positional_argument(function):
    call, positional = CALLS[function]
    names = list(inspect.signature(call).parameters)
    for place in range(len(positional)):
        with pytest.raises(UsageError) as error:
            call(*positional[:place], 7, *positional[place + 1 :])
        says(error, f"{names[place]} is 7; expected ")


def test_a_long_value_is_cut():
    with pytest.raises(UsageError) as error:
        arguments.check_word("engine", "x" * 5000, ("torch",))
    assert len(str(error.value)) < 250
    says(error, "engine is 'xxxx")


NUMBER = r"\b(int|float)\b"
NUMBERS = [
    *(
        "rows",
        "seq_len",
        "row_batch",
        "memory",
        "threads",
        "shard_bytes",
        "context",
        "max_tokens",
        "seed",
        "mtp",
    ),
    *("descent", "headroom", "temperature", "sm", "max_seq_len", "max_batch", "workspace"),
]


def test_every_number_is_among_these():
    found = {
        name
        for call, _ in CALLS.values()
        for name, parameter in inspect.signature(call).parameters.items()
        if re.search(NUMBER, str(parameter.annotation))
    }
    assert found - {"layers", "progress"} == set(NUMBERS)


IMPOSSIBLE = [float("nan"), float("inf"), -float("inf"), -1, 1e400, 10**30, "9", True, []]
HUGE = pytest.param(10**5000, id="10**5000")  # pytest itself can't write it out


@pytest.mark.parametrize("got", [*IMPOSSIBLE, HUGE])
@pytest.mark.parametrize(
    ("function", "name"),
    [
        (function, name)
        for function, (call, _) in CALLS.items()
        for name, parameter in inspect.signature(call).parameters.items()
        if name in NUMBERS and re.search(NUMBER, str(parameter.annotation))
    ],
)
def test_impossible_numbers(function, name, got):
    call, positional = CALLS[function]
    with pytest.raises(UsageError) as error:
        call(*positional, **{name: got})
    assert str(error.value).startswith(f"{name} is ")
    assert "; expected " in str(error.value) and len(str(error.value)) < 300


@pytest.mark.parametrize("temperature", [1e-7, 1e7, 1e-320, 1e308])
def test_temperatures_that_lose_or_overflow_logits(temperature):
    with pytest.raises(UsageError, match=r"expected 0 \(greedy\), or a number from 0.000001 to 1,000,000"):
        nemoquant.generate(PLACE, "Once", temperature=temperature)


@pytest.mark.parametrize("text", ["a\0b", "~a\0b", "\ud800", "~\ud800/x", "x" * 256, "x/" * 3000])
@pytest.mark.parametrize("function", CALLS)
def test_what_is_no_path(function, text):
    call, positional = CALLS[function]
    with pytest.raises(UsageError, match=r"expected a path"):
        call(text, *positional[1:])


def test_the_home_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert arguments.path("out", "~/x") == tmp_path / "x"
    assert arguments.path("out", Path("~/x")) == tmp_path / "x"
    assert arguments.paths("outs", ["~/x", "y"]) == [tmp_path / "x", Path("y")]
    options = nemoquant.RunOptions(data="~/rows.npy", scales="~/scales.json")
    assert (options.data, options.scales) == (tmp_path / "rows.npy", tmp_path / "scales.json")
    for function in ("inspect", "verify", "generate", "export_onnx"):
        call, positional = CALLS[function]
        with pytest.raises(NemoquantError, match=str(tmp_path / "nowhere")):
            call("~/nowhere", *positional[1:])
    with pytest.raises(RecipeError, match="neither a file nor a preset"):
        nemoquant.plan(CONFIG, "~/mine.yaml")
    (tmp_path / "mine.yaml").write_text("name: mine\nsummary: s\nrules: [{roles: ['*'], format: fp8}]\n")
    with pytest.raises(RecipeError, match="can't be given the format fp8"):
        nemoquant.plan(CONFIG, "~/mine.yaml")


def test_integers_of_numpy_are_integers():
    options = nemoquant.RunOptions(rows=np.int64(3), memory=np.int32(1 << 30))
    assert options == nemoquant.RunOptions(rows=3, memory=1 << 30)
    assert type(options.rows) is int


def test_strings_are_paths_everywhere(source, token_rows, tmp_path):
    """A recipe file may be a Path, too; one checkpoint to compare needs no list."""
    out, cache, recipe = f"{tmp_path}/out", f"{tmp_path}/cache.bin", tmp_path / "mine.yaml"
    recipe.write_bytes(presets()["fp8"].read_bytes())
    made = nemoquant.quantize(
        str(source), out, recipe, data=str(token_rows), dtype="float32", threads=1, progress=False
    )
    assert made.out == Path(out)
    again = f"{tmp_path}/again"
    scales = f"{out}/nemoquant_scales.json"
    nemoquant.quantize(str(source), again, "fp8", method="max", scales=scales, threads=1)
    assert nemoquant.verify(again, str(source))["ok"]
    assert nemoquant.inspect(out)["quantization"] == "FP8"
    assert nemoquant.plan(str(source / "config.json"), "fp8").recipe.name == "fp8"
    assert nemoquant.estimate(str(source), "fp8", out=out, rows=8, seq_len=32).seconds > 0
    settings = {"data": str(token_rows), "threads": 1, "card": False}
    alone = nemoquant.diff(str(source), out, reference_cache=cache, **settings)
    both = nemoquant.diff(source, [out, Path(again)], reference_cache=cache, **settings)
    assert [c.name for c in alone.candidates] == ["out"]
    assert [c.name for c in both.candidates] == ["out", "again"]
    assert both.candidates[0].logits == alone.candidates[0].logits
