"""The verbs that read no weights: plan, inspect, recipes; and what the command line itself loads."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from support import commands
from support.commands import invoke
from support.commands import nemoquant as command
from support.files import parse_strictly
from support.places import CALIB, CONFIGS, NANO, SUPER
from support.processes import run_python

import nemoquant

REST = "- roles: ['*']\n  format: source"


def data(*args: str | Path) -> Any:
    """Runs a verb with --json and parses its output, which must be nothing else."""
    result = command(*args, "--json")
    assert result.stderr == ""
    return parse_strictly(result.stdout)


def refusal(*args: str | Path) -> str:
    """The one line on standard error of a call that ends with exit code 2."""
    return commands.refusal(*args).removeprefix("error: ")


# --- plan


def test_plan_for_an_engine(source: Path) -> None:
    """It is shown alone, with its command; what it can't run is a check that failed."""
    args = ("plan", source, "--recipe", "nvfp4-full-w4a16", "--for")
    right = command(*args, "vllm", "--gpu", "h100")
    assert "vllm serve OUT " in right.stdout and "SGLang" not in right.stdout
    wrong = invoke(*args, "sglang", "--gpu", "b200")
    assert wrong.exit_code == 1
    assert "\nSGLang does not run nvfp4-full-w4a16 on B200: wrong; SGLang 0.5.23 reads its" in wrong.stderr
    nowhere = invoke(*args, "sglang")
    assert nowhere.exit_code == 1 and "on any GPU" in nowhere.stderr
    as_json = invoke(*args, "sglang", "--json")
    assert as_json.exit_code == 1
    assert list(parse_strictly(as_json.stdout)["engines"]) == ["SGLang"]
    assert "'h1000' is not one of 't4', " in invoke("plan", source, "--fmt", "fp8", "--gpu", "h1000").stderr


def test_plan_as_json(source: Path) -> None:
    found = data("plan", source, "--fmt", "nvfp4")
    rows = found.pop("rows")
    assert list(found) == [
        "schema",
        "recipe",
        "sha256",
        "source_dtypes",
        "tensors_in",
        "bytes_in",
        "tensors_out",
        "bytes_out",
        "compression",
        "bits_per_weight",
        "bits_per_quantized_weight",
        "kv_cache_bytes_per_token",
        "ssm_state_bytes_per_sequence",
        "formats",
        "needs_calibration",
        "roles",
        "engines",
        "warnings",
        "cautions",
        "serving",
    ]
    assert list(found["engines"]) == ["vLLM", "SGLang", "TensorRT-LLM"]
    assert found["engines"]["SGLang"]["90"] == {
        **{"runs": "weights only", "since": "0.5.23", "notes": [], "options": []}
    }
    assert [serving["engine"] for serving in found["serving"]] == ["vLLM", "SGLang", "TensorRT-LLM"]
    assert found["cautions"] == []
    assert (found["schema"], found["recipe"], found["source_dtypes"], found["needs_calibration"]) == (
        1,
        "nvfp4",
        "headers",
        True,
    )
    assert found["tensors_in"] == len(rows) == sum(found["formats"].values())
    assert found["compression"] == found["bytes_in"] / found["bytes_out"]
    assert found["kv_cache_bytes_per_token"] == {"source": 2 * 2 * 16 * 2, "planned": 2 * 2 * 16}
    assert found["ssm_state_bytes_per_sequence"] == {
        "source": 2 * 4 * 16 * 16 * 4,
        "planned": 2 * 4 * 16 * 16 * 4,
    }
    by_name = {row.pop("name"): row for row in rows}
    assert by_name["backbone.layers.2.mixer.experts.3.up_proj.weight"] == {
        "role": "experts.up_proj",
        "layer": 2,
        "expert": 3,
        "shape": [48, 32],
        "source_dtype": "BF16",
        "format": "nvfp4",
        "scale_method": "gptq",
        "activation_format": "nvfp4",
        "reason": "rule 1: roles experts.*, mlp.*",
        "scale_group": {"weight": None, "input": "backbone.layers.2.mixer.experts.up_proj"},
    }
    assert by_name["backbone.layers.1.mixer.k_proj.weight"] == {
        "role": "attention.k_proj",
        "layer": 1,
        "expert": None,
        "shape": [32, 64],
        "source_dtype": "BF16",
        "format": "fp8",
        "scale_method": "gptq",
        "activation_format": "fp8",
        "reason": "rule 3: roles attention.*",
        "scale_group": {
            "weight": "backbone.layers.1.mixer.qkv_proj",
            "input": "backbone.layers.1.mixer.qkv_proj",
        },
    }
    assert by_name["backbone.layers.5.mixer.gate.e_score_correction_bias"] == {
        "role": "router.bias",
        "layer": 5,
        "expert": None,
        "shape": [8],
        "source_dtype": "F32",
        "format": "source",
        "scale_method": None,
        "activation_format": None,
        "reason": "rule 5: roles *",
        "scale_group": {"weight": None, "input": None},
    }


