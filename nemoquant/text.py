"""Text to tokens and back, with the tokenizer and chat template of a checkpoint."""

from pathlib import Path

from nemoquant.calibrate.data import chat_template, load_tokenizer


class TextCodec:
    """Raises CalibrationError where the folder has no tokenizer that can be read."""

    def __init__(self, model: Path) -> None:
        self.model = model
        self.tokenizer = load_tokenizer(model)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def chat(self, text: str) -> list[int]:
        """What a user says, as the template puts it, with the answer about to begin."""
        render = chat_template(self.model, add_generation_prompt=True)
        return self.encode(render([{"role": "user", "content": text}], "the prompt"))

    def decode(self, ids: list[int]) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text
