"""Conversations out of questions and answers, dialogues, and code with its description."""

import ast
import re
from collections.abc import Iterable, Iterator
from itertools import zip_longest

from clean import tidy
from extract import HEADING, LEAST, PIECE, html, page

Pair = tuple[str, str]  # what the user says, and the answer
Messages = list[dict[str, str]]
QUESTION = re.compile(r"\?$|^(?:how|why|what|when|where|is|are|can|do|does|should|which|i) ", re.IGNORECASE)
SPEECH = re.compile(r"^([A-Z][A-Z .'&]+)\.\n(.+?)(?=\n\n|\Z)", re.MULTILINE | re.DOTALL)
STAGE = re.compile(r"\[[^\]]*\]")
MOST_TURNS = 8  # pairs of a conversation


def messages(pairs: Iterable[Pair]) -> Messages:
    """The form that a chat template takes."""
    return [
        {"role": role, "content": text}
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]


def conversations(pairs: Iterable[Pair]) -> Iterator[Messages]:
    """Pairs that follow one another, as conversations of about ``PIECE`` characters."""
    held: list[Pair] = []
    for pair in pairs:
        size = sum(map(len, pair))
        if held and (sum(len(q) + len(a) for q, a in held) + size > PIECE or len(held) == MOST_TURNS):
            yield messages(held)
            held = []
        if size <= 1.5 * PIECE:
            held.append(pair)
    if held and sum(len(q) + len(a) for q, a in held) >= LEAST:
        yield messages(held)


def faq(text: str) -> Iterator[Messages]:
    """A page of frequently asked questions in reStructuredText: headings ask, what follows answers."""
    text = page(text)
    found = list(HEADING.finditer(text))
    pairs = []
    for heading, after in zip_longest(found, found[1:]):
        question = heading["title"].strip()
        answer = tidy(text[heading.end() : after.start() if after else None])
        if QUESTION.search(question) and len(answer) > 80:
            pairs.append((question.replace("``", "`"), re.sub(r"::$", ":", answer, flags=re.MULTILINE)))
    return conversations(pairs)


def sqlite_faq(text: str) -> Iterator[Messages]:
    """The same of SQLite's page, where questions are numbered."""
    _, *parts = re.split(r"^\(\d+\) ", html(text), flags=re.MULTILINE)
    return conversations(
        (question.replace("\n", " ").strip(), tidy(answer))
        for question, _, answer in (part.partition("\n\n") for part in parts)
        if answer.strip()
    )


def dialogues(play: str) -> Iterator[Messages]:
    """Stretches of a play in which two people take turns."""
    for scene in re.split(r"^(?:ACT|SCENE)\b.*$", play.replace("\r\n", "\n"), flags=re.MULTILINE):
        speeches: list[Pair] = []
        for who, said in SPEECH.findall(scene):
            said = re.sub(r"\s*\n\s*", "\n", STAGE.sub("", said)).strip()
            if said and speeches and speeches[-1][0] == who:
                speeches[-1] = (who, f"{speeches[-1][1]}\n{said}")
            elif said:
                speeches.append((who, said))
        yield from _turns(speeches)


def _turns(speeches: list[Pair]) -> Iterator[Messages]:
    start = 0
    while start < len(speeches) - 3:
        end, two = start + 2, {speeches[start][0], speeches[start + 1][0]}
        while end < len(speeches) and speeches[end][0] in two:
            end += 1
        lines = [said for _, said in speeches[start:end]]
        if len(lines) >= 4:
            yield from conversations(zip(lines[::2], lines[1::2], strict=False))
        start = max(end - 1, start + 1)


def about_code(text: str) -> Iterator[Messages]:
    """Functions of a Python file: one is to be explained, the next to be written."""
    lines, number = text.splitlines(), 0
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.FunctionDef) or node.col_offset or len(node.body) < 2:
            continue  # methods need their class to be understood
        doc = ast.get_docstring(node)
        if doc is None or not 150 <= len(doc) <= PIECE:
            continue
        first = node.body[0]
        assert first.end_lineno is not None
        head = lines[node.lineno - 1 : first.lineno - 1]
        source = tidy("\n".join(head + lines[first.end_lineno : node.end_lineno]))
        if not 100 <= len(source) <= 1500:
            continue
        number += 1
        if number % 2:
            yield messages([(f"What does this function do?\n\n```python\n{source}\n```", tidy(doc))])
        else:
            task = f"Write a Python function `{node.name}` that does this:\n\n{tidy(doc)}"
            yield messages([(task, f"```python\n{source}\n```")])
