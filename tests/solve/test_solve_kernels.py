"""The sources that a kernel's name stands for."""

from support.places import PACKAGE

from nemoquant.solve.kernels import FILES


def test_all_files_with_kernels_are_hashed():
    """A file that is left out would keep stale machine code in use after an edit."""
    having = {path.name for path in (PACKAGE / "solve").glob("*.py") if "kernel\ndef " in path.read_text()}
    assert {*having, "kernels.py"} == set(FILES)
