"""A number format or cache format is one row in each table; no other place asks which one it is."""

import ast
from pathlib import Path
from typing import get_args

import pytest
from support.places import DEMO
from support.processes import run_python

from nemoquant.converting.targets import REFUSED
from nemoquant.demo import PRESETS as DEMO_PRESETS
from nemoquant.engine import TARGETS
from nemoquant.evaluate.report.html import SERIES
from nemoquant.formats import (
    CACHE_FORMATS,
    FORMATS,
    SOLVED,
    CacheName,
    FormatName,
    ScaleMethod,
    mxfp8,
    nvfp4_blocks,
)
from nemoquant.formats.registry import ARITHMETIC
from nemoquant.graph import ops
from nemoquant.graph.dialects import DIALECTS
from nemoquant.graph.gemms import GEMMS, gemm_of
from nemoquant.layouts import ENGINES, compressed_tensors, engine_rows, modelopt
from nemoquant.ops.functional import EXPERT_FORMATS
from nemoquant.pack.card import NAMES
from nemoquant.planning.modelopt import numerics
from nemoquant.planning.recipe import load_recipe, presets

ROOT = Path(__file__).resolve().parents[2]

TABLES = {
    "arithmetic": ARITHMETIC,
    "layout": modelopt.LAYOUT,
    "layout of compressed-tensors": compressed_tensors.LAYOUTS,
    "why it is not converted": REFUSED,
    "quantizers of Model Optimizer": numerics.CODES,
    "model card": {name: text for name, text in NAMES.items() if name != "source"},
    **{f"codecs of {name}": dialect.codecs for name, dialect in DIALECTS.items()},
    **{f"GPUs of {name}": target.least_sm for name, target in TARGETS.items()},
}
CACHE_TABLES = {
    "layout": modelopt.CACHES,
    **{f"caches of {name}": dialect.caches for name, dialect in DIALECTS.items()},
}


@pytest.mark.parametrize("table", TABLES)
def test_every_table_has_every_format(table: str) -> None:
    assert tuple(TABLES[table]) == tuple(FORMATS) == get_args(FormatName)


@pytest.mark.parametrize("table", CACHE_TABLES)
def test_every_table_has_every_cache(table: str) -> None:
    assert tuple(CACHE_TABLES[table]) == tuple(CACHE_FORMATS) == get_args(CacheName)


def test_a_block_is_the_same_number_everywhere() -> None:
    assert (FORMATS["mxfp8"].block,) * 2 == (mxfp8.BLOCK, ops.MX_BLOCK)
    assert (FORMATS["nvfp4"].block,) * 2 == (nvfp4_blocks.BLOCK, ops.BLOCK)


def test_the_demo_shows_every_format() -> None:
    assert set(FORMATS) <= set(DEMO_PRESETS)


def test_every_format_has_a_preset_of_its_name() -> None:
    """``--fmt NAME`` is that preset."""
    assert set(FORMATS) <= set(presets())
    assert all(name in {rule.format for rule in load_recipe(name).rules} for name in FORMATS)


def test_a_format_with_facts_alone_is_not_written(tmp_path: Path) -> None:
    """A name with NVFP4's facts and no other row ends in a KeyError before a file exists."""
    recipe = tmp_path / "mxfp4.yaml"
    recipe.write_text(
        "name: mxfp4\nsummary: A trial.\nrules:\n"
        "  - {roles: [experts.*], format: mxfp4}\n  - {roles: ['*'], format: source}\n"
    )
    code = f"""
from dataclasses import replace
from typing import Literal
import nemoquant.formats as formats
formats.FormatName = Literal["fp8", "mxfp4", "mxfp8", "nvfp4"]
formats.FORMATS = {{**formats.FORMATS, "mxfp4": replace(formats.FORMATS["nvfp4"], name="mxfp4")}}
import nemoquant
assert nemoquant.plan({str(DEMO)!r}, {str(recipe)!r}).quantized
try:
    nemoquant.quantize({str(DEMO)!r}, {str(tmp_path / "out")!r}, {str(recipe)!r}, rows=2, seq_len=16)
except KeyError as error:
    print("refused", error)
"""
    assert run_python(code).stdout == "refused 'mxfp4'\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mxfp4.yaml"]


