"""Chat templates: programs of strangers, held to limits; honest ones give transformers' text."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.places import DEMO

from nemoquant.errors import CalibrationError
from nemoquant.files import MOST_SETTINGS
from nemoquant.tokens import template as module
from nemoquant.tokens.template import ChatTemplate

CHAT = [
    {"role": "system", "content": "Answer in <b>one</b> word.\n"},
    {"role": "user", "content": "  What is \u00bd of 4\u202f? \U0001f600 {{ 1 }}"},
    {
        "role": "assistant",
        "content": "2",
        "tool_calls": [{"name": "f", "arguments": {"a": 1.5, "b": [None, True]}}],
    },
]
HONEST = {
    "demo": (DEMO / "chat_template.jinja").read_text(encoding="utf-8"),
    "blocks": (
        "{%- set ns = namespace(system='') -%}\n"
        "{%- for m in messages %}\n"
        "  {%- if m.role == 'system' %}{% set ns.system = m.content | trim %}{% continue %}{% endif %}\n"
        "    <{{ m['role'] }}>{{ '\\n' }}{{ m.content.strip() if m.content is string else '' }}\n"
        "  {%- for call in m.tool_calls or [] %}\n"
        "[{{ call.name | upper }} {{ call.arguments | tojson(indent=2) }}]\n"
        "  {%- endfor %}\n"
        "{% endfor %}\n"
        "{{ ns.system ~ bos_token ~ eos_token }}{% if add_generation_prompt %}<assistant>\n{% endif %}\n"
    ),
    "generation": (
        "{{ strftime_now('%Y') }}\n"
        "{% for m in messages %}\n"
        "  {% set said = m.content %}\n"
        "  {%- generation -%}\n"
        "  {% set said = 'x' %}{{ loop.index ~ said ~ m.role }}\n"
        "  {%- endgeneration %}\n"
        "{{ said }}{{ m | tojson(ensure_ascii=True, separators=(',', ':'), sort_keys=True) }}\n"
        "{% endfor %}\n"
    ),
}


def model(folder: Path, template: object, **settings: object) -> Path:
    folder.mkdir(exist_ok=True)
    if isinstance(template, str):
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def rendered(folder: Path, messages: object = CHAT) -> str:
    with ChatTemplate(folder) as template:
        return template.render(messages, "x.jsonl, document 3")  # type: ignore[arg-type]


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")
@pytest.mark.parametrize("add_generation_prompt", [False, True])
@pytest.mark.parametrize("name", HONEST)
def test_honest_templates_render_as_in_transformers(name, add_generation_prompt, tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")),
        bos_token="<s>",
        eos_token="</s>",
    )
    expected = theirs.apply_chat_template(
        CHAT, chat_template=HONEST[name], tokenize=False, add_generation_prompt=add_generation_prompt
    )
    folder = model(tmp_path, HONEST[name], bos_token="<s>", eos_token={"content": "</s>"})
    with ChatTemplate(folder, add_generation_prompt=add_generation_prompt) as template:
        assert template.render(CHAT, "") == expected
        assert template.render(CHAT, "") == expected, "the process serves as often as it is asked"


def test_the_process_is_no_fork_and_has_no_weights(tmp_path):
    with ChatTemplate(model(tmp_path, "{{ messages }}")) as template:
        template.render(["a"], "")
        maps = Path(f"/proc/{template._process.pid}/maps").read_text()
        at = Path(f"/proc/{template._process.pid}")
        assert "torch" not in maps
        assert "numpy" not in maps
    assert not at.exists(), "closing ends it"


def test_a_thread_that_is_no_main_thread_can_use_it(tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    folder = model(tmp_path, "{{ messages | length }}")
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda n: rendered(folder, [0] * n), range(8))) == list(map(str, range(8)))


BEYOND = {
    "a large text": ("{{ 'x' * 10 ** 10 }}", "takes more than 512 MiB of memory"),
    "a long list": ("{{ ([0] * 10 ** 9) | length }}", "takes more than 512 MiB of memory"),
    "a wide field": ("{{ '%999999999d' % 1 }}", "takes more than 512 MiB of memory"),
    "text made of text": (
        "{{ 'a' | replace('a', 'b' * 10 ** 7) | replace('b', 'c' * 10 ** 7) }}",
        "takes more than 512 MiB of memory",
    ),
    "much text": ("{{ 'x' * (2 ** 24 + 1) }}", "makes more than 16,777,216 characters"),
    "half a character": ("{{ '\\ud800' }}", "makes half of a surrogate pair, which is no character"),
}
LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
ENDLESS = {
    "loops": LOOPS,
    "one call of C": "{{ (9 ** (9 ** (messages | length * 3))) | length }}",
    "the same while it is compiled": "{{ (9 ** (9 ** 9)) | length }}",
}


@pytest.mark.parametrize(("source", "limit"), BEYOND.values(), ids=BEYOND.keys())
def test_limits_of_size(source, limit, tmp_path):
    with pytest.raises(CalibrationError) as error:
        rendered(model(tmp_path, source))
    assert str(error.value) == (
        f"x.jsonl, document 3: the chat template {limit}; a template formats messages and needs little: is "
        f"it this model's?"
    )


@pytest.mark.parametrize("source", ENDLESS.values(), ids=ENDLESS.keys())
def test_limit_of_time(source, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PROCESSOR_SECONDS", 0.5)
    with pytest.raises(
        CalibrationError, match=r": the chat template takes more than 0\.5 s of processor time; a template"
    ):
        rendered(model(tmp_path, source))


def test_limit_of_time_where_its_signals_are_ignored(tmp_path, monkeypatch):
    """A process inherits which signals are ignored and which are blocked."""
    monkeypatch.setattr(module, "PROCESSOR_SECONDS", 0.2)
    kinds = (signal.SIGPROF, signal.SIGALRM, signal.SIGXCPU)
    before = [signal.signal(kind, signal.SIG_IGN) for kind in kinds]
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, kinds)
    try:
        with pytest.raises(CalibrationError, match=r"takes more than 0\.2 s of processor time; a template"):
            rendered(model(tmp_path, LOOPS))
    finally:
        for kind, handler in zip(kinds, before, strict=True):
            signal.signal(kind, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def test_limit_of_time_of_all_documents(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "ALL_PROCESSOR_SECONDS", 1)
    source = "{% for i in range(messages | length) %}{% for j in range(90000) %}{% endfor %}{% endfor %}"
    with (
        ChatTemplate(model(tmp_path, source)) as template,
        pytest.raises(CalibrationError, match=r"takes more than 1 s of processor time for all documents; a"),
    ):
        for i in range(1000):
            template.render([0] * 20, f"document {i}")


def test_text_up_to_its_limit_whatever_its_characters(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "CHARACTERS", 1000)
    folder = model(tmp_path, "{{ messages[0] * 1000 }}")
    for character in ("a", "\0", "\u2028", "\U0001f600"):
        assert rendered(folder, [character]) == character * 1000
        with pytest.raises(CalibrationError, match="makes more than 1,000 characters"):
            rendered(folder, [character * 2])


def test_a_template_that_only_waits_is_ended_too(tmp_path, monkeypatch):
    """Where others take the processor, its own time hardly passes."""
    monkeypatch.setattr(module, "SECONDS", 0.3)
    with pytest.raises(CalibrationError, match=r"document 3: the chat template takes more than 0\.3 s;"):
        rendered(model(tmp_path, LOOPS))


def test_a_process_that_dies_is_an_error(tmp_path):
    with ChatTemplate(model(tmp_path, "a")) as template:
        template._process.kill()
        with pytest.raises(
            CalibrationError, match=r"x: the chat template ended its process \(exit code -9\);"
        ):
            template.render([], "x")


def test_no_process_can_be_started(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no python"))
    with pytest.raises(
        CalibrationError, match=r"needs a process of its own, which can't be started .*`text`"
    ):
        rendered(model(tmp_path, "a"))


@pytest.mark.parametrize(
    "source",
    ["{{" + "(" * 100_000 + ")" * 100_000 + "}}", "{% if a %}" * 5000 + "{% endif %}" * 5000, "{% for %}"],
    ids=["brackets", "blocks", "syntax"],
)
def test_sources_that_jinja_refuses(source, tmp_path):
    with pytest.raises(CalibrationError, match=r"its chat template cannot be read \(."):
        rendered(model(tmp_path, source))


def test_messages_nested_deeply_and_long_reasons_are_one_short_line(tmp_path):
    with pytest.raises(CalibrationError) as error:
        rendered(model(tmp_path, "{{ raise_exception('x\n' * 10 ** 6) }}"))
    assert len(str(error.value)) < 5000
    deep = json.loads("[" * 60 + "]" * 60)
    assert rendered(model(tmp_path, "{{ messages | length }}"), [deep, deep]) == "2"


def test_messages_that_are_no_json(tmp_path):
    import datetime

    with pytest.raises(
        CalibrationError, match=r"document 3: `messages` can't be given .*type date is not JSON"
    ):
        rendered(model(tmp_path, "a"), [datetime.date(2026, 1, 1)])


SETTINGS = {
    "a list": ("[]", "is a JSON list; expected an object"),
    "no JSON": ("{", "cannot be read (Expecting property name"),
    "deep": ('{"a":' * 100_000, "cannot be read (it is nested too deeply; expected"),
    "twice": ('{"a": 1, "a": 2}', "duplicate key 'a'"),
    "surrogate": ('{"chat_template": "\\ud800"}', "half of a surrogate pair"),
    "digits": ('{"a": ' + "1" * 5000 + "}", "cannot be read (Exceeds the limit"),
    "bytes": (b"\xff", "cannot be read ('utf-8' codec"),
    "token": (
        '{"chat_template": "a", "eos_token": ["a"]}',
        "eos_token is ['a']; expected text, or an object",
    ),
    "content": (
        '{"chat_template": "a", "bos_token": {"content": 5}}',
        "bos_token is {'content': 5}; expected",
    ),
    "template": ('{"chat_template": 5}', "has no chat template"),
    "templates": ('{"chat_template": [{"name": "default", "template": 5}]}', "has no chat template"),
    "no default": (
        '{"chat_template": [{"name": "rag", "template": "a"}]}',
        "has the chat templates rag and no 'default'; name one of them default",
    ),
}


@pytest.mark.parametrize(("content", "message"), SETTINGS.values(), ids=SETTINGS.keys())
def test_tokenizer_config_that_is_damaged(content, message, tmp_path):
    (tmp_path / "tokenizer_config.json").write_bytes(
        content if isinstance(content, bytes) else content.encode()
    )
    with pytest.raises(CalibrationError) as error:
        rendered(tmp_path)
    assert message in str(error.value)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer_config.json"])
def test_files_that_are_none(name, tmp_path):
    model(tmp_path, "a")
    file = tmp_path / name
    with file.open("r+b") as f:
        f.truncate(MOST_SETTINGS + 1)
    with pytest.raises(CalibrationError, match=rf"{name} cannot be read \(it has more than 16,777,216 bytes"):
        rendered(tmp_path)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(CalibrationError, match=rf"{name} cannot be read \(.*not a regular file"):
        rendered(tmp_path)


def test_an_orphan_ends(tmp_path):
    """A run that is killed leaves no process behind, whatever the template does."""
    program = (
        "import sys, os; from pathlib import Path; from nemoquant.tokens.template import ChatTemplate; "
        "t = ChatTemplate(Path(sys.argv[1])); print(t._process.pid, flush=True); os._exit(0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(model(tmp_path, "a"))], capture_output=True, text=True, check=True
    )
    at = Path(f"/proc/{done.stdout.strip()}/cmdline")
    for _ in range(100):
        if not (at.exists() and at.read_bytes()):
            return
        time.sleep(0.1)
    pytest.fail("it still runs")