def test_golden_figures_through_the_command_line() -> None:
    found = data("plan", SUPER, "--fmt", "fp8")
    assert (found["tensors_in"], found["bytes_in"]) == (42_683, 247_222_108_160)
    assert found["kv_cache_bytes_per_token"] == {"source": 8192, "planned": 4096}
    assert found["ssm_state_bytes_per_sequence"]["source"] == 167_772_160
    assert found["source_dtypes"] == "assumed"
    assert len(found["rows"]) == 42_683


def test_fmt_is_the_preset_of_that_name(source: Path) -> None:
    for name in ("fp8", "nvfp4"):
        assert data("plan", source, "--fmt", name) == data("plan", source, "--recipe", name)


def test_without_scale_groups(source: Path) -> None:
    grouped, apart = (data("plan", source, "--fmt", "nvfp4", *flag) for flag in ([], ["--no-scale-groups"]))
    assert grouped["sha256"] != apart["sha256"]
    assert all(row["scale_group"] == {"weight": None, "input": None} for row in apart["rows"])
    assert {row["scale_group"]["input"] for row in grouped["rows"]} > {"backbone.layers.1.mixer.qkv_proj"}
    assert {k: v for k, v in grouped.items() if k not in ("sha256", "rows")} == {
        k: v for k, v in apart.items() if k not in ("sha256", "rows")
    }


