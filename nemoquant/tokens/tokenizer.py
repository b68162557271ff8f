"""The tokenizer of a checkpoint: read within bounds, and its library's panics as errors.

The library (``tokenizers``, in Rust) ends some files in a panic, which prints a backtrace and is no Exception
of Python; and a file of a few bytes can make any amount of text of each character.
"""

import os
import threading
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from nemoquant.errors import CalibrationError, brief
from nemoquant.files import MOST_TABLE_ENTRIES, parse_json, read_text
from nemoquant.tokens.declared import FLAGS, added_tokens, splits_special_tokens

MOST_BYTES = 128 << 20  # of the file: real ones have up to some tens of megabytes
MOST_CHARS = 4096  # of a token, or of what replaces another text: real ones have up to some hundreds
MOST_GROWTH = (
    16  # bytes of which one becomes: the library takes some 200 for each, of 65,536 and more at a time
)
MOST_PARTS = 64  # of all steps, each of which goes through the text: real ones have some
MOST_ADDED = 64  # to a text, by the post-processor: real ones add one or two
MOST_PROBES = 1000  # texts that are tried, until one has a token
_standard_error = threading.Lock()  # for who has put a file in its place


def load_tokenizer(model: Path) -> Any:
    """The tokenizer of a checkpoint folder, a ``tokenizers.Tokenizer`` that gives transformers' ids.

    It knows the tokens that tokenizer_config.json alone declares. It neither cuts texts nor pads them,
    whatever the file says: transformers does it when it is asked only.

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
        text = read_text(file, MOST_BYTES)
        _check(parse_json(text, entries=MOST_TABLE_ENTRIES))
        with _panics():
            tokenizer = Tokenizer.from_str(text)
            _add_declared(tokenizer, model)
    except CalibrationError:  # of tokenizer_config.json
        raise
    except Exception as error:  # the library raises bare Exception
        raise CalibrationError(f"{file} cannot be read as a tokenizer ({error})") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = splits_special_tokens(model)
    return tokenizer


def _add_declared(tokenizer: Any, model: Path) -> None:
    """Add the tokens that tokenizer_config.json declares and tokenizer.json lacks, or has otherwise."""
    from tokenizers import AddedToken

    known = {token.content: repr(token) for token in tokenizer.get_added_tokens_decoder().values()}
    for text, flags in added_tokens(model):
        _check_chars(text)
        token = AddedToken(text, **flags)
        if text not in known or (len(flags) == len(FLAGS) and repr(token) != known[text]):
            tokenizer.add_tokens([token])


class Ends(NamedTuple):
    """Token ids that a tokenizer's post-processor puts before and after a text, such as ``<s>``."""

    before: list[int]
    after: list[int]


