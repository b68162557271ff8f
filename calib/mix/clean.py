"""What is no text to calibrate on: licences, addresses, secrets, and what was taken already."""

import re

SHINGLE = 8  # words; two texts that share one have very likely a common source
MAX_SHARED = 0.15  # of a piece's shingles found in pieces already taken
MAX_HELD_OUT = 0.02  # of a calibration piece's shingles found in the evaluation text
UNWANTED = (
    re.compile(r"copyright|licen[cs]e|all rights reserved|spdx-", re.IGNORECASE),
    re.compile(r"[\w.+-]+@[\w-]+\.[\w.-]+"),  # an e-mail address
    re.compile(r"://[^/\s:]+:[^/\s@]+@"),  # a URL with a password
    re.compile(r"-----BEGIN |AKIA[0-9A-Z]{16}|\bgh[pousr]_\w{20}|\bsk-\w{20}"),
    re.compile(r"(?=[A-Za-z+/]*\d)(?=[a-z\d+/]*[A-Z])(?=[A-Z\d+/]*[a-z])[A-Za-z0-9+/]{40}"),  # base64, keys
    re.compile(r"(?:[0-9a-fA-F]{2}){20}"),  # digests
    re.compile(r"\S{120}"),  # minified code
)
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\ufeff\ufffd]")


def wanted(text: str) -> bool:
    """Whether a piece is text without any of these."""
    return not any(pattern.search(text) for pattern in UNWANTED) and not CONTROL.search(text)


def tidy(text: str) -> str:
    """Without spaces at the ends of lines, at most one empty line in a row."""
    text = re.sub(r"[ \t\f]+$", "", text.replace("\r\n", "\n").replace("\f", ""), flags=re.MULTILINE)
    return re.sub(r"\n{3,}", "\n\n", text).strip("\n")


def shingles(text: str) -> set[tuple[str, ...]]:
    """All runs of ``SHINGLE`` words, case and punctuation aside."""
    words = re.findall(r"[a-z0-9]+", text.lower())
    return {tuple(words[i : i + SHINGLE]) for i in range(len(words) - SHINGLE + 1)}


class Taken:
    """What has been taken; a piece that repeats it is refused."""

    def __init__(self, held_out: set[tuple[str, ...]] | None = None) -> None:
        self.seen: set[tuple[str, ...]] = set()
        self.held_out = held_out or set()

    def take(self, text: str) -> bool:
        own = shingles(text)
        size = max(1, len(own))
        if len(own & self.seen) > MAX_SHARED * size or len(own & self.held_out) > MAX_HELD_OUT * size:
            return False
        self.seen |= own
        return True
