"""Verify detects each kind of damage with the check meant for it, and names it.

``sign`` gives a changed output a matching manifest: then only the deeper check can detect the damage.
"""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.commands import invoke, nemoquant, refusal
from support.files import edit_json
from support.pack_oracle import PRESETS, read
from support.processes import listening
from support.tampering import overwrite, sign

from nemoquant.api import RunOptions, plan, quantize, verify
from nemoquant.checkpoint.manifest import FILE, write_manifest
from nemoquant.pack import verify as check

IN_PROJ, EXPERT = "backbone.layers.0.mixer.in_proj", "backbone.layers.2.mixer.experts.3.up_proj"
ONE_FILE = "model-00001-of-00001.safetensors"


@pytest.fixture
def out(quantized):
    return quantized("nvfp4")


def command(out, *more):
    """(exit code, parsed report) of ``nemoquant verify --json``"""
    result = invoke("verify", out, "--json", *more)
    return result.exit_code, json.loads(result.stdout) if result.stdout else result.stderr


def failed(out, *more):
    """The problems, one line; the exit code must report failure too."""
    code, report = command(out, *more)
    assert code == 1, report
    assert report["ok"] is False
    assert report["problems"]
    return "; ".join(report["problems"])


@pytest.mark.parametrize("preset", PRESETS)
def test_fresh_output_passes(preset, fitting, quantized):
    source, out = fitting(preset), quantized(preset)
    tensors = read(out)
    code, report = command(out, "--against", source)
    assert (code, report["ok"], report["problems"], report["warnings"]) == (0, True, [], [])
    checked = report["checked"]
    assert checked["files"] == len(list(out.iterdir())) - 1
    assert checked["tensors"] == len(tensors)
    quantized_weights = sum(
        name.endswith(".weight") and t.dtype in ("U8", "F8_E4M3") for name, t in tensors.items()
    )
    assert checked["encoded_again"] == quantized_weights > 0
    assert checked["encoded_again"] + checked["compared_with_source"] == len(read(source))
    alone = verify(out)
    assert alone["ok"]
    assert alone["checked"]["compared_with_source"] == alone["checked"]["encoded_again"] == 0
    assert alone["checked"]["scales"] == checked["scales"] > 0


def test_nothing_is_counted_that_verify_does_not_tell(source, out, monkeypatch):
    monkeypatch.setattr("nemoquant.pack.encode.lost_to_scale", lambda *_: pytest.fail("it counts"))
    assert verify(out, source)["ok"]


def test_several_shards_pass(source, quantized):
    out = quantized("nvfp4", shard_bytes=20_000)
    assert command(out, "--against", source)[0] == 0


@pytest.mark.parametrize("at", [0, 9, 5000, -1], ids=["header size", "header", "data", "last byte"])
def test_a_flipped_byte(at, out):
    file = out / ONE_FILE
    raw = bytearray(file.read_bytes())
    raw[at] ^= 1
    file.write_bytes(raw)
    assert f"{ONE_FILE} was changed: its sha256 is not the manifest's" in failed(out)


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "hf_quant_config.json",
        "nemoquant_scales.json",
        "model.safetensors.index.json",
    ],
)
def test_a_changed_file(name, out):
    (out / name).write_text((out / name).read_text() + "\n")
    assert failed(out) == f"{name} was changed: its sha256 is not the manifest's"


@pytest.mark.parametrize(
    "name", ["hf_quant_config.json", "config.json", ONE_FILE, "model.safetensors.index.json"]
)
def test_a_missing_file(name, out):
    (out / name).unlink()
    assert f"{name} is missing; the manifest lists it" in failed(out)


def test_a_changed_manifest(out):
    edit_json(out / FILE, lambda data: data.update(shard_bytes=1))
    code, message = command(out)
    assert code == 2
    assert "nemoquant.json was changed after it was written" in message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        ("{", "cannot be read"),
        ("[]", "schema 'list', expected 2"),
        ('{"schema": 99}', "schema 99, expected 2"),
    ],
)
def test_no_usable_manifest(content, message, out):
    if content is None:
        (out / FILE).unlink()
    else:
        (out / FILE).write_text(content)
    code, error = command(out)
    assert code == 2
    assert message in error
    assert error.count("\n") == 1


def test_an_edited_card_is_no_damage(out):
    """Everybody edits the card before a push."""
    (out / "README.md").write_text((out / "README.md").read_text() + "\nMy own words.\n")
    code, report = command(out)
    assert (code, report["ok"], report["problems"], report["edited"]) == (0, True, [], ["README.md"])
    assert report["warnings"] == ["README.md was edited: its sha256 is not the manifest's"]
    assert "warning: README.md was edited" in nemoquant("verify", out).stderr
    (out / "README.md").unlink()
    code, report = command(out)
    assert (code, report["edited"]) == (0, [])
    assert report["warnings"] == ["README.md is missing; the manifest lists it"]


# What must not be read.

ELSEWHERE = "is no regular file of this folder (a link out of it, or a device or pipe); nothing was read"


def listed(out, name):
    """Lists a file in the manifest, with a hash that the file can't have."""
    data = json.loads((out / FILE).read_text())
    data["files"][name] = "0" * 64
    write_manifest(out, data)


@pytest.mark.parametrize("name", ["/dev/zero", "/etc/passwd", "../../etc/passwd", "sub/file", "..", ".", ""])
def test_a_manifest_that_names_a_path(name, out):
    listed(out, name)
    code, message = command(out)
    assert code == 2
    assert "nemoquant.json is not as nemoquant writes it: `files" in message
    assert "expected the name of a file in the folder, without a path" in message
    assert message.count("\n") == 1


@pytest.mark.parametrize(
    "name",
    [
        "extra",
        "config.json",
        "hf_quant_config.json",
        "nemoquant_scales.json",
        ONE_FILE,
        "model.safetensors.index.json",
    ],
)
@pytest.mark.parametrize(
    "target", ["/dev/zero", "/etc/passwd", "outside", "nowhere", "itself", "FIFO", "folder"]
)
def test_nothing_is_read_through_a_file_that_is_none(target, name, out, tmp_path):
    """A pipe or a device would be read for ever; whether the manifest lists the file or not."""
    file = out / name
    content = file.read_bytes() if file.exists() else b""
    (tmp_path / "outside").write_bytes(content)
    if target == "FIFO":
        file.unlink(missing_ok=True)
        os.mkfifo(file)
    elif target == "folder":
        file.unlink(missing_ok=True)
        file.mkdir()
    else:
        file.unlink(missing_ok=True)
        file.symlink_to({"outside": "../outside", "itself": name}.get(target, target))
    if name == "extra":
        listed(out, name)
    assert failed(out) == f"{name} {ELSEWHERE}"
    if name != "extra":
        data = json.loads((out / FILE).read_text())
        del data["files"][name]
        write_manifest(out, data)
        assert failed(out) == f"{name} {ELSEWHERE}"


@pytest.mark.parametrize("target", ["/dev/zero", "/etc/passwd", "../outside"])
def test_a_manifest_behind_a_link(target, out, tmp_path):
    (out / FILE).rename(tmp_path / "outside")
    (out / FILE).symlink_to(target)
    code, message = command(out)
    assert (code, f"{out}/{FILE} {ELSEWHERE}" in message) == (2, True)


def test_a_strange_shard_that_the_index_could_name(out):
    os.mkfifo(out / "more.safetensors")
    assert failed(out) == f"more.safetensors {ELSEWHERE}"


def test_links_of_a_hub_cache_are_its_own_files(out, tmp_path):
    """``snapshots/REVISION/NAME -> ../../blobs/HASH``, as a download leaves it."""
    snapshot, blobs = tmp_path / "models--a--b/snapshots/1234", tmp_path / "models--a--b/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(out.iterdir())):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    assert command(snapshot)[0] == 0
    (snapshot / "README.md").unlink()
    (snapshot / "README.md").symlink_to("/etc/passwd")
    assert failed(snapshot) == f"README.md {ELSEWHERE}"


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_soon(sent, out):
    """A listed file of a terabyte of zeros, which would be hashed for many minutes."""
    with (out / "long").open("wb") as f:
        f.truncate(1 << 40)
    listed(out, "long")
    process = subprocess.Popen(
        [sys.executable, "-m", "nemoquant", "verify", str(out)],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        preexec_fn=listening,
    )
    descriptors = Path(f"/proc/{process.pid}/fd")
    while process.poll() is None:
        with suppress(OSError):
            if any(link.resolve() == out / "long" for link in descriptors.iterdir()):
                break
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(sent)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + sent
    assert stdout == b""
    assert stderr.decode().startswith("error: interrupted") and stderr.count(b"\n") == 1


