"""Each bad input of a diff: exit code, one line on standard error, nothing changed and no file left."""

import json
import math
import re
import shutil
import socket
import sys

import numpy as np
import pytest
import torch
from support.commands import invoke, refusal
from support.files import edit_json, tree
from support.synthetic import replaced
from support.tampering import load_tensors, overwrite, sign

from nemoquant.api import diff
from nemoquant.checkpoint.manifest import FILE, read_manifest, write_manifest
from nemoquant.errors import UsageError

IN_PROJ, O_PROJ, K_PROJ = (
    f"backbone.layers.{i}.mixer.{name}" for i, name in ((0, "in_proj"), (1, "o_proj"), (1, "k_proj"))
)
EXPERT = "backbone.layers.2.mixer.experts.3.up_proj"


def run(*arguments):
    return invoke("diff", "--threads", 1, *arguments)


@pytest.fixture
def refused(tmp_path, token_rows):
    """Runs ``nemoquant diff SRC OUT... ...`` and checks the refusal; ``parts`` must be in the message."""

    def check(source, *arguments, parts, code=2, data=token_rows):
        arguments = [*arguments, *(["--data", data] if data else [])]
        before = tree(tmp_path)
        line = refusal("diff", "--threads", 1, source, *arguments, parts=parts, code=code)
        assert tree(tmp_path) == before
        return line

    return check


@pytest.fixture
def usage(tmp_path):
    """The same for what click itself refuses: the usage, and the reason in the last line."""

    def check(*arguments, parts):
        before = tree(tmp_path)
        result = run(*arguments)
        assert result.exit_code == 2, result.output
        assert result.stderr.startswith("Usage: ")
        last = result.stderr.splitlines()[-1]
        assert [part for part in parts if part not in last] == [], last
        assert result.stdout == ""
        assert tree(tmp_path) == before

    return check


# The rows.


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("x.txt", "", ["x.txt holds no text", "expected at least one row of 512 tokens"]),
        (
            "x.jsonl",
            '{"input_ids": [5, 6]}\n',
            ["x.jsonl holds 3 tokens, less than one row of 512", "smaller --seq-len"],
        ),
        ("x.doc", "a", ["unknown kind '.doc'; expected .txt, .jsonl, .ndjson, .json, .csv, .tsv"]),
        (
            "x.jsonl",
            '{"input_ids": [5]}\nhello\n',
            ["x.jsonl, line 2: not JSON", "expected one JSON object a line"],
        ),
        ("x.jsonl", json.dumps({"input_ids": [5, 96] * 300}), ["token ids from 5 to 96, expected 0 to 95"]),
        ("x.txt", "some text", ["tokenizer.json does not exist; text needs the model's tokenizer"]),
        ("missing.txt", None, ["missing.txt does not exist; expected .txt, .jsonl, .ndjson"]),
        ("x.npy", b"no array", ["x.npy cannot be read as a numpy array"]),
    ],
    ids=["empty", "short", "suffix", "JSON", "ids", "no tokenizer", "missing", "no array"],
)
def test_data(name, content, parts, source, tmp_path, refused):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    if "holds no text" in parts[0]:
        save_tokenizer(source, {"<unk>": 0})
    refused(source, source, data=path, parts=parts)


@pytest.mark.parametrize(
    ("array", "parts"),
    [
        (
            np.zeros((4, 1), np.int64),
            ["x.npy has rows of one token; expected at least 2, the first one predicts the second"],
        ),
        (np.zeros((0, 8), np.int64), ["x.npy holds int64 of shape [0, 8]; expected integers [rows, length]"]),
        (np.zeros((4, 8)), ["x.npy holds float64 of shape [4, 8]"]),
        (np.full((4, 8), 96), ["token ids from 96 to 96, expected 0 to 95"]),
    ],
    ids=["one token", "no rows", "floats", "ids"],
)
def test_arrays(array, parts, source, tmp_path, refused):
    np.save(tmp_path / "x.npy", array)
    refused(source, source, data=tmp_path / "x.npy", parts=parts)


