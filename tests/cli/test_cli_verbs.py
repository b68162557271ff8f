"""The command line: help, dry runs, JSON, progress, exit codes, and which modules it loads."""

import json
import re
import sys
from pathlib import Path

import pytest
from support.commands import error_line, nemoquant
from support.places import NANO, SUPER
from support.processes import run_python

from nemoquant._version import __version__
from nemoquant.bars import progress_bars
from nemoquant.cli import VERBS


@pytest.fixture
def quantize(source, token_rows, tmp_path):
    """Runs the verb on the base checkpoint, with OUT = tmp_path/out."""
    return lambda *more, code=0: nemoquant(
        "quantize", source, tmp_path / "out", "--calib", token_rows, "--threads", 1, *more, code=code
    )


@pytest.mark.parametrize(
    "verb", [(), *((v,) for v in VERBS), ("recipes", "list"), ("recipes", "show")], ids=" ".join
)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help(verb, flag):
    text = nemoquant(*verb, flag).stdout
    assert text.startswith(f"Usage: main {' '.join(verb)}".rstrip())
    if len(verb) < 2:
        assert "Examples:" in text
        examples = [line.strip() for line in text.splitlines() if line.startswith("    nemoquant ")]
        assert len(examples) >= 2
        assert all(example.split()[1] == (verb[0] if verb else example.split()[1]) for example in examples)


def test_the_help_of_the_group_names_every_verb_and_exit_code():
    text = nemoquant("--help").stdout
    assert all(f"  {verb} " in text and summary in text for verb, summary in VERBS.items())
    codes = (
        "0 ok, 1 a check failed, 2 usage or bad input, 3 a missing extra, 70 an error of nemoquant's own, "
        "130 interrupted"
    )
    assert f"Exit codes: {codes}" in " ".join(text.split())


def test_version():
    assert nemoquant("--version").stdout == f"nemoquant {__version__}\n"


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("quantise", "Did you mean 'quantize'?"),
        ("verfy", "Did you mean 'verify'?"),
        ("xyz", f"Commands are {', '.join(VERBS)}."),
    ],
)
def test_unknown_commands_get_a_suggestion(word, hint):
    assert f"No such command '{word}'. {hint}" in nemoquant(word, code=2).stderr


@pytest.mark.parametrize(
    "arguments",
    [["quantize"], ["quantize", "a", "b", "--fmt", "int4"], ["verify"], ["plan", "a", "--nonsense"]],
)
def test_usage_errors(arguments):
    result = nemoquant(*arguments, code=2)
    assert "Usage: " in result.stderr
    assert result.stdout == ""


# Quantize.


def test_output_for_people(quantize, tmp_path):
    result = quantize("--fmt", "nvfp4")
    calibrated, solved, folds, made, *serving = result.stdout.splitlines()
    assert calibrated.startswith("calibrated on 8 rows of 32 tokens (rows.npy, ")
    assert "; 16 of 16 experts reached, the least used got " in calibrated
    says = (
        r"Weights solved for with the inputs of calibration: 46 gptq; their error in outputs is \d+% of .*\."
    )
    assert re.fullmatch(says, solved)
    assert folds.startswith("Folds that keep the function, looked for: latent (a matrix between fc1 and ")
    assert re.search(r"; norm \(.*\); \d+ tensors were changed\.$", folds)
    assert made.startswith(f"{tmp_path / 'out'}: nvfp4, ")
    assert re.search(
        r"bits a weight, verified, [\d.]+ s \(expected [\d.]+ s\), .*B of memory at most \(expected .*B\)$",
        made,
    )
    assert [line.split()[0] for line in serving if line.endswith(":")] == ["vLLM", "SGLang", "TensorRT-LLM"]


def test_json_is_alone_on_stdout(quantize, tmp_path, source):
    (source / "notes.txt").write_text("mine")
    result = quantize("--fmt", "nvfp4", "--json")
    assert result.stderr == ""
    report = json.loads(result.stdout)
    plan = json.loads(nemoquant("plan", source, "--fmt", "nvfp4", "--json").stdout)
    figures = {k: v for k, v in plan.items() if k not in ("rows", "roles", "engines", "cautions", "serving")}
    assert {k: report[k] for k in figures} == figures
    assert report["out"] == str(tmp_path / "out")
    assert report["dry_run"] is False
    assert report["seconds"] > 0
    assert report["expected"]["seconds"] > 0
    assert report["expected"]["solve"] > 0
    assert report["expected"]["speeds"]["encode"] == {}, "nothing is left to encode"
    assert 1e8 < report["peak_memory"] < 1e10
    assert report["warnings"] == []
    assert report["skipped_side_files"] == ["notes.txt"]
    assert (
        report["verified"]["tensors"]
        == report["tensors_out"]
        == len(plan["rows"]) + report["tensors_out"] - report["tensors_in"]
    )


