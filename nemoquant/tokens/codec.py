"""Text to tokens and back, with the tokenizer and chat template of a checkpoint."""

from pathlib import Path

from nemoquant.model.parse import load_config
from nemoquant.tokens.rows import check_ids
from nemoquant.tokens.template import ChatTemplate
from nemoquant.tokens.tokenizer import decode, encode, load_tokenizer


class TextCodec:
    """The tokenizer and the chat template of a checkpoint folder.

    Raises CalibrationError if the folder has no readable tokenizer, ConfigError if it has no config.
    """

    def __init__(self, model: Path) -> None:
        self.model = model
        self.config, _ = load_config(model)
        self.tokenizer = load_tokenizer(model)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens.

        Raises CalibrationError if some are not in the model's vocabulary.
        """
        ids = encode(self.tokenizer, text)
        check_ids(ids, self.config, "the prompt")
        return ids

    def chat(self, text: str) -> list[int]:
        """Token ids of one user message in the chat template, up to where the answer begins.

        Raises CalibrationError if the template can't be used; or see :meth:`encode`.
        """
        with ChatTemplate(self.model, add_generation_prompt=True) as template:
            return self.encode(template.render([{"role": "user", "content": text}], "the prompt"))

    def decode(self, ids: list[int]) -> str:
        """The text of token ids, without special tokens."""
        return decode(self.tokenizer, ids)