def test_the_report_has_a_colour_for_every_format_and_series() -> None:
    style = (ROOT / "nemoquant/evaluate/report/report.css").read_text()
    for name in (*FORMATS, *(f"series-{i}" for i in range(SERIES))):
        rule = name if name.startswith("series-") else f"format-{name}"
        assert style.count(f"--{name}: light-dark(") == 1, name
        assert style.count(f".{rule} {{") == 1, name


def test_names_are_those_of_the_rows() -> None:
    assert all(name == number.name for name, number in FORMATS.items())
    assert all(name == cache.name and cache.number in FORMATS for name, cache in CACHE_FORMATS.items())
    assert {method for number in FORMATS.values() for method in number.methods} == set(get_args(ScaleMethod))
    assert {method for number in FORMATS.values() for method in number.solved} == set(SOLVED)
    assert all(number.plain in number.methods for number in FORMATS.values())


def test_the_layout_names_the_parts_that_a_format_has() -> None:
    for name, number in FORMATS.items():
        kinds = [tensor.kind for tensor in number.packed_tensors((64, 64))]
        kinds += ["input_scale"] * number.calibrated
        layout = modelopt.LAYOUT[name]
        assert sorted(layout.suffix) == sorted(kinds)
        assert len(set(layout.suffix.values())) == len(kinds)
        assert (layout.weights_only is not None) == number.weights_only
        assert layout.algorithm in modelopt.READABLE


def test_the_layout_can_tell_formats_apart() -> None:
    """A reader knows a format by the dtypes of codes and block scales."""
    seen = {(number.code_dtype, number.scale_dtype) for number in FORMATS.values()}
    assert len(seen) == len(FORMATS)


def test_what_loads_each_algorithm_is_said() -> None:
    said = {(row.engine, row.algorithm) for row in engine_rows.ROWS}
    assert said >= {(engine, name) for engine in ENGINES.values() for name in modelopt.FORMAT_OF}


def test_every_format_has_a_gemm_for_each_kind_of_input() -> None:
    for name, number in FORMATS.items():
        assert gemm_of(name, name).rounds
        if number.weights_only:
            assert not gemm_of(name, None).rounds
    assert all(name == gemm.name for name, gemm in GEMMS.items())


def test_the_plugin_has_the_other_gemms() -> None:
    """A format that the experts' kernel lacks is refused by the dialect with plugins; see docs/engines.md."""
    assert set(GEMMS) - set(EXPERT_FORMATS) == {"mxfp8"}
    assert all(GEMMS[name].parts == parts for name, (_, parts) in EXPERT_FORMATS.items())


def test_no_place_asks_which_format_it_is() -> None:
    """A comparison with a format's name has an else that means all the others; rows of tables have none."""
    words = {*FORMATS, *GEMMS, *CACHE_FORMATS} | {a for a in modelopt.FORMAT_OF if a is not None}
    found = [
        f"{path.relative_to(ROOT)}:{_tested(node).lineno} {ast.unparse(_tested(node))}"
        for path in sorted((ROOT / "nemoquant").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Compare | ast.match_case) and words & set(_words(node))
    ]
    assert found == []


def _words(node: ast.Compare | ast.match_case) -> list[str]:
    """The words that a comparison, or a case, names."""
    inside = ast.walk(_tested(node))
    return [n.value for n in inside if isinstance(n, ast.Constant) and isinstance(n.value, str)]


def _tested(node: ast.Compare | ast.match_case) -> ast.Compare | ast.pattern:
    """What has the words, and a line: of a case, its pattern."""
    return node.pattern if isinstance(node, ast.match_case) else node