def test_a_foreign_file_is_a_warning(out):
    (out / "notes.txt").write_text("mine")
    code, report = command(out)
    assert (code, report["problems"]) == (0, [])
    assert report["warnings"] == ["notes.txt is not in the manifest; nemoquant did not write it"]


# With a matching manifest.


@pytest.mark.parametrize(
    ("name", "value"),
    [(f"{IN_PROJ}.weight_scale", v) for v in (np.nan, np.inf, 0.0, -1.0)]
    + [
        (n, np.nan)
        for n in (
            f"{EXPERT}.weight_scale_2",
            f"{EXPERT}.input_scale",
            "backbone.layers.1.mixer.k_proj.k_scale",
        )
    ],
)
def test_a_scalar_scale_that_is_no_positive_number(name, value, out):
    overwrite(out, name, np.float32(value).tobytes())
    sign(out)
    assert failed(out) == f"{name}: 1 of 1 scales are not finite and positive"


@pytest.mark.parametrize("code", [0x00, 0x80, 0x7F, 0xFF, 0xB8], ids=["0", "-0", "NaN", "-NaN", "-1"])
def test_a_block_scale_that_is_no_positive_number(code, out):
    overwrite(out, f"{EXPERT}.weight_scale", bytes([code]), at=5)
    sign(out)
    assert failed(out) == f"{EXPERT}.weight_scale: 1 of 96 scales are not finite and positive"


def test_smallest_and_largest_block_scales_are_fine(out):
    overwrite(out, f"{EXPERT}.weight_scale", bytes([0x01, 0x7E]))
    sign(out)
    assert command(out)[0] == 0


@pytest.mark.parametrize("name", [f"{IN_PROJ}.weight", f"{EXPERT}.weight", f"{EXPERT}.weight_scale"])
def test_changed_codes_are_found_with_the_source(name, source, out):
    before = read(out)[name].data
    overwrite(out, name, bytes([before[7] ^ 1]), at=7)
    sign(out)
    assert command(out)[0] == 0, "without the source they are codes like any other"
    assert (
        failed(out, "--against", source)
        == f"{name.rsplit('.', 1)[0]}: encoding the source's weight again gives other bytes"
    )


@pytest.mark.parametrize("name", [f"{IN_PROJ}.weight_scale", f"{EXPERT}.weight_scale_2"])
def test_a_wrong_weight_scale_is_found_with_the_source(name, source, out):
    scale = np.float32(read(out)[name].tensor().item())
    overwrite(
        out, name, np.nextafter(scale, np.float32(1)).tobytes()
    )  # one step: too little to change a code
    sign(out)
    assert (
        failed(out, "--against", source)
        == f"{name.rsplit('.', 1)[0]}: encoding the source's weight again gives other bytes"
    )


@pytest.mark.parametrize(
    "name", [f"{IN_PROJ}.input_scale", f"{EXPERT}.input_scale", "backbone.layers.1.mixer.v_proj.v_scale"]
)
def test_an_activation_scale_that_the_scales_file_does_not_give(name, out):
    scale = np.float32(read(out)[name].tensor().item())
    overwrite(out, name, np.float32(1 / scale).tobytes())  # the reciprocal: finite, positive, wrong
    sign(out)
    assert f"{name} is {np.float32(1 / scale)}, nemoquant_scales.json gives {scale}" == failed(out)


def test_zeros_in_place_of_a_weight_are_found_with_the_source(source, out):
    """The encoding of a zero weight (codes 0, scale 1.0) must not pass for another weight."""
    overwrite(out, f"{IN_PROJ}.weight", bytes(len(read(out)[f"{IN_PROJ}.weight"].data)))
    overwrite(out, f"{IN_PROJ}.weight_scale", np.float32(1).tobytes())
    sign(out)
    assert (
        failed(out, "--against", source) == f"{IN_PROJ}: encoding the source's weight again gives other bytes"
    )


