"""The file in which solved weights wait: whole records come back, half ones and damaged ones do not."""

import numpy as np
import pytest

from nemoquant.errors import OutputError
from nemoquant.formats.arithmetic import Encoded
from nemoquant.planning.row import Row
from nemoquant.solve.store import Record, SolvedFile, Stored


def row(name: str, number: str = "nvfp4") -> Row:
    return Row(
        name=name,
        role="experts.up_proj",
        layer=1,
        expert=0,
        shape=(4, 32),
        source_dtype="BF16",
        format=number,
        scale_method="gptq",
        activation_format=None,
        weight_group=None,
        input_group=None,
        reason="",
    )


ROWS = [row("a.weight"), row("b.weight", "fp8")]


def stored(name: str, seed: int) -> Stored:
    random = np.random.default_rng(seed)
    if name == "a.weight":
        codes, blocks = (random.integers(0, 255, shape, np.uint8) for shape in ((4, 16), (4, 2)))
    else:
        codes, blocks = random.integers(0, 126, (4, 32), np.uint8), None
    record = Record(name, "gptq", 7, gram="0" * 32, scale=0.1, objective=0.25, plain=0.5, error=0.125)
    return Stored(record, Encoded(codes, blocks))


@pytest.fixture
def path(tmp_path):
    file = SolvedFile(tmp_path / "solved.1", ROWS)
    file.append("one", [stored("a.weight", 0)])
    file.append("two", [stored("b.weight", 1)])
    file.close()
    return tmp_path / "solved.1"


def test_weights_come_back(path):
    file = SolvedFile(path, ROWS)
    assert file.has("one") and file.has("two") and not file.has("three")
    for name, seed in (("a.weight", 0), ("b.weight", 1)):
        expected, found = stored(name, seed), file.get(name)
        assert found.record == expected.record
        np.testing.assert_array_equal(found.encoded.codes, expected.encoded.codes)
        if expected.encoded.block_scales is None:
            assert found.encoded.block_scales is None
        else:
            np.testing.assert_array_equal(found.encoded.block_scales, expected.encoded.block_scales)


def test_half_a_record_is_cut_off_wherever_it_ends(path):
    data, rows = path.read_bytes(), ROWS
    first = len(data)
    for cut in range(first - 1, 0, -37):
        path.write_bytes(data[:cut])
        file = SolvedFile(path, rows)
        assert not file.has("two")
        file.append("two", [stored("b.weight", 1)])
        assert file.has("two") and file.get("b.weight").record.name == "b.weight"
        if file.has("one"):
            assert path.read_bytes() == data
        file.close()


def test_a_flipped_bit_is_found(path):
    data, refused = path.read_bytes(), 0
    whole = SolvedFile(path, ROWS)
    digest = whole.digest
    whole.close()
    for at in range(0, len(data), 11):
        damaged = bytearray(data)
        damaged[at] ^= 4
        path.write_bytes(damaged)
        file = SolvedFile(path, ROWS)
        try:
            names = [record.name for record in file.records]
            if file.digest != digest or sorted(names) != ["a.weight", "b.weight"]:
                refused += 1  # the state names another digest
                continue
            with pytest.raises(OutputError, match=r"solved\.1 is damaged: a record is not what was written"):
                [file.get(name) for name in names]
            refused += 1
        finally:
            file.close()
    assert refused == len(range(0, len(data), 11))
