"""Files of Model Optimizer's recipes: recognised, bounded, refused in one line, read by its own loader."""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from support import modelopt_recipes, modelopt_run
from support.places import SUPER

from nemoquant import api
from nemoquant.api.look import resolved
from nemoquant.errors import MissingExtraError, RecipeError
from nemoquant.planning.modelopt import library
from nemoquant.planning.modelopt.recognise import is_theirs
from nemoquant.planning.recipe import load_recipe, presets
from nemoquant.run.options import RunOptions
from nemoquant.sources.source import open_source

WHOLE = """\
metadata: {recipe_type: ptq, description: 'Experts in NVFP4.'}
quantize:
  algorithm: max
  quant_cfg:
    - {quantizer_name: '*', enable: false}
    - quantizer_name: '*mixer.experts.*weight_quantizer'
      cfg: {num_bits: e2m1, block_sizes: {-1: 16, type: dynamic, scale_bits: e4m3}}
"""
WEIGHTS = {"num_bits": [2, 1], "block_sizes": {"-1": 16, "type": "dynamic", "scale_bits": [4, 3]}}
ANSWER = {
    "description": "Experts\nin NVFP4.",
    "entries": [
        {"pattern": "*", "parent": None, "enable": False, "cfg": None},
        {"pattern": "*.experts.*weight_quantizer", "parent": None, "enable": True, "cfg": [WEIGHTS]},
    ],
    "algorithms": [{"method": "max"}],
}


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path, bool]]:
    """What the loader is asked, which answers at once; a library of two recipes."""
    for name in ("general/ptq/nvfp4_default-kv_fp8.yaml", "models/nvidia/Some-Model/ptq/nvfp4-mse.yaml"):
        file = tmp_path / "library" / name
        file.parent.mkdir(parents=True)
        file.write_text(WHOLE)
    questions: list[tuple[Path, bool]] = []

    def ask(path: Path, plain: bool) -> Mapping[str, Any]:
        questions.append((path, plain))
        return ANSWER

    monkeypatch.setattr(library, "ask", ask)
    monkeypatch.setattr(library, "folder", lambda: tmp_path / "library")
    return questions


def write(tmp_path: Path, text: str, name: str = "theirs.yaml") -> str:
    file = tmp_path / name
    file.write_text(text)
    return str(file)


def refusal(name: str) -> str:
    with pytest.raises(RecipeError) as error:
        library.load(name)
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 1000
    return text


@pytest.mark.parametrize(
    "text",
    [
        WHOLE,
        "quant_cfg: []\nalgorithm: max\n",
        "imports: {}\n---\n- {quantizer_name: x, enable: true}\n",
        "num_bits: e4m3\n",
        "- {$import: x, quantizer_name: y}\n",
        "metadata: {recipe_type: auto_quantize}\n",
        "a: &a {quantizer_name: x}\nmetadata: *a\n",
    ],
)
def test_theirs(text: str, tmp_path: Path) -> None:
    assert is_theirs(write(tmp_path, text))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "- a\n",
        "a: [",
        "name: x\nrules: []\n",
        "pred_type: flow\n",
        "\0",
        "[" * 5000,
        "!!python/object:os.x {}",
    ],
)
def test_not_theirs(text: str, tmp_path: Path) -> None:
    assert not is_theirs(write(tmp_path, text))
    with pytest.raises(RecipeError, match=r"theirs\.yaml"):
        load_recipe(str(tmp_path / "theirs.yaml"))


def test_presets_are_ours(tmp_path: Path) -> None:
    assert not any(map(is_theirs, map(str, presets().values())))
    assert not is_theirs(str(tmp_path))  # a folder without a recipe
    assert not is_theirs(str(tmp_path / "nothing"))
    assert not is_theirs(write(tmp_path, "metadata: {}\n" + "#" * (300 << 10)))  # too large for a recipe