def test_no_tokenizer_for_the_shipped_text(source, refused):
    refused(
        source,
        source,
        data=None,
        parts=["source/tokenizer.json does not exist; text needs the model's tokenizer"],
    )


def test_parquet_without_its_extra(source, tmp_path, refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "x.parquet").write_bytes(b"")
    refused(
        source, source, data=tmp_path / "x.parquet", code=3, parts=["x.parquet needs the extra `parquet`"]
    )


@pytest.mark.parametrize(
    ("option", "value", "least"),
    [("--rows", 0, 1), ("--rows", -1, 1), ("--seq-len", 0, 2), ("--seq-len", 1, 2), ("--threads", 0, 1)],
)
def test_counts(option, value, least, source, usage):
    bounds = f"{least}<=x<={1024 if option == '--threads' else 2**31 - 1}"
    usage(source, source, option, value, parts=[f"'{option}'", f"{value} is not in the range {bounds}"])
    name = option.strip("-").replace("-", "_")
    with pytest.raises(UsageError, match=f"^{name} is {value}; expected at least {least}$"):
        diff(source, [source], **{name: value})


# The checkpoints.


def test_no_candidate(source, token_rows, usage):
    usage(source, parts=["Missing argument 'OUT...'"])
    with pytest.raises(UsageError, match="no checkpoint to compare; expected at least one beside the source"):
        diff(source, [], data=token_rows)


def test_the_same_candidate_twice(source, quantized, tmp_path, refused):
    out = quantized("fp8")
    (tmp_path / "link").symlink_to(out)
    refused(source, out, source, out, parts=[f"{out} is given twice; expected each checkpoint once"])
    refused(source, out, tmp_path / "link", parts=[f"{tmp_path / 'link'} is given twice"])


@pytest.mark.parametrize(
    "what", ["nowhere", "a file", "a bare config", "no config", "no weights", "half a shard", "no index"]
)
def test_candidates_that_are_none(what, source, quantized, tmp_path, refused):
    out = quantized("fp8")
    shard = next(out.glob("*.safetensors"))
    if what == "nowhere":
        refused(
            source,
            tmp_path / "nowhere",
            parts=["nowhere does not exist", "expected a Nemotron-H checkpoint folder"],
        )
    elif what == "a file":
        refused(source, shard, parts=[str(shard), "cannot be read as JSON"])
    elif what == "a bare config":
        refused(
            source,
            out / "config.json",
            parts=[f"{out}/config.json is a config.json", "the folder with the weights"],
        )
    elif what == "no config":
        (out / "config.json").unlink()
        refused(source, out, parts=[f"{out} is damaged: config.json is missing; the manifest lists it"])
    elif what == "no weights":
        shard.unlink()
        refused(source, out, parts=[str(shard), "does not exist", "download the shard"])
    elif what == "half a shard":
        shard.write_bytes(shard.read_bytes()[:5000])
        refused(source, out, parts=[shard.name, "expected a safetensors file"])
    else:
        (out / "model.safetensors.index.json").unlink()
        refused(source, out, parts=["model.safetensors.index.json is missing; the manifest lists it"])
        (out / FILE).unlink()
        refused(source, out, parts=["fp8 has neither model.safetensors.index.json nor model.safetensors"])


def test_one_bad_candidate_of_several(source, quantized, tmp_path, refused):
    refused(
        source, quantized("fp8"), tmp_path / "nowhere", quantized("nvfp4"), parts=["nowhere does not exist"]
    )


def test_sources_that_are_none(source, quantized, tmp_path, refused):
    out = quantized("fp8")
    refused(
        tmp_path / "nowhere", out, parts=["nowhere does not exist", "expected a Nemotron-H checkpoint folder"]
    )
    refused(
        source / "config.json",
        out,
        parts=["source/config.json is a config.json", "the folder with the weights"],
    )
    refused(
        out, source, parts=["fp8 is already quantized", "expected the bf16 checkpoint that it was made from"]
    )


