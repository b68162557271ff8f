"""Which columns of a row are its text: known names in an order of precedence, or those that the user named.

``SHAPES`` is that order; the first one whose column is there and not null is taken, row by row. A question
and its answer are a conversation for the model's chat template. docs/calibration.md has the table for users.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from nemoquant.errors import brief, listing
from nemoquant.tokens.chat import Conversation, from_json, messages_of
from nemoquant.tokens.unusable import DocumentError
from nemoquant.words import plain

Kind = Literal["ids", "conversation", "text", "turns"]
MASK = "attention_mask"
OPTION = "--calib-column (of diff: --data-column)"


@dataclass(frozen=True)
class Shape:
    """One way to keep a document in columns.

    Attributes:
        name: the column that must be there.
        context: columns whose text follows that of ``name`` in a question.
        answers: columns of the answer, the first that is there; a question without one is a conversation that
            ends with it.
    """

    kind: Kind
    name: str
    context: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()

    def used(self, row: Mapping[str, Any]) -> list[str]:
        """Its columns that this row has."""
        context = [name for name in self.context if row.get(name)]
        answers = [name for name in self.answers if row.get(name) is not None]
        return [self.name, *context, *answers[:1]]


SHAPES = (
    Shape("ids", "input_ids"),
    Shape("conversation", "messages"),
    Shape("conversation", "conversations"),
    Shape("conversation", "conversation"),
    Shape("text", "text"),
    Shape("turns", "prompt", (), ("completion", "response", "output", "answer", "chosen")),
    Shape("turns", "instruction", ("input", "context"), ("output", "response", "answer")),
    Shape("turns", "input", (), ("output",)),
    Shape("turns", "question", ("context",), ("answer", "response")),
    Shape("turns", "query", (), ("response", "answer")),
    Shape("turns", "problem", (), ("generated_solution", "solution", "answer")),
    Shape("text", "article"),
    Shape("text", "content"),
)
SYSTEM = ("system_prompt", "system")
VARIABLES: Mapping[str, type] = MappingProxyType(  # columns that templates know as variables
    {
        "enable_thinking": bool,
        "thinking": bool,
        "truncate_history_thinking": bool,
        "reasoning_effort": str,
    }
)
TEMPLATE = "chat_template_kwargs"
TAKEN = ("messages", "conversation", "chat_template", "tokenize", "return_dict", "continue_final_message")
BESIDE = (MASK, "tools", "documents", TEMPLATE, *SYSTEM, *VARIABLES)
KNOWN = frozenset((*BESIDE, *(name for s in SHAPES for name in (s.name, *s.context, *s.answers))))


@dataclass(frozen=True)
class Document:
    """A document, which is one of three things.

    Attributes:
        columns: what it was read from; empty where its columns are there and null.
        masked: token ids that its attention mask leaves out.
        others: columns that would have been a document too.
    """

    columns: str
    ids: list[int] | None = None
    text: str | None = None
    conversation: Conversation | None = None
    masked: int = 0
    others: tuple[str, ...] = ()


EMPTY = Document("", text="")


def is_document(row: Mapping[str, Any]) -> bool:
    """Whether an object has a column that is a document's."""
    return any(row.get(shape.name) is not None for shape in SHAPES)


def to_read(names: Sequence[str], given: Sequence[str]) -> list[str]:
    """The columns of a table that can matter; all where none is known, for a message that names them."""
    return [name for name in names if name in KNOWN or name in given] or list(names)


