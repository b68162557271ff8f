"""What the package exports: names, signatures, types, and the page that is made from them."""

import importlib.util
import inspect
from dataclasses import fields
from typing import get_type_hints

import pytest
from support.places import PACKAGE, ROOT
from support.processes import run_python

import nemoquant
from nemoquant import errors
from nemoquant.api.quantizing import run_options
from nemoquant.run.options import RunOptions, RunOptionsDict

ERRORS = [
    name
    for name, kind in vars(errors).items()
    if inspect.isclass(kind) and issubclass(kind, BaseException) and kind.__module__ == errors.__name__
]
OPTIONS = [
    "data=None",
    "columns=()",
    "rows=32",
    "seq_len=512",
    "scales=None",
    "device='cpu'",
    "dtype=None",
    "row_batch=None",
    "memory=None",
    "threads=None",
    "shard_bytes=5000000000",
    "scale_groups=True",
    "method=None",
    "folds=None",
    "descent=None",
    "propagate=None",
    "outputs=None",
    "headroom=None",
    "on='local'",
    "address=None",
    "resume=False also=() gpu=None",
]
SIGNATURES = {
    "convert": "path out to * dry_run=False download=False progress=None say=None",
    "diff": "source candidates * data=None columns=() rows=32 seq_len=512 reference_cache=None "
    "engine='torch' engine_files=() plugins=None device='cpu' threads=None card=True download=False "
    "progress=None say=None",
    "estimate": "source recipe options=None * out='.' download=False say=None " + " ".join(OPTIONS),
    "export_engine": "source out * target=None sm=None compute='bfloat16' max_seq_len=4096 max_batch=1 "
    "workspace=None last_token_only=False mtp=False strip_weights=False weight_streaming=False "
    "timing_cache=None plugins=None download=False progress=None say=None",
    "export_onnx": "source out=None * dialect='onnxruntime' compute=None last_token_only=False layers=None "
    "mtp=False copy=True download=False progress=None say=None",
    "generate": "path prompt * chat=False engine='torch' engine_file=None plugins=None max_tokens=64 "
    "temperature=0.0 seed=0 mtp=0 threads=None download=False ready=None stream=None progress=None say=None",
    "inspect": "path * context=None download=False say=None",
    "plan": "source recipe * scale_groups=True method=None folds=None descent=None propagate=None "
    "outputs=None headroom=None download=False say=None",
    "quantize": "source out recipe options=None * dry_run=False download=False planned=None expected=None "
    "progress=None say=None " + " ".join(OPTIONS),
    "verify": "out against=None * download=False progress=None say=None",
}
OTHERS = [
    "Converted",
    "Estimate",
    "Exported",
    "Generated",
    "Plan",
    "Progress",
    "Report",
    "Result",
    "RunOptions",
]


def test_the_exported_names():
    expected = [*SIGNATURES, *OTHERS, *ERRORS, "__version__", "no_progress"]
    assert sorted(nemoquant.__all__) == sorted(expected)
    assert dir(nemoquant) == sorted(expected)
    assert len(ERRORS) >= 15
    for name in nemoquant.__all__:
        assert getattr(nemoquant, name) is not None
    with pytest.raises(AttributeError, match="module 'nemoquant' has no attribute 'quantise'"):
        nemoquant.quantise  # noqa: B018


def test_errors_are_the_same_classes():
    assert all(getattr(nemoquant, name) is getattr(errors, name) for name in ERRORS)


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name):
    written, before = [], None
    for parameter in inspect.signature(getattr(nemoquant, name)).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and before is not parameter.KEYWORD_ONLY:
            written.append("*")
        before = parameter.kind
        default = "" if parameter.default is parameter.empty else f"={parameter.default!r}"
        written.append(parameter.name + default)
    assert " ".join(written) == SIGNATURES[name]


def test_importing_the_package_is_cheap():
    program = """
import sys
import nemoquant
from nemoquant import UsageError, __version__
try:
    raise UsageError("caught without loading anything")
except nemoquant.NemoquantError:
    pass
dir(nemoquant)
heavy = "torch numpy numba pydantic safetensors jinja2 tokenizers rich yaml click nemoquant.api".split()
print([name for name in heavy if name in sys.modules])
"""
    assert run_python(program).stdout == "[]\n"


def test_a_star_import_needs_neither_torch_nor_an_extra():
    program = """
import sys
from nemoquant import *
print([name for name in ("torch", "onnx", "onnx_ir", "onnxruntime", "ray") if name in sys.modules])
"""
    assert run_python(program).stdout == "[]\n"


def test_the_package_says_that_it_has_types():
    assert (PACKAGE / "py.typed").read_bytes() == b""


def test_keyword_options_are_the_fields_of_the_options():
    hints = get_type_hints(RunOptions)
    assert get_type_hints(RunOptionsDict) == {f.name: hints[f.name] for f in fields(RunOptions)}
    assert RunOptionsDict.__total__ is False


def test_options_are_given_in_one_way():
    assert run_options("quantize", None, {"rows": 3, "threads": 2}) == RunOptions(rows=3, threads=2)
    assert run_options("quantize", RunOptions(rows=3), {}) == RunOptions(rows=3)
    with pytest.raises(nemoquant.UsageError, match="got options and rows, threads; expected one of the two"):
        run_options("quantize", RunOptions(), {"rows": 3, "threads": 2})
    with pytest.raises(nemoquant.UsageError, match="options is 32; expected RunOptions, or its fields"):
        nemoquant.quantize("a", "b", "fp8", 32)
    with pytest.raises(
        TypeError, match=r"estimate\(\) got an unexpected keyword argument 'row'; options are"
    ):
        nemoquant.estimate("a", "fp8", row=3)


def test_the_old_name_of_on():
    """The warning points to the line that uses it, or Python would not show it."""
    with pytest.warns(DeprecationWarning, match="engine, an option of quantize, is now on") as warned:  # noqa: SIM117
        with pytest.raises(nemoquant.CheckpointError):
            nemoquant.quantize("nowhere", "out", "fp8", engine="local")
    assert [one.filename for one in warned] == [__file__]
    with pytest.raises(nemoquant.UsageError, match="on is 'ray' and engine, its old name, 'local'; expected"):
        nemoquant.estimate("nowhere", "fp8", engine="local", on="ray")


def test_the_page_is_what_its_script_makes():
    spec = importlib.util.spec_from_file_location("make_api", ROOT / "docs/make_api.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    made = script.page()
    assert (ROOT / "docs/api.md").read_text(encoding="utf-8") == made, "run python docs/make_api.py"
    assert all(f"### {name}\n" in made for name in [*SIGNATURES, *OTHERS] if name != "Progress")
    assert all(name in made for name in ERRORS)
    assert "``" not in made.replace("```", "")
