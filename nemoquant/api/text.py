"""Text from a checkpoint."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from nemoquant import arguments, bars
from nemoquant.api.model import found
from nemoquant.arguments import PathLike
from nemoquant.engine import ENGINES, EngineName
from nemoquant.progress import Progress


@dataclass(frozen=True, repr=False)
class Generated:
    """Result of ``generate``.

    Attributes:
        text: what follows the prompt.
        tokens: its token ids, without the end-of-sequence token.
        prompt_tokens: number of tokens of the prompt.
        seconds: from the loaded engine to the last token.
        drafted, accepted: tokens that multi-token prediction drafted, and those that the model would have
            chosen too; 0 without ``mtp``.
        engine: what ran it.
        warnings: files that were used and are not in the checkpoint's manifest; and where the language model
            is a part of another, that it alone was run.
    """

    text: str
    tokens: tuple[int, ...]
    prompt_tokens: int
    seconds: float
    drafted: int
    accepted: int
    engine: EngineName
    warnings: tuple[str, ...] = ()

    def summary(self) -> str:
        """Counts and speed in one line."""
        count = len(self.tokens)
        line = (
            f"{self.engine}: {self.prompt_tokens} tokens in, {count} out, {self.seconds:.1f} s "
            f"({count / self.seconds:.1f} tokens/s)"
        )
        if self.drafted:
            line += (
                f"; {self.accepted} of {self.drafted} drafts accepted ({self.accepted / self.drafted:.1%})"
            )
        return line

    def __repr__(self) -> str:
        text = self.text if len(self.text) <= 60 else self.text[:60] + "..."
        return f"Generated({text!r}; {self.summary()})"

    def __str__(self) -> str:
        return self.text


def generate(
    path: PathLike,
    prompt: str,
    *,
    chat: bool = False,
    engine: EngineName = "torch",
    engine_file: PathLike | None = None,
    plugins: PathLike | None = None,
    max_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    mtp: int = 0,
    threads: int | None = None,
    download: bool = False,
    ready: Callable[[], None] | None = None,
    stream: Callable[[str], None] | None = None,
    progress: Progress | Literal[False] | None = None,
    say: Callable[[str], None] | None = None,
) -> Generated:
    """Generate text with the checkpoint in ``path``, quantized or not; a folder, or a name on the hub.

    It ends at the model's end-of-sequence tokens, or after ``max_tokens``. A checkpoint that nemoquant wrote
    is held against its manifest first; a damaged one is refused.

    Args:
        prompt: text to go on from.
        chat: the prompt is what a user says: put it through the chat template.
        engine: what runs it: ``torch``, ``onnxruntime``, ``rtx`` or ``trt``.
        engine_file: what ``export_engine`` wrote, for ``rtx`` and ``trt``.
        plugins: the plugin library of ``trt``; None is where ``nemoquant plugins build`` puts it.
        temperature: 0 takes the likeliest token, a positive number draws from the distribution.
        seed: of the draws.
        mtp: tokens to draft at a time with the multi-token-prediction module; greedy only.
        threads: None is all that this process may use.
        download: of a name on the hub, fetch what its cache lacks; without it nothing reaches a network.
        ready: called when the engine is loaded and the prompt fits, before the first token.
        stream: called with each piece of new text as soon as its characters are complete.
        progress: of hashing the shards. None shows it in a terminal or notebook; False shows nothing; a
            function is called with it.
        say: called with a line of text before the shards are hashed.
    Raises:
        NemoquantError: any of its kinds; see errors.py.
    """
    arguments.check_text("prompt", prompt)
    arguments.check_word("engine", engine, ENGINES)
    arguments.check_flags(chat=chat)
    arguments.check_functions(ready=ready, stream=stream, say=say)
    showing = bars.shown(progress)
    max_tokens = arguments.whole("max_tokens", max_tokens, 1)
    seed = arguments.whole("seed", seed, 0, arguments.MOST_SEED)
    mtp = arguments.whole("mtp", mtp, 0)
    threads = arguments.threads(threads)
    temperature = arguments.temperature(temperature)
    file = arguments.optional_path("engine_file", engine_file)
    library = arguments.optional_path("plugins", plugins)
    folder = found("path", path, download=download, say=say, progress=progress)
    from nemoquant.checkpoint.intact import open_settings, unlisted
    from nemoquant.engine.generate import Drafts, Sampler, check_call, stop_tokens
    from nemoquant.engine.generate import generate as new_tokens
    from nemoquant.engine.load import load_engine
    from nemoquant.model.parse import load_config
    from nemoquant.tokens.codec import TextCodec
    from nemoquant.tokens.declared import FILES, TEMPLATE_FILES

    signed = open_settings(folder)
    used = ["tokenizer.json", "generation_config.json", *FILES, *(TEMPLATE_FILES if chat else ())]
    warnings = [] if signed is None else unlisted(folder, signed, used)
    config, _ = load_config(folder)
    if config.prefix:
        warnings.append("its language model alone is run, on text; what stands beside it is not")
    codec = TextCodec(folder)
    ids = codec.chat(prompt) if chat else codec.encode(prompt)
    stop, sampler = stop_tokens(folder, config), Sampler(temperature, seed)
    with showing as report:
        loaded = load_engine(
            engine,
            folder,
            threads,
            file,
            library,
            say=say or (lambda text: None),
            progress=report,
            admit=lambda known: check_call(known, ids, max_tokens=max_tokens, sampler=sampler, mtp=mtp),
        )
    drafts, began, before = Drafts(), time.monotonic(), codec.decode(ids)
    new = new_tokens(
        loaded,
        ids,
        max_tokens=max_tokens,
        stop=stop,
        sampler=sampler,
        mtp=mtp,
        drafts=drafts,
    )
    if ready is not None:
        ready()
    tokens: list[int] = []
    text = shown = ""
    for token in new:
        tokens.append(token)
        text = codec.decode(ids + tokens)[len(before) :]
        if not text.endswith("\ufffd"):  # a character of several tokens is shown when it is complete
            if stream is not None:
                stream(text[len(shown) :])
            shown = text
    return Generated(
        text=text,
        tokens=tuple(tokens),
        prompt_tokens=len(ids),
        seconds=time.monotonic() - began,
        drafted=drafts.drafted,
        accepted=drafts.accepted,
        engine=engine,
        warnings=tuple(warnings),
    )