# Whether they belong together.


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"moe_intermediate_size": 64}, ["moe_intermediate_size"]),
        ({"hybrid_override_pattern": "M*E-M"}, ["layers"]),
        ({"layer_norm_epsilon": 1e-6}, ["norm_eps"]),
        ({"vocab_size": 100, "num_experts_per_tok": 3}, ["vocab_size", "num_experts_per_tok"]),
    ],
    ids=["size", "schedule", "epsilon", "two"],
)
def test_a_model_of_other_sizes(changes, names, source, make_checkpoint, quantized, refused):
    other = quantized("nvfp4-w4a16", of=make_checkpoint("other", **changes))
    line = refused(
        source,
        other,
        parts=[f"{other} is not of {source}: their configs differ in ", "expected a checkpoint made from it"],
    )
    assert all(name in line for name in names)


def test_an_output_of_another_source(source, make_checkpoint, quantized, refused):
    """The manifest records the source; the sizes are the same here."""
    other = make_checkpoint("other", max_position_embeddings=512)
    out = quantized("fp8", of=other)
    refused(
        source,
        out,
        parts=[
            f"{out} was made from another source than {source}",
            "config_sha256",
            "give the source that it was made from",
        ],
    )
    wide = make_checkpoint("wide", lambda t: t.update({f"{IN_PROJ}.weight": t[f"{IN_PROJ}.weight"].float()}))
    out = quantized("fp8", name="of-wide", of=wide)
    refused(source, out, parts=[f"{out} was made from another source than {source}", "tensor_table_sha256"])


@pytest.mark.parametrize("key", ["config_sha256", "tensor_table_sha256"])
def test_a_manifest_that_names_another_source(key, source, quantized, refused):
    out = quantized("fp8")
    data = read_manifest(out)
    data["source"][key] = "0123456789abcdef" * 4
    write_manifest(out, data)
    refused(
        source,
        out,
        parts=[f"{out} was made from another source", f"{FILE} has {key} 0123456789ab, this source has "],
    )


@pytest.mark.parametrize("content", ["{", "{}", '{"schema": 2}'])
def test_manifests_that_cannot_be_used(content, source, quantized, refused):
    out = quantized("fp8")
    (out / FILE).write_text(content)
    refused(
        source,
        out,
        parts=[
            f"{out / FILE}",
            "expected JSON" if content == "{" else "expected 2" if content == "{}" else "was changed",
        ],
    )


def save_tokenizer(folder, vocabulary, **more):
    data = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"},
    } | more
    (folder / "tokenizer.json").write_text(json.dumps(data, indent=2))


@pytest.mark.parametrize(
    ("vocabulary", "more", "part"),
    [
        ({"<unk>": 0, "b": 1, "a": 2}, {}, "model"),
        ({"<unk>": 0, "a": 1, "b": 2}, {"normalizer": {"type": "Lowercase"}}, "normalizer"),
        ({"<unk>": 0, "a": 1, "b": 2}, {"pre_tokenizer": None}, "pre_tokenizer"),
        ({"<unk>": 0, "b": 1, "a": 2}, {"normalizer": {"type": "Lowercase"}}, "model, normalizer"),
    ],
)
def test_another_tokenizer(vocabulary, more, part, source, quantized, refused):
    save_tokenizer(source, {"<unk>": 0, "a": 1, "b": 2})
    out = quantized("fp8")
    save_tokenizer(out, vocabulary, **more)
    sign(out)
    refused(
        source,
        out,
        parts=[
            f"{out} has another tokenizer than {source}: they differ in {part}; expected the same",
            "other words",
        ],
    )


def test_the_same_tokenizer_written_otherwise(source, quantized, compare):
    save_tokenizer(source, {"<unk>": 0, "a": 1, "b": 2})
    out = quantized("fp8")
    file = out / "tokenizer.json"
    data = json.loads(file.read_text())
    file.write_text(json.dumps(dict(reversed(data.items())) | {"truncation": None}))
    sign(out)
    assert compare(source, out).candidates[0].logits.kl.mean > 0
    file.unlink()
    sign(out)
    assert compare(source, out).candidates[0].logits.kl.mean > 0


