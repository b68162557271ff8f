"""The file of folds: written and read back, and what it refuses."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file
from support.small_model import small_config

from nemoquant.errors import CheckpointError, HeaderError
from nemoquant.model.roles import tensor_table
from nemoquant.solve.files import FOLDS
from nemoquant.solve.folds import file
from nemoquant.solve.folds.layer import compose, expert_transforms, gate_transforms, latent_transforms
from nemoquant.solve.folds.transform import Transform

CONFIG, _ = small_config()
MOE, MAMBA = CONFIG.layers.index("moe"), CONFIG.layers.index("mamba")


@pytest.fixture
def folds():
    rng = np.random.default_rng(0)
    n = CONFIG.moe_latent_size
    m = (np.eye(n) + 0.1 * rng.standard_normal((n, n))).astype(np.float32)
    return compose(
        latent_transforms(CONFIG, MOE, m, np.linalg.inv(m)),
        expert_transforms(CONFIG, MOE, "experts.3", np.arange(-20, 20).astype(np.int8)),
        gate_transforms(CONFIG, MAMBA, np.arange(CONFIG.mamba_inner).astype(np.int8)),
    )


def test_round_trip(folds, tmp_path):
    path = tmp_path / FOLDS
    file.save(path, folds)
    loaded = file.load(path)
    file.check(path, loaded, tensor_table(CONFIG))
    assert loaded.keys() == folds.keys()
    for name, fold in folds.items():
        for part in file.PARTS:
            expected, found = getattr(fold, part), getattr(loaded[name], part)
            assert (expected is None) == (found is None)
            if expected is not None:
                assert found.dtype == expected.dtype
                np.testing.assert_array_equal(found, expected)


def test_experts_share_one_matrix(folds, tmp_path):
    """512 experts of a layer would have gigabytes of it."""
    path = tmp_path / FOLDS
    file.save(path, folds)
    loaded = file.load(path)
    shared = {id(fold.right) for fold in loaded.values() if fold.right is not None}
    assert len(shared) == 1
    assert path.stat().st_size < 3 * 4096 + 3 * 4 * CONFIG.moe_latent_size**2
    again = tmp_path / "again"
    file.save(again, loaded)
    assert again.read_bytes() == path.read_bytes()


def test_a_file_that_is_there_stays(folds, tmp_path):
    path = tmp_path / FOLDS
    path.write_text("mine")
    with pytest.raises(FileExistsError):
        file.save(path, folds)
    assert path.read_text() == "mine"


SQUARE = np.eye(4, dtype=np.float32)
EIGHT = np.zeros(4, np.int8)


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        ({"a|up": EIGHT}, {}, r"'a\|up' has an array of int8 \[4\]; expected <tensor>\|rows"),
        ({"a": EIGHT}, {}, "expected <tensor>"),
        ({"|rows": EIGHT}, {}, "expected <tensor>"),
        ({"a|rows": EIGHT.astype(np.int16)}, {}, r"'a\|rows' has dtype I16; expected I8 exponents"),
        ({"a|rows": SQUARE[0]}, {}, r"float32 \[4\]; expected <tensor>"),
        ({"a|rows": np.zeros((4, 4), np.int8)}, {}, r"int8 \[4, 4\]; expected"),
        ({"a|left": SQUARE[:3]}, {}, r"float32 \[3, 4\]; expected"),
        (
            {"a|left": np.full((4, 4), np.inf, np.float32)},
            {},
            r"'a\|left' holds NaN or Inf; expected finite numbers",
        ),
        ({"a|rows": EIGHT}, {"b|rows": "c|rows"}, r"metadata say that 'b\|rows' is 'c\|rows'"),
        ({"a|rows": EIGHT}, {"a|rows": "a|rows"}, "expected a part that is not stored"),
        ({"a|rows": EIGHT}, {"b|left": "a|rows"}, r"'b\|left' has an array of int8"),
    ],
)
def test_what_is_refused(tensors, metadata, message, tmp_path):
    path = tmp_path / FOLDS
    save_file(tensors, path, metadata=metadata or None)
    with pytest.raises(CheckpointError, match=message) as error:
        file.load(path)
    assert str(error.value).startswith(f"{FOLDS}: ")
    assert "write it again" in str(error.value)


def test_damaged_files(folds, tmp_path):
    path = tmp_path / FOLDS
    file.save(path, folds)
    data = path.read_bytes()
    for damaged in (data[:-1], data[:100], b"", data + b"x"):
        path.write_bytes(damaged)
        with pytest.raises(HeaderError):
            file.load(path)
    path.unlink()
    with pytest.raises(HeaderError, match="cannot be read"):
        file.load(path)


@pytest.mark.parametrize(
    ("name", "fold", "message"),
    [
        ("backbone.layers.99.norm.weight", Transform(rows=EIGHT), "which this model does not have"),
        ("backbone.layers.0.norm.weight", Transform(rows=EIGHT), r"shape \[4\], but the tensor has \[64\]"),
        ("backbone.layers.0.norm.weight", Transform(columns=np.zeros(64, np.int8)), "but the tensor has"),
        ("backbone.layers.1.mixer.o_proj.weight", Transform(right=SQUARE), r"has \[64, 96\]"),
    ],
)
def test_folds_of_another_model(name, fold, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        file.check(tmp_path / FOLDS, {name: fold}, tensor_table(CONFIG))


def test_the_layout_is_safetensors(folds, tmp_path):
    path = tmp_path / FOLDS
    digest = file.save(path, folds)
    assert len(digest) == 64
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    kinds = {key.rpartition("|")[2]: entry["dtype"] for key, entry in header.items() if key != "__metadata__"}
    assert kinds == {"rows": "I8", "columns": "I8", "left": "F32", "right": "F32"}


def test_too_much_is_refused_before_it_is_read(tmp_path, monkeypatch):
    path = tmp_path / FOLDS
    file.save(path, {"a": Transform(rows=EIGHT)})
    monkeypatch.setattr(file, "MOST_BYTES", EIGHT.size - 1)
    with pytest.raises(CheckpointError, match="4 bytes of folds; expected at most 3"):
        file.load(path)