def test_a_recipe_file(source: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(f"name: mine\nsummary: s\nrules:\n- roles: [lm_head]\n  format: fp8\n{REST}\n")
    found = data("plan", source, "--recipe", file)
    assert found["recipe"] == "mine"
    assert found["formats"] == {"source": found["tensors_in"] - 1, "fp8": 1}
    assert found["bits_per_quantized_weight"] == 8 * (96 * 64 + 8) / (96 * 64)


def test_plan_for_people() -> None:
    result = command("plan", NANO, "--fmt", "nvfp4")
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert (
        lines[0]
        == "nvfp4: Routed experts NVFP4; Mamba projections, shared experts and attention FP8; KV cache FP8; "
        "all else as the source."
    )
    assert (
        "experts.up_proj nvfp4 (gptq) nvfp4 2,944 8,261,688,320" in lines
    )  # 2,944 x (1856 x 2688 x 9/16 + 8)
    assert "shared_experts.down_proj fp8 (gptq) fp8 23 229,490,872" in lines  # 23 x (2688 x 3712 + 8)
    assert "embedding source - 1 704,643,072" in lines
    assert "tensors 6,243 in, 24,151 out" in lines
    assert "bytes 63,155,886,464 in, 19,440,022,864 out (19.44 GB, 3.25 times smaller)" in lines
    assert "bits per weight 4.925" in lines
    assert "KV cache per token 6,144 B as the source, 3,072 B planned" in lines
    needed = "codes that are solved for, folds (latent, norm), activation scales (headroom 2)"
    assert f"calibration needed for {needed}" in lines
    assert (
        lines[-1]
        == "dtypes of the source are assumed from the config: bf16, the router's correction bias fp32"
    )


def test_plan_writes_nothing(source: Path) -> None:
    before = sorted((p, p.stat().st_mtime_ns) for p in source.parent.rglob("*"))
    data("plan", source, "--fmt", "fp8")
    invoke("plan", source, "--recipe", "nope")
    assert sorted((p, p.stat().st_mtime_ns) for p in source.parent.rglob("*")) == before


# --- plan --estimate


def test_plan_measures_this_machine(source: Path) -> None:
    result = command("plan", source, "--fmt", "nvfp4", "--estimate", "--memory", "4G", "--threads", 1)
    line = next(line for line in result.stdout.splitlines() if line.startswith("on this machine"))
    assert "calibrate" in line
    assert "of memory, " in line
    assert "rows at once: 32 (attention), 32 (mamba), 32 (mlp), 32 (moe)" in line
    assert len(list(source.parent.iterdir())) == 1, "nothing is left of the measurement"
    found = json.loads(command("plan", source, "--fmt", "fp8", "--estimate", "--json").stdout)["estimate"]
    assert all(found["speeds"][name] > 0 for name in ("read", "write", "sync", "hash", "product", "expert"))
    assert found["seconds"] == pytest.approx(
        found["calibrate"] + found["solve"] + found["pack"] + found["verify"]
    )
    assert found["solve"] > 0


def test_an_estimate_needs_weights(source: Path) -> None:
    result = command("plan", source / "config.json", "--fmt", "fp8", "--estimate", code=2)
    assert "an estimate needs the folder with the weights" in result.stderr


# --- inspect


def test_inspect_as_json() -> None:
    found = data("inspect", SUPER)
    assert list(found) == [
        "source",
        "layers",
        "parameters",
        "parameters_without_mtp",
        "active_parameters",
        "tensors",
        "bytes",
        "dtypes",
        "beside",
        "quantization",
        "warnings",
        "weights",
        "kv_cache",
        "ssm_state_bytes_per_sequence",
    ]
    assert (found["tensors"], found["bytes"]) == (42_683, 247_222_108_160)
    assert (
        data("inspect", SUPER, "--context", "1048576")["kv_cache"]["bytes_at_context"] == 8 << 30
    )  # 8 GiB, as published


def test_inspect_for_people(source: Path) -> None:
    result = command("inspect", SUPER)
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert "layers 88: 40 mamba, 40 moe, 8 attention; MTP modules 1" in lines
    assert "parameters 123,611,033,088 (120,668,707,840 without MTP)" in lines
    assert "KV cache 8,192 B a token, 2.15 GB at 262,144 tokens" in lines
    assert "SSM state 167.77 MB a sequence" in lines
    assert "quantization none" in lines
    assert "pattern M*E-ME" in [
        " ".join(line.split()) for line in invoke("inspect", source).stdout.splitlines()
    ]


# --- recipes


def test_recipes_list() -> None:
    listed = data("recipes", "list")
    assert {r["name"]: r["kv_cache"] for r in listed} == {
        "fp8": "fp8",
        "fp8-published": "fp8",
        "lightning-published": "fp8",
        "mxfp8": "source",
        "nano-fp8-published": "fp8",
        "nano-nvfp4-published": "fp8",
        "nvfp4": "fp8",
        "nvfp4-full": "fp8",
        "nvfp4-full-w4a16": "source",
        "nvfp4-w4a16": "source",
        "super-nvfp4-published": "fp8",
    }
    text = invoke("recipes", "list").stdout
    assert all(r["name"] in text and r["summary"] in text for r in listed)


def test_recipes_show_prints_a_recipe_that_plans(source: Path, tmp_path: Path) -> None:
    shown = command("recipes", "show", "nvfp4")
    assert shown.stdout == (CALIB / "recipes/nvfp4.yaml").read_text()
    (tmp_path / "my.yaml").write_text(shown.stdout)
    assert data("plan", source, "--recipe", tmp_path / "my.yaml") == data("plan", source, "--fmt", "nvfp4")
    assert data("recipes", "show", tmp_path / "my.yaml") == data("recipes", "show", "nvfp4")
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(data("recipes", "show", "nvfp4")))
    assert data("plan", source, "--recipe", tmp_path / "my.yaml") == data("plan", source, "--fmt", "nvfp4")