def test_the_old_name_of_on(quantize):
    result = quantize("--fmt", "fp8", "--engine", "local", "--dry-run")
    assert result.stderr.startswith("note: --engine is now --on\n")
    assert "note" not in quantize("--fmt", "fp8", "--on", "local", "--dry-run").stderr
    assert "--engine" not in nemoquant("quantize", "--help").stdout
    refused = quantize("--fmt", "fp8", "--engine", "ray", "--on", "local", code=2)
    assert error_line(refused.stderr) == (
        "error: got --on local and --engine ray, its old name; expected --on alone"
    )
    both = quantize("--fmt", "fp8", "--on", "local", "--engine", "local", "--dry-run")
    assert both.stderr.count("note: ") == 1


def test_what_is_left_behind_is_told(quantize, source):
    (source / "notes.txt").write_text("mine")
    assert (
        "not copied: notes.txt (not part of a checkpoint)\n"
        in quantize("--fmt", "fp8", "--method", "max").stderr
    )


def test_files_that_serving_commands_name_are_told(quantize, source):
    (source / "super_v3_reasoning_parser.py").write_text("")
    (source / "loader.py").write_text("")
    told = quantize("--fmt", "fp8", "--method", "max", "--dry-run").stderr
    assert "named" not in told, "nothing is copied by a dry run"
    told = quantize("--fmt", "fp8", "--method", "max").stderr
    name = "super_v3_reasoning_parser.py"
    assert f"published serving commands name {name}: --also {name} copies it\n" in told
    assert "name loader.py" not in told


def test_how_to_serve_it_is_the_last_thing_said(quantize, tmp_path):
    lines = quantize("--fmt", "fp8", "--method", "max", "--gpu", "h200").stdout.splitlines()
    assert f"  vllm serve {tmp_path / 'out'} --kv-cache-dtype fp8 " in "\n".join(lines)
    assert lines[-1].startswith(f"  trtllm-serve {tmp_path / 'out'} --config trtllm.yaml")
    assert sum(line.endswith("on H200 (native):") for line in lines) == 3


def test_warnings_go_to_stderr(make_checkpoint, token_rows, tmp_path):
    source = make_checkpoint(
        "zero", lambda tensors: tensors["backbone.layers.0.mixer.in_proj.weight"].zero_()
    )
    result = nemoquant("quantize", source, tmp_path / "out", "--fmt", "fp8", "--calib", token_rows)
    assert (
        "warning: 1 weights are zero or underflow; codes set to 0, scales to 1.0 where no group gives one: "
        "backbone.layers.0.mixer.in_proj\n" in result.stderr
    )
    assert "warning:" not in result.stdout


@pytest.mark.parametrize("more", [[], ["--json"]])
@pytest.mark.parametrize("method", [[], ["--method", "max"]])
@pytest.mark.parametrize("recipe", ["nvfp4", "nvfp4-w4a16"])
def test_dry_run_writes_nothing(recipe, method, more, quantize, tmp_path):
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    result = quantize("--recipe", recipe, "--dry-run", *method, *more)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before
    if more:
        report = json.loads(result.stdout)
        assert (report["dry_run"], report["verified"]) == (True, {})
        assert report["tensors_out"] > report["tensors_in"]
    else:
        assert result.stdout.startswith(f"dry run: {recipe}{'-max' if method else ''} fits ")
        assert "tensors would be written to" in result.stdout


def test_dry_run_checks_the_data_and_the_output(quantize, source, tmp_path):
    assert (
        "does not exist"
        in nemoquant(
            "quantize",
            source,
            tmp_path / "out",
            "--fmt",
            "fp8",
            "--calib",
            tmp_path / "no.npy",
            "--dry-run",
            code=2,
        ).stderr
    )
    (tmp_path / "out").mkdir()
    assert "exists; expected a new folder" in quantize("--fmt", "fp8", "--dry-run", code=2).stderr