def ends(tokenizer: Any) -> Ends:
    """What transformers adds to a text that is no conversation.

    A tokenizer.json says it, and nothing else: transformers 5 does not look at ``add_bos_token`` beside one.

    Raises CalibrationError if the post-processor does something else, or adds very many.
    """
    if tokenizer.post_processor is None:
        return Ends([], [])
    with _failing("split a text"), _panics():
        texts = ["a", *islice(sorted(tokenizer.get_vocab()), MOST_PROBES)]
        plain = ((text, tokenizer.encode(text, add_special_tokens=False).ids) for text in texts)
        probe, ids = next(((text, ids) for text, ids in plain if ids), ("", []))
        whole = tokenizer.encode(probe, add_special_tokens=True)
    mask = whole.special_tokens_mask
    at = mask.index(0) if 0 in mask else len(mask)
    found = Ends(whole.ids[:at], whole.ids[at + len(ids) :])
    expected = [1] * len(found.before) + [0] * len(ids) + [1] * len(found.after)
    if mask != expected or whole.ids[at : at + len(ids)] != ids or len(mask) - len(ids) > MOST_ADDED:
        raise CalibrationError(
            f"the post-processor in tokenizer.json makes {len(whole.ids):,} tokens of {len(ids):,}; expected "
            f"at most {MOST_ADDED} more, before and after the text"
        )
    return found


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text, without special tokens.

    Raises CalibrationError if the tokenizer fails.
    """
    with _failing("split a text"), _panics():
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids


def decode(tokenizer: Any, ids: list[int]) -> str:
    """The text of token ids, without special tokens.

    Raises CalibrationError if the tokenizer fails.
    """
    with _failing("make a text of tokens"), _panics():
        text: str = tokenizer.decode(ids, skip_special_tokens=True)
    return text


def _check(data: Any) -> None:
    """Bounds for the text that tokens and replacements make.

    Raises:
        ValueError: names what is not within them.
    """
    if not isinstance(data, dict):
        raise ValueError(f"it holds a JSON {type(data).__name__}, not an object")
    growth = 1
    parts = [p for name in ("normalizer", "pre_tokenizer", "decoder") for p in _parts(data.get(name))]
    if len(parts) > MOST_PARTS:
        raise ValueError(f"it has {len(parts):,} steps; expected at most {MOST_PARTS}")
    for part in parts:
        if part.get("type") == "Precompiled":
            raise ValueError("it has a `Precompiled` normalizer, which no tokenizer of this family has")
        if part.get("type") == "Replace":
            growth *= _growth(part)
        for name in ("content", "prepend"):
            _check_chars(part.get(name))
    if growth > MOST_GROWTH:
        raise ValueError(
            f"its replacements make up to {brief(growth)} bytes of one; expected at most {MOST_GROWTH}"
        )
    for part in _parts(data.get("post_processor")):
        single = part.get("single")
        times = str(single).count("'Sequence'") if isinstance(single, list) else str(single).count("$")
        if times > 1:
            raise ValueError(f"its post-processor repeats a text {times:,} times; expected once")
    model, added = data.get("model"), data.get("added_tokens")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    for token in vocabulary if isinstance(vocabulary, dict | list) else ():
        _check_chars(token[0] if isinstance(token, list) and token else token)
    for entry in added if isinstance(added, list) else ():
        _check_chars(entry.get("content") if isinstance(entry, dict) else None)


def _growth(replace: dict[str, Any]) -> int:
    """How many times as long a text can become by a ``Replace``.

    A regex, or an empty text, can match between any two characters. Another step may decompose what comes in.
    """
    made = len(unicodedata.normalize("NFKD", str(replace.get("content"))).encode())
    pattern = replace.get("pattern")
    text = pattern.get("String") if isinstance(pattern, dict) else None
    return max(1, -(-made // len(text.encode()))) if isinstance(text, str) and text else 1 + made


def _check_chars(text: object) -> None:
    if isinstance(text, str) and len(text) > MOST_CHARS:
        raise ValueError(f"{brief(text)} has {len(text):,} characters; expected at most {MOST_CHARS:,}")


def _parts(part: Any) -> Iterator[dict[str, Any]]:
    """The parts of a normalizer, a pre-tokenizer or a decoder: those of a sequence, or it alone."""
    if not isinstance(part, dict):
        return
    yield part
    for inner in part.values():
        if isinstance(inner, list):
            for one in inner:
                yield from _parts(one)


@contextmanager
def _failing(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the library raises bare Exception
        raise CalibrationError(
            f"the tokenizer can't {what} ({error}); is its tokenizer.json damaged?"
        ) from None


@contextmanager
def _panics() -> Iterator[None]:
    """Makes a panic a ValueError, and keeps its backtrace from standard error.

    What others write there meanwhile is written afterwards. One thread at a time: the second would take the
    first one's file for standard error, and leave it there.
    """
    with _standard_error, _held():
        yield


@contextmanager
def _held() -> Iterator[None]:
    try:
        kept = os.dup(2)
    except OSError:  # there is none: in its place, so that the panic's text has somewhere to go
        kept = os.open(os.devnull, os.O_WRONLY)
    held, panic = os.memfd_create("stderr"), None
    try:
        os.dup2(held, 2)
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # its class can't be imported
            raise
        panic = str(error)
    finally:
        os.dup2(kept, 2)
        size = os.lseek(held, 0, os.SEEK_END)
        if panic is None and size:
            with suppress(OSError):
                os.write(2, os.pread(held, size, 0))
        os.close(held)
        os.close(kept)
    if panic is not None:
        raise ValueError(panic)
