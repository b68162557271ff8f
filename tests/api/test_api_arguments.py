"""A wrong word or an impossible number is a UsageError that says what was got and what is known."""

import inspect
from pathlib import Path

import numpy as np
import pytest

import nemoquant
from nemoquant import arguments
from nemoquant.errors import UsageError
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
OPTIONS = [
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
    ("scales", b"x", "scales is b'x'; expected a path, as str or Path"),
    ("address", 7, "address is 7; expected HOST:PORT or auto"),
]
PROGRESS = "progress is 'yes'; expected None (shown in a terminal or notebook), False or a function"
WRONG = {
    "diff": [
        ("engine", "foo", "engine is 'foo'; expected torch, onnxruntime, rtx or trt"),
        ("engine", None, "engine is None; expected torch, onnxruntime, rtx or trt"),
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
        ("temperature", -1, "temperature is -1; expected 0 (greedy) or a positive number"),
        ("temperature", "hot", "temperature is 'hot'; expected 0 (greedy) or a positive number"),
        ("temperature", float("nan"), "temperature is nan; expected 0 (greedy) or a positive number"),
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
    "plan": [("scale_groups", None, "scale_groups is None; expected True or False")],
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
    nemoquant.quantize(str(source), again, "fp8", scales=f"{out}/nemoquant_scales.json", threads=1)
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
