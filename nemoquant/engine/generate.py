"""Text from a checkpoint, token by token, by any engine: greedy or sampled, with or without MTP drafts."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count, islice, takewhile
from pathlib import Path
from typing import Any

import numpy as np

from nemoquant.engine.base import Engine, Floats, Step
from nemoquant.errors import CheckpointError, EngineError, UsageError, brief
from nemoquant.files import MOST_SETTINGS, read_json
from nemoquant.model.config import NemotronHConfig
from nemoquant.model.parse import MOST_SIZE

MODULE = "the multi-token-prediction module"


@dataclass
class Drafts:
    """Number of drafted tokens, and of those that the main model would have chosen too."""

    drafted: int = 0
    accepted: int = 0

    @property
    def rate(self) -> float | None:
        return self.accepted / self.drafted if self.drafted else None


@dataclass
class Sampler:
    """Chooses a token from logits [vocabulary]: the likeliest (ties to the lower id), or a sample.

    A sample is drawn at ``temperature`` from a generator with ``seed``.
    """

    temperature: float = 0.0
    seed: int = 0
    generator: np.random.Generator = field(init=False)

    def __post_init__(self) -> None:
        if not (np.isfinite(self.temperature) and self.temperature >= 0):
            raise UsageError(f"--temperature {self.temperature}: expected 0 (greedy) or a positive number")
        self.generator = np.random.default_rng(self.seed)

    def __call__(self, logits: Floats, place: int = 0, what: str = "the model") -> int:
        """The token; ``place`` (from 0) among the new ones, and ``what`` gave the logits, are for messages.

        Raises:
            EngineError: there is a NaN or Inf among the logits, which have no likeliest token then.
        """
        bad = np.count_nonzero(~np.isfinite(logits))
        if bad:
            raise EngineError(
                f"{what} computes NaN or Inf: {bad:,} of the {logits.size:,} logits of new token "
                f"{place + 1}; expected finite ones, is the checkpoint damaged? `nemoquant verify` checks "
                f"its files, `nemoquant diff` names the layer"
            )
        if not self.temperature:
            return int(logits.argmax())
        # the largest of logits / T plus Gumbel noise is a sample of the softmax
        noise = self.generator.gumbel(size=logits.shape)
        return int((logits.astype(np.float64) / self.temperature + noise).argmax())


def stop_tokens(path: Path, config: NemotronHConfig) -> set[int]:
    """The eos tokens of generation_config.json, else of config.json.

    Raises:
        CheckpointError: generation_config.json can't be read.
    """
    file = path / "generation_config.json"
    try:
        settings = read_json(file, MOST_SETTINGS)
    except FileNotFoundError:
        settings = {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}); expected JSON") from None
    if not isinstance(settings, dict):
        raise CheckpointError(f"{file} holds a JSON {type(settings).__name__}; expected an object")
    eos = settings.get("eos_token_id")
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(type(i) is int and 0 <= i <= MOST_SIZE for i in ids):
        raise CheckpointError(
            f"{file}: `eos_token_id` is {brief(eos)}; expected a token id or a list of them"
        )
    return set(ids) or set(config.eos_token_ids)


def generate(
    engine: Engine,
    prompt: list[int],
    *,
    max_tokens: int,
    stop: set[int],
    sampler: Sampler,
    mtp: int = 0,
    drafts: Drafts | None = None,
) -> Iterator[int]:
    """Checks the call, and returns an iterator of new tokens; a stop token ends it and is not yielded.

    Args:
        mtp: number of tokens to draft at a time and verify in one call, at most ``max_tokens``; greedy only.
        drafts: counts drafted and accepted tokens.
    Raises:
        UsageError: see :func:`check_call`. While iterating, EngineError: the model computes NaN.
    """
    check_call(engine, prompt, max_tokens=max_tokens, sampler=sampler, mtp=mtp)
    tokens = (
        _plain(engine, prompt, sampler)
        if not mtp
        else _drafted(engine, prompt, sampler, min(mtp, max_tokens), drafts or Drafts())
    )
    return islice(takewhile(lambda token: token not in stop, tokens), max_tokens)


def check_call(engine: Engine, prompt: list[int], *, max_tokens: int, sampler: Sampler, mtp: int) -> None:
    """Make sure that an engine admits a call of :func:`generate`; nothing is computed.

    Raises:
        UsageError: no prompt, more tokens than the engine admits, or drafts where the engine has none or with
            a temperature.
    """
    if not prompt:
        raise UsageError("the prompt holds no tokens; give some text")
    if mtp and not engine.has_mtp:
        raise UsageError(
            f"the {engine.name} engine has no multi-token prediction here; export with --mtp, or leave out "
            f"--mtp"
        )
    longest = len(prompt) + max_tokens + mtp
    if engine.max_seq_len is not None and longest > engine.max_seq_len:
        raise UsageError(
            f"{len(prompt)} tokens of the prompt and {max_tokens + mtp} new ones (drafts included) are "
            f"{longest}; the {engine.name} engine was "
            f"built for {engine.max_seq_len}: ask for fewer with --max-tokens, or build it again with a "
            f"larger --max-seq-len"
        )
    if mtp and sampler.temperature:
        raise UsageError("--mtp verifies greedily; leave out --temperature")


def _ids(tokens: list[int]) -> Any:
    return np.array([tokens], np.int64)


def _plain(engine: Engine, prompt: list[int], sampler: Sampler) -> Iterator[int]:
    step = engine.forward(_ids(prompt))
    for place in count():
        token = sampler(step.logits[0, -1], place)
        yield token
        step = engine.forward(_ids([token]), step.state)


def _drafted(engine: Engine, prompt: list[int], sampler: Sampler, most: int, drafts: Drafts) -> Iterator[int]:
    """Drafts ``most`` tokens after each chosen one, and verifies all in one call of the main model.

    The scan's state can't be cut back: where a draft is rejected, the accepted tokens run once more from the
    state before. The module's own cache contains the hidden state of every accepted position; drafts run
    ahead on a copy.
    """
    step = engine.forward(_ids(prompt))
    token = sampler(step.logits[0, -1])
    yield token
    pending_hidden, pending_tokens = _hidden(step), [*prompt[1:], token]
    module_state: Any = None
    made = 1
    while True:
        # positions whose next token is known by now; the draft starts from the last of them
        caught_up = engine.draft(_ids(pending_tokens), pending_hidden, module_state)
        module_state = caught_up.state
        guesses = [sampler(caught_up.logits[0, -1], made, MODULE)]
        ahead = caught_up
        while len(guesses) < most:
            ahead = engine.draft(_ids(guesses[-1:]), _hidden(ahead)[:, -1:], ahead.state)
            guesses.append(sampler(ahead.logits[0, -1], made + len(guesses), MODULE))
        checked = engine.forward(_ids([token, *guesses]), step.state)
        chosen = [sampler(checked.logits[0, i], made + i) for i in range(len(guesses) + 1)]
        agreed = next((i for i, guess in enumerate(guesses) if guess != chosen[i]), len(guesses))
        drafts.drafted += len(guesses)
        drafts.accepted += agreed
        kept = [token, *guesses[:agreed]]
        step = checked if agreed == len(guesses) else engine.forward(_ids(kept), step.state)
        new = [*guesses[:agreed], chosen[agreed]]
        yield from new
        made += len(new)
        pending_hidden, pending_tokens = _hidden(step), new
        token = new[-1]


def _hidden(step: Step) -> Floats:
    assert step.hidden is not None
    return step.hidden
