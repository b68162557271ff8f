"""Text to tokens and back, with the tokenizer and chat template of a checkpoint."""

from pathlib import Path
from typing import Any

from nemoquant.errors import CalibrationError
from nemoquant.tokens.template import ChatTemplate

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
        return encode(self.tokenizer, text)

    def chat(self, text: str) -> list[int]:
        """Token ids of one user message in the chat template, up to where the answer begins.

        Raises CalibrationError if the template can't be used.
        """
        with ChatTemplate(self.model, add_generation_prompt=True) as template:
            return self.encode(template.render([{"role": "user", "content": text}], "the prompt"))

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


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text, without special tokens."""
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids
