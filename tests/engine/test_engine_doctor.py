"""The report of ``doctor`` on this machine."""

import importlib.util
import json
from pathlib import Path

import pytest
from support.commands import nemoquant

from nemoquant.engine import doctor
from nemoquant.engine.targets import Gpu
from nemoquant.ops import proven
from nemoquant.ops.built import Built
from nemoquant.ops.sources import sources_hash

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed (extra: rtx)"
)


def test_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    """One line for each engine, with a reason; fewer engines where packages are hidden."""

    def found() -> dict[str, dict[str, object]]:
        return {entry["name"]: entry for entry in json.loads(nemoquant("doctor", "--json").stdout)}

    whole = found()
    assert list(whole) == ["machine", "torch", "onnxruntime", "rtx", "trt", "plugins"]
    assert all(entry["why"] for entry in whole.values())
    assert (whole["onnxruntime"]["runs"], whole["rtx"]["builds"]) == (True, True)
    assert whole["trt"]["builds"] is False
    table = nemoquant("doctor").stdout
    assert all(name in table for name in whole)
    monkeypatch.setattr(doctor, "_version", lambda *packages: None)
    hidden = found()
    assert (hidden["onnxruntime"]["runs"], hidden["rtx"]["builds"]) == (False, False)
    assert "nemoquant[ort]" in str(hidden["onnxruntime"]["why"])
    assert "nemoquant[rtx]" in str(hidden["rtx"]["why"])


def test_the_plugins_say_which_kernels_torch_takes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Those that no GPU of this kind has run are built, and not used unless they are named."""
    built = Built("0", sources_hash(), False, ("90a",), (), None, {"libnemoquant_kernels.so": ""})
    monkeypatch.setattr(doctor, "missing", lambda: None)
    monkeypatch.setattr(doctor, "read_built", lambda folder: built)
    monkeypatch.setattr(proven, "PROVEN", ())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("NEMOQUANT_KERNELS", raising=False)
    found = doctor.plugins(Gpu("a stand-in", 90))
    assert found.why.endswith(
        "for sm_90a; torch: no GPU of SM 90 has run causal_conv1d, mamba2_scan, routed_experts yet: torch "
        f"computes; NEMOQUANT_KERNELS={tmp_path}/nemoquant/plugins/libnemoquant_kernels.so takes the kernels"
    )
    monkeypatch.setenv("NEMOQUANT_KERNELS", "none")
    assert doctor.plugins(Gpu("a stand-in", 90)).why.endswith("for sm_90a; torch: NEMOQUANT_KERNELS=none")
    monkeypatch.delenv("NEMOQUANT_KERNELS")
    rows = tuple(proven.Proof(op, (9, 0), "made") for op in proven.OPERATORS)
    monkeypatch.setattr(proven, "PROVEN", rows)
    assert doctor.plugins(Gpu("a stand-in", 90)).why.endswith("for sm_90a")


def test_plugins_for_another_device_do_not_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What the library says itself when it is named; naming it is no way out."""
    built = Built("0", sources_hash(), False, ("120f",), (), None, {"libnemoquant_kernels.so": ""})
    monkeypatch.setattr(doctor, "missing", lambda: None)
    monkeypatch.setattr(doctor, "read_built", lambda folder: built)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = doctor.plugins(Gpu("a stand-in", 90))
    assert (found.builds, found.runs) == (True, False)
    assert found.why == (
        f"{tmp_path}/nemoquant/plugins was built for sm_120f, not for this device, SM 90; "
        "`nemoquant plugins build` makes them"
    )
    assert doctor.plugins(Gpu("a stand-in", 75)).why.endswith(
        "not for this device, SM 75; nor is what `nemoquant plugins build` makes by default"
    )
    assert doctor.plugins(Gpu("a stand-in", 121)).runs
