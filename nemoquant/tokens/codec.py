"""Text to tokens and back, with the tokenizer and chat template of a checkpoint."""

from pathlib import Path

from nemoquant.model.parse import load_config
from nemoquant.tokens.rows import check_ids
from nemoquant.tokens.template import ChatTemplate
from nemoquant.tokens.tokenizer import decode, encode, ends, load_tokenizer


class TextCodec:
    """The tokenizer and the chat template of a checkpoint folder.

    Raises CalibrationError if the folder has no readable tokenizer, ConfigError if it has no config.
    """

    def __init__(self, model: Path) -> None:
        self.model = model
        self.config, _ = load_config(model)
        self.tokenizer = load_tokenizer(model)
        self._ends = ends(self.tokenizer)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, with those that the tokenizer puts at its ends, as transformers gives them.

        Raises CalibrationError if some are not in the model's vocabulary.
        """
        return self._checked([*self._ends.before, *encode(self.tokenizer, text), *self._ends.after])

    def chat(self, text: str) -> list[int]:
        """Token ids of one user message in the chat template, up to where the answer begins.

        The template has all special tokens: the tokenizer adds none, as in transformers.

        Raises CalibrationError if the template can't be used; or see :meth:`encode`.
        """
        with ChatTemplate(self.model, add_generation_prompt=True) as template:
            said = template.render([{"role": "user", "content": text}], "the prompt")
        return self._checked(encode(self.tokenizer, said))

    def _checked(self, ids: list[int]) -> list[int]:
        check_ids(ids, self.config, "the prompt")
        return ids

    def decode(self, ids: list[int]) -> str:
        """The text of token ids, without special tokens."""
        return decode(self.tokenizer, ids)