def test_a_tokenizer_that_is_none(source, quantized, refused):
    save_tokenizer(source, {"<unk>": 0})
    out = quantized("fp8")
    for content in ("{", "[]"):
        (out / "tokenizer.json").write_text(content)
        sign(out)
        refused(source, out, parts=[f"{out}/tokenizer.json", "cannot be read as a tokenizer"])


# What the checkpoints contain.


@pytest.mark.parametrize(
    ("edit", "parts"),
    [
        (
            lambda t: t.pop(f"{IN_PROJ}.weight"),
            ["1 tensors are not as expected", f"{IN_PROJ}.weight is missing"],
        ),
        (lambda t: t.pop("backbone.norm_f.weight"), ["backbone.norm_f.weight is missing"]),
        (
            lambda t: t.pop(f"{IN_PROJ}.weight_scale"),
            [f"{IN_PROJ}.weight_scale is missing; {IN_PROJ}.weight is F8_E4M3 and needs it"],
        ),
        (
            lambda t: t.pop(f"{EXPERT}.weight_scale_2"),
            [f"{EXPERT}.weight_scale_2 is missing; {EXPERT}.weight is U8 and needs it"],
        ),
        (
            replaced(f"{IN_PROJ}.weight_scale", lambda t: t.to(torch.bfloat16)),
            [f"{IN_PROJ}.weight_scale is BF16 [], expected F32 []"],
        ),
        (
            replaced(f"{IN_PROJ}.weight_scale", lambda t: t.repeat(196)),
            [f"{IN_PROJ}.weight_scale is F32 [196], expected F32 []"],
        ),
        (
            replaced(f"{EXPERT}.weight_scale", lambda t: t.view(torch.uint8)),
            [f"{EXPERT}.weight_scale is U8 [48, 2], expected F8_E4M3 [48, 2]"],
        ),
        (
            replaced(f"{EXPERT}.weight_scale", lambda t: t[:, :1]),
            [f"{EXPERT}.weight_scale is F8_E4M3 [48, 1], expected F8_E4M3 [48, 2]"],
        ),
        (
            replaced(f"{EXPERT}.weight", lambda t: t[:, :-1]),
            [f"{EXPERT}.weight is U8 [48, 15], expected U8 [48, 16]"],
        ),
        (
            replaced("backbone.norm_f.weight", lambda t: t[:-1]),
            ["backbone.norm_f.weight is BF16 [63], expected BF16 [64]"],
        ),
        (replaced("lm_head.weight", lambda t: t.long()), ["lm_head.weight is I64"]),
        (
            lambda t: t.update(
                {
                    "backbone.embeddings.weight": t["backbone.embeddings.weight"].to(torch.float8_e4m3fn),
                    "backbone.embeddings.weight_scale": torch.ones(()),
                }
            ),
            ["backbone.embeddings.weight (embedding) is F8_E4M3, expected a floating dtype: it is no GEMM"],
        ),
        (
            lambda t: [t.pop(n) for n in list(t) if n.endswith("up_proj.weight_scale")],
            [
                "19 tensors are not as expected",
                "and 14 more",
                "expected the ModelOpt layout with FP8 per tensor, MXFP8 or NVFP4",
            ],
        ),
        (
            lambda t: [t.pop(name) for name in ("mtp.layers.0.norm.weight", "backbone.norm_f.weight")],
            ["1 tensors are not as expected: backbone.norm_f.weight is missing"],
        ),
    ],
    ids=[
        "weight missing",
        "norm missing",
        "scale missing",
        "global scale missing",
        "scale dtype",
        "scales by channel",
        "block scale dtype",
        "block scale shape",
        "codes shape",
        "norm shape",
        "integers",
        "quantized embedding",
        "many",
        "MTP and another",
    ],
)
def test_tensors_that_do_not_fit(edit, parts, source, quantized, changed, refused):
    out = changed(quantized("nvfp4"), edit)
    refused(source, out, parts=[f"{out}: ", *parts])


