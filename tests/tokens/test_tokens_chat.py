"""Conversations give the text of transformers' apply_chat_template, over templates with what real ones use.

The messages that transformers gets are written out where serving engines change them first: arguments of tool
calls as objects, no null content, text for lists of parts where a template takes text alone.
"""

import importlib.util
import json
import shutil

import pytest
from support.places import DEMO

from nemoquant.errors import CalibrationError
from nemoquant.tokens.chat import messages_of, without_nulls
from nemoquant.tokens.columns import documents_of
from nemoquant.tokens.template import ChatTemplate
from nemoquant.tokens.unusable import DocumentError

needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)

# A model that thinks and calls tools: system first, tools in XML, arguments item by item.
THINKS = """\
{%- set ns = namespace(last=-1) %}
{%- set enable_thinking = enable_thinking if enable_thinking is defined else True %}
{%- macro extra(keys, known) %}
{%- for key in keys if key not in known %}
{{- '\\n<' ~ key ~ '>' ~ (keys[key] | tojson if keys[key] is mapping \
or (keys[key] is sequence and keys[key] is not string) else keys[key] | string) ~ '</' ~ key ~ '>' }}
{%- endfor %}
{%- endmacro %}
{%- if messages[0].role == 'system' %}{{ '<|im_start|>system\\n' ~ messages[0].content }}
{%- set rest = messages[1:] %}
{%- else %}{{ '<|im_start|>system\\n' }}
{%- set rest = messages %}
{%- endif %}
{%- if tools is iterable and tools | length > 0 %}
{{- '\\n# Tools\\n<tools>' }}
{%- for tool in tools %}
{%- set tool = tool.function if tool.function is defined else tool %}
{{- '\\n<function>\\n<name>' ~ tool.name ~ '</name>' }}
{%- if tool.parameters is mapping and tool.parameters.properties is mapping %}
{%- for name, fields in tool.parameters.properties | items %}
{{- '\\n<parameter>' ~ name ~ ':' ~ fields.type | default('any') ~ '</parameter>' }}
{{- extra(fields, ['type']) }}
{%- endfor %}
{%- endif %}
{{- '\\n</function>' }}
{%- endfor %}
{{- '\\n</tools>' }}
{%- endif %}
{{- '<|im_end|>\\n' }}
{%- for message in rest %}
{%- if message.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}
{%- endfor %}
{%- for message in rest %}
{%- if message.role == 'assistant' %}
{{- '<|im_start|>assistant\\n' }}
{%- if message.reasoning_content is defined and message.reasoning_content is string %}
{%- if loop.index0 > ns.last or not (truncate_history_thinking | default(true)) %}
{{- '<think>\\n' ~ message.reasoning_content | trim ~ '\\n</think>\\n' }}{% else %}{{ '<think></think>' }}
{%- endif %}
{%- endif %}
{{- message.content.split('</think>')[-1].lstrip('\\n') if message.content is string else '' }}
{%- if message.tool_calls is defined and message.tool_calls is iterable and message.tool_calls | length > 0 %}
{%- for call in message.tool_calls %}
{%- set call = call.function if call.function is defined else call %}
{{- '<tool_call>\\n<function=' ~ call.name ~ '>\\n' }}
{%- for name, value in call.arguments | items %}
{{- '<parameter=' ~ name ~ '>\\n' ~ (value | tojson | safe if value is mapping or (value is sequence and \
value is not string) else value | string) ~ '\\n</parameter>\\n' }}
{%- endfor %}
{{- '</function>\\n</tool_call>\\n' }}
{%- endfor %}
{%- endif %}
{{- '<|im_end|>\\n' }}
{%- elif message.role == 'tool' %}
{%- if loop.previtem and loop.previtem.role != 'tool' %}{{ '<|im_start|>user\\n' }}{% endif %}
{{- '<tool_response>\\n' ~ message.content ~ '\\n</tool_response>\\n' }}
{%- if loop.last or loop.nextitem.role != 'tool' %}{{ '<|im_end|>\\n' }}{% endif %}
{%- else %}
{{- '<|im_start|>' ~ message.role ~ '\\n' ~ message.content ~ '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' ~ ('<think>\\n' if enable_thinking else '') }}
{%- endif %}
"""
# Arguments and tools as JSON, with the date, and variables that only a caller gives.
AS_JSON = """\
{{- bos_token }}
{%- if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}
{%- if not tools is defined %}{% set tools = none %}{% endif %}
{{- '<|start|>system\\nToday: ' + date_string + '\\nEffort: ' + reasoning_effort | default('high') }}
{%- if tools is not none %}{% for t in tools %}{{ '\\n' }}{{ t | tojson(indent=4) }}{% endfor %}{% endif %}
{%- if documents is not none %}{% for d in documents %}
{{- '\\n## ' ~ loop.index0 ~ ' ' ~ d['title'] ~ '\\n' ~ d.text }}{% endfor %}{% endif %}
{{- eos_token ~ (pad_token or '') ~ (unk_token | default('no unk')) }}
{%- for message in messages %}
{%- if message.role not in ['system', 'user', 'assistant', 'tool'] %}
{{- raise_exception('no role ' ~ message.role) }}
{%- endif %}
{{- '<|start|>' + message['role'] + '\\n' }}
{%- if 'tool_calls' in message %}
{%- for c in message.tool_calls %}
{{- '{"name": "' + c.function.name + '", "parameters": ' }}{{ c.function.arguments | tojson }}{{ '}' }}
{%- endfor %}
{%- else %}{{ message['content'] | trim }}{% endif %}
{{- eos_token }}
{%- endfor %}
"""
# Looks into lists of parts.
PARTS = """\
{%- for message in messages %}
{%- set content = message['content'] %}
{{- '[' ~ message.role ~ ']' }}
{%- if content is string %}{{ content }}
{%- else %}{% for part in content %}{% if part['type'] == 'text' %}{{ part['text'] ~ '|' }}{% else %}<image>
{%- endif %}{% endfor %}{% endif %}
{%- endfor %}
"""
GENERATION = """\
{% for message in messages %}
{% if message['role'] == 'assistant' %}
{%- generation -%}
{% set mark = '!' %}{{ message['content'] ~ mark }}{{ loop.index }}
{% endgeneration %}
{% else %}
{{ message | tojson(ensure_ascii=False) }}
{{ message | tojson(separators=(',', ':'), sort_keys=true, indent=2) }}
{% endif %}
{% endfor %}
"""
TEMPLATES = {
    "thinks": THINKS,
    "as JSON": AS_JSON,
    "parts": PARTS,
    "generation": GENERATION,
    "demo": (DEMO / "chat_template.jinja").read_text(encoding="utf-8"),
}
TOOL = {
    "type": "function",
    "function": {
        "name": "get",
        "description": "Gibt <é> & \u4f60 \U0001f600",
        "parameters": {
            "type": "object",
            "properties": {"x": {"type": "integer", "enum": [1, 2]}, "y": {"description": "'q'"}},
        },
    },
}