@pytest.mark.parametrize(
    "name", ["lm_head.weight", "backbone.layers.0.mixer.A_log", "mtp.layers.1.mixer.experts.0.up_proj.weight"]
)
def test_a_changed_unquantized_tensor_is_found_with_the_source(name, source, out):
    before = read(out)[name].data
    overwrite(out, name, bytes([before[0] ^ 1]))
    sign(out)
    assert command(out)[0] == 0
    assert failed(out, "--against", source) == f"{name} differs from the source; expected the same bytes"


def rewrite(out, change):
    """Rewrites the shard with another header; ``change`` gets name -> (dtype, shape, bytes) in order."""
    tensors = {name: (t.dtype, t.shape, t.data) for name, t in read(out).items()}
    tensors = change(tensors) or tensors
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(header).encode()
    text = text.ljust(-(-(8 + len(text)) // 4096) * 4096 - 8)
    (out / ONE_FILE).write_bytes(
        len(text).to_bytes(8, "little") + text + b"".join(data for _, _, data in tensors.values())
    )
    edit_json(
        out / "model.safetensors.index.json",
        lambda index: index.update(weight_map=dict.fromkeys(tensors, ONE_FILE)),
    )
    sign(out)


def swap(a, b):
    def change(tensors):
        return {{a: b, b: a}.get(name, name): value for name, value in tensors.items()}

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{EXPERT}.input_scale") and None, f"{EXPERT}.input_scale is missing"),
        (lambda t: t.pop("backbone.norm_f.weight") and None, "backbone.norm_f.weight is missing"),
        (lambda t: t.update(stranger=("F32", [], bytes(4))), "stranger is not in the plan"),
        (
            lambda t: t.update({f"{EXPERT}.input_scale": ("F32", [1], t[f"{EXPERT}.input_scale"][2])}),
            f"{EXPERT}.input_scale is F32 [1], expected F32 []",
        ),
        (
            lambda t: t.update({f"{EXPERT}.weight": ("I8", *t[f"{EXPERT}.weight"][1:])}),
            f"{EXPERT}.weight is I8 [48, 16], expected U8 [48, 16]",
        ),
        (
            swap(
                "backbone.layers.2.mixer.experts.3.up_proj.weight",
                "backbone.layers.2.mixer.experts.4.up_proj.weight",
            ),
            "its tensors are in another order than the plan's",
        ),
    ],
    ids=["missing scale", "missing weight", "extra", "shape", "dtype", "names swapped"],
)
def test_another_tensor_table(change, message, out):
    rewrite(out, change)
    assert f"{ONE_FILE}: {message}" in failed(out)


def test_swapped_bytes_are_found_with_the_source(source, out):
    a, b = (f"backbone.layers.2.mixer.experts.{e}.up_proj.weight" for e in (3, 4))
    tensors = read(out)
    overwrite(out, a, tensors[b].data)
    overwrite(out, b, tensors[a].data)
    sign(out)
    assert command(out)[0] == 0
    problems = failed(out, "--against", source)
    assert "experts.3.up_proj: encoding" in problems
    assert "experts.4.up_proj: encoding" in problems


def test_data_that_does_not_begin_at_a_page(out):
    file = out / ONE_FILE
    raw = file.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    file.write_bytes((size + 8).to_bytes(8, "little") + raw[8 : 8 + size] + b" " * 8 + raw[8 + size :])
    sign(out)
    assert failed(out) == f"{ONE_FILE}: data begins at byte {size + 16}, expected a multiple of 4096"


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (
            "config.json",
            lambda d: d.pop("quantization_config"),
            "config.json: `quantization_config` is not what the plan calls for",
        ),
        (
            "config.json",
            lambda d: d["quantization_config"]["ignore"].append("backbone.layers.1"),
            "config.json: `quantization_config` is not what the plan calls for",
        ),
        (
            "hf_quant_config.json",
            lambda d: d["quantization"].update(kv_cache_quant_algo=None),
            "hf_quant_config.json is not what the plan calls for",
        ),
        (
            "hf_quant_config.json",
            lambda d: d["quantization"]["quantized_layers"].popitem(),
            "hf_quant_config.json is not what the plan calls for",
        ),
        ("config.json", lambda d: d.update(hidden_size=32), "the recipe and config.json give the plan"),
        ("config.json", lambda d: d.update(model_type="llama"), "`model_type` is 'llama'"),
        (
            "model.safetensors.index.json",
            lambda d: d["weight_map"].popitem(),
            "does not fit its shards: not in it: mtp.layers.1",
        ),
        (
            "model.safetensors.index.json",
            lambda d: d["metadata"].update(total_size=1),
            "index.json: its metadata are {'total_size': 1}",
        ),
    ],
    ids=["no section", "ignore", "kv", "a module less", "sizes", "model_type", "index", "total"],
)
def test_config_files_that_do_not_fit(file, change, message, out):
    edit_json(out / file, change)
    sign(out)
    assert message in failed(out)


