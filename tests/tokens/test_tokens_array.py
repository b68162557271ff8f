"""The header of an .npy file is a stranger's: nothing in it is run, and no memory is given for its word."""

import numpy as np
import pytest

from nemoquant.errors import CalibrationError
from nemoquant.tokens.array import read_array

IDS = np.array([[1, 2, 3], [4, 5, 6]], np.int64)
DATA = IDS.tobytes()


@pytest.fixture
def written(tmp_path):
    """An .npy file whose header is any text."""

    def write(header, data=DATA, version=b"\x01\x00"):
        text = header.encode("latin-1")
        size = len(text).to_bytes(2 if version[0] == 1 else 4, "little")
        (tmp_path / "x.npy").write_bytes(b"\x93NUMPY" + version + size + text + data)
        return read_array(tmp_path / "x.npy")

    return write


@pytest.mark.parametrize("version", [b"\x01\x00", b"\x02\x00", b"\x03\x00"])
@pytest.mark.parametrize("order", [False, True])
def test_arrays_as_numpy_writes_them(version, order, written):
    text = f"{{'descr': '<i8', 'fortran_order': {order}, 'shape': (2, 3), }}\n"
    ids = written(text, IDS.tobytes("F" if order else "C"), version)
    assert ids.tolist() == IDS.tolist() and ids.dtype == np.int64


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, ">i4", np.uint64])
def test_integers_of_any_kind(dtype, tmp_path):
    np.save(tmp_path / "x.npy", IDS.astype(dtype))
    assert read_array(tmp_path / "x.npy").tolist() == IDS.tolist()


@pytest.mark.parametrize(
    "header",
    [
        "",
        "{",
        "{}",
        "3",
        "[" * 5000,
        "(" * 200,
        '"""',
        "__import__('os').getpid()",
        "{'descr': '<i8', 'fortran_order': False, 'shape': (2, 3), 'more': 1}",
        "{'descr': '<i8', 'fortran_order': 'no', 'shape': (2, 3)}",
        "{'descr': '<i8', 'fortran_order': False, 'shape': [2, 3]}",
        "{'descr': '<i8', 'fortran_order': False, 'shape': ('2', 3)}",
        "{'descr': '<i8', 'fortran_order': False, 'shape': (-2, 3)}",
        "{'descr': '<i8', 'fortran_order': False, 'shape': (2, 1e9)}",
        "{'descr': '<i8', 'fortran_order': False, 'shape': (1000000000, 1000000000)}",
        "{'descr': '<i8', 'fortran_order': False, 'shape': (9223372036854775807, 9223372036854775807)}",
        "{'descr': '<i8', 'fortran_order': False, 'shape': (2, 4)}",
        f"{{'descr': '<i8', 'fortran_order': False, 'shape': (1{'0' * 5000}, 1)}}",
        "{'descr': 'x', 'fortran_order': False, 'shape': (2, 3)}",
        "{'descr': 'O', 'fortran_order': False, 'shape': (2, 3)}",
        "{'descr': [('a', '<i8')], 'fortran_order': False, 'shape': (2, 3)}",
        "{'descr': '<f8', 'fortran_order': False, 'shape': (2, 3)}",
        "{'descr': '<i8', 'fortran_order': False, 'shape': ()}",
        "{'descr': '<i8', 'fortran_order': False, 'shape': (0, 3)}",
        "{'descr': '<i8L', 'fortran_order': False, 'shape': (2L, 3L)}",
    ],
)
@pytest.mark.parametrize("version", [b"\x01\x00", b"\x02\x00"])
def test_headers_that_are_refused(header, version, written, capfd):
    with pytest.raises(CalibrationError) as error:
        written(header, version=version)
    assert "x.npy cannot be read as a numpy array (" in str(error.value) or "x.npy holds " in str(error.value)
    assert str(error.value).endswith("expected integers [rows, length]")
    assert "\n" not in str(error.value) and len(str(error.value)) < 600
    assert capfd.readouterr().err == ""


def test_more_ids_than_are_read(written, tmp_path):
    """A file of nothing but a size: its ids took eight times as much memory."""
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': (1, {1 << 40}), }}"
    with pytest.raises(CalibrationError, match="cannot be read"):
        written(header, b"")
    with (tmp_path / "x.npy").open("ab") as file:
        file.truncate((1 << 40) + 1000)
    with pytest.raises(CalibrationError) as error:
        read_array(tmp_path / "x.npy")
    assert str(error.value) == (
        f"{tmp_path / 'x.npy'} holds 1,099,511,627,776 token ids of shape [1, 1099511627776]; expected at "
        f"most 67,108,864"
    )