def called(arguments: object) -> list[dict]:
    return [{"id": "c1", "type": "function", "function": {"name": "get", "arguments": arguments}}]


USER, ANSWER = {"role": "user", "content": " Say <é> \U0001f600 "}, {"role": "assistant", "content": "yes\n"}
SYSTEM = {"role": "system", "content": "Be kind."}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": "5 > 4"}
ARGUMENTS = {"x": 1, "y": [None, True, {"é": 1.5}]}
# A row, and what of it serving engines give to a template: messages, and the rest by name.
ROWS = {
    "turns": ({"messages": [USER, ANSWER, USER]}, [USER, ANSWER, USER], {}),
    "system": ({"messages": [SYSTEM, USER, ANSWER]}, [SYSTEM, USER, ANSWER], {}),
    "system beside": (
        {"conversations": [USER, ANSWER], "system": "Be kind."},
        [SYSTEM, USER, ANSWER],
        {},
    ),
    "thoughts": (
        {
            "messages": [
                USER,
                {**ANSWER, "reasoning_content": " hm "},
                USER,
                {**ANSWER, "reasoning_content": "x"},
            ]
        },
        [USER, {**ANSWER, "reasoning_content": " hm "}, USER, {**ANSWER, "reasoning_content": "x"}],
        {},
    ),
    "arguments as objects": (
        {"messages": [USER, {**ANSWER, "tool_calls": called(ARGUMENTS)}, RESULT, ANSWER], "tools": [TOOL]},
        [USER, {**ANSWER, "tool_calls": called(ARGUMENTS)}, RESULT, ANSWER],
        {"tools": [TOOL]},
    ),
    "arguments as text": (
        {
            "messages": [
                USER,
                {"role": "assistant", "content": None, "tool_calls": called(json.dumps(ARGUMENTS))},
                RESULT,
                RESULT,
                {"role": "assistant", "tool_calls": called("")},
                RESULT,
            ],
            "tools": json.dumps([TOOL, TOOL]),
        },
        [
            USER,
            {"role": "assistant", "content": "", "tool_calls": called(ARGUMENTS)},
            RESULT,
            RESULT,
            {"role": "assistant", "content": "", "tool_calls": called({})},
            RESULT,
        ],
        {"tools": [TOOL, TOOL]},
    ),
    "no calls": (
        {"messages": [USER, {**ANSWER, "tool_calls": []}, {**ANSWER, "tool_calls": None}], "tools": []},
        [USER, ANSWER, ANSWER],
        {},
    ),
    "documents": (
        {
            "messages": [USER, ANSWER],
            "documents": [{"title": "T", "text": "t\n"}, {"title": "U", "text": ""}],
        },
        [USER, ANSWER],
        {"documents": [{"title": "T", "text": "t\n"}, {"title": "U", "text": ""}]},
    ),
    "variables": (
        {
            "messages": [USER, ANSWER],
            "enable_thinking": False,
            "reasoning_effort": "low",
            "chat_template_kwargs": {"date_string": "1 May", "eos_token": "<e>"},
        },
        [USER, ANSWER],
        {"enable_thinking": False, "reasoning_effort": "low", "date_string": "1 May", "eos_token": "<e>"},
    ),
    "variables as text": (
        {"messages": [USER], "enable_thinking": None, "chat_template_kwargs": '{"enable_thinking": false}'},
        [USER],
        {"enable_thinking": False},
    ),
    "messages as text": ({"messages": json.dumps([USER, ANSWER])}, [USER, ANSWER], {}),
    "ShareGPT": (
        {
            "conversations": [
                {"from": "system", "value": "Be kind."},
                {"from": "Human", "value": USER["content"]},
                {"from": "function_call", "value": '{"name": "get", "arguments": {"x": 1}}'},
                {"from": "observation", "value": "5"},
                {"from": "gpt", "value": ANSWER["content"]},
            ]
        },
        [
            SYSTEM,
            USER,
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"type": "function", "function": {"name": "get", "arguments": {"x": 1}}}],
            },
            {"role": "tool", "content": "5"},
            ANSWER,
        ],
        {},
    ),
    "prompt and completion": (
        {"prompt": USER["content"], "completion": ANSWER["content"]},
        [USER, ANSWER],
        {},
    ),
    "messages of both": ({"prompt": [SYSTEM, USER], "completion": [ANSWER]}, [SYSTEM, USER, ANSWER], {}),
    "preferences": ({"prompt": "Say", "chosen": [USER, ANSWER], "rejected": [USER]}, [USER, ANSWER], {}),
    "alpaca": (
        {"instruction": "Say", "input": "it", "output": ANSWER["content"]},
        [{"role": "user", "content": "Say\nit"}, ANSWER],
        {},
    ),
    "post-training": (
        {"input": [USER], "output": ANSWER["content"], "system_prompt": "Be kind.", "category": "math"},
        [SYSTEM, USER, ANSWER],
        {},
    ),
    "question": ({"question": USER["content"], "answer": "yes\n", "id": 5}, [USER, ANSWER], {}),
}