def test_source_keys_that_were_lost(source, out):
    edit_json(out / "config.json", lambda data: data.pop("architectures"))
    sign(out)
    assert command(out)[0] == 0
    assert "config.json: keys differ from the source's: architectures" in failed(out, "--against", source)


# Against other sources.


def test_against_another_model(out, make_checkpoint):
    other = make_checkpoint("other", n_routed_experts=4)
    assert "is not the source: its tensor table is another one" in failed(out, "--against", other)


def test_against_other_weights_of_the_same_shapes(out, make_checkpoint):
    problems = failed(out, "--against", make_checkpoint("other", seed=1))
    assert f"{IN_PROJ}: encoding the source's weight again gives other bytes" in problems
    assert "lm_head.weight differs from the source" in problems


@pytest.mark.parametrize("what", ["config", "missing", "quantized"])
def test_against_what_is_no_source(what, source, out, tmp_path):
    against = {"config": source / "config.json", "missing": tmp_path / "nowhere", "quantized": out}[what]
    code, message = command(out, "--against", against)
    assert code == 2
    assert {"config": "is a config.json", "missing": "does not exist", "quantized": "is already quantized"}[
        what
    ] in message
    assert message.startswith("error: ")
    assert message.count("\n") == 1


def test_a_source_that_changes_meanwhile(source, out, monkeypatch):
    """It is not the output that is wrong."""
    again = check._encoded_again

    def changed(*given):
        overwrite(source, "lm_head.weight", b"\1")
        return again(*given)

    monkeypatch.setattr(check, "_encoded_again", changed)
    refusal("verify", out, "--against", source, "--json", parts=[f"{source}/", "written to meanwhile"])


@pytest.mark.parametrize("name", [f"{IN_PROJ}.weight", f"{EXPERT}.weight"])
def test_a_source_with_nan(name, source, out):
    overwrite(source, name, b"\xc0\x7f")
    refusal("verify", out, "--against", source, "--json", parts=[f"{name} has NaN", "the source is damaged"])


def test_progress_is_called_in_one_thread_and_its_errors_are_its_own(source, out):
    seen = []

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    progress = lambda *given: seen.append((threading.current_thread(), given))  # noqa: E731
    assert verify(out, source, progress=progress)["ok"]
    assert {thread for thread, _ in seen} == {threading.main_thread()}
    _, last, total, _ = seen[-1][1]
    assert last == total
    for against in (None, source):
        with pytest.raises(OSError, match="No space left"):
            verify(out, against, progress=full)


def test_plain_report(out, source):
    result = nemoquant("verify", out, "--against", source)
    assert result.stdout.startswith(f"{out}: ok (")
    shutil.rmtree(out / "nothing", ignore_errors=True)
    (out / "hf_quant_config.json").unlink()
    result = nemoquant("verify", out, code=1)
    assert result.stdout.startswith(f"{out}: FAILED (")
    assert "problem: hf_quant_config.json is missing; the manifest lists it\n" in result.stderr


def test_quantize_verifies_before_the_rename(source, token_rows, tmp_path, monkeypatch):
    """The packer writes wrong scales: verify detects it, and OUT is not created."""
    from nemoquant.errors import VerificationError
    from nemoquant.pack import write

    bad = {row.module: np.float32(np.nan) for row in plan(source, "fp8").quantized}
    scales = write.activation_scales
    monkeypatch.setattr(write, "activation_scales", lambda *given: replace(scales(*given), inputs=bad))
    with pytest.raises(
        VerificationError, match=r"what was written is not what was planned: .*out\.partial is kept"
    ) as error:
        quantize(source, tmp_path / "out", "fp8", RunOptions(method="max", data=token_rows, threads=1))
    assert error.value.exit_code == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.partial", "rows.npy", "source"]
