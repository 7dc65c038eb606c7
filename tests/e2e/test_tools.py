"""Calls of tools by a real model: through OpenAI's SDK, against the live services.

The embedded model is too small to choose well, so that it is asked to say a call again, or shown how it goes.
What must be a call is one whatever the model would have liked.
"""

from __future__ import annotations

import json
from typing import Any

import jsonschema_rs
import openai
import pytest

from pagoda.models import EMBEDDED_MODEL as MODEL

pytestmark = pytest.mark.timeout(600)

GREEDY: dict[str, Any] = {"model": MODEL, "temperature": 0, "max_tokens": 200}
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}


def function(name: str, parameters: dict[str, Any], **more: Any) -> Any:
    """A tool."""
    return {"type": "function", "function": {"name": name, "parameters": parameters, **more}}


TOOLS = [
    function("get_weather", CITY, description="Get the current weather of a city."),
    function("get_time", CITY, description="Get the local time of a city."),
]
PARIS = '{"city": "Paris"}'
CALL = f'<tool_call>\n{{"name": "get_weather", "arguments": {PARIS}}}\n</tool_call>'
REPEAT: list[Any] = [{"role": "user", "content": f"Repeat this text:\n{CALL}"}]
ASK: list[Any] = [{"role": "user", "content": "What is the weather in Paris?"}]


def calls_in(choice: Any) -> list[tuple[str, str]]:
    """Names and arguments of a choice's calls."""
    return [(call.function.name, call.function.arguments) for call in choice.message.tool_calls or ()]


# ------------------------------------------------------------------------------------- the model's own choice


def test_a_call(sdk: openai.OpenAI) -> None:
    answer = sdk.chat.completions.create(messages=REPEAT, tools=TOOLS, **GREEDY)
    (choice,) = answer.choices
    assert calls_in(choice) == [("get_weather", PARIS)]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    plain = sdk.chat.completions.create(messages=ASK, tools=TOOLS, **GREEDY).choices[0]
    assert plain.message.tool_calls is None and plain.message.content and plain.finish_reason == "stop"


def test_a_streamed_call(sdk: openai.OpenAI) -> None:
    chunks = list(
        sdk.chat.completions.create(
            messages=REPEAT, tools=TOOLS, stream=True, stream_options={"include_usage": True}, **GREEDY
        )
    )
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    parts = [call for delta in deltas for call in delta.tool_calls or ()]
    assert [part.function.name for part in parts if part.id and part.function] == ["get_weather"]
    assert "".join(part.function.arguments or "" for part in parts if part.function) == PARIS
    assert len(parts) > 2, "it streams"
    assert not any(delta.content for delta in deltas)
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "tool_calls"


def test_the_stream_helper(sdk: openai.OpenAI) -> None:
    with sdk.chat.completions.stream(messages=REPEAT, tools=TOOLS, **GREEDY) as stream:
        done = [event for event in stream if event.type == "tool_calls.function.arguments.done"]
        (choice,) = stream.get_final_completion().choices
    assert [(event.name, event.arguments) for event in done] == [("get_weather", PARIS)]
    assert calls_in(choice) == [("get_weather", PARIS)]


def test_a_bare_call_after_text(sdk: openai.OpenAI) -> None:
    bare = f'{{"name": "get_weather", "arguments": {PARIS}}}'
    messages: list[Any] = [{"role": "user", "content": f"Repeat this text:\n{bare}"}]
    (choice,) = sdk.chat.completions.create(messages=messages, tools=TOOLS, **GREEDY).choices
    assert calls_in(choice) == [("get_weather", PARIS)]
    assert choice.finish_reason == "tool_calls" and "{" not in (choice.message.content or "")


def test_turns_with_results(sdk: openai.OpenAI) -> None:
    """The model goes on as the turns before went, results of tools among them."""
    messages: list[Any] = []
    for city in ("London", "Rome", "Oslo", "Paris"):
        messages.append({"role": "user", "content": f"Call get_weather for {city}."})
        if city == "Paris":
            break
        arguments = json.dumps({"city": city})
        called = {"name": "get_weather", "arguments": arguments}
        call = {"id": f"call_{city}", "type": "function", "function": called}
        messages.append({"role": "assistant", "content": None, "tool_calls": [call]})
    (choice,) = sdk.chat.completions.create(messages=messages, tools=TOOLS, **GREEDY).choices
    assert calls_in(choice) == [("get_weather", PARIS)]
    assert choice.message.tool_calls is not None
    result = {"role": "tool", "tool_call_id": choice.message.tool_calls[0].id, "content": "It is 31 degrees."}
    messages = [*ASK, choice.message, result]
    (answer,) = sdk.chat.completions.create(
        messages=messages, tools=TOOLS, tool_choice="none", **GREEDY
    ).choices
    assert "31" in (answer.message.content or ""), "the result was told"


# ----------------------------------------------------------------------------------------------- what must be