def documents_of(value: Any, given: Sequence[str] = ()) -> Iterator[Document]:
    """The documents in a row, an object, a text or a list: one, but for several rows of token ids.

    Args:
        given: columns that the user named, instead of the known ones.
    Raises:
        DocumentError: it holds none that can be used; without the row's place.
    """
    if isinstance(value, DocumentError):
        raise value
    if isinstance(value, str):
        yield Document("text", text=value)
    elif isinstance(value, list) and value:
        is_ids = isinstance(value[0], int | float | list)
        row = {"input_ids" if is_ids else "messages": value}
        yield from _of_shape(SHAPES[0 if is_ids else 1], row, ())
    elif not isinstance(value, dict):
        raise DocumentError(f"a JSON {type(value).__name__}, expected an object")
    elif given:
        yield from _named(value, given)
    else:
        fitting = [shape for shape in SHAPES if value.get(shape.name) is not None]
        if not fitting and any(shape.name in value for shape in SHAPES):
            yield EMPTY
            return
        if not fitting:
            kinds = [f"{key} ({type(inside).__name__})" for key, inside in sorted(value.items())]
            raise DocumentError(
                f"has {listing(kinds) or 'nothing'}; expected `text` (str), `messages` (list), `input_ids` "
                f"(list) or other known columns, or name them by {OPTION}"
            )
        yield from _of_shape(fitting[0], value, _rivals(fitting, value))


def _rivals(fitting: list[Shape], row: Mapping[str, Any]) -> tuple[str, ...]:
    """Columns that could as well be meant: not the beginning of a conversation that is there as a whole."""
    chosen = fitting[0]
    if chosen.kind == "ids":
        return ()
    used = chosen.used(row)
    return tuple(
        shape.name
        for shape in fitting[1:]
        if shape.name not in used and (chosen.kind == "text" or shape.kind in ("text", "conversation"))
    )


def _of_shape(shape: Shape, row: Mapping[str, Any], others: tuple[str, ...]) -> Iterator[Document]:
    if shape.kind == "ids":
        for ids, masked in _ids(row[shape.name], row.get(MASK), shape.name):
            yield Document(shape.name, ids=ids, masked=masked)
    elif shape.kind == "conversation":
        messages = messages_of(row[shape.name], shape.name)
        yield Document(shape.name, conversation=_conversation(messages, row, None), others=others)
    elif shape.kind == "text":
        if not isinstance(row[shape.name], str):
            raise DocumentError(
                f"has {shape.name} ({type(row[shape.name]).__name__}); expected `{shape.name}` (str)"
            )
        yield Document(shape.name, text=row[shape.name], others=others)
    else:
        used = shape.used(row)
        answer = used.pop() if used[-1] in shape.answers else None
        turns = _turns(row, used, answer)
        yield Document(" + ".join([*used, *([answer] if answer else [])]), conversation=turns, others=others)


def _turns(row: Mapping[str, Any], asked: Sequence[str], answer: str | None) -> Conversation:
    """A question, in one or several columns, and its answer; each is text or messages."""
    said = None if answer is None else row[answer]
    whole = _maybe_messages(said, answer or "")
    if whole and whole[0]["role"] != "assistant":  # of preferences: the answer repeats the question
        return _conversation(whole, row, None)
    begin = _maybe_messages(row[asked[0]], asked[0]) if len(asked) == 1 else None
    texts = [] if begin else [_text(row, name) for name in asked]
    question = "\n".join(text for text in texts if text)
    messages = begin or [{"role": "user", "content": question}]
    if whole:
        messages = messages + whole
    elif answer is not None:
        messages = [*messages, {"role": "assistant", "content": _text(row, answer)}]
    joined = None
    if not begin and not whole:
        joined = "\n".join(filter(None, [question, "" if answer is None else _text(row, answer)]))
    return _conversation(messages, row, joined)


def _maybe_messages(value: Any, name: str) -> list[dict[str, Any]] | None:
    """The messages of a list; None for what is none."""
    return messages_of(value, name) if isinstance(value, list) else None


def _text(row: Mapping[str, Any], name: str) -> str:
    if not isinstance(row[name], str):
        raise DocumentError(f"has {name} ({type(row[name]).__name__}); expected `{name}` (str)")
    text: str = row[name]
    return text