@pytest.mark.parametrize(
    "name",
    [
        "stranger",
        f"{IN_PROJ}.bias",
        f"{IN_PROJ}.pre_quant_scale",
        f"{IN_PROJ}.weight_scale_2",
        "backbone.norm_f.weight_scale",
    ],
)
def test_tensors_of_unknown_meaning(name, source, quantized, changed, refused):
    out = changed(quantized("nvfp4"), lambda t: t.update({name: torch.ones(1)}))
    refused(
        source,
        out,
        parts=[f"{out}: 1 tensors of unknown meaning: {name}; they may change what an engine computes"],
    )


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0, -1.0])
@pytest.mark.parametrize(
    "name",
    [
        f"{IN_PROJ}.weight_scale",
        f"{EXPERT}.weight_scale_2",
        f"{O_PROJ}.input_scale",
        f"{EXPERT}.input_scale",
        f"{K_PROJ}.k_scale",
    ],
)
def test_scales_that_are_no_scales(name, value, source, quantized, refused):
    out = quantized("nvfp4")
    overwrite(out, name, lambda data: np.float32(value).tobytes())
    refused(source, out, parts=[f"{out}: {name} is {np.float32(value)}; expected a positive finite scale"])


@pytest.mark.parametrize(
    ("preset", "module"), [("fp8", IN_PROJ), ("nvfp4", EXPERT), ("nvfp4", O_PROJ), ("nvfp4-full", EXPERT)]
)
@pytest.mark.parametrize("where", ["both", "config.json", "hf_quant_config.json"])
def test_inputs_that_are_declared_and_lack_their_scale(
    where, preset, module, source, quantized, changed, refused
):
    """Whichever config file declares them: older tools write only the second file."""
    out = changed(quantized(preset), lambda t: t.pop(f"{module}.input_scale"))
    if where == "config.json":
        (out / "hf_quant_config.json").unlink()
    elif where == "hf_quant_config.json":
        edit_json(out / "config.json", lambda config: config.pop("quantization_config"))
    refused(
        source,
        out,
        parts=[
            f"{out}: 1 modules are declared to have quantized inputs and lack `input_scale`: {module}",
            "calibrate again",
        ],
    )


def test_experts_of_several_formats(source, quantized, changed, refused):
    def mix(tensors):
        tensors[f"{EXPERT}.weight"] = tensors[f"{EXPERT}.weight"].to(torch.bfloat16)
        for part in ("weight_scale", "input_scale"):
            del tensors[f"{EXPERT}.{part}"]

    out = changed(quantized("fp8"), mix)
    refused(
        source,
        out,
        parts=[
            f"{out}: the experts of backbone.layers.2.mixer.experts.up_proj have the formats fp8, source",
            "expected one for all",
        ],
    )


# What the models compute.

