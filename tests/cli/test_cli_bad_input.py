"""Each bad input that docs/design.md, "Bad input", lists.

Each has its exit code and one line on standard error, and leaves nothing on disk. OUT lies two folders deep
that do not exist: they must not be made either. Where a layer or a shard was finished, OUT.partial stays for
``--resume`` and the line says so; tests/run/test_run_resume.py continues from there.
"""

import json
import shutil
import sys
from collections import namedtuple

import numpy as np
import pytest
import torch
from support.commands import error_line, invoke, nemoquant
from support.files import edit_json, tree
from support.synthetic import replaced

from nemoquant.checkpoint.writer import ShardWriter

EXPERT = "backbone.layers.2.mixer.experts.3.up_proj.weight"
RECIPE = "name: mine\nsummary: s\nrules:\n{rules}\n- {{roles: ['*'], format: source}}\n"


@pytest.fixture
def refused(tmp_path, token_rows):
    """Runs ``nemoquant quantize SRC OUT ...`` and checks the refusal; ``parts`` must be in the message."""

    def check(source, *options, parts, code=2, out=None, fmt="nvfp4", calib=token_rows, kept=False):
        out = tmp_path / "new/deeper/out" if out is None else out
        options = [*(["--calib", calib] if calib else []), *(["--fmt", fmt] if fmt else []), *options]
        before = tree(tmp_path)
        result = nemoquant("quantize", source, out, *options, "--threads", 1, code=code)
        lines = [
            line
            for line in result.stderr.splitlines()
            if not line.startswith(("calibrate: done", "pack: done", "verify: done", "expected: "))
            and " tensors quantized, " not in line
        ]
        line = error_line("\n".join(lines), parts)
        assert result.stdout == ""
        assert ("out.partial is kept (" in line) is kept, line
        after = tree(tmp_path)
        if kept:
            assert "new/deeper/out.partial/nemoquant_resume/state.json" in after
            after = {name: data for name, data in after.items() if not name.startswith("new")}
        assert after == before
        return line

    return check


# The checkpoint.


@pytest.mark.parametrize(
    ("edit", "parts"),
    [
        (lambda t: t.pop(EXPERT), ["1 missing", EXPERT, "config.json calls for"]),
        (lambda t: t.update(stranger=torch.zeros(2)), ["1 extra", "stranger", "config.json calls for"]),
        (replaced(EXPERT, lambda w: w[:, :-1]), ["1 misshapen", f"{EXPERT} is [48, 31], expected [48, 32]"]),
        (
            lambda t: [t.pop(n) for n in list(t) if ".experts." in n and n.startswith("mtp.")] and None,
            ["16 missing: mtp.layers.1.mixer.experts.0.up_proj.weight", "and 11 more"],
        ),
        (
            replaced(EXPERT, lambda w: w.to(torch.float8_e4m3fn)),
            [f"{EXPERT} F8_E4M3", "not read as weights", "expected BF16, F16, F32"],
        ),
    ],
    ids=["missing", "extra", "wrong shape", "many missing", "not floating"],
)
def test_tensors_that_do_not_fit_the_config(edit, parts, make_checkpoint, refused):
    source = make_checkpoint("bad", edit)
    assert str(source) in refused(source, parts=parts)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(
    "name",
    [
        EXPERT,
        "backbone.layers.0.mixer.in_proj.weight",
        "lm_head.weight",
        "backbone.layers.0.mixer.A_log",
        "mtp.layers.0.norm.weight",
    ],
)
@pytest.mark.parametrize(
    "recipe", [["nvfp4"], ["nvfp4-w4a16", "--method", "max"]], ids=["calibrated", "not calibrated"]
)
def test_nan_and_inf_in_weights(recipe, name, value, make_checkpoint, refused):
    source = make_checkpoint("bad", lambda tensors: tensors[name].view(-1)[-1:].fill_(value))
    parts = [f"{name} has ", "expected finite weights", "download or convert it again"]
    line = refused(source, "--recipe", *recipe, fmt=None, parts=parts)
    assert "NaN" in line if np.isnan(value) else "Inf" in line


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"model_type": "llama"}, ["`model_type` is 'llama', expected 'nemotron_h'"]),
        (
            {"hybrid_override_pattern": "M*XE"},
            ["`hybrid_override_pattern`", "unknown layer letter 'X' at layer 2", "expected M (Mamba-2)"],
        ),
        ({"num_hidden_layers": 7}, ["`num_hidden_layers` is 7", "has 6 layers"]),
        (
            {"quantization_config": {"quant_algo": "FP8"}},
            ["is already quantized", "quantization_config", "expected the bf16 checkpoint"],
        ),
        ({"hidden_size": "wide"}, ["`hidden_size` is 'wide'; expected an integer"]),
    ],
    ids=["model_type", "letter", "count", "quantized", "no number"],
)
def test_configs_that_cannot_be_used(changes, parts, source, refused):
    edit_json(source / "config.json", lambda data: data.update(changes))
    refused(source, parts=parts)