def folder(path, template, **settings):
    for name in ("tokenizer.json", "config.json"):
        shutil.copy(DEMO / name, path)
    data = json.loads((DEMO / "tokenizer_config.json").read_text())
    data.pop("chat_template")
    (path / "tokenizer_config.json").write_text(json.dumps(data | settings))
    if template is not None:
        (path / "chat_template.jinja").write_text(template, encoding="utf-8")
    return path


def theirs(path, messages, more):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path).apply_chat_template(messages, tokenize=False, **more)


def ours(path, row):
    with ChatTemplate(path) as template:
        return template.converse(conversation(row), "x")


def conversation(row):
    (document,) = documents_of(row)
    return document.conversation


@needs_transformers
@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_text_is_that_of_transformers(name, prompt, tmp_path):
    from transformers import AutoTokenizer

    path = folder(tmp_path, TEMPLATES[name])
    tokenizer, told = AutoTokenizer.from_pretrained(path), 0
    with ChatTemplate(path, add_generation_prompt=prompt) as template:
        for row, messages, more in ROWS.values():
            expected = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=prompt, **more
            )
            assert template.converse(conversation(row), "x") == expected
            told += "Say" in expected
    assert told > 15


@needs_transformers
@pytest.mark.parametrize("name", ["parts", "thinks", "demo"])
def test_lists_of_parts_go_to_templates_that_look_into_them(name, tmp_path):
    """The others get text, a part a line, as from vLLM; transformers would fail, or print the list."""
    parts = [{"type": "text", "text": "Say"}, {"type": "text", "text": "it"}]
    given = parts if name == "parts" else "Say\nit"
    path = folder(tmp_path, TEMPLATES[name])
    row = {"messages": [{"role": "user", "content": parts}, ANSWER]}
    expected = theirs(path, [{"role": "user", "content": given}, ANSWER], {})
    assert ours(path, row) == expected
    image = [{"type": "image"}, *parts]
    row = {"messages": [{"role": "user", "content": image}]}
    if name == "parts":
        assert ours(path, row) == theirs(path, row["messages"], {}) == "[user]<image>Say|it|"
    else:
        with pytest.raises(DocumentError, match="has a part of content that is no text"):
            ours(path, row)