BAD = {  # what -> (tensor of the NVFP4 output, new bytes from the old, where the error shows)
    "a weight scale that overflows": (
        f"{IN_PROJ}.weight_scale",
        lambda data: np.float32(3e38).tobytes(),
        IN_PROJ,
    ),
    "a global scale that overflows": (
        f"{EXPERT}.weight_scale_2",
        lambda data: np.float32(1e37).tobytes(),
        EXPERT,
    ),
    "NaN among FP8 codes": (f"{O_PROJ}.weight", lambda data: b"\x7f" + data[1:], O_PROJ),
    "NaN among block scales": (f"{EXPERT}.weight_scale", lambda data: b"\x7f" * len(data), EXPERT),
    "a NaN norm": (
        "backbone.layers.3.norm.weight",
        lambda data: b"\xc0\x7f" * (len(data) // 2),
        "backbone.layers.3.norm",
    ),
    "a NaN router": (
        "backbone.layers.2.mixer.gate.weight",
        lambda data: b"\xc0\x7f" * (len(data) // 2),
        "mixer.gate",
    ),
    "a NaN embedding": (
        "backbone.embeddings.weight",
        lambda data: b"\xc0\x7f" * (len(data) // 2),
        "embedding",
    ),
    "a NaN final norm": ("backbone.norm_f.weight", lambda data: b"\xc0\x7f" * (len(data) // 2), "head"),
    "a NaN head": ("lm_head.weight", lambda data: data[:-2] + b"\xc0\x7f", "head"),
    "an infinite head": ("lm_head.weight", lambda data: data[:-2] + b"\x80\x7f", "head"),
    "a NaN MTP norm": ("mtp.layers.0.enorm.weight", lambda data: b"\xc0\x7f" * (len(data) // 2), "mtp"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_candidate_that_computes_nan(what, source, quantized, refused):
    name, change, place = BAD[what]
    out = quantized("nvfp4")
    overwrite(out, name, change)
    sign(out)
    line = refused(source, out, parts=[f"{out}", "NaN or Inf"])
    assert place in line.lower()


@pytest.mark.parametrize(
    "what",
    [
        w
        for w, (name, *_) in BAD.items()
        if name.startswith(("backbone.layers.3", "lm_head", "backbone.norm_f"))
    ],
)
def test_a_source_that_computes_nan(what, source, make_checkpoint, refused):
    name, change, place = BAD[what]
    other = make_checkpoint("other")
    overwrite(source, name, change)
    line = refused(source, other, parts=[f"{source}", "NaN or Inf"])
    assert {"backbone.layers.3.norm": "layer 3 (mlp)"}.get(place, place) in line


def test_nan_that_no_token_reaches(source, quantized, compare, tmp_path):
    """An expert's codes are checked even if no token reaches it: it must not pass as free of errors."""
    data = tmp_path / "short.npy"
    np.save(data, np.array([[5, 6]]))
    out = quantized("fp8")
    name = "backbone.layers.2.mixer.experts.{}.up_proj"
    (found,) = compare(source, out, data=data).candidates
    reached = next(e.routing.tokens_per_expert for e in found.layers if e.name == "2")
    idle = next(e for e, count in enumerate(reached) if not count)
    overwrite(out, f"{name.format(idle)}.weight", lambda codes: b"\x7f" + codes[1:])
    sign(out)
    result = run(source, out, "--data", data, "--json", "-")
    assert result.exit_code == 2 or name.format(idle) in result.stdout, "an error, or a warning that names it"


# The reports.


@pytest.mark.parametrize("kind", ["--html", "--json", "--markdown"])
def test_report_folders_that_are_none(kind, source, tmp_path, token_rows, refused, usage, monkeypatch):
    refused(
        source,
        source,
        kind,
        tmp_path / "no/report",
        parts=[f"{tmp_path}/no/report: {tmp_path}/no is not a folder that can be written; make it"],
    )
    refused(
        source,
        source,
        kind,
        token_rows / "report",
        parts=[f"{token_rows} is not a folder that can be written"],
    )
    usage(source, source, kind, tmp_path, parts=[f"'{kind}'", "is a directory"])
    monkeypatch.setattr(
        "os.access", lambda path, mode: path != tmp_path
    )  # a folder of another user: root may write anywhere
    refused(
        source,
        source,
        kind,
        tmp_path / "report",
        parts=[f"{tmp_path} is not a folder that can be written", "choose another place"],
    )


def test_files_that_must_not_be_replaced(source, tmp_path, refused, monkeypatch):
    monkeypatch.setattr("nemoquant.api.diff", lambda *a, **k: pytest.fail("it worked first"))
    with socket.socket(socket.AF_UNIX) as server:
        monkeypatch.chdir(tmp_path)  # its address may not be long
        server.bind("socket")
    (tmp_path / "target").write_text("of the user")
    (tmp_path / "link").symlink_to("target")
    (tmp_path / "lost").symlink_to("nowhere")
    for name, reason in (
        ("socket", "it is no file; expected a file, a pipe or a device such as /dev/null"),
        ("link", "it is a link, which would be replaced; name the file that it leads to"),
        ("lost", "it is a link, which would be replaced"),
        ("x" * 250, "its name is too long; expected at most 237 bytes"),
    ):
        refused(source, source, "--html", tmp_path / name, parts=[f"{name}: {reason}"])


def test_one_file_for_two_reports(source, tmp_path, refused, monkeypatch):
    report = tmp_path / "report"
    refused(
        source,
        source,
        "--json",
        report,
        "--markdown",
        report,
        parts=[f"{report} is given for two reports; expected a file for each"],
    )
    monkeypatch.chdir(tmp_path)
    refused(source, source, "--html", "report", "--json", report, parts=["is given for two reports"])


def test_reports_are_refused_before_the_work(source, tmp_path, monkeypatch, refused):
    monkeypatch.setattr("nemoquant.api.diff", lambda *a, **k: pytest.fail("it worked first"))
    refused(source, source, "--json", tmp_path / "no/report", parts=["is not a folder"])
    refused(source, source, "--fail-if", "nope > 1", parts=["there is no figure"])


# Conditions.


@pytest.mark.parametrize(
    "condition",
    [
        "kl",
        "kl > x",
        "kl == 1",
        "kl > nan",
        "kl > inf",
        "kl > 1e999",
        '__import__("os") > 1',
        "",
        "> 1",
        "kl > 1 > 2",
        "1 < kl",
        "kl => 1",
        "kl > 1; top1 < 1",
        "kl.mean > 1",
    ],
)
def test_conditions_that_are_none(condition, source, refused):
    refused(
        source,
        source,
        "--fail-if",
        condition,
        parts=[f"--fail-if {condition!r}: expected NAME OP NUMBER", "> >= < <=", "'kl > 0.02'"],
    )


@pytest.mark.parametrize("name", ["nope", "KL", "__class__", "logits", "_"])
def test_figures_that_do_not_exist(name, source, refused):
    line = refused(
        source,
        source,
        "--fail-if",
        f"{name} > 1",
        parts=[f"--fail-if '{name} > 1': there is no figure {name!r}; figures are kl, "],
    )
    assert "top1" in line and "bits_per_weight" in line


def test_the_second_condition_is_read_before_the_work_too(source, refused):
    refused(
        source,
        source,
        "--fail-if",
        "kl > 1",
        "--fail-if",
        "kl",
        parts=["--fail-if 'kl': expected NAME OP NUMBER"],
    )


# Errors in the middle of a run.


@pytest.mark.parametrize("at", [0, 4, 8])
def test_an_interrupt_changes_nothing(at, source, quantized, tmp_path, refused, monkeypatch):
    from nemoquant.evaluate import run as work

    seen = []

    def stop(*_):
        seen.append(1)
        if len(seen) > at:
            raise KeyboardInterrupt

    real = work.diff
    monkeypatch.setattr(
        work, "diff", lambda source, sides, rows, cache, *_, **__: real(source, sides, rows, cache, stop)
    )
    out = quantized("fp8")
    files = [
        "--json",
        tmp_path / "r.json",
        "--markdown",
        tmp_path / "r.md",
        "--reference-cache",
        tmp_path / "cache",
    ]
    if at == 8:
        files = files[:-2]  # the cache is complete by then, and kept
    refused(source, out, *files, code=130, parts=["error: interrupted"])


def test_a_report_that_cannot_be_written(source, tmp_path, token_rows, monkeypatch):
    from nemoquant.evaluate.report import files

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "write_named", full)
    before = tree(tmp_path)
    result = run(source, source, "--data", token_rows, "--json", tmp_path / "r.json")
    assert result.exit_code == 2
    last = result.stderr.splitlines()[-1]
    assert last == f"error: {tmp_path / 'r.json'}: No space left on device; the report can't be written there"
    assert tree(tmp_path) == before


def test_the_order_of_messages(source, tmp_path, refused):
    """Cheap checks come first: no candidate is read when the source does not exist."""
    shutil.rmtree(source)
    assert re.search(
        r"source/?\S* does not exist", refused(source, tmp_path / "nowhere", parts=["does not exist"])
    )


@pytest.mark.parametrize(
    ("section", "legacy", "part"),
    [
        ({"num_bits": 8, "type": "int"}, None, '{"num_bits": 8, "type": "int"}'),
        ({"num_bits": 4, "type": "float"}, None, '{"num_bits": 4, "type": "float"}'),
        (None, "NVFP4", '"NVFP4"'),
    ],
    ids=["INT8", "4 bits", "by the older file"],
)
def test_a_cache_that_nobody_knows(section, legacy, part, source, quantized, refused):
    """Read as a bf16 cache, its cost would be left out."""
    out = quantized("nvfp4")
    config, older = out / "config.json", out / "hf_quant_config.json"
    data = json.loads(config.read_text())
    if section is not None:
        data["quantization_config"]["kv_cache_scheme"] = section
    else:
        del data["quantization_config"]
        declared = json.loads(older.read_text())
        declared["quantization"]["kv_cache_quant_algo"] = legacy
        older.write_text(json.dumps(declared))
    config.write_text(json.dumps(data))
    sign(out)
    refused(source, out, parts=[f"it declares a KV cache of {part}", "expected FP8, or none"])


def test_an_algorithm_that_the_tensors_are_not(source, quantized, refused):
    out = quantized("nvfp4-full")
    config = out / "config.json"
    data = json.loads(config.read_text())
    data["quantization_config"]["quant_algo"] = "MXFP4"
    config.write_text(json.dumps(data))
    edit_json(out / "hf_quant_config.json", lambda data: data["quantization"].update(quant_algo="MXFP4"))
    sign(out)
    refused(
        source,
        out,
        parts=[
            "modules are declared as what their tensors are not",
            f"{IN_PROJ} (MXFP4, its tensors are NVFP4's)",
        ],
    )


@pytest.mark.parametrize(
    ("edit", "part"),
    [
        (replaced(f"{EXPERT}.weight_scale", lambda t: t.float()), "is F32 [96, 1], expected U8 [96, 1]"),
        (replaced(f"{EXPERT}.weight_scale", lambda t: t[:, :0]), "is U8 [96, 0], expected U8 [96, 1]"),
        (lambda t: t.pop(f"{EXPERT}.weight_scale"), "is missing"),
    ],
    ids=["dtype", "shape", "missing"],
)
def test_mxfp8_block_scales_that_do_not_fit(edit, part, fitting, quantized, changed, refused):
    out = changed(quantized("mxfp8"), edit)
    refused(fitting("mxfp8"), out, parts=[f"{EXPERT}.weight_scale {part}"])


def test_a_block_scale_that_is_nan(fitting, quantized, refused):
    out = quantized("mxfp8")
    overwrite(out, f"{EXPERT}.weight_scale", lambda data: b"\xff" + data[1:])
    sign(out)
    refused(fitting("mxfp8"), out, parts=[f"{EXPERT}.weight decodes to NaN or Inf"])


def test_an_algorithm_without_a_quantized_tensor(source, changed, refused):
    """An engine would read the weights as codes."""
    out = changed(source, lambda tensors: None, quantization_config={"quant_algo": "MXFP8"})
    refused(source, out, parts=["it declares MXFP8 and none of its tensors is quantized"])


def test_a_module_that_is_listed_and_not_quantized(source, quantized, changed, refused):
    kept = load_tensors(source)[f"{IN_PROJ}.weight"]

    def edit(tensors):
        for part in ("weight_scale", "input_scale"):
            tensors.pop(f"{IN_PROJ}.{part}")
        tensors[f"{IN_PROJ}.weight"] = kept

    out = changed(quantized("nvfp4"), edit)
    refused(source, out, parts=[f"{IN_PROJ} (FP8, its weight is not quantized)"])
