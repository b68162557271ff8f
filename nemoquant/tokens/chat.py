"""Conversations as data sets have them, as chat templates and serving engines take them.

What vLLM and SGLang do to messages before a template sees them is done here too: arguments of tool calls that
are JSON as text become objects, ``content: null`` becomes an empty text, calls that are none are dropped, and
lists of text parts become one text where the template does not look into lists. All else reaches the template
as it is, as in transformers' ``apply_chat_template``.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from nemoquant.errors import brief
from nemoquant.files import parse_json
from nemoquant.tokens.unusable import DocumentError

MOST_ENTRIES = 1 << 20  # of messages or tools that are JSON as text
NO_CONTENT = ("value", "text", "parts", "message")  # where others keep a message's text; templates skip them
SHAREGPT: Mapping[str, str] = MappingProxyType(
    {
        **dict.fromkeys(("human", "user", "prompter"), "user"),
        **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model", "bot"), "assistant"),
        "system": "system",
        **dict.fromkeys(("tool", "function", "function_response", "observation", "ipython"), "tool"),
        "function_call": "assistant",
    }
)


@dataclass(frozen=True)
class Conversation:
    """What a chat template gets.

    Attributes:
        messages: each with its role.
        tools, documents: None where the row has none.
        variables: what else the template may ask for, such as ``enable_thinking``.
        joined: the text in place of all this where a model has no chat template; None where there is none.
    """

    messages: list[dict[str, Any]]
    tools: list[Any] | None = None
    documents: list[Any] | None = None
    variables: dict[str, Any] = field(default_factory=dict)
    joined: str | None = None


def from_json(value: Any, name: str) -> Any:
    """A value, or the one that it is as JSON text: Parquet and .csv have lists as text.

    Raises:
        DocumentError: it is text, and no JSON.
    """
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value, entries=MOST_ENTRIES)
    except ValueError as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise DocumentError(f"`{name}` is text that is not JSON ({reason})") from None


def messages_of(value: Any, name: str) -> list[dict[str, Any]]:
    """Messages, each a new mapping with ``role``.

    Raises:
        DocumentError: they are none.
    """
    found = from_json(value, name)
    if not isinstance(found, list):
        raise DocumentError(f"has {name} ({type(found).__name__}); expected a list of messages")
    if not found:
        raise DocumentError(f"`{name}` holds no message")
    return [_message(one, f"message {i} of `{name}`") for i, one in enumerate(found, 1)]


def _message(one: Any, what: str) -> dict[str, Any]:
    if not isinstance(one, dict):
        raise DocumentError(f"{what} is {brief(one)}; expected an object with `role` and `content`")
    message = dict(one)
    if "role" not in message and "from" in message:
        said = message.pop("from")
        role = SHAREGPT.get(said.lower()) if isinstance(said, str) else None
        if role is None:
            raise DocumentError(f"{what} is from {brief(said)}; expected {', '.join(SHAREGPT)}")
        message = {"role": role, "content": message.pop("value", None), **message}
        if role == "assistant" and said.lower() == "function_call":
            message |= {"content": "", "tool_calls": [{"type": "function", "function": message["content"]}]}
    if not isinstance(message.get("role"), str):
        raise DocumentError(f"{what} has no `role`; expected an object with `role` and `content`")
    if "content" not in message and (elsewhere := [name for name in NO_CONTENT if message.get(name)]):
        raise DocumentError(f"{what} has `{elsewhere[0]}` and no `content`; expected its text as `content`")
    if message.get("content") is None:
        message["content"] = ""
    if "tool_calls" in message:
        calls = from_json(message.pop("tool_calls"), "tool_calls")
        if calls:
            if not isinstance(calls, list):
                raise DocumentError(f"{what} has tool_calls {brief(calls)}; expected a list")
            message["tool_calls"] = [_call(call, what) for call in calls]
    return message


def _call(call: Any, what: str) -> Any:
    """A tool call, whose arguments are an object: ``{"function": {...}}``, or the function itself."""
    if not isinstance(call, dict):
        raise DocumentError(f"{what} has the tool call {brief(call)}; expected an object")
    if "function" in call:
        function = from_json(call["function"], "function")
        if not isinstance(function, dict):
            raise DocumentError(f"{what} calls {brief(function)}; expected an object with name and arguments")
        return {**call, "function": {**function, "arguments": _arguments(function, what)}}
    return {**call, "arguments": _arguments(call, what)} if "arguments" in call else call


def _arguments(function: dict[str, Any], what: str) -> dict[str, Any]:
    given = function.get("arguments")
    if given is None or given == "":
        return {}
    try:
        found = from_json(given, "arguments")
    except DocumentError as error:
        raise DocumentError(f"a tool call in {what}: {error}") from None
    if not isinstance(found, dict):
        raise DocumentError(f"a tool call in {what} has the arguments {brief(found)}; expected an object")
    return found


def with_joined_parts(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same with lists of text parts as one text, a part a line, for templates that take text alone.

    Raises:
        DocumentError: a part is no text.
    """
    return [
        {**message, "content": _joined(message["content"])}
        if isinstance(message.get("content"), list)
        else message
        for message in messages
    ]


def _joined(parts: list[Any]) -> str:
    texts = []
    for part in parts:
        text = part.get("text") if isinstance(part, dict) and part.get("type", "text") == "text" else part
        if not isinstance(text, str):
            raise DocumentError(
                f"has a part of content that is no text ({brief(part)}), and the chat template takes text"
            )
        texts.append(text)
    return "\n".join(texts)


def without_nulls(value: Any) -> Any:
    """What Parquet and Arrow made of JSON, without the fields that other rows have: they are null here.

    ``content`` stays: it is null where a message only calls tools.
    """
    if isinstance(value, dict):
        kept = ((key, inside) for key, inside in value.items() if inside is not None or key == "content")
        return {key: without_nulls(inside) for key, inside in kept}
    return [without_nulls(inside) for inside in value] if isinstance(value, list) else value