def test_a_source_that_is_already_quantized(source, quantized_by_command, refused):
    refused(
        quantized_by_command,
        parts=["out is already quantized", "expected the bf16 checkpoint that it was made from"],
    )
    (source / "hf_quant_config.json").write_text("{}")
    refused(source, parts=["source is already quantized", "it has hf_quant_config.json"])


@pytest.fixture
def quantized_by_command(source, tmp_path):
    nemoquant("quantize", source, tmp_path / "out", "--recipe", "nvfp4-w4a16", "--method", "max")
    return tmp_path / "out"


@pytest.mark.parametrize(
    "what", ["nowhere", "a file", "no config", "no weights", "a bare config", "half a shard", "no JSON"]
)
def test_sources_that_are_none(what, source, tmp_path, refused):
    if what == "nowhere":
        refused(
            tmp_path / "nowhere", parts=["nowhere does not exist", "expected a Nemotron-H checkpoint folder"]
        )
    elif what == "a file":
        refused(source / "model-00001-of-00002.safetensors", parts=["cannot be read as JSON"])
    elif what == "no config":
        (source / "config.json").unlink()
        refused(source, parts=["config.json does not exist"])
    elif what == "no weights":
        for file in source.glob("model*"):
            file.unlink()
        refused(source, parts=["has neither model.safetensors.index.json nor model.safetensors"])
    elif what == "a bare config":
        refused(
            source / "config.json", parts=["is a config.json; quantize needs the folder with the weights"]
        )
    elif what == "half a shard":
        file = source / "model-00002-of-00002.safetensors"
        file.write_bytes(file.read_bytes()[:5000])
        refused(source, parts=["model-00002-of-00002.safetensors", "does not fit the file's 5,000 bytes"])
    else:
        (source / "config.json").write_text("{")
        refused(source, parts=["config.json cannot be read as JSON"])


# The recipe.


@pytest.mark.parametrize(
    ("rules", "parts"),
    [
        (
            "- {roles: [experts.*], format: nvfp4, speed: fast}",
            ["mine.yaml", "unknown key `speed` in rule 1"],
        ),
        (
            "- {roles: [experts.*], format: int4}",
            ["rule 1, `format`", "'source', 'bf16', 'fp8', 'mxfp8' or 'nvfp4'", "got 'int4'"],
        ),
        (
            "- {names: ['backbone.layers.9.*'], format: fp8}",
            ["rule 1", "name pattern 'backbone.layers.9.*' matches none of the"],
        ),
        ("- {roles: [expert.*], format: fp8}", ["no role matches expert.*", "roles are"]),
        (
            "- {roles: [experts.*], layers: [0], format: fp8}",
            ["rule 1", "layers 0 have no tensor of the roles experts.*"],
        ),
        (
            "- {roles: [ssm.A_log], format: fp8}",
            ["backbone.layers.0.mixer.A_log", "can't be given the format fp8", "recurrence"],
        ),
        (
            "- {roles: [router], format: fp8}",
            ["backbone.layers.2.mixer.gate.weight", "can't be given the format fp8", "rounded router"],
        ),
        (
            "- {roles: [experts.*], format: mxfp8, activations: none}",
            ["`activations: none` does not go with `format: mxfp8`"],
        ),
    ],
    ids=["key", "format", "pattern", "role", "layer", "ssm", "router", "activations"],
)
def test_recipes_that_do_not_fit(rules, parts, source, tmp_path, refused):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(RECIPE.format(rules=rules))
    refused(source, "--recipe", recipe, fmt=None, parts=parts)


