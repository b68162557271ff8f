"""Special tokens and chat templates that a checkpoint declares beside its tokenizer, as in transformers."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nemoquant.errors import CalibrationError
from nemoquant.files import MOST_ENTRIES, parse_json, read_text

DEFAULT, TOOL_USE = "default", "tool_use"
SETTINGS, OLD_TOKENS = "tokenizer_config.json", "special_tokens_map.json"
TEMPLATE, OLD_TEMPLATE, MORE_TEMPLATES = (
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates",
)
FILES = (SETTINGS, OLD_TOKENS)
TEMPLATE_FILES = (TEMPLATE, OLD_TEMPLATE)
MOST_TEMPLATES = 100
NAMED = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
EXTRA = ("additional_special_tokens", "extra_special_tokens")
FLAGS = ("lstrip", "rstrip", "normalized", "single_word", "special")


def settings(model: Path) -> dict[str, Any]:
    """tokenizer_config.json; a special_tokens_map.json of older tools is part of it.

    Raises:
        CalibrationError: one of them can't be read.
    """
    found = _object(model / SETTINGS)
    if "added_tokens_decoder" not in found:
        found = found | _object(model / OLD_TOKENS)
    return found


def _object(file: Path) -> dict[str, Any]:
    """An object of JSON; empty where there is no such file."""
    try:
        data = parse_json(read_text(file), entries=MOST_ENTRIES) if file.exists() else {}
    except (OSError, ValueError) as error:
        raise CalibrationError(f"{file} cannot be read ({error}); expected JSON") from None
    if not isinstance(data, dict):
        raise CalibrationError(f"{file} is a JSON {type(data).__name__}; expected an object")
    return data


def special_tokens(model: Path) -> dict[str, str]:
    """Texts of special tokens by their names, the variables of a chat template: ``bos_token`` and so on.

    Raises:
        CalibrationError: they can't be read.
    """
    return {name: text for name, text, _ in _named_tokens(model, settings(model))}


def _named_tokens(model: Path, data: dict[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """Name, text and declaration of each token that has a name; such as a tool has made are among them."""
    extra = data.get("extra_special_tokens")
    for name, value in {**data, **(extra if isinstance(extra, dict) else {})}.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name in NAMED and value and not isinstance(text, str):
            raise CalibrationError(
                f"{model / SETTINGS}: {name} is {value!r:.200}; expected text, or an object with text as "
                f"`content`"
            )
        is_token = name in NAMED or name.endswith("_token") or (isinstance(extra, dict) and name in extra)
        if is_token and isinstance(text, str):
            yield name, text, value


def added_tokens(model: Path) -> list[tuple[str, dict[str, bool]]]:
    """Tokens that stand whole in any text, though tokenizer.json may not say so: text and flags of each.

    transformers adds those of tokenizer_config.json to the tokenizer.

    Raises:
        CalibrationError: they can't be read.
    """
    data = settings(model)
    found: dict[str, dict[str, bool]] = {}
    decoder = data.get("added_tokens_decoder")
    listed = list(decoder.values()) if isinstance(decoder, dict) else []
    special = [value for _, _, value in _named_tokens(model, data)]
    for name in EXTRA:
        value = data.get(name)
        special += value if isinstance(value, list) else []
    for is_special, tokens in ((False, listed), (True, special)):
        for token in tokens:
            flags = token if isinstance(token, dict) else {}
            text = flags.get("content") if isinstance(token, dict) else token
            if isinstance(text, str) and text and text not in found:
                found[text] = {flag: flags[flag] for flag in FLAGS if isinstance(flags.get(flag), bool)}
                if is_special:
                    found[text] |= {"special": True}
    return list(found.items())


def chat_templates(model: Path) -> dict[str, str]:
    """Sources of a checkpoint's chat templates by name; one without a name is ``DEFAULT``.

    Files of their own stand before tokenizer_config.json, as in transformers; chat_template.json, which
    processors of older models have, comes last.

    Raises:
        CalibrationError: there is none, or it can't be read.
    """
    found = dict(_template_files(model))
    if not found:
        found = _templates(_object(model / SETTINGS).get("chat_template"))
    if not found:
        found = _templates(_object(model / OLD_TEMPLATE).get("chat_template"))
    if not found:
        raise CalibrationError(f"{model} has no chat template; `messages` need {TEMPLATE}, or give `text`")
    return found


def _template_files(model: Path) -> Iterator[tuple[str, str]]:
    files = [(DEFAULT, model / TEMPLATE)] if (model / TEMPLATE).exists() else []
    try:
        more = sorted((model / MORE_TEMPLATES).glob("*.jinja"))
    except OSError as error:
        raise CalibrationError(f"{model / MORE_TEMPLATES} cannot be read ({error})") from None
    if len(more) > MOST_TEMPLATES:
        raise CalibrationError(
            f"{model / MORE_TEMPLATES} holds {len(more):,} templates; expected at most {MOST_TEMPLATES}"
        )
    for name, file in [*files, *((file.stem, file) for file in more)]:
        try:
            yield name, read_text(file)
        except (OSError, ValueError) as error:
            raise CalibrationError(f"{file} cannot be read ({error}); expected a template in UTF-8") from None


def _templates(value: Any) -> dict[str, str]:
    """One template, or several in a list of names and templates."""
    if isinstance(value, str):
        return {DEFAULT: value}
    if isinstance(value, list):
        value = {
            one.get("name"): one.get("template") for one in value[:MOST_TEMPLATES] if isinstance(one, dict)
        }
    named = value.items() if isinstance(value, dict) else ()
    return {name: text for name, text in named if isinstance(name, str) and isinstance(text, str)}


def splits_special_tokens(model: Path) -> bool:
    """Whether text that spells a special token is only text: ``split_special_tokens``."""
    return settings(model).get("split_special_tokens") is True