def test_options_reach_the_manifest(quantize, tmp_path):
    options = ("--fmt", "fp8", "--method", "max", "--compute", "float32", "--row-batch", 2)
    quantize(*options, "--shard-size", 0.00003, "--no-scale-groups")
    manifest = json.loads((tmp_path / "out/nemoquant.json").read_text())
    settings = manifest["calibration"]
    assert (settings["dtype"], settings["row_batch"], settings["threads"], settings["device"]) == (
        "float32",
        2,
        1,
        "cpu",
    )
    assert (settings["rows"], settings["seq_len"], settings["data"]) == (8, 32, "rows.npy")
    assert manifest["shard_bytes"] == 30_000
    assert manifest["plan"]["scale_groups"] is False
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1


# Progress.


def test_plain_progress_when_not_a_terminal(quantize):
    result = quantize("--fmt", "fp8", "--method", "max")
    plan, expected, *stages = result.stderr.splitlines()
    assert re.match(
        r"expected: [\d.]+ s \(calibrate .* s, pack .* s, verify .* s\), .*B of memory, .*B of disk; rows "
        r"at once: ",
        expected,
    )
    assert plan.startswith("fp8-max: ")
    assert plan.endswith(" tensors quantized, activations calibrated")
    assert [line.split(":")[0] for line in stages] == ["calibrate", "pack", "verify"]
    assert all(line.split(": ")[1].startswith("done in ") and line.endswith(" s") for line in stages)
    assert "\x1b" not in result.output
    assert "\r" not in result.output


class Terminal:
    """A standard error that claims to be a terminal, and keeps the text."""

    encoding = "utf-8"

    def __init__(self):
        self.text = ""

    def isatty(self):
        return True

    def write(self, text):
        self.text += text
        return len(text)

    def flush(self):
        pass


@pytest.mark.parametrize("slow", [False, True], ids=["soon over", "over two seconds"])
def test_bars_on_a_terminal(slow, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("nemoquant.bars.SHOW_AFTER", -1.0 if slow else 60.0)
    with progress_bars(quiet=False) as report:
        for i in range(5):
            report("pack", i, 4, f"layer {i}")
    assert ("pack" in terminal.text) is slow
    assert ("100%" in terminal.text) is slow


# The other verbs: --json prints JSON and nothing else, plain text has the figures.


@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect", SUPER],
        ["plan", NANO, "--fmt", "nvfp4"],
        ["recipes", "list"],
        ["recipes", "show", "nvfp4"],
        ["recipes", "show", "super-nvfp4-published"],
    ],
    ids=lambda a: " ".join(str(x) for x in a if not isinstance(x, Path)),
)
def test_json_of_the_other_verbs(arguments):
    result = nemoquant(*arguments, "--json")
    assert result.stderr == ""
    assert json.loads(result.stdout)
    plain = nemoquant(*arguments)
    assert plain.stdout
    assert plain.stderr == ""
    assert "\x1b" not in plain.stdout


def test_golden_figures_of_super():
    text = nemoquant("inspect", SUPER, "--context", 1_048_576).stdout
    assert "42,683, 247,222,108,160 bytes" in text
    assert "8,192 B a token, 8.59 GB at 1,048,576 tokens" in text


def test_a_shown_recipe_is_a_recipe(source, tmp_path):
    shown = tmp_path / "mine.yaml"
    shown.write_text(nemoquant("recipes", "show", "nvfp4").stdout)
    mine, theirs = (
        json.loads(nemoquant("plan", source, "--recipe", r, "--json").stdout) for r in (shown, "nvfp4")
    )
    assert mine == theirs


def test_inspect_of_a_quantized_checkpoint(quantize, tmp_path):
    quantize("--fmt", "nvfp4", "--method", "max")
    found = json.loads(nemoquant("inspect", tmp_path / "out", "--json").stdout)
    assert found["quantization"] == "MIXED_PRECISION"
    assert {"BF16", "F32", "F8_E4M3", "U8"} == set(found["dtypes"])


# Which modules it loads.

LIGHT = """
import sys
import nemoquant, nemoquant.cli
from click.testing import CliRunner
assert CliRunner().invoke(nemoquant.cli.main, ["--help"]).exit_code == 0
heavy = "torch numpy numba pydantic safetensors jinja2 tokenizers rich yaml".split()
print([m for m in heavy if m in sys.modules])
"""


def test_importing_the_command_line_loads_nothing_heavy():
    assert run_python(LIGHT).stdout == "[]\n"


WITHOUT = """
import sys
from click.testing import CliRunner
from nemoquant.cli import main
made = CliRunner().invoke(main, sys.argv[1:])
assert made.exit_code == 0, made.output
print([m for m in HEAVY if m in sys.modules])
"""