def test_recipes_show_resolved_has_what_a_recipe_extends(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text("name: my  # and no more\nextends: nvfp4\nkv_cache: source\n")
    assert command("recipes", "show", tmp_path / "my.yaml").stdout == (tmp_path / "my.yaml").read_text()
    whole = yaml.safe_load(command("recipes", "show", tmp_path / "my.yaml", "--resolved").stdout)
    expected = {key: value for key, value in data("recipes", "show", "nvfp4").items() if key != "kv_cache"}
    assert whole == expected | {"name": "my", "summary": "nvfp4 with changes."}
    assert data("recipes", "show", tmp_path / "my.yaml") == whole


def test_recipes_schema_is_the_file_in_docs() -> None:
    assert json.loads(command("recipes", "schema").stdout) == json.loads(
        (CALIB.parent / "docs/recipe.schema.json").read_text()
    ), "run nemoquant recipes schema > docs/recipe.schema.json"


# --- wrong input: one line, exit code 2


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["plan", "/no/such", "--fmt", "fp8"],
            "/no/such does not exist; expected a Nemotron-H checkpoint folder or its config.json",
        ),
        (
            ["inspect", "/no/such"],
            "/no/such does not exist; expected a Nemotron-H checkpoint folder or its config.json",
        ),
        (["plan", CONFIGS, "--fmt", "fp8"], f"{CONFIGS}/config.json does not exist; expected"),
        (["plan", NANO], "got neither of --fmt and --recipe; expected one, such as --fmt fp8"),
        (
            ["plan", NANO, "--fmt", "fp8", "--recipe", "fp8"],
            "got both of --fmt and --recipe; expected one, such as --fmt fp8",
        ),
        (
            ["plan", NANO, "--recipe", "fp9"],
            "recipe 'fp9' is neither a file nor a preset; presets are fp8-published, fp8,",
        ),
        (["plan", NANO, "--recipe", ""], "recipe '' is neither a file nor a preset"),
        (["recipes", "show", "fp9"], "recipe 'fp9' is neither a file nor a preset; presets are"),
        (
            ["plan", NANO, "--recipe", "super-nvfp4-published"],
            "recipe super-nvfp4-published: rule 3: layers 76 have no tensor of",
        ),
        (["plan", __file__, "--fmt", "fp8"], f"{__file__} cannot be read as JSON ("),
        (["inspect", __file__], f"{__file__} cannot be read as JSON ("),
        (["plan", NANO, "--recipe", NANO], f"recipe {NANO}: `name`: Field required"),
    ],
)
def test_wrong_input(args: list[str | Path], message: str) -> None:
    assert refusal(*args).startswith(message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{'model_type': 1}", "cannot be read as JSON (Expecting property name"),
        ("[1]", "holds a JSON list, expected an object with `model_type: nemotron_h`"),
        ('{"model_type": "llama"}', "`model_type` is 'llama', expected 'nemotron_h'"),
        (
            '{"model_type": "nemotron_h", "hybrid_override_pattern": "MX"}',
            "has the unknown layer letter 'X' at layer 1",
        ),
    ],
)
@pytest.mark.parametrize("verb", [["plan", "--fmt", "fp8"], ["inspect"]], ids=["plan", "inspect"])
def test_a_wrong_config(tmp_path: Path, verb: list[str], text: str, message: str) -> None:
    (tmp_path / "config.json").write_text(text)
    assert message in refusal(*verb, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (
            "- roles: ['*']\n  format: int4",
            "rule 1, `format`: Input should be 'source', 'bf16', 'fp8', 'mxfp8' or 'nvfp4', got 'int4'",
        ),
        (
            f"- roles: [router]\n  format: fp8\n{REST}",
            "(role router) can't be given the format fp8: a rounded router sends tokens",
        ),
        (
            f"- names: [nothing]\n  format: fp8\n{REST}",
            "the name pattern 'nothing' matches none of the 6,243 tensors",
        ),
        ("- roles: [norm", "cannot be read as YAML"),
    ],
)
def test_a_wrong_recipe(tmp_path: Path, rule: str, message: str) -> None:
    (tmp_path / "mine.yaml").write_text(f"name: mine\nsummary: s\nrules:\n{rule}\n")
    assert message in refusal("plan", NANO, "--recipe", tmp_path / "mine.yaml")


