"""The same bytes from two runs.

Also with other thread counts, with a given scales file, and with other layouts of the source.
"""

import json

import pytest
import torch
from safetensors.torch import save_file
from support import oracle_tensors
from support.files import changed_files, tree
from support.pack_oracle import PRESETS, read

from nemoquant.api import RunOptions, quantize


@pytest.mark.parametrize("preset", PRESETS)
def test_two_runs_are_equal_in_every_file(preset, quantized):
    assert changed_files(quantized(preset, "one"), quantized(preset, "two")) == []


def test_nothing_in_it_tells_of_the_machine(quantized, tmp_path, source):
    out = quantized("nvfp4")
    for name, data in tree(out).items():
        assert str(tmp_path).encode() not in data, name
        assert source.name.encode() + b"/" not in data, name


@pytest.mark.parametrize("preset", ["nvfp4", "nvfp4-w4a16"])
def test_threads_do_not_change_weights(preset, quantized):
    one, two = read(quantized(preset, "one", threads=1)), read(quantized(preset, "two", threads=2))
    assert list(one) == list(two)
    by_activations = ("input_scale", "k_scale", "v_scale")
    assert [n for n in one if one[n].data != two[n].data and not n.endswith(by_activations)] == []
    for name in (n for n in one if n.endswith(by_activations)):
        # docs/design.md, "Reproducible": within 1e-5, sums are taken in another order
        assert two[name].tensor().item() == pytest.approx(one[name].tensor().item(), rel=1e-5)


@pytest.mark.parametrize("preset", ["fp8", "nvfp4", "nvfp4-full"])
def test_scales_of_an_earlier_run_repeat_the_whole_output(preset, quantized):
    first = quantized(preset, "first", threads=2)
    again = quantized(preset, "again", threads=1, scales=first / "nemoquant_scales.json")
    assert changed_files(first, again) == []


def test_scales_repeat_the_warnings_too(source, tmp_path):
    text = tmp_path / "few.jsonl"
    text.write_text(
        "".join(json.dumps({"input_ids": [5 + i % 80 for i in range(45 + n)]}) + "\n" for n in range(3))
    )

    def run(name, dry_run=False, **options):
        given = RunOptions(method="max", seq_len=20, threads=1, **options)
        return quantize(source, tmp_path / name, "fp8", given, dry_run=dry_run)

    first = run("first", data=text)
    tokens = 45 + 46 + 47 + 3  # an eos after each document
    assert first.warnings == [
        f"few.jsonl holds {tokens // 20} rows of 20 tokens, 32 were asked for; all of them were used",
        f"few.jsonl: its last {tokens % 20} tokens do not fill a row and were left out",
    ]
    assert run("dry", data=text, dry_run=True).warnings == first.warnings
    again = run("again", scales=tmp_path / "first/nemoquant_scales.json")
    assert again.warnings == first.warnings
    assert changed_files(first.out, again.out) == []
    manifest = json.loads((first.out / "nemoquant.json").read_text())
    assert manifest["warnings"] == first.warnings
    assert all(w in (first.out / "README.md").read_text() for w in first.warnings)


def test_warnings_of_the_plan_are_not_repeated(make_checkpoint, quantized):
    """They come from the recipe and the model in each run; the scales file keeps only the calibration's."""
    source = make_checkpoint("dense", hybrid_override_pattern="M*-", num_nextn_predict_layers=0)
    first = quantized("nvfp4", "first", of=source)  # no experts, so no tensor is NVFP4
    again = quantized("nvfp4", "again", of=source, scales=first / "nemoquant_scales.json")
    assert changed_files(first, again) == []


def test_one_scales_file_serves_other_recipes(quantized):
    scales = quantized("fp8", "first") / "nemoquant_scales.json"
    assert (
        changed_files(quantized("nvfp4-full", "direct"), quantized("nvfp4-full", "by_scales", scales=scales))
        == []
    )


def fuse(source, folder):
    """The layout of transformers 5: one file, experts stacked in numeric order, its name of the embedding."""
    tensors = oracle_tensors.read(source)
    fused, experts = {}, {}
    for name, tensor in tensors.items():
        parts = name.split(".experts.")
        if len(parts) == 2:
            expert, projection, _ = parts[1].split(".")
            experts.setdefault(f"{parts[0]}.experts.{projection}", {})[int(expert)] = tensor
        else:
            fused[name.replace("backbone.embeddings.", "backbone.embedding.")] = tensor
    fused |= {
        name: torch.stack([by_number[e] for e in range(len(by_number))])
        for name, by_number in experts.items()
    }
    folder.mkdir(parents=True)
    save_file(fused, folder / "model.safetensors")
    (folder / "config.json").write_text((source / "config.json").read_text())
    return folder


@pytest.mark.parametrize("preset", ["nvfp4", "fp8", "nvfp4-w4a16"])
def test_a_fused_single_file_source_gives_the_same_output(preset, make_checkpoint, quantized, tmp_path):
    published = make_checkpoint("published", n_routed_experts=12)
    fused = fuse(published, tmp_path / "fused" / published.name)  # cards have the folder's name
    assert not any(".experts.0." in name for name in read(fused))
    assert changed_files(quantized(preset, "a", of=published), quantized(preset, "b", of=fused)) == []


def test_links_in_the_source_are_followed_and_none_is_written(source, quantized, tmp_path):
    (source / "tokenizer_config.json").write_text("{}")
    linked, blobs = tmp_path / "hub/snapshots" / source.name, tmp_path / "hub/blobs"  # as a hub cache's
    linked.mkdir(parents=True)
    blobs.mkdir()
    for i, path in enumerate(sorted(source.iterdir())):
        (blobs / f"blob{i}").write_bytes(path.read_bytes())
        (linked / path.name).symlink_to(f"../../blobs/blob{i}")
    plain, followed = quantized("nvfp4", "plain"), quantized("nvfp4", "followed", of=linked)
    assert changed_files(plain, followed) == []
    assert (followed / "tokenizer_config.json").exists()
    assert not any(path.is_symlink() for path in followed.iterdir())