LOOPS = {
    "for part in message.content": True,
    "for part in message['content'] | list": True,
    "for part in content": True,
    "for part in (message.content if message.content is not string else [])": True,
    "for line in message.content.split('x')": False,
    "for part in message.parts": False,
}


@pytest.mark.parametrize(("loop", "takes"), LOOPS.items())
def test_which_templates_look_into_parts(loop, takes, tmp_path):
    path = folder(tmp_path, f"{{% set message = messages[0] %}}{{% {loop} %}}{{% endfor %}}a")
    with ChatTemplate(path) as template:
        assert template._takes_parts == {"default": takes}


SPECIAL = {
    "all that have a name": {
        "unk_token": "<pad>",
        "sep_token": {"__type": "AddedToken", "content": "<sep>", "lstrip": False},
        "cls_token": None,
        "image_token": "<image>",
        "extra_special_tokens": {"boi_token": "<boi>", "end": "<end>"},
        "pad_token_id": 5,
    },
    "as in older files": {"added_tokens_decoder": {"2": {"content": "</s>", "special": True}}},
}


@needs_transformers
@pytest.mark.parametrize("settings", SPECIAL.values(), ids=SPECIAL.keys())
@pytest.mark.parametrize("map_file", [{}, {"eos_token": "<|im_end|>", "mask_token": {"content": "<mask>"}}])
def test_templates_get_the_special_tokens_that_transformers_gives(settings, map_file, tmp_path):
    names = ("bos", "eos", "unk", "sep", "pad", "cls", "mask", "image", "boi")
    template = "".join(f"{name}={{{{ {name}_token }}}} " for name in names) + "{{ end }}"
    path = folder(tmp_path, template, **settings)
    (path / "special_tokens_map.json").write_text(json.dumps(map_file))
    assert ours(path, {"messages": [USER]}) == theirs(path, [USER], {})


SEVERAL = [{"name": "default", "template": "D{{ tools }}"}, {"name": "tool_use", "template": "T{{ tools }}"}]


