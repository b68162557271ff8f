"""Rules of the code that no linter checks."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MOST_POSITIONAL = 6


def test_no_call_passes_seven_or_more_positional_arguments():
    """With more than six nobody can tell them apart: they are passed by name."""
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno} {ast.unparse(node.func)}"
        for path in sorted((ROOT / "nemoquant").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and len(node.args) > MOST_POSITIONAL
    ]
    assert found == []


def test_foreign_names_stand_in_one_file():
    """Names of other tools' tensors and config files are only in layouts/modelopt.py.

    This holds for code that reads them and code that writes them.
    """
    foreign = {
        "weight_scale",
        "weight_scale_2",
        "quantization_config",
        "hf_quant_config.json",
        "quant_algo",
        "kv_cache_quant_algo",
        "quantized_layers",
        "exclude_modules",
        "kv_cache_scheme",
        "config_groups",
        "quant_method",
    }
    found = {
        (str(path.relative_to(ROOT / "nemoquant")), node.value)
        for path in sorted((ROOT / "nemoquant").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and node.value in foreign
    }
    assert {file for file, _ in found} == {"layouts/modelopt.py"}
    assert len(found) >= 8, "the file has them"