def test_a_recipe_that_is_none(source, tmp_path, refused):
    refused(
        source,
        "--recipe",
        "fp9",
        fmt=None,
        parts=["recipe 'fp9' is neither a file nor a preset", "presets are"],
    )
    (tmp_path / "x.yaml").write_text("rules: [")
    refused(source, "--recipe", tmp_path / "x.yaml", fmt=None, parts=["x.yaml cannot be read as YAML"])


def test_no_rule_covers_a_tensor(source, tmp_path, refused):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("name: mine\nsummary: s\nrules:\n- {roles: [experts.*], format: fp8}\n")
    refused(
        source,
        "--recipe",
        recipe,
        fmt=None,
        parts=["no rule covers", "backbone.embeddings.weight", "end the rules with"],
    )


def test_an_indivisible_dimension(make_checkpoint, refused):
    source = make_checkpoint("narrow", moe_intermediate_size=40)
    refused(
        source,
        parts=[
            "tensors don't fit their format",
            "experts.0.down_proj.weight: input dimension 40",
            "block of 16",
            "give them fp8",
        ],
    )


@pytest.mark.parametrize("given", [[], ["--fmt", "fp8", "--recipe", "fp8"]])
def test_one_of_fmt_and_recipe(given, source, refused):
    refused(
        source,
        *given,
        fmt=None,
        parts=["got neither" if not given else "got both", "--fmt and --recipe", "expected one"],
    )


# The output.


@pytest.mark.parametrize("kind", ["folder", "empty folder", "file", "dangling link"])
def test_an_output_that_exists(kind, source, tmp_path, refused):
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("mine")
    elif kind == "dangling link":
        out.symlink_to(tmp_path / "nowhere")
    else:
        out.mkdir()
        if kind == "folder":
            (out / "mine").write_text("mine")
    refused(source, out=out, parts=["out exists; expected a new folder, nothing is overwritten"])


@pytest.mark.parametrize("where", ["SRC", "SRC/out", "SRC/../source", "SRC/deep/er/out", ".", "link/out"])
def test_an_output_that_overlaps_the_source(where, source, tmp_path, refused):
    (tmp_path / "link").symlink_to(source)
    out = {"link/out": tmp_path / "link/out", ".": tmp_path}.get(where, where.replace("SRC", str(source)))
    refused(source, out=out, parts=["overlaps the source", "expected a folder outside it"])


def test_an_output_whose_partial_folder_is_the_source(source, tmp_path, refused):
    source = source.rename(tmp_path / "out.partial")
    refused(source, out=tmp_path / "out", parts=["overlaps the source"])


@pytest.mark.parametrize("out", ["/", "/proc/out"])
def test_outputs_that_cannot_be(out, source, refused):
    refused(source, out=out, parts=[out])


def test_a_partial_folder_is_left_untouched(source, tmp_path, refused):
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "mine").write_text("mine")
    refused(
        source,
        out=tmp_path / "out",
        parts=["out.partial exists, left by a run that did not end; remove it, or"],
    )
    assert (partial / "mine").read_text() == "mine"


def test_a_parent_that_is_a_file(source, tmp_path, refused):
    (tmp_path / "file").write_text("mine")
    refused(source, out=tmp_path / "file/out", parts=["file is not a folder"])


def test_too_little_disk(source, refused, monkeypatch):
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: namedtuple("Usage", "total used free")(10**9, 10**9, 1_000_000)
    )
    refused(source, parts=["0.07 GB needed, 0.00 GB free on its disk; make room or choose another disk"])


