"""Text to tokens and back, with the tokenizer and chat template of a checkpoint."""

import json
from pathlib import Path
from typing import Any

from nemoquant.errors import CalibrationError

MOST_TOKENIZER = 128 << 20  # bytes: real ones have up to some tens of megabytes


class TextCodec:
    """The tokenizer and the chat template of a checkpoint folder.

    Raises CalibrationError if the folder has no readable tokenizer.
    """

    def __init__(self, model: Path) -> None:
        self.model = model
        self.tokenizer = load_tokenizer(model)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def chat(self, text: str) -> list[int]:
        """Token ids of one user message in the chat template, up to where the answer begins.

        Raises CalibrationError if the template can't be used.
        """
        render = chat_template(self.model, add_generation_prompt=True)
        return self.encode(render([{"role": "user", "content": text}], "the prompt"))

    def decode(self, ids: list[int]) -> str:
        """The text of token ids, without special tokens."""
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text


def load_tokenizer(model: Path) -> Any:
    """The tokenizer of a checkpoint folder, a ``tokenizers.Tokenizer``.

    Raises CalibrationError if it can't be read.
    """
    file = model / "tokenizer.json"
    if not file.exists():
        raise CalibrationError(
            f"{file} does not exist; text needs the model's tokenizer, or give token ids (.npy, or "
            f"`input_ids` in .jsonl)"
        )
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise CalibrationError(f"{file} cannot be read as a tokenizer ({error})") from None


def chat_template(model: Path, *, add_generation_prompt: bool = False) -> Any:
    """A function (messages, place for errors) -> text, from the checkpoint's chat template.

    It runs in jinja's sandbox, because a template comes from a stranger. Raises CalibrationError if there is
    no template or it can't be read; the function raises it if the template refuses the messages.
    """
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    file, settings = model / "chat_template.jinja", model / "tokenizer_config.json"
    try:
        names = json.loads(settings.read_text(encoding="utf-8")) if settings.exists() else {}
    except ValueError as error:
        raise CalibrationError(f"{settings} cannot be read ({error}); expected JSON") from None
    source = file.read_text(encoding="utf-8") if file.exists() else names.get("chat_template")
    if not isinstance(source, str):
        raise CalibrationError(
            f"{model} has no chat template; `messages` need chat_template.jinja, or give `text`"
        )
    # As in transformers: `break` and `continue` exist, and JSON is not escaped for HTML.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(
        value, ensure_ascii=False, indent=indent
    )
    tokens = {
        k: names[k]["content"] if isinstance(names[k], dict) else names[k]
        for k in ("bos_token", "eos_token")
        if names.get(k)
    }

    def refuse(message: str) -> None:
        raise TemplateError(message)

    try:
        compiled = environment.from_string(source)
    except TemplateError as error:
        raise CalibrationError(f"{model}: its chat template cannot be read ({error})") from None

    def render(messages: list[Any], where: str) -> str:
        try:
            return compiled.render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                raise_exception=refuse,
                **tokens,
            )
        except Exception as error:  # a template is a program, it or jinja can raise anything
            raise CalibrationError(f"{where}: the chat template refuses its messages ({error})") from None

    return render