def _conversation(messages: list[dict[str, Any]], row: Mapping[str, Any], joined: str | None) -> Conversation:
    """A conversation with what the row has beside it for the chat template."""
    system = next((row[name] for name in SYSTEM if isinstance(row.get(name), str) and row[name]), None)
    if system is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
        joined = None if joined is None else f"{system}\n{joined}"
    variables = {name: row[name] for name, kind in VARIABLES.items() if isinstance(row.get(name), kind)}
    more = from_json(row.get(TEMPLATE) or {}, TEMPLATE)
    if not isinstance(more, dict) or any(name in TAKEN for name in more):
        raise DocumentError(f"`{TEMPLATE}` is {brief(more)}; expected an object of variables of the template")
    return Conversation(
        messages, _objects(row, "tools"), _objects(row, "documents"), variables | more, joined
    )


def _objects(row: Mapping[str, Any], name: str) -> list[Any] | None:
    """A list of objects beside messages; None where there are none."""
    found = from_json(row.get(name) or None, name)
    if found is None or found == []:
        return None
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise DocumentError(f"`{name}` is {brief(found)}; expected a list of objects")
    return found


def _named(row: Mapping[str, Any], given: Sequence[str]) -> Iterator[Document]:
    """The document in the columns that the user named: one column, or those of a question and its answer."""
    if all(name in row and row[name] is None for name in given):
        yield EMPTY
        return
    if missing := [name for name in given if row.get(name) is None]:
        raise DocumentError(
            f"has no {listing([f'`{name}`' for name in missing])}, which {OPTION} names; it has "
            f"{listing(sorted(row)) or 'nothing'}"
        )
    if len(given) > 1:
        yield Document(shown(given), conversation=_turns(row, given[:-1], given[-1]))
        return
    name, value = given[0], row[given[0]]
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = _list_or_text(value)
    if isinstance(value, str):
        yield Document(shown(given), text=value)
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        yield Document(shown(given), conversation=_conversation(messages_of(value, name), row, None))
    else:
        for ids, masked in _ids(value, row.get(MASK), name):
            yield Document(shown(given), ids=ids, masked=masked)


def shown(names: Iterable[str]) -> str:
    """Columns that the user named, as one name, printable."""
    return " + ".join(plain(name, 100) for name in names)


def _list_or_text(text: str) -> Any:
    """A list of messages or numbers that is JSON as text; else the text."""
    try:
        found = from_json(text, "")
    except DocumentError:
        return text
    return found if found and isinstance(found[0], dict | int | list) else text


def _ids(value: Any, mask: Any, name: str) -> Iterator[tuple[list[int], int]]:
    """Token ids without those that a mask leaves out, and their number; several rows of a nested list."""
    ids, mask = from_json(value, name), from_json(mask, MASK)
    if not isinstance(ids, list):
        raise DocumentError(f"has {name} ({type(ids).__name__}); expected token ids")
    if ids and isinstance(ids[0], list):
        if mask is not None and (not isinstance(mask, list) or len(mask) != len(ids)):
            raise DocumentError(f"`{MASK}` does not have the {len(ids)} rows of `{name}`")
        for i, row in enumerate(ids):
            yield from _ids(row if isinstance(row, list) else [row], None if mask is None else mask[i], name)
        return
    for i in ids:
        if type(i) is not int or not 0 <= i < 1 << 31:
            raise DocumentError(f"`{name}` holds {i!r:.200}; expected token ids")
    if mask is None:
        yield ids, 0
        return
    if not isinstance(mask, list) or len(mask) != len(ids):
        length = len(mask) if isinstance(mask, list) else brief(mask)
        raise DocumentError(f"`{MASK}` has {length} values for {len(ids)} token ids; expected as many")
    if wrong := [one for one in mask if one not in (0, 1)]:
        raise DocumentError(f"`{MASK}` holds {brief(wrong[0])}; expected 0 and 1")
    kept = [i for i, keep in zip(ids, mask, strict=True) if keep]
    yield kept, len(ids) - len(kept)