def test_an_incomplete_checkpoint(source: Path) -> None:
    (source / "model-00002-of-00002.safetensors").unlink()
    for verb in (["plan", "--fmt", "fp8"], ["inspect"]):
        assert (
            "model-00002-of-00002.safetensors does not exist, but model.safetensors.index.json names it"
            in refusal(*verb, source)
        )


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["plan", NANO, "--fmt", "fp4"],
            "Invalid value for '--fmt': 'fp4' is not one of 'fp8', 'mxfp8', 'nvfp4'.",
        ),
        (["plan", "--fmt", "fp8"], "Missing argument 'MODEL'."),
        (["inspect", NANO, "--context", "0"], "Invalid value for '--context'"),
        (["plon", NANO], "No such command 'plon'. Did you mean 'plan'?"),
        (["frobnicate"], "No such command 'frobnicate'. Commands are inspect, plan, quantize, verify,"),
        (["plan", NANO, "--format", "fp8"], "No such option"),
    ],
)
def test_wrong_usage(args: list[str], message: str) -> None:
    result = command(*args, code=2)
    assert result.stdout == ""
    assert message in result.stderr.splitlines()[-1]


# --- what it loads

HEAVY = ("torch", "numpy", "numba", "rich", "pydantic", "safetensors", "onnx", "tokenizers", "yaml", "jinja2")


def run(code: str, *args: str) -> str:
    return run_python(code, *args).stdout


def test_importing_the_command_line_loads_nothing_heavy() -> None:
    assert (
        run(f"import sys, nemoquant, nemoquant.cli; print([m for m in {HEAVY} if m in sys.modules])")
        == "[]\n"
    )


def test_planning_loads_no_torch() -> None:
    code = (
        "import sys; from nemoquant.cli import main; main(sys.argv[1:], standalone_mode=False); "
        "print([m for m in ('torch', 'numba', 'safetensors', 'onnx') if m in sys.modules])"
    )
    assert run(code, "plan", NANO, "--fmt", "fp8").endswith("\n[]\n")
    assert run(code, "inspect", NANO).endswith("\n[]\n")


@pytest.mark.parametrize(
    "args",
    [["--help"], ["-h"], ["--version"], ["plan", "--help"], ["recipes", "--help"], ["quantize", "--help"]],
)
def test_help_works_without_the_heavy_packages(args: list[str]) -> None:
    code = f"""
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {HEAVY}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Missing())
from nemoquant.cli import main
main(sys.argv[1:], prog_name="nemoquant")
"""
    text = run(code, *args)
    if args == ["--version"]:
        assert text == f"nemoquant {nemoquant.__version__}\n"
    else:
        assert text.startswith(f"Usage: nemoquant {args[0] + ' ' if args[0][0] != '-' else ''}[OPTIONS]")
        assert "Examples:" in text
    if args == ["--help"]:
        assert all(f"\n  {verb} " in text for verb in ("inspect", "plan", "quantize", "verify", "recipes"))


def test_the_api_is_found_in_any_order_of_imports(source: Path) -> None:
    code = """
import sys
from pathlib import Path
for name in sys.argv[2].split():
    exec(f"import {name}")
import nemoquant
first = nemoquant.plan(Path(sys.argv[1]), "fp8")
from nemoquant import plan
assert plan(Path(sys.argv[1]), "fp8") == nemoquant.plan(Path(sys.argv[1]), "fp8") == first
assert nemoquant.plan(Path(sys.argv[1]), "fp8", scale_groups=False) != first
import nemoquant.planning.recipe as recipe
assert recipe.presets()
print(nemoquant.inspect(Path(sys.argv[1]))["layers"]["total"])
"""
    for order in ("nemoquant", "nemoquant.planning.resolve", "nemoquant.api nemoquant.planning.recipe"):
        assert run(code, str(source), order) == "6\n"


def test_names_that_the_api_lacks() -> None:
    with pytest.raises(AttributeError, match="module 'nemoquant' has no attribute 'quantise'"):
        nemoquant.quantise  # noqa: B018


def test_a_format_that_no_tensor_gets_is_said(make_checkpoint: Callable[..., Path]) -> None:
    """`nvfp4` gives NVFP4 to experts and MLPs only: a model without both gets none.

    The option's name does not show that, so the command must say it.
    """
    dense = make_checkpoint("dense", hybrid_override_pattern="MM*", num_nextn_predict_layers=0)
    result = command("plan", dense, "--fmt", "nvfp4")
    assert "warning: no tensor of this model got the format nvfp4" in result.stderr
