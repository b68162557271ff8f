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

from nemoquant.errors import CalibrationError, listing
from nemoquant.tokens.chat import Conversation, with_joined_parts
from nemoquant.tokens.declared import DEFAULT, TOOL_USE, chat_templates, special_tokens
from nemoquant.tokens.unusable import DocumentError

PROCESSOR_SECONDS = 10  # for one document; an honest template takes milliseconds
SECONDS = 60  # the same, where the machine is busy
ALL_PROCESSOR_SECONDS = 600  # for all documents
MEMORY = 512 << 20  # bytes beyond what the interpreter takes: messages, text and their JSON
CHARACTERS = 16 << 20  # of the text
WORKER = Path(__file__).with_name("template_worker.py")


class ChatTemplate:
    """A checkpoint's chat templates; a context manager, which ends the process.

    Raises CalibrationError if there is none or they can't be read.
    """

    def __init__(self, model: Path, *, add_generation_prompt: bool = False) -> None:
        self._templates = chat_templates(model)
        self._always = special_tokens(model)
        self._asked = {"tools": None, "documents": None, "add_generation_prompt": add_generation_prompt}
        self._model = model
        self._takes_parts: dict[str, bool] = {}  # by the names of templates that were compiled
        libraries = [find_spec(name) for name in ("jinja2", "markupsafe")]
        first = {
            "path": [str(Path(spec.origin).parent.parent) for spec in libraries if spec and spec.origin],
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
            self._send(json.dumps(first))
            if DEFAULT in self._templates:
                self._compile(DEFAULT)
        except BaseException:
            self.close()
            raise

    def _compile(self, name: str) -> None:
        question = json.dumps({"name": name, "source": self._templates[name]})
        try:
            self._takes_parts[name] = self._ask(question, str(self._model)) == "parts"
        except DocumentError as error:
            raise CalibrationError(f"{self._model}: its chat template cannot be read ({error})") from None

    def _name(self, tools: object) -> str:
        """The template of a conversation, as transformers chooses it."""
        name = TOOL_USE if tools is not None and TOOL_USE in self._templates else DEFAULT
        if name not in self._templates:
            raise CalibrationError(
                f"{self._model} has the chat templates {listing(sorted(self._templates))} and no "
                f"{DEFAULT!r}; name one of them {DEFAULT}"
            )
        if name not in self._takes_parts:
            self._compile(name)
        return name

    def converse(self, conversation: Conversation, where: str) -> str:
        """The text of a conversation; lists of text parts become text where the template takes that alone.

        Args:
            where: the document, for errors.
        Raises:
            DocumentError: the template refuses the conversation; without its place.
            CalibrationError: it exceeds a limit, or there is no template for it.
        """
        name = self._name(conversation.tools)
        messages = conversation.messages
        if not self._takes_parts[name]:
            messages = with_joined_parts(messages)
        beside = {"tools": conversation.tools, "documents": conversation.documents}
        return self._render(name, messages, beside | conversation.variables, where)

    def render(self, messages: list[Any], where: str) -> str:
        """The text of messages, which are JSON and are given as they are.

        Args:
            where: the document, for errors.
        Raises:
            CalibrationError: the template refuses the messages or exceeds a limit.
        """
        try:
            return self._render(self._name(None), messages, {}, where)
        except DocumentError as error:
            raise CalibrationError(f"{where}: {error}") from None

    def _render(self, name: str, messages: list[Any], more: dict[str, Any], where: str) -> str:
        variables = {**self._always, **self._asked, **more, "messages": messages}
        try:
            question = json.dumps({"name": name, "variables": variables}, ensure_ascii=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise DocumentError(
                f"`messages` can't be given to a chat template ({error}); expected text, numbers, lists and "
                f"objects"
            ) from None
        try:
            return self._ask(question, where)
        except DocumentError as error:
            raise DocumentError(f"the chat template refuses its messages ({error})") from None

    def _send(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line.encode("utf-8", "surrogatepass") + b"\n")
        self._process.stdin.flush()

    def _ask(self, question: str, where: str) -> str:
        """The text that the process answers; DocumentError has the reason where jinja raises."""
        assert self._process.stdout is not None
        line = b""
        try:
            self._send(question)
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
            raise DocumentError(answer["refused"])
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
        return chat_templates(model).get(DEFAULT, "")
    except CalibrationError:
        return ""
