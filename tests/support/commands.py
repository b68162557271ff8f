"""Runs the command line in this process, and checks its refusals."""

from click.testing import CliRunner, Result

from nemoquant.cli import main


def invoke(*arguments: object) -> Result:
    """Runs ``nemoquant ARGUMENTS``, with any result."""
    return CliRunner().invoke(main, [str(a) for a in arguments])


def nemoquant(*arguments: object, code: int = 0) -> Result:
    """The same with an expected exit code; an error must be a message, never a traceback."""
    result = invoke(*arguments)
    assert result.exit_code == code, (result.output, result.exception)
    if code:
        assert isinstance(result.exception, SystemExit), f"a message, not a traceback: {result.exception!r}"
    return result


def check_parts(parts: list[str], text: str) -> None:
    """Checks that all parts are in the text."""
    missing = [part for part in parts if part not in text]
    assert not missing, f"{missing} not in {text}"


def refusal(*arguments: object, parts: list[str] = [], code: int = 2) -> str:  # noqa: B006
    """A call that is refused: nothing on standard output, one line with these parts on standard error."""
    result = nemoquant(*arguments, code=code)
    assert result.stdout == ""
    return error_line(result.stderr, parts)


def error_line(text: str, parts: list[str] = []) -> str:  # noqa: B006
    """The only line ``error: ...`` of standard error, which must have these parts."""
    lines = text.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: "), lines
    check_parts(parts, lines[0])
    return lines[0]