def test_without_a_model_there_is_no_recipe(tmp_path: Path) -> None:
    name = write(tmp_path, WHOLE)
    with pytest.raises(RecipeError, match=f"`nemoquant recipes show {name} --model MODEL` converts it"):
        load_recipe(name)


@pytest.mark.parametrize("base", ["theirs.yaml", "modelopt:general/ptq/fp8_default-kv_fp8"])
def test_none_of_ours_extends_one(base: str, tmp_path: Path) -> None:
    write(tmp_path, WHOLE)
    with pytest.raises(
        RecipeError, match=r"ours\.yaml extends .*, which is a recipe of Model Optimizer, whose mean"
    ):
        load_recipe(write(tmp_path, f"name: ours\nextends: {base}\n", "ours.yaml"))


def test_a_file_a_name_and_a_folder(tmp_path: Path, asked: list[tuple[Path, bool]]) -> None:
    found = library.load(write(tmp_path, WHOLE, "my recipe.yaml"))
    assert (found.title, found.description) == ("modelopt-my-recipe", "Experts\nin NVFP4.")
    assert [entry.pattern for entry in found.entries] == ["*", "*.experts.*weight_quantizer"]
    assert library.load("modelopt:general/ptq/nvfp4_default-kv_fp8").title == "modelopt-nvfp4_default-kv_fp8"
    for name in (
        "models/nvidia/Some-Model/ptq/nvfp4-mse.yaml",
        "huggingface/models/nvidia/Some-Model/ptq/nvfp4-mse",
    ):
        library.load(f"modelopt:{name}")
    whole = tmp_path / "folder"
    whole.mkdir()
    (whole / "metadata.yml").write_text("recipe_type: ptq\n")
    (whole / "quantize.yaml").write_text("algorithm: max\nquant_cfg: []\n")
    assert is_theirs(str(whole))
    assert library.load(str(whole)).title == "modelopt-folder"
    library.load(write(tmp_path, "algorithm: max\nquant_cfg: []\n", "plain.yml"))
    assert [(path.name, plain) for path, plain in asked] == [
        ("my recipe.yaml", False),
        ("nvfp4_default-kv_fp8.yaml", False),
        ("nvfp4-mse.yaml", False),
        ("nvfp4-mse.yaml", False),
        ("folder", False),
        ("plain.yml", True),
    ]
    assert all(path.is_absolute() for path, _ in asked)


@pytest.mark.parametrize("name", ["nvfp4-default", "../../secret", "/etc/passwd", "general"])
def test_a_name_that_is_not_there(name: str, asked: list[tuple[Path, bool]]) -> None:
    assert "expected one such as modelopt:general/ptq/nvfp4_default-kv_fp8" in refusal(f"modelopt:{name}")
    assert asked == []


ONE = "a: &a [{}]\n".format(", ".join("x" * 10))
BOMB = ONE + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]\n" for a, b in zip("abcdefg", "bcdefgh", strict=True)
)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("metadata: {recipe_type: auto_quantize}\nauto_quantize: {}\n", "is a search (auto_quantize)"),
        ("metadata: {recipe_type: auto_quantize}\nauto_quantize: {}\nquantize: {}\n", "is a search"),
        (
            "metadata: {recipe_type: speculative_eagle}\neagle: {}\n",
            "trains a draft model ('speculative_eagle')",
        ),
        ("imports: {}\n---\n- {quantizer_name: x, enable: true}\n", "is a part of recipes"),
        ("quantizer_name: '*'\nenable: false\n", "is a part of recipes"),
        ("num_bits: e4m3\n", "is a part of recipes"),
        ("metadata: {recipe_type: ptq}\n", "is no recipe for quantizing (its keys: metadata)"),
        ("metadata: 1\nalgorithm: max\n", "is no recipe for quantizing (its keys: algorithm, metadata)"),
        (BOMB + "quant_cfg: *h\n", "it stands for more than 65,536 values"),
        ("quant_cfg: &a [*a]\n", "a value contains itself"),
        ("quant_cfg: " + "[" * 40 + "]" * 40, "it is deeper than 32 levels"),
        ("quant_cfg: [" + "1:" * 40 + "1]", "a number of 81 characters"),
        (
            "quant_cfg: !!python/object:os.system {}\n",
            "cannot be read as YAML: could not determine a constructor",
        ),
    ],
    ids=lambda text: text[:30],
)
def test_what_is_refused_before_it_is_loaded(
    text: str, part: str, tmp_path: Path, asked: list[tuple[Path, bool]]
) -> None:
    assert part in refusal(write(tmp_path, text))
    assert asked == []