@pytest.mark.parametrize("temperature", [0, 1.2])
def test_required(sdk: openai.OpenAI, temperature: float) -> None:
    options = GREEDY | {"temperature": temperature, "seed": 7}
    answer = sdk.chat.completions.create(messages=ASK, tools=TOOLS, tool_choice="required", n=4, **options)
    for choice in answer.choices:
        assert choice.message.content is None and choice.finish_reason == "tool_calls"
        assert calls_in(choice)
        for name, arguments in calls_in(choice):
            assert name in ("get_weather", "get_time") and set(json.loads(arguments)) == {"city"}


@pytest.mark.parametrize("stream", [False, True])
def test_named(sdk: openai.OpenAI, stream: bool) -> None:
    choice: Any = {"type": "function", "function": {"name": "get_time"}}
    options: Any = {"messages": ASK, "tools": TOOLS, "tool_choice": choice, **GREEDY}
    if stream:
        with sdk.chat.completions.stream(**options) as events:
            (said,) = events.until_done().get_final_completion().choices
    else:
        (said,) = sdk.chat.completions.create(**options).choices
    assert calls_in(said) == [("get_time", PARIS)] and said.finish_reason == "tool_calls"


SCHEMAS: list[dict[str, Any]] = [
    {
        "type": "object",
        "properties": {"unit": {"enum": ["C", "F"]}, "days": {"type": "integer", "maximum": 9}},
    },
    {"type": "object", "properties": {"tags": {"type": "array", "items": {"type": "string"}, "maxItems": 3}}},
    {"type": "object", "properties": {"at": {"type": "string", "format": "date"}}, "required": ["at"]},
    {
        "type": "object",
        "properties": {"where": {"$ref": "#/$defs/p"}},
        "$defs": {"p": CITY},
        "required": ["where"],
    },
    {
        "type": "object",
        "properties": {"x": {"anyOf": [{"type": "null"}, {"type": "boolean"}]}},
        "required": ["x"],
    },
    {
        "type": "object",
        "properties": {"code": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"}},
        "required": ["code"],
    },
]


def test_arguments_are_as_defined(sdk: openai.OpenAI) -> None:
    """Whatever the schema, and though the model is drawn from at random."""
    options = GREEDY | {"temperature": 1, "seed": 3}
    tools = [function(f"f{i}", schema, strict=True) for i, schema in enumerate(SCHEMAS)]
    for i, schema in enumerate(SCHEMAS):
        choice: Any = {"type": "function", "function": {"name": f"f{i}"}}
        answer = sdk.chat.completions.create(messages=ASK, tools=tools, tool_choice=choice, n=3, **options)
        for said in answer.choices:
            ((name, arguments),) = calls_in(said)
            assert name == f"f{i}"
            jsonschema_rs.validate(schema, json.loads(arguments))


def test_strict_tools_of_the_models_own_choice(sdk: openai.OpenAI) -> None:
    """The model is to repeat a call that is not as defined. It may, unless the tool is strict."""
    lower = {"type": "object", "properties": {"city": {"type": "string", "pattern": "^[a-z]+$"}}}
    said = {}
    for strict in (False, True):
        tools = [
            function("get_weather", lower, strict=strict, description="Get the current weather of a city.")
        ]
        said[strict] = sdk.chat.completions.create(messages=REPEAT, tools=tools, **GREEDY).choices[0]
    assert calls_in(said[False]) == [("get_weather", PARIS)]
    assert calls_in(said[True]) == [("get_weather", PARIS.lower())]
    strict_tools = [function("get_time", CITY, strict=True)]
    text = sdk.chat.completions.create(messages=ASK, tools=strict_tools, **GREEDY).choices[0].message
    assert text.content and not text.tool_calls, "text is as free as ever"


def test_a_call_or_text_of_a_form(sdk: openai.OpenAI) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"enum": ["sunny", "rainy"]}}}
    options: dict[str, Any] = {"tools": TOOLS, "response_format": form, **GREEDY}
    call = sdk.chat.completions.create(messages=REPEAT, parallel_tool_calls=False, **options).choices[0]
    assert calls_in(call) == [("get_weather", PARIS)]
    text = sdk.chat.completions.create(messages=ASK, tool_choice="none", **options).choices[0]
    assert json.loads(text.message.content or "") in ("sunny", "rainy")


def test_what_is_refused(sdk: openai.OpenAI) -> None:
    missing: Any = {"type": "function", "function": {"name": "nobody"}}
    with pytest.raises(openai.BadRequestError) as unknown:
        sdk.chat.completions.create(messages=ASK, tools=TOOLS, tool_choice=missing, **GREEDY)
    assert unknown.value.param == "tool_choice"
    with pytest.raises(openai.BadRequestError) as alone:
        sdk.chat.completions.create(messages=ASK, tool_choice="required", **GREEDY)
    assert alone.value.param == "tool_choice"
