"""What chat templates get: tools, earlier calls and results, for templates in the manner of each family."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gateway_svc.errors import InvalidField
from gateway_svc.text.tools.definitions import Tool, check_parameters
from gateway_svc.text.tools.formats import (
    BARE,
    HERMES,
    LLAMA3,
    MISTRAL,
    MISTRAL_WITH_HEADER,
    ToolFormat,
    format_of,
)
from gateway_svc.text.tools.rendering import render_tools
from tests.unit.gateway.conftest import model_tokenizer

# As Qwen's and Hermes' do: arguments through tojson, results with the function's name.
QWEN = """{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}
{%- for m in messages %}[{{ m.role }}:{{ m.content }}
{%- for call in m.tool_calls or [] %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}{% if m.role == "tool" %}={{ m.name }}{% endif %}]{% endfor %}"""
# As Llama's: `'tool_calls' in message`, one call at most.
LLAMA = """{% if tools %}Environment: ipython {% for t in tools %}{{ t | tojson }}{% endfor %}{% endif %}
{%- for m in messages %}{% if 'tool_calls' in m %}
{%- if m.tool_calls | length != 1 %}{{ raise_exception("one call at a time") }}{% endif %}
{%- set call = m.tool_calls[0].function %}
{{- '{"name": "' + call.name + '", "parameters": ' + call.arguments | tojson + '}' }}
{%- else %}[{{ m.role }}:{{ m.content }}]{% endif %}{% endfor %}"""
# As Mistral's: ids of nine characters or nothing.
MISTRALS = """{% for m in messages %}{% if m.tool_calls is defined %}[TOOL_CALLS] [
{%- for call in m.tool_calls %}{{ (call.function | tojson)[:-1] }}, "id": "{{ call.id }}"}
{%- if call.id | length != 9 %}{{ raise_exception("ids have nine characters") }}{% endif %}{% endfor %}]
{%- elif m.role == "tool" %}[TOOL_RESULTS]{{ m.tool_call_id }}={{ m.content }}
{%- else %}[{{ m.role }}:{{ m.content }}]{% endif %}{% endfor %}
{%- if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}{% endif %}"""
# As those from before there were tools.
CHATML = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string", "default": None}}}
DEFINITION = {"type": "function", "function": {"name": "get_weather", "parameters": PARAMETERS}}
TOOL = Tool("get_weather", PARAMETERS, False, DEFINITION, "tools[0].function")


def called(call_id: str, arguments: Any) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": "get_weather", "arguments": arguments}}


def turns(*calls: dict[str, Any], content: str = "") -> list[dict[str, Any]]:
    """A question, the calls that the model made, and their results."""
    results = [{"role": "tool", "tool_call_id": call["id"], "content": "sunny"} for call in calls]
    said = {"role": "assistant", "content": content, "tool_calls": list(calls)}
    return [{"role": "user", "content": "And Paris?"}, said, *results]


def render(
    template: str, messages: list[dict[str, Any]], form: ToolFormat, tools: tuple[Tool, ...] = (TOOL,)
) -> str:
    before = json.dumps(messages)
    told, shown = render_tools(messages, tools, template, form)
    assert json.dumps(messages) == before, "what the client sent is as it was"
    options = {"chat_template": template, "tools": shown, "add_generation_prompt": True}
    return model_tokenizer()._render(told, {"continue_final_message": False, **options})


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        ('{"city": "Zürich"}', '{"city": "Zürich"}'),
        ({"city": "Zürich"}, '{"city": "Zürich"}'),
        ("", "{}"),
        ("{broken", '"{broken"'),
        ("[1]", '"[1]"'),
    ],
)
def test_arguments_are_objects(arguments: Any, shown: str) -> None:
    text = render(QWEN, turns(called("call_1", arguments)), HERMES)
    assert f'<tool_call>\n{{"name": "get_weather", "arguments": {shown}}}\n</tool_call>' in text
    assert text.endswith("[tool:sunny=get_weather]"), "a result has its function's name"
    assert text.startswith(json.dumps(DEFINITION)), "tools are as the client sent them"


def test_llamas_template() -> None:
    text = render(LLAMA, turns(called("call_1", '{"city": "Paris"}')), LLAMA3)
    assert '{"name": "get_weather", "parameters": {"city": "Paris"}}' in text
    empty = [{"role": "assistant", "content": "Hi", "tool_calls": []}]
    assert render(LLAMA, empty, LLAMA3).endswith("[assistant:Hi]"), "no calls are no member at all"
    with pytest.raises(InvalidField) as caught:
        render(LLAMA, turns(called("a", "{}"), called("b", "{}")), LLAMA3)
    assert "one call at a time" in caught.value.problem


def test_mistrals_template() -> None:
    """Ids from elsewhere are replaced by short ones, the same for call and result."""
    text = render(MISTRALS, turns(called("call_0123456789", "{}"), called("aB3456789", "{}")), MISTRAL)
    first = text.partition('"id": "')[2][:9]
    assert first.isalnum() and f"[TOOL_RESULTS]{first}=sunny" in text
    assert '"id": "aB3456789"' in text and "[TOOL_RESULTS]aB3456789=sunny" in text


def test_a_template_without_tools() -> None:
    text = render(CHATML, turns(called("a", '{"city": "é"}'), called("b", "{}"), content="Wait."), HERMES)
    system, _, rest = text.partition("<user>")
    assert system.startswith("<system># Tools") and json.dumps(DEFINITION["function"]) in system
    calls = [
        f'<tool_call>\n{{"name": "get_weather", "arguments": {a}}}\n</tool_call>'
        for a in ('{"city": "é"}', "{}")
    ]
    result = "The result of get_weather is:\nsunny"
    assert rest == f"And Paris?<assistant>Wait.\n{calls[0]}\n{calls[1]}<user>{result}\n\n{result}"
    bare = render(CHATML, turns(called("a", "{}")), LLAMA3)
    assert '<assistant>{"name": "get_weather", "parameters": {}}<user>' in bare


def test_calls_of_before_without_tools_now() -> None:
    """The history is told all the same."""
    messages = turns(called("a", "{}"))
    assert "# Tools" not in render(CHATML, messages, HERMES, ())
    assert "<tool_call>" in render(CHATML, messages, HERMES, ())
    assert render(QWEN, messages, HERMES, ()).startswith("[user:And Paris?]")


def test_plain_chats_are_left_alone() -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert render_tools(messages, (), CHATML, HERMES) == (messages, None)


@pytest.mark.parametrize(
    ("chosen", "template", "tokens", "form"),
    [
        ("auto", QWEN, (), HERMES),
        ("auto", LLAMA, (), LLAMA3),
        ("auto", "{{ tools }}<|python_tag|>", (), LLAMA3),
        ("auto", MISTRALS, (), MISTRAL),
        ("auto", "[TOOL_CALLS]{{ name }}[ARGS]{{ tools }}", (), MISTRAL_WITH_HEADER),
        ("auto", CHATML, ("[TOOL_CALLS]",), HERMES),
        ("auto", "", (), HERMES),
        ("auto", "{{ tools }}", (), BARE),
        ("auto", "{{ tools }}", ("<|python_tag|>",), LLAMA3),
        ("auto", "{{ tools }}", ("<tool_call>",), HERMES),
        ("auto", "{{ tools }}", ("[TOOL_CALLS]",), MISTRAL),
        ("json", QWEN, (), BARE),
        ("hermes", LLAMA, (), HERMES),
        ("llama3", CHATML, (), LLAMA3),
        ("mistral", CHATML, (), MISTRAL),
        ("mistral", "[ARGS]", (), MISTRAL_WITH_HEADER),
    ],
)
def test_formats_of_models(chosen: str, template: str, tokens: tuple[str, ...], form: ToolFormat) -> None:
    assert format_of(chosen, template, lambda text: text in tokens) is form


@pytest.mark.parametrize(
    "schema",
    [
        {},
        {"type": "object"},
        {"type": ["object", "null"], "properties": {}},
        {"properties": {"a": {"$ref": "#/$defs/a"}}, "$defs": {"a": {"type": "string"}}},
        {"$schema": "http://127.0.0.1:1/nowhere", "type": "object"},
        {"type": "object", "properties": {"pair": {"items": [{"type": "string"}, {}]}}},
        {"type": "object", "properties": {"n": {"minimum": 0, "exclusiveMinimum": True}}},
    ],
)
def test_schemas_of_any_draft(schema: dict[str, Any]) -> None:
    check_parameters(schema, "f")


@pytest.mark.parametrize(
    ("schema", "word"),
    [
        ({"type": "string"}, "object"),
        ({"type": ["string", "null"]}, "object"),
        ({"type": "object", "properties": {"a": {"type": "text"}}}, "['properties']['a']['type']"),
        ({"type": "object", "required": "a"}, "required"),
        ({"$schema": "http://127.0.0.1:1/nowhere", "properties": []}, "properties"),
    ],
)
def test_what_is_no_schema(schema: dict[str, Any], word: str) -> None:
    with pytest.raises(InvalidField) as caught:
        check_parameters(schema, "f")
    assert caught.value.field == "f" and word in caught.value.problem