@needs_transformers
@pytest.mark.parametrize("tools", [None, [TOOL]])
@pytest.mark.parametrize("place", ["settings", "without tool_use", "files", "files beside settings"])
def test_templates_with_names_are_chosen_as_in_transformers(place, tools, tmp_path):
    inside = SEVERAL[:1] if place == "without tool_use" else SEVERAL
    path = folder(tmp_path, None, **({} if place == "files" else {"chat_template": inside}))
    if place.startswith("files"):
        (path / "additional_chat_templates").mkdir()
        (path / "chat_template.jinja").write_text("file D")
        (path / "additional_chat_templates/tool_use.jinja").write_text("file T{{ tools | length }}")
        (path / "additional_chat_templates/rag.jinja").write_text("{% unreadable")
    row = {"messages": [USER]} | ({"tools": tools} if tools else {})
    assert ours(path, row) == theirs(path, [USER], {"tools": tools})


def test_the_template_file_of_older_processors(tmp_path):
    path = folder(tmp_path, None)
    (path / "chat_template.json").write_text('{"chat_template": "old"}')
    assert ours(path, {"messages": [USER]}) == "old"
    (path / "chat_template.json").write_text("{")
    with pytest.raises(CalibrationError, match=r"chat_template\.json cannot be read .* expected JSON"):
        ours(path, {"messages": [USER]})


def test_a_template_that_cannot_be_read_and_is_needed(tmp_path):
    tool_use = {"name": "tool_use", "template": "{% if %}"}
    path = folder(tmp_path, None, chat_template=[SEVERAL[0], tool_use])
    assert ours(path, {"messages": [USER]}) == "DNone"
    with pytest.raises(
        CalibrationError, match=r"its chat template cannot be read \(Expected an expr"
    ) as error:
        ours(path, {"messages": [USER], "tools": [TOOL]})
    assert not isinstance(error.value, DocumentError), "it is not the conversation's fault"


REFUSED = {
    "no list": ({"role": "user"}, "has messages (dict); expected a list of messages"),
    "none": ([], "`messages` holds no message"),
    "a text in the list": (["a"], "message 1 of `messages` is 'a'; expected an object with `role`"),
    "no role": ([USER, {"content": "a"}], "message 2 of `messages` has no `role`"),
    "a stranger": ([{"from": "narrator", "value": "a"}], "is from 'narrator'; expected human, user"),
    "a list as name": ([{"from": ["human"], "value": "a"}], "is from ['human']"),
    "calls": ([{**ANSWER, "tool_calls": {"a": 1}}], "has tool_calls {'a': 1}; expected a list"),
    "a call": ([{**ANSWER, "tool_calls": ["get"]}], "has the tool call 'get'; expected an object"),
    "a function": ([{**ANSWER, "tool_calls": [{"function": 5}]}], "calls 5; expected an object"),
    "cut arguments": (
        [{**ANSWER, "tool_calls": called('{"x": ')}],
        "a tool call in message 1 of `messages`: `arguments` is text that is not JSON (Expecting value)",
    ),
    "a list of arguments": (
        [{**ANSWER, "tool_calls": called("[1]")}],
        "has the arguments [1]; expected an obj",
    ),
    "text that is no JSON": ("[{'role': 'user'}]", "`messages` is text that is not JSON (Expecting property"),
}


@pytest.mark.parametrize(("messages", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_messages_that_are_none(messages, message):
    with pytest.raises(DocumentError) as error:
        messages_of(messages, "messages")
    assert message in str(error.value)


def test_messages_of_a_row_are_left_as_they_are():
    row = {"messages": [{**ANSWER, "content": None, "tool_calls": called("{}")}, USER]}
    before = json.dumps(row)
    list(documents_of(row))
    assert json.dumps(row) == before


def test_fields_that_a_table_fills_up_are_no_fields():
    """Arrow gives each message the fields of all: ``'tool_calls' in message`` would be true of each."""
    rows = [{"role": "user", "content": "a", "tool_calls": None}, {"content": None, "parts": [{"a": None}]}]
    assert without_nulls(rows) == [{"role": "user", "content": "a"}, {"content": None, "parts": [{}]}]
