"""The bench that sets other tools beside ours: its map, its table, what stands in for their GPU kernels."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.modelopt_run import MARKS

from bench import rivals
from nemoquant.formats import nvfp4
from nemoquant.quantized.packed import fake_quantize


def of(name: str) -> Any:
    """A script of bench/peer, as its interpreter sees it."""
    sys.path.insert(0, str(rivals.PEERS))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(rivals.PEERS))


def test_the_map_is_the_presets_without_its_kv_cache(tmp_path: Path) -> None:
    case = rivals.Case("demo", "nvfp4", tmp_path / "demo" / "nvfp4")
    formats = rivals.planned(case)
    assert formats["backbone.layers.1.mixer.experts.3.up_proj"] == ("nvfp4", "nvfp4")
    assert formats["backbone.layers.0.mixer.in_proj"] == ("fp8", "fp8")
    assert "backbone.layers.1.mixer.fc1_latent_proj" not in formats
    assert "kv_cache: source" in case.recipe.read_text()
    command = rivals.command(case, "modelopt", "gptq", "python", tmp_path)
    job = json.loads(Path(command[-1]).read_text())
    assert job["method"] == "gptq" and job["map"]["backbone.layers.0.mixer.in_proj"] == ["fp8", "fp8"]


def test_a_refusal_is_quoted_and_kept(tmp_path: Path) -> None:
    case = rivals.Case("demo", "fp8", tmp_path / "demo" / "fp8")
    rivals.planned(case)
    script = tmp_path / "python"
    script.write_text(
        "#!/bin/sh\necho 'Traceback:'\necho 'my.tool.OddError: no such layer'\necho bye\nexit 1\n"
    )
    script.chmod(0o755)
    first = rivals.step(case, "modelopt", "max", str(script), again=False)
    assert first == {"refused": "my.tool.OddError: no such layer"}
    script.write_text("#!/bin/sh\nexit 0\n")
    assert rivals.step(case, "modelopt", "max", str(script), again=False) == first
    assert "wall" in rivals.step(case, "modelopt", "max", str(script), again=True)


def test_the_table_is_paired_and_sorted() -> None:
    def result(title: str, kl: list[float]) -> dict[str, Any]:
        rows = {"kl": kl, "nll": [3.0, 3.0], "top1": [0.9, 0.8]}
        unseen = {"kl": [2 * kl[0], kl[1]]}
        return {"title": title, "rows": rows, "unseen": unseen, "bits": 4.5, "cpu": 7.0, "peak_tree": 0.5}

    results = {
        "modelopt-max": result("Model Optimizer `max`", [0.03, 0.05]),
        "ours-default": result("nemoquant `default`", [0.02, 0.04]),
        "modelopt-awq_lite": {"title": "Model Optimizer `awq_lite`", "refused": "KeyError: x"},
    }
    text = list(rivals.lines(rivals.Case("demo", "nvfp4", Path()), results))
    cells = [[cell.strip() for cell in line.split("|")] for line in text if line.startswith("| ")]
    assert [line[1] for line in cells[1:]] == ["nemoquant `default`", "Model Optimizer `max`"]
    assert cells[1][3:5] == ["", ""]
    assert cells[2][3:5] == ["+33.3% +- 0.0%", "+37.5% +- 12.5%"]  # of 0.04, by 0.02 and 0.01
    assert cells[2][2] == "0.04000 +- 0.01000" and cells[2][5:7] == ["85.00%", "20.086"]
    assert text[-1] == "- Model Optimizer `awq_lite`: `KeyError: x`"


class TestModelOptimizer:
    pytestmark = MARKS

    @pytest.mark.parametrize("separate", [False, True])
    def test_the_loaded_model_is_the_reference(self, separate: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        """Over more than a chunk, where transformers' own scan is wrong."""
        mixer = of("nemotron_h").NemotronHMamba2Mixer
        monkeypatch.setattr(mixer, "forward", mixer.forward)  # which the script replaces: it comes back
        source = rivals.CALIB / "nano_model"
        ids = np.random.default_rng(0).integers(3, 2048, (1, 200))
        wanted = rivals.source_logits(source, ids)[0].double()
        with torch.no_grad():
            found = (
                of("nemotron_h").load(str(source), separate)(torch.from_numpy(ids), use_cache=False).logits
            )
        assert torch.allclose(torch.log_softmax(found.double(), -1), wanted, atol=1e-3)

    def test_blocks_are_rounded_as_the_kernels_do(self) -> None:
        """Block scales from the blocks' own maxima are the format's; so are those that are given."""
        peer = of("rival_modelopt")
        x = torch.randn(64, 96, generator=torch.Generator().manual_seed(0)).bfloat16().float()
        x[0, :16] = torch.tensor([6, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5] * 2)  # ties
        wanted, _ = fake_quantize(x, "nvfp4", nvfp4.global_decode_scale(float(x.abs().max())))
        assert torch.equal(peer.dynamic_blocks(x, 16, x.abs().max()), wanted)
        amax = x.reshape(-1, 16).abs().amax(-1)
        assert torch.equal(peer.static_blocks(x, amax, x.abs().max()), wanted)