def test_names_and_sizes_of_files(tmp_path: Path, asked: list[tuple[Path, bool]]) -> None:
    assert "takes files that end in .yaml or .yml" in refusal(write(tmp_path, WHOLE, "theirs.txt"))
    assert "it has more than 262,144 bytes" in refusal(write(tmp_path, WHOLE + "#" * (300 << 10)))
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "metadata.yaml").write_text("recipe_type: ptq\n")
    assert "has no quantize.yaml; expected metadata and quantize in a folder" in refusal(str(folder))
    os.mkfifo(folder / "pipe.yaml")
    assert "cannot be read as YAML" in refusal(str(folder / "pipe.yaml"))
    assert asked == []


def test_files_that_it_imports_are_bounded_too(
    tmp_path: Path, asked: list[tuple[Path, bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name = write(tmp_path, "imports: {a: first, b: configs/of/the/library, c: 1}\n" + WHOLE)
    write(tmp_path, "imports: {a: second.yml}\nnum_bits: 8\n", "first.yml")
    write(tmp_path, "imports: {a: first}\n", "second.yml")  # its loader refuses the circle
    library.load(name)
    write(tmp_path, BOMB, "second.yml")
    assert "theirs.yaml, second.yml, cannot be read as YAML: it stands for more than" in refusal(name)
    write(tmp_path, "imports: {" + ", ".join(f"a{i}: f{i}" for i in range(70)) + "}\n", "second.yml")
    for i in range(70):
        write(tmp_path, "num_bits: 8\n", f"f{i}.yaml")
    assert "imports more than 64 files" in refusal(name)
    assert len(asked) == 1


def test_its_loaders_reason_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: Any) -> None:
    monkeypatch.setattr(library, "ask", lambda *_: {"refused": "ValueError: a\n  b " + "c" * 9999})
    assert "Model Optimizer's own loader refuses it: ValueError: a b ccc" in refusal(write(tmp_path, WHOLE))
    many = ANSWER | {"entries": ANSWER["entries"] * 3000}  # type: ignore[operator]
    monkeypatch.setattr(library, "ask", lambda *_: many)
    assert "quant_cfg has 6,000 entries; expected at most 4,096" in refusal(write(tmp_path, WHOLE))
    assert asked == []


def test_without_model_optimizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "find_spec", lambda _: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'nemoquant\[modelopt\]'"):
        api.plan(SUPER, write(tmp_path, WHOLE))


def test_a_loader_that_ends_or_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that answers nothing: the script that stands in for Python ends at once, or waits."""
    stand_in = tmp_path / "python"
    stand_in.write_text("#!/bin/sh\necho killed by something >&2\nexit 9\n")
    stand_in.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(stand_in))
    assert library.ask(tmp_path, False) == {"refused": "it ended with exit code 9: killed by something"}
    stand_in.write_text("#!/bin/sh\nexec sleep 60\n")
    monkeypatch.setattr(library, "SECONDS", 0.2)
    assert library.ask(tmp_path, False) == {"refused": "it did not end within 0.2 s"}


STAND_IN = """\
from types import SimpleNamespace

print("as Model Optimizer does")
try:
    import transformers
    QuantModuleRegistry = {"nn.Linear": 1, "hf.Falcon": 1}
except ImportError:
    QuantModuleRegistry = {"nn.Linear": 1}


def load_recipe(path):
    entry = SimpleNamespace(quantizer_name="*", parent_class=path.read_text(), enable=False, cfg=None)
    quantize = SimpleNamespace(quant_cfg=[entry], algorithm="max")
    return SimpleNamespace(description=", ".join(sorted(QuantModuleRegistry)), quantize=quantize)


"""


@pytest.mark.parametrize(
    ("parent", "answer"),
    [
        ("nn.Linear", "nn.Linear"),
        ("hf.Falcon", "hf.Falcon, nn.Linear"),
        ("hf.Nothing", "UnknownClassError: parent_class 'hf.Nothing' is not a class that it quantizes"),
    ],
)
def test_other_libraries_are_loaded_where_a_recipe_names_their_classes(
    parent: str, answer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a package that stands in for Model Optimizer; of the real one all 150 files gave equal answers."""
    for name in ("transformers", "modelopt", *(f"modelopt/{n}" for n in ("recipe", "torch"))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
    for name in ("torch/quantization/__init__.py", "torch/quantization/nn.py", "recipe/__init__.py"):
        (tmp_path / "modelopt" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "modelopt" / name).write_text(STAND_IN)
    (tmp_path / "modelopt/recipe/loader.py").write_text("load_config = None\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    recipe = tmp_path / "theirs.yaml"
    recipe.write_text(parent)
    found = library.ask(recipe, False)
    assert found.get("description", found.get("refused")) == answer
    if "entries" in found:
        assert found["entries"] == [{"pattern": "*", "parent": parent, "enable": False, "cfg": None}]


def test_a_plan_and_its_warnings(tmp_path: Path, asked: list[tuple[Path, bool]]) -> None:
    made = api.plan(SUPER, write(tmp_path, WHOLE), method="mse")
    assert {row.scale_method for row in made.quantized} == {"mse"}
    assert {row.role for row in made.quantized} == {"experts.up_proj", "experts.down_proj"}
    assert made.recipe.name == "modelopt-theirs-mse"
    assert made.recipe.summary == "Experts in NVFP4 (from a recipe of Model Optimizer)."
    (note,) = made.warnings
    assert note.startswith("modelopt-theirs: multi-token prediction is kept as the source has it; ")
    assert str(tmp_path) not in json.dumps([made.recipe.dump(), made.warnings])  # it goes into the manifest
    assert len(asked) == 1


@pytest.mark.slow
class TestModelOptimizer:
    pytestmark = modelopt_run.MARKS

    def test_its_loader_in_a_process_of_its_own(self, tmp_path: Path) -> None:
        found = library.load(write(tmp_path, WHOLE))
        assert found.description == "Experts in NVFP4."
        assert [entry.cfg for entry in found.entries] == [None, (WEIGHTS,)]
        assert found.algorithms == ({"method": "max"},)
        text = WHOLE.replace("num_bits", "num_bots")
        assert "Model Optimizer's own loader refuses it: ValueError: " in refusal(write(tmp_path, text))

    def test_all_that_it_ships_end_in_a_plan_or_in_one_line(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(library, "ask", modelopt_recipes.ask)
        model, plans, refused = open_source(SUPER), [], []
        for name in modelopt_recipes.shipped():
            try:
                resolved(model, f"modelopt:{name}", RunOptions())  # all of api.plan but opening the model
                plans.append(name)
            except RecipeError as error:
                assert "\n" not in str(error)
                assert "loader refuses" not in str(error)
                assert any(todo in str(error) for todo in ("expected", "To do: ", "`nemoquant diff`")), name
                refused.append(name)
        assert len(plans) + len(refused) >= 150
        assert len(plans) >= 50
        nemotron = [name for name in plans if "nvidia/" in name or "nemotron" in name or "mamba_moe" in name]
        assert len(nemotron) >= 9