# Calibration.

CHAT = json.dumps({"messages": [{"role": "user", "content": "a"}]})


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("x.txt", "", ["x.txt holds no text", "expected at least one row of 512 tokens"]),
        (
            "x.jsonl",
            '{"input_ids": [5, 6]}\n',
            ["x.jsonl holds 3 tokens, less than one row of 512", "give more text or a smaller --seq-len"],
        ),
        ("x.doc", "a", ["unknown kind '.doc'; expected .txt, .jsonl, .ndjson, .json, .csv, .tsv"]),
        ("x.pt", "a", ["unknown kind '.pt', it is a pickle, which can run code and is not opened"]),
        (
            "x.jsonl",
            '{"input_ids": [5]}\nhello\n',
            ["x.jsonl, line 2: not JSON", "expected one JSON object a line"],
        ),
        ("x.jsonl", json.dumps({"input_ids": [5, 96] * 300}), ["token ids from 5 to 96, expected 0 to 95"]),
        ("x.txt", "some text", ["tokenizer.json does not exist; text needs the model's tokenizer"]),
        ("x.jsonl", CHAT, ["source has no chat template; `messages` need chat_template.jinja"]),
        ("missing.txt", None, ["missing.txt does not exist"]),
    ],
    ids=["empty", "short", "suffix", "pickle", "JSON", "ids", "no tokenizer", "no template", "missing"],
)
def test_calibration_data(name, content, parts, source, tmp_path, refused):
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    if "holds no text" in parts[0]:
        from tokenizers import Tokenizer, models

        Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>")).save(str(source / "tokenizer.json"))
    refused(source, calib=path, parts=parts)


def test_parquet_without_its_extra(source, tmp_path, refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "x.parquet").write_bytes(b"")
    refused(
        source,
        calib=tmp_path / "x.parquet",
        code=3,
        parts=["x.parquet needs the extra `parquet`: pip install 'nemoquant[parquet]'"],
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="tells of a machine without a GPU")
def test_no_gpu(source, refused):
    refused(
        source,
        "--device",
        "cuda",
        parts=["device: got cuda, but torch finds no CUDA GPU here", "expected one, or take device cpu"],
    )


@pytest.fixture
def scales(source, token_rows, tmp_path):
    nemoquant(
        "quantize", source, tmp_path / "first", "--fmt", "fp8", "--method", "max", "--calib", token_rows
    )
    return tmp_path / "first/nemoquant_scales.json"


def test_scales_and_calib(source, scales, refused):
    refused(source, "--scales", scales, parts=["got both --scales and --calib; expected one"])


def test_scales_of_another_model(make_checkpoint, scales, refused):
    other = make_checkpoint("other", hybrid_override_pattern="*MEM")
    refused(
        other,
        "--scales",
        scales,
        "--method",
        "max",
        calib=None,
        parts=["has the maxima of", "modules that this model lacks", "is it of another model?"],
    )
    longer = make_checkpoint("longer", hybrid_override_pattern="M*E-MEM")
    refused(
        longer,
        "--scales",
        scales,
        "--method",
        "max",
        calib=None,
        parts=["lacks the maxima of 2 modules", "backbone.layers.6.mixer.in_proj"],
    )
    shorter = make_checkpoint("shorter", hybrid_override_pattern="M*E-M")
    refused(
        shorter,
        "--scales",
        scales,
        "--method",
        "max",
        calib=None,
        parts=["modules that this model lacks: backbone.layers.5.mixer."],
    )


def test_damaged_scales(source, scales, tmp_path, refused):
    for name, content in {
        "half.json": scales.read_text()[:500],
        "config.json": '{"model_type": "nemotron_h"}',
        "missing.json": None,
    }.items():
        path = tmp_path / name
        if content is not None:
            path.write_text(content)
        refused(
            source,
            "--scales",
            path,
            "--method",
            "max",
            calib=None,
            parts=[f"{name} is not a scales file", "nemoquant_scales.json of an earlier run"],
        )


