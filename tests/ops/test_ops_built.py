"""``build.json``: what a build writes is read as it was; what it would not write is refused in one line."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from nemoquant.errors import BuildError
from nemoquant.ops import build
from nemoquant.ops.built import read_built

WRITTEN = build.Built(
    "0.1", "ab" * 32, False, ("80", "100f"), ("90a",), None, {"libnemoquant_kernels.so": "c"}
)


def test_it_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert read_built(tmp_path) is None
    assert read_built(tmp_path / "none") is None
    (tmp_path / "build.json").write_text(json.dumps(asdict(WRITTEN) | {"of a later version": 1}))
    found = read_built(tmp_path)
    assert found is not None and asdict(found) == asdict(WRITTEN)
    assert read_built(tmp_path, host=True) is None
    (tmp_path / "build_host.json").write_text(
        json.dumps(asdict(WRITTEN) | {"host": True, "tensorrt": "10.1"})
    )
    found = read_built(tmp_path, host=True)
    assert found is not None and (found.host, found.tensorrt) == (True, "10.1")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"sources": 5}, "`sources` is of another kind"),
        ({"host": "yes"}, "`host` is of another kind"),
        ({"architectures": "80"}, "`architectures` is of another kind"),
        ({"gemm_architectures": [90]}, "`gemm_architectures` is of another kind"),
        ({"tensorrt": 10}, "`tensorrt` is of another kind"),
        ({"libraries": ["a"]}, "`libraries` is of another kind"),
    ],
)
def test_fields_of_another_kind(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    (tmp_path / "build.json").write_text(json.dumps(asdict(WRITTEN) | change))
    with pytest.raises(BuildError, match=rf"build.json is not what .* writes \({says}\); remove it"):
        read_built(tmp_path)


@pytest.mark.parametrize(
    ("text", "says"),
    [("{}", "`nemoquant` is missing"), ("[]", "no object"), ("{", ".+"), ("[" * 99999, ".+")],
)
def test_files_that_no_build_wrote(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "build.json").write_text(text)
    with pytest.raises(BuildError, match=rf"build.json is not what .* writes \({says}\); remove it"):
        read_built(tmp_path)


def test_a_folder_in_its_place(tmp_path: Path) -> None:
    (tmp_path / "build.json").mkdir()
    with pytest.raises(BuildError, match=r"build.json can't be read \(.*\); set XDG_CACHE_HOME"):
        read_built(tmp_path)
