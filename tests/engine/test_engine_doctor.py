"""The report of ``doctor`` on this machine."""

import importlib.util
import json

import pytest
from support.commands import nemoquant

from nemoquant.engine import doctor

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