def test_activations_that_overflow(make_checkpoint, refused):
    source = make_checkpoint(
        "huge", lambda tensors: tensors["backbone.layers.3.mixer.up_proj.weight"].mul_(1e25)
    )
    refused(
        source,
        parts=["layer 3 (mlp): NaN or Inf in", "of 8 rows", "more than 10%", "expected finite activations"],
        kept=True,
    )


# Errors in the middle of a run.


@pytest.mark.parametrize("fmt", ["nvfp4", "nvfp4-w4a16"])
@pytest.mark.parametrize("shards", [[], ["--shard-size", "0.00002"]], ids=["one shard", "several"])
def test_a_write_error(shards, fmt, source, refused, monkeypatch):
    """Finished work is kept: the calibration, or a shard. Without any, nothing is left."""
    written = 0
    write = ShardWriter.write

    def full(self, data, *then):
        nonlocal written
        written += data.nbytes
        if written > 60_000:
            raise OSError(28, "No space left on device")
        write(self, data, *then)

    monkeypatch.setattr(ShardWriter, "write", full)
    kept = fmt == "nvfp4" or bool(shards)
    parts = ["new/deeper/out", "No space left on device", "make room", "kept"]
    options = ("--recipe", fmt, "--method", "max", *shards)
    line = refused(source, *options, fmt=None, parts=parts, kept=kept)
    assert kept or line.endswith("nothing was kept")
    assert written > 60_000


@pytest.mark.parametrize(
    ("stage", "kept"),
    [
        ("embed", None),
        ("calibrate", "2 layers calibrated"),
        ("pack", "calibrated"),
        ("verify", "calibrated, 1 shards written"),
    ],
)
def test_an_interrupt(stage, kept, source, refused, monkeypatch):
    from nemoquant.calibrate import run
    from nemoquant.pack import verify

    calls = 0
    layer = run._Run.layer

    def interrupt(*arguments, **named):
        nonlocal calls
        calls += 1
        if stage == "calibrate" and calls < 3:
            return layer(*arguments, **named)
        raise KeyboardInterrupt

    place = {
        "embed": (run._Run, "embed"),
        "calibrate": (run._Run, "layer"),
        "pack": (ShardWriter, "write"),
        "verify": (verify, "_check_tensors"),
    }
    monkeypatch.setattr(*place[stage], interrupt)
    says = (
        f"out.partial is kept ({kept}): --resume goes on from there"
        if kept
        else "interrupted; nothing was kept"
    )
    parts = ["error: interrupted; ", says]
    refused(source, "--method", "max", code=130, parts=parts, kept=kept is not None)


def test_an_unforeseen_error_leaves_nothing_either(source, tmp_path, monkeypatch):
    monkeypatch.setattr(ShardWriter, "write", lambda *arguments: 1 / 0)
    before = tree(tmp_path)
    result = invoke("quantize", source, tmp_path / "a/b", "--recipe", "nvfp4-w4a16", "--method", "max")
    assert result.exit_code == 70 and "\nZeroDivisionError: " in result.stderr
    assert tree(tmp_path) == before


def test_an_unforeseen_error_says_what_is_kept(source, token_rows, tmp_path, monkeypatch):
    monkeypatch.setattr(ShardWriter, "write", lambda *arguments: 1 / 0)
    result = invoke(
        "quantize", source, tmp_path / "a/b", "--fmt", "fp8", "--method", "max", "--calib", token_rows
    )
    assert result.exit_code == 70 and "\nZeroDivisionError: " in result.stderr
    assert f"\n{tmp_path}/a/b.partial is kept (calibrated): --resume goes on from there\n" in result.stderr
    assert (tmp_path / "a/b.partial/nemoquant_scales.json").exists()


def test_parents_that_existed_stay(source, tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    monkeypatch.setattr(ShardWriter, "write", lambda *arguments: 1 / 0)
    invoke("quantize", source, tmp_path / "a/b/c", "--recipe", "nvfp4-w4a16", "--method", "max")
    assert (tmp_path / "a").is_dir()
    assert list((tmp_path / "a").iterdir()) == []