def test_planning_and_inspecting_load_no_torch():
    for arguments in (["plan", NANO, "--fmt", "fp8"], ["inspect", NANO]):
        heavy = "HEAVY = ['torch', 'numba', 'tokenizers', 'jinja2']"
        assert run_python(heavy + WITHOUT, *arguments).stdout == "[]\n", arguments


def test_packing_without_calibration_and_verifying_load_no_torch(source, tmp_path):
    out = tmp_path / "out"
    verbs = (
        ["quantize", source, out, "--recipe", "nvfp4-w4a16", "--method", "mse"],
        ["verify", out, "--against", source],
        ["verify", out],
    )
    for arguments in verbs:
        assert run_python("HEAVY = ['torch']" + WITHOUT, *arguments).stdout == "[]\n", arguments


def test_exit_codes_of_a_real_process(tmp_path):
    """Through the entry point of the console script, not click's runner: code 2, one line, no traceback."""
    code = "from nemoquant.cli import main; main(prog_name='nemoquant')"
    done = run_python(code, "quantize", tmp_path / "nowhere", tmp_path / "out", "--fmt", "fp8", code=2)
    assert done.stdout == ""
    error_line(done.stderr)


# Conditions that would otherwise go unnoticed, or appear only after hours.


def test_a_changed_preset_should_not_pass_for_it(quantize, tmp_path):
    preset = nemoquant("recipes", "show", "nvfp4").stdout
    (tmp_path / "same.yaml").write_text(preset)
    (tmp_path / "mine.yaml").write_text(preset.replace("format: nvfp4", "format: fp8"))
    assert "warning" not in quantize("--recipe", tmp_path / "same.yaml", "--dry-run").stderr
    told = quantize("--recipe", tmp_path / "mine.yaml", "--dry-run").stderr
    assert (
        "mine.yaml calls itself nvfp4 but differs from that preset; give it a `name` and `summary` of its own"
        in told
    )


def test_options_without_effect_are_named(quantize):
    told = quantize("--fmt", "fp8", "--rows", 2, "--compute", "float32", "--dry-run").stderr
    assert "warning: not used: --rows (an array says its rows and length itself)\n" in told
    told = quantize("--recipe", "nvfp4-w4a16", "--method", "max", "--row-batch", 2, "--dry-run").stderr
    assert "warning: not used: --row-batch (this recipe needs no calibration)\n" in told


def test_text_as_people_have_it(source, tmp_path):
    """What was read, and what was left out, is told by both verbs; a column is named alike."""
    rows = [{"tokens": [5, 6, 7, 8], "attention_mask": [1, 1, 1, 0]}] * 3 + [{"other": 1}]
    text = tmp_path / "x.json"
    text.write_text(json.dumps(rows))
    sizes = ("--rows", 2, "--seq-len", 4, "--threads", 1)
    made = ("quantize", source, tmp_path / "out", "--fmt", "fp8", "--method", "max", "--calib", text, *sizes)
    done = nemoquant(*made, "--calib-column", "tokens")
    assert "calibrated on 2 rows of 4 tokens (x.json: tokens, " in done.stdout
    assert "calibration text is read from x.json: tokens\n" in done.stderr
    padding = "warning: x.json: 2 tokens that attention_mask masks (padding) were left out\n"
    assert padding in done.stderr and "array says its rows" not in done.stderr
    compared = ("diff", source, tmp_path / "out", "--data", text, "--rows", 9, *sizes[2:], "--no-card")
    done = nemoquant(*compared, "--data-column", "tokens")
    assert "1 of 4 documents can't be used and were left out; the first: x.json, document 4: " in done.stdout
    nemoquant("quantize", source, tmp_path / "new", "--fmt", "fp8", "--calib", text, *sizes, code=2)


def test_what_cannot_be_read_or_written_is_found_before_the_work(quantize, source, tmp_path, monkeypatch):
    (source / "tokenizer.json").write_text("{}")
    closed = {source / "tokenizer.json"}
    monkeypatch.setattr("os.access", lambda path, mode: path not in closed)
    error = quantize("--fmt", "fp8", code=2).stderr
    assert (
        error == f"error: {source}/tokenizer.json cannot be read (permission denied); it belongs to the "
        f"checkpoint: make it readable\n"
    )
    closed.clear()
    closed.add(tmp_path.resolve())
    assert (
        f"{tmp_path} is not writable; choose another output"
        in quantize("--fmt", "fp8", "--dry-run", code=2).stderr
    )
