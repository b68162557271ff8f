"""A tokenizer whose ids can be counted by hand, next to the synthetic checkpoint."""

import json
from pathlib import Path

import pytest

WORDS = [
    "<unk>",
    "<s>",
    "</s>",
    "a",
    "b",
    "c",
    "d",
    "e",
    "[user]",
    "[assistant]",
]  # id = index; eos is 2, as in the config
TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m['content'] }} {% endfor %}"


@pytest.fixture
def model(source: Path) -> Path:
    """The base checkpoint with a word-level tokenizer and a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(source / "tokenizer.json"))
    (source / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<s>", "eos_token": {"content": "</s>"}})
    )
    (source / "chat_template.jinja").write_text(TEMPLATE)
    return source
