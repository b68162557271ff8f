"""``nemoquant.generate``: its text, its tokens, what is streamed, and what it refuses."""

from pathlib import Path

import pytest
from support.commands import nemoquant as command
from support.tampering import overwrite, sign

import nemoquant
from nemoquant.engine.generate import Sampler, generate, stop_tokens
from nemoquant.engine.torch import TorchEngine
from nemoquant.tokens.codec import TextCodec

PROMPT = "The king said unto him, What"


@pytest.fixture(scope="module")
def folder(demo) -> Path:
    return demo("nvfp4-w4a16")


def test_text_tokens_and_pieces(folder):
    calls = []
    made = nemoquant.generate(
        str(folder),
        PROMPT,
        max_tokens=12,
        threads=1,
        ready=lambda: calls.append("ready"),
        stream=calls.append,
    )
    engine, codec = TorchEngine(folder), TextCodec(folder)
    ids, stop = codec.encode(PROMPT), stop_tokens(folder, engine.opened.config)
    expected = list(generate(engine, ids, max_tokens=12, stop=stop, sampler=Sampler()))
    assert made.tokens == tuple(expected)
    assert made.text == str(made) == codec.decode(ids + expected)[len(codec.decode(ids)) :]
    assert (made.prompt_tokens, made.engine, made.drafted) == (len(ids), "torch", 0)
    assert made.seconds > 0
    assert calls[0] == "ready"
    assert len(calls) > 6 and "".join(calls[1:]) == made.text
    assert nemoquant.generate(folder, PROMPT, max_tokens=12, threads=1).tokens == made.tokens


def test_drafts_and_chat(folder):
    plain = nemoquant.generate(folder, PROMPT, max_tokens=12, threads=1)
    drafted = nemoquant.generate(folder, PROMPT, max_tokens=12, mtp=2, threads=1)
    assert drafted.text == plain.text
    assert drafted.drafted > drafted.accepted >= 0
    chat = nemoquant.generate(folder, PROMPT, max_tokens=1, chat=True, threads=1)
    assert chat.prompt_tokens > plain.prompt_tokens


@pytest.mark.parametrize("name", ["chat_template.jinja", "generation_config.json"])
def test_files_beside_the_checkpoint_that_it_does_not_list(name, demo, copied):
    """They are used, as whoever put them there wants, and that is said."""
    folder = copied(demo("nvfp4-w4a16"), graphs=False)
    given = folder / name
    text = given.read_text()
    given.unlink()
    sign(folder)
    call = {"max_tokens": 1, "threads": 1}
    assert nemoquant.generate(folder, PROMPT, **call).warnings == ()
    given.write_text(text)
    warning = f"{given} is used and is not in nemoquant.json: nemoquant did not write it"
    plain = nemoquant.generate(folder, PROMPT, **call).warnings
    assert plain == (() if name == "chat_template.jinja" else (warning,)), "a template without a chat is not"
    shown = command("generate", folder, "--prompt", PROMPT, "--chat", "--max-tokens", 1, "--threads", 1)
    assert f"warning: {warning}\n" in shown.stderr


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"engine": "rtx"}, "--engine rtx needs the engine file"),
        ({"engine_file": "model.engine"}, "the engine torch reads none"),
        ({"mtp": 1, "temperature": 0.5}, "--mtp verifies greedily"),
        ({"prompt": ""}, "the prompt holds no tokens"),
    ],
)
def test_refusals_come_before_anything_is_read_or_shown(options, says, folder, unread):
    unread()
    shown = []
    with pytest.raises(nemoquant.UsageError, match=says):
        nemoquant.generate(folder, **{"prompt": PROMPT, **options}, ready=lambda: shown.append(1))
    assert shown == []


def test_a_model_that_computes_nan_says_nothing(demo, copied):
    """Its likeliest token would be the first NaN: an end-of-sequence token, or rubbish."""
    folder = copied(demo("mxfp8"))
    overwrite(folder, "backbone.layers.0.mixer.in_proj.weight_scale", lambda data: b"\xff" * len(data))
    sign(folder)
    with pytest.raises(
        nemoquant.EngineError,
        match=r"^the model computes NaN or Inf: 2,048 of the 2,048 logits of new token 1; expected finite",
    ):
        nemoquant.generate(folder, "The king", max_tokens=2)
