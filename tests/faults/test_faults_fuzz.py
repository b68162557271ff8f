"""A short slice of the fuzzer over every parser; ``python -m tests.faults --long`` runs the whole."""

import pytest

from tests.faults import fuzz
from tests.faults.mutations import NASTY, places, replaced
from tests.faults.parsers import PARSERS

CASES, SEED = 500, 14


def test_a_damaged_file_is_refused_or_read_but_never_more_than_that(tmp_path):
    results = fuzz.run(CASES, SEED, folder=tmp_path)
    print(fuzz.table(results))
    assert [line for result in results for line in result.failures] == []
    assert {r.parser for r in results} == PARSERS.keys()
    assert sum(r.cases for r in results) >= CASES - len(PARSERS)
    assert all(r.errors for r in results if r.cases > 20), "damage is seen, and is said in an error"


def test_a_case_is_the_same_bytes_again():
    good = b'{"a": [1, {"b": "x"}], "c": null}'
    first = [fuzz.case("index", good, 3, number) for number in range(400)]
    assert [fuzz.case("index", good, 3, number) for number in range(400)] == first
    assert [fuzz.case("index", good, 4, number) for number in range(400)] != first


def test_every_leaf_gets_every_nasty_value_before_chance_takes_over():
    good = b'{"a": [1, {"b": "x"}], "c": null}'
    tree = PARSERS["index"].codec.load(good)
    paths = list(places(tree))
    assert paths == [(), ("a",), ("a", 0), ("a", 1), ("a", 1, "b"), ("c",)]
    cases = {fuzz.case("index", good, 7, n) for n in range(2 * len(paths) * len(NASTY))}
    for path in paths:
        for value in NASTY:
            assert PARSERS["index"].codec.dump(replaced(tree, path, value), good) in cases


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("raises", "KeyError at parsers.py"),
        ("panics", "BaseException at parsers.py"),
        ("speaks", "on standard error: b'thread panicked'"),
        ("dies", "ended its process: exit code 3"),
        ("hangs", "hangs: ended after 4 s"),
        ("hoards", "takes 1,342 MB"),
        ("devours", "MemoryError at parsers.py"),
    ],
)
def test_the_fuzzer_finds_what_it_looks_for(name, what, tmp_path):
    [result] = fuzz.run(1, 1, [name], tmp_path, patience=4 if name == "hangs" else fuzz.PATIENCE)
    assert [what in line for line in result.failures] == [True], result.failures
    assert result.failures[0].startswith(f"{name}, seed 1, case 0: ")
    assert result.cases == 1 and "  1  " in fuzz.table([result])
