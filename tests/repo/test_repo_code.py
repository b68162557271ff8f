"""Rules of the code that no linter checks."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

from nemoquant.model.config import LayerKind

ROOT = Path(__file__).resolve().parents[2]
MOST_POSITIONAL = 6
KINDS = get_args(LayerKind)


def nodes() -> Iterator[tuple[str, ast.AST]]:
    """Every node of the package's code, with the path of its file in the package."""
    for path in sorted((ROOT / "nemoquant").rglob("*.py")):
        file = str(path.relative_to(ROOT / "nemoquant"))
        yield from ((file, node) for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


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
    """Names of other tools' tensors and config files are only in the file of their layout.

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
    assert {file for file, _ in found} == {"layouts/modelopt.py", "layouts/compressed_tensors.py"}
    assert len(found) >= 8, "the file has them"


def test_published_names_are_built_in_one_file():
    """Of modules and tensors, in model/names.py; checkpoint/spellings.py reads other spellings."""
    code = list(nodes())
    prose = {node.value for _, node in code if isinstance(node, ast.Expr)}
    found = {
        file
        for file, node in code
        if isinstance(node, ast.Constant)
        and node not in prose
        and str(node.value).startswith(("backbone.", "mtp.layers"))
    }
    assert found == {"model/names.py"}


def test_tables_by_kind_of_layer_have_every_kind():
    """One for what is known without torch, one for torch, one for its gradients, one for ONNX."""
    found = []
    for file, node in nodes():
        if isinstance(node, ast.Dict):
            keys = [key.value for key in node.keys if isinstance(key, ast.Constant)]
            if len(set(keys) & set(KINDS)) > 1:
                assert tuple(keys) == KINDS, f"{file}:{node.lineno} has {keys}"
                found.append(file)
    assert found == [
        "graph/layers.py",
        "model/gradients.py",
        "model/kinds/__init__.py",
        "model/reference.py",
    ]


def silent(node: ast.AST) -> bool:
    """Whether code that is not for a certain kind of layer runs for every other kind, unknown ones too."""

    def names_a_kind(test: ast.AST) -> bool:
        constants = {n.value for n in ast.walk(test) if isinstance(n, ast.Constant)}
        asks = {ast.unparse(n.left) for n in ast.walk(test) if isinstance(n, ast.Compare)}
        return bool(constants & set(KINDS)) and any(a == "kind" or a.endswith(".kind") for a in asks)

    if isinstance(node, ast.IfExp):
        return names_a_kind(node.test)
    if isinstance(node, ast.If) and names_a_kind(node.test) and node.orelse:
        last = node.orelse[0]
        return not isinstance(last, ast.If) and "assert_never" not in ast.unparse(last)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "get":
        return bool(node.args) and ast.unparse(node.args[0]).split(".")[-1] == "kind"
    return False


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ('if kind == "moe":\n    a()', False),
        ('if kind == "moe":\n    a()\nelse:\n    b()', True),
        ('if kind == "moe":\n    a()\nelif layer.kind != "mlp":\n    b()\nelse:\n    c()', True),
        ('if kind == "moe":\n    a()\nelse:\n    assert_never(kind)', False),
        ('a if variant.kind == "moe" else b', True),
        ('{"mamba": 1}.get(kind, 0)', True),
        ('a if kind == "html" else b', False),
        ('if size == 1:\n    a()\nelse:\n    b("mlp")', False),
    ],
)
def test_the_test_sees_what_would_be_silent(code, expected):
    assert any(silent(node) for node in ast.walk(ast.parse(code))) == expected


def test_no_kind_of_layer_falls_into_an_else():
    """A new kind must fail where nothing is known about it: by a lookup, or by ``assert_never``."""
    assert [f"{file}:{node.lineno}" for file, node in nodes() if silent(node)] == []  # type: ignore[attr-defined]
