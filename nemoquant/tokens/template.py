"""The chat template of a checkpoint, rendered in a process of its own.

A template is a stranger's program. Jinja's sandbox keeps it away from files and from Python, but not from
the processor and the memory: ``{{ 'x' * 10 ** 10 }}`` is one call of C, which no timer of this process could
interrupt, and a limit of this process would be one of the whole run. So one more interpreter renders, one for
all documents of a run, with limits that the system holds it to. It imports jinja and nothing else, which
takes 0.1 s, and is no fork: this process may have threads.
"""

import json
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

from nemoquant.errors import CalibrationError
from nemoquant.files import parse_json, read_text

PROCESSOR_SECONDS = 10  # for one document; an honest template takes milliseconds
SECONDS = 60  # the same, where the machine is busy
ALL_PROCESSOR_SECONDS = 600  # for all documents
MEMORY = 512 << 20  # bytes beyond what the interpreter takes: messages, text and their JSON
CHARACTERS = 16 << 20  # of the text
WORKER = Path(__file__).with_name("template_worker.py")


class ChatTemplate:
    """A checkpoint's chat template; a context manager, which ends the process.

    Raises CalibrationError if there is no template or it can't be read.
    """

    def __init__(self, model: Path, *, add_generation_prompt: bool = False) -> None:
        source, variables = _read(model)
        libraries = [find_spec(name) for name in ("jinja2", "markupsafe")]
        first = {
            "path": [str(Path(spec.origin).parent.parent) for spec in libraries if spec and spec.origin],
            "template": source,
            "variables": variables | {"add_generation_prompt": add_generation_prompt},
            "processor_seconds": PROCESSOR_SECONDS,
            "seconds": SECONDS,
            "all_processor_seconds": ALL_PROCESSOR_SECONDS,
            "memory": MEMORY,
            "characters": CHARACTERS,
        }
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(WORKER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
        except OSError as error:
            raise CalibrationError(
                f"{model}: its chat template needs a process of its own, which can't be started ({error}); "
                f"give `text` instead of `messages`"
            ) from None
        try:
            self._ask(json.dumps(first), str(model), "its chat template cannot be read")
        except BaseException:
            self.close()
            raise

    def render(self, messages: list[Any], where: str) -> str:
        """The text of messages, which are JSON.

        Args:
            where: the document, for errors.
        Raises:
            CalibrationError: the template refuses the messages or exceeds a limit.
        """
        try:
            question = json.dumps(messages, ensure_ascii=False)
        except (TypeError, RecursionError) as error:
            raise CalibrationError(
                f"{where}: `messages` can't be given to a chat template ({error}); expected text, numbers, "
                f"lists and objects"
            ) from None
        return self._ask(question, where, "the chat template refuses its messages")

    def _ask(self, question: str, where: str, refused: str) -> str:
        """The text that the process answers; ``refused`` is said where jinja raises."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        line = b""
        try:
            self._process.stdin.write(question.encode("utf-8", "surrogatepass") + b"\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline(6 * CHARACTERS + 100)  # \u0000: six bytes a character
        except BrokenPipeError:
            pass  # it has ended, the reason is below
        if not line.endswith(b"\n"):
            self._process.kill()
            raise _beyond(where, self._process.wait())
        answer: dict[str, str] = json.loads(line)
        if "beyond" in answer:
            raise _beyond(where, answer["beyond"])
        if "refused" in answer:
            raise CalibrationError(f"{where}: {refused} ({answer['refused']})")
        try:
            answer["text"].encode("utf-8")
        except UnicodeEncodeError:
            raise _beyond(where, "surrogates") from None
        return answer["text"]

    def close(self) -> None:
        """End the process; a second time does nothing."""
        self._process.kill()
        self._process.communicate()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _beyond(where: str, limit: str | int) -> CalibrationError:
    """The error for what no honest template does; ``limit`` may be the exit code of its process."""
    what = {
        "memory": f"takes more than {MEMORY >> 20} MiB of memory",
        "characters": f"makes more than {CHARACTERS:,} characters",
        "surrogates": "makes half of a surrogate pair, which is no character",
        -signal.SIGPROF: f"takes more than {PROCESSOR_SECONDS} s of processor time",
        -signal.SIGALRM: f"takes more than {SECONDS} s",
        -signal.SIGXCPU: f"takes more than {ALL_PROCESSOR_SECONDS} s of processor time for all documents",
    }.get(limit, f"ended its process (exit code {limit})")
    return CalibrationError(
        f"{where}: the chat template {what}; a template formats messages and needs little: is it this "
        f"model's?"
    )


def template_source(model: Path) -> str:
    """The source of a model's chat template; empty where it has none that can be read."""
    try:
        return _read(model)[0]
    except CalibrationError:
        return ""


def _read(model: Path) -> tuple[str, dict[str, str]]:
    """The template's source, and the names of special tokens that it may use."""
    file, settings = model / "chat_template.jinja", model / "tokenizer_config.json"
    try:
        names = parse_json(read_text(settings)) if settings.exists() else {}
    except (OSError, ValueError) as error:
        raise CalibrationError(f"{settings} cannot be read ({error}); expected JSON") from None
    if not isinstance(names, dict):
        raise CalibrationError(f"{settings} is a JSON {type(names).__name__}; expected an object")
    try:
        source = read_text(file) if file.exists() else names.get("chat_template")
    except (OSError, ValueError) as error:
        raise CalibrationError(f"{file} cannot be read ({error}); expected a template in UTF-8") from None
    if not isinstance(source, str):
        raise CalibrationError(
            f"{model} has no chat template; `messages` need chat_template.jinja, or give `text`"
        )
    tokens: dict[str, str] = {}
    for name in ("bos_token", "eos_token"):
        value = names.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            tokens[name] = text
        elif value:
            raise CalibrationError(
                f"{settings}: {name} is {value!r:.200}; expected text, or an object with text as `content`"
            )
    return source, tokens
