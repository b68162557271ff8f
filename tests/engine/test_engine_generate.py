"""``nemoquant generate``: the same text from every engine, with and without drafts, and refusals."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.commands import nemoquant
from support.tampering import sign

from nemoquant.engine.base import Step
from nemoquant.engine.generate import Drafts, Sampler, generate
from nemoquant.engine.torch import TorchEngine

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("onnxruntime") is None, reason="onnxruntime is not installed (extra: ort)"
)

PROMPT = "The king said unto him, What"


def run(folder: Path, *options: object, prompt: str = PROMPT, code: int = 0) -> Any:
    return nemoquant("generate", folder, "--prompt", prompt, "--threads", 1, *options, code=code)


@pytest.fixture(scope="module")
def folder(demo: Callable[[str], Path]) -> Path:
    """Weights only: no input is rounded at run time, so that runtimes agree."""
    return demo("nvfp4-w4a16")


@pytest.fixture(scope="module")
def expected(folder: Path) -> str:
    """The text that torch writes without drafts."""
    return str(run(folder, "--max-tokens", 24).stdout)


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--mtp", 1), ("--mtp", 2), ("--mtp", 3)], ids=str)
@pytest.mark.parametrize("engine", ["torch", "onnxruntime"])
def test_the_same_text_from_every_engine_with_drafts_or_without(
    engine: str, options: tuple[object, ...], folder: Path, expected: str
) -> None:
    assert expected.startswith(PROMPT)
    assert len(expected) > len(PROMPT) + 20
    result = run(folder, "--engine", engine, "--max-tokens", 24, *options)
    assert result.stdout == expected
    assert f"{engine}: 7 tokens in, 24 out, " in result.stderr
    assert ("drafts accepted (" in result.stderr) == bool(options)


def test_it_stops_at_the_end_of_sequence(folder: Path, copied: Callable[..., Path]) -> None:
    """At the third token, when that token is set as the end; it is not shown."""
    engine = TorchEngine(folder)
    tokens = list(generate(engine, [5, 6, 7], max_tokens=6, stop=set(), sampler=Sampler()))
    assert len(tokens) == 6
    third = next(i for i, t in enumerate(tokens) if i >= 2 and t not in tokens[:i])
    assert (
        list(generate(engine, [5, 6, 7], max_tokens=6, stop={tokens[third]}, sampler=Sampler()))
        == tokens[:third]
    )
    own = copied(folder)
    full = run(own, "--max-tokens", 8).stderr
    codes = TorchEngine(own).opened.config.eos_token_ids
    assert " 8 out" in full and codes
    from nemoquant.tokens.codec import TextCodec

    ids = TextCodec(own).encode(PROMPT)
    first = next(iter(generate(engine, ids, max_tokens=1, stop=set(), sampler=Sampler())))
    (own / "generation_config.json").write_text(json.dumps({"eos_token_id": [first]}))
    sign(own)
    assert " 0 out" in run(own, "--max-tokens", 8).stderr


def test_a_temperature_is_reproducible_by_its_seed(folder: Path) -> None:
    one, again, other = (
        run(folder, "--max-tokens", 16, "--temperature", 1.0, "--seed", seed).stdout for seed in (1, 1, 2)
    )
    assert one == again != other


def test_sampling_follows_the_distribution() -> None:
    """Two tokens with odds 3 to 1 at temperature 1, and 9 to 1 at 0.5.

    Shares of 20,000 draws are within four standard deviations.
    """
    logits = np.log(np.array([0.75, 0.25], np.float32))
    for temperature, share in ((1.0, 0.75), (0.5, 0.9)):
        sampler = Sampler(temperature, seed=3)
        found = np.mean([sampler(logits) == 0 for _ in range(20_000)])
        assert abs(found - share) < 4 * (share * (1 - share) / 20_000) ** 0.5


class Counting:
    """A fake engine whose next token is last + 1; its module guesses wrongly after tokens in ``wrong``.

    Its state is the list of tokens that it has processed, so that a state that was not cut back is detected.
    """

    name, has_mtp, max_seq_len = "fake", True, None

    def __init__(self, wrong: set[int]) -> None:
        self.wrong = wrong

    def forward(self, tokens: Any, state: Any = None) -> Step:
        before = state or []
        assert before == list(range(7, 7 + len(before))), "a rejected draft stayed in the state"
        assert not before or tokens[0, 0] == before[-1] + 1
        return Step(
            self._logits(tokens + 1), tokens[..., None].astype(np.float32), [*before, *tokens[0].tolist()]
        )

    def draft(self, tokens: Any, hidden: Any, state: Any = None) -> Step:
        assert tokens.shape == hidden.shape[:2]
        known = tokens[0] != 0  # the others are wrong guesses, from which it drafts further
        assert (hidden[0, :, 0] + 1 == tokens[0])[known].all(), "hidden states belong to the positions before"
        guess = np.where(np.isin(tokens, list(self.wrong)), 0, tokens + 1)
        return Step(self._logits(guess), tokens[..., None].astype(np.float32), (state or 0) + tokens.shape[1])

    def _logits(self, choice: Any) -> Any:
        return np.eye(1000, dtype=np.float32)[choice]

    def describe(self) -> dict[str, Any]:
        return {}


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize(
    "wrong", [set(), set(range(1000)), {13, 14, 20}], ids=["all right", "all wrong", "some wrong"]
)
def test_drafts_change_nothing(count: int, wrong: set[int]) -> None:
    drafts = Drafts()
    tokens = generate(
        Counting(wrong), [7, 8, 9], max_tokens=30, stop=set(), sampler=Sampler(), mtp=count, drafts=drafts
    )
    assert list(tokens) == list(range(10, 40))
    assert drafts.drafted > 0
    assert drafts.rate == {0: 1.0, 1000: 0.0}.get(len(wrong), drafts.rate)
    assert 0 <= drafts.accepted <= drafts.drafted


def test_refusals(
    folder: Path, copied: Callable[..., Path], tmp_path: Path, unread: Callable[[], None]
) -> None:
    """All of them before a shard is read."""
    unread()
    assert "the prompt holds no tokens" in run(folder, prompt="", code=2).stderr
    assert "leave out --temperature" in run(folder, "--mtp", 1, "--temperature", 1, code=2).stderr
    for value in (-1, "nan"):
        assert "'--temperature': " in run(folder, "--temperature", value, code=2).stderr
    for engine in ("rtx", "trt"):
        assert f"--engine {engine} needs the engine file" in run(folder, "--engine", engine, code=2).stderr
    assert "does not exist" in run(tmp_path / "nowhere", code=2).stderr
    bare = copied(folder, graphs=False)
    assert "nemoquant export onnx" in run(bare, "--engine", "onnxruntime", code=2).stderr
    (bare / "tokenizer.json").unlink()
    assert "tokenizer.json is missing; the manifest lists it" in run(bare, code=2).stderr
    without = copied(folder, "no mtp")
    (without / "mtp.onnx").unlink()
    refused = run(without, "--engine", "onnxruntime", "--mtp", 1, code=2).stderr
    assert "has no multi-token prediction here; export with --mtp" in refused


def test_chat_goes_through_the_template(folder: Path, copied: Callable[..., Path]) -> None:
    """The prompt ends where the answer begins."""
    own = copied(folder, graphs=False)
    (own / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt "
        "%}answer:{% endif %}"
    )
    sign(own)
    from nemoquant.tokens.codec import TextCodec

    codec = TextCodec(own)
    assert codec.chat("Hello") == codec.encode("user: Hello\nanswer:")
    assert (
        f"{len(codec.chat('Hello'))} tokens in, 4 out"
        in run(own, "--chat", "--max-tokens", 4, prompt="Hello").stderr
    )
