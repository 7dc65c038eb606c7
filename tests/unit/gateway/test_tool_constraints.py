"""Grammars of calls, followed by llguidance's own matcher with the real model's tokenizer."""

from __future__ import annotations

import functools
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer

from gateway_svc.errors import InvalidField
from gateway_svc.text.tools.constraints import MAX_CALLS, arguments_schema, may_call, must_call
from gateway_svc.text.tools.definitions import Tool
from gateway_svc.text.tools.formats import (
    BARE,
    HERMES,
    LLAMA3,
    MISTRAL,
    MISTRAL_WITH_HEADER,
    ToolFormat,
    WrittenCall,
)
from tests.support.data import model_folder
from tests.unit.gateway.conftest import ids_of, model_tokenizer

FORMATS = [HERMES, LLAMA3, MISTRAL, MISTRAL_WITH_HEADER, BARE]
each_format = pytest.mark.parametrize("form", FORMATS, ids=lambda form: f"{form.name}{form.has_header:d}")
WEATHER: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer", "minimum": 1}},
    "required": ["city"],
}
# Special tokens of the embedded model that stand for the marks of other models.
SPECIAL = {
    "<tool_call>": "<repo_name>",
    "</tool_call>": "<reponame>",
    "<|python_tag|>": "<file_sep>",
    "[TOOL_CALLS]": "<filename>",
    "[ARGS]": "<gh_stars>",
}


def tool(name: str, parameters: dict[str, Any] | None, strict: bool = False) -> Tool:
    return Tool(name, parameters, strict, {}, "tools[0].function")


TOOLS = [tool("get_weather", WEATHER, strict=True), tool("now", None), tool("any", {})]
CALLS = [
    WrittenCall("get_weather", '{"city": "Saint-\\"Étienne\\" }", "days": 3}'),
    WrittenCall("now", "{}"),
    WrittenCall("any", '{"x": [1, null, {"y": "世界"}]}'),
]
WRONG = [
    WrittenCall("get_weather", '{"city": 5}'),
    WrittenCall("get_weather", '{"days": 3}'),
    WrittenCall("get_weather", '{"city": "x", "days": 0}'),
    WrittenCall("get_weather", '{"city": "x", "more": 1}'),
    WrittenCall("now", '{"a": 1}'),
    WrittenCall("any", "[]"),
    WrittenCall("nobody", "{}"),
]


@functools.cache
def matcher_tokenizer() -> LLTokenizer:
    return LLTokenizer(str(model_folder() / "tokenizer.json"), eos_token=2)


def follows(grammar: str, text: str) -> bool:
    """Whether a whole answer is as the grammar says."""
    matcher = LLMatcher(matcher_tokenizer(), grammar)
    ids = ids_of(text)
    return matcher.validate_tokens(ids) == len(ids) and matcher.consume_tokens(ids) and matcher.is_accepting()


def no_special(text: str) -> None:
    """A model whose marks are ordinary text."""


def special_id(text: str) -> int | None:
    """A model whose marks are special tokens, those of SPECIAL."""
    return model_tokenizer().special_id(SPECIAL[text]) if text in SPECIAL else None


def with_special(text: str) -> str:
    for mark, token in SPECIAL.items():
        text = text.replace(mark, token)
    return text


@each_format
@pytest.mark.parametrize("is_special", [False, True])
def test_an_answer_that_must_be_calls(form: ToolFormat, is_special: bool) -> None:
    spelt = with_special if is_special else str
    grammar = must_call(form, TOOLS, True, special_id if is_special else no_special)
    for call in CALLS:
        assert follows(grammar, spelt(form.write([call])))
    assert follows(grammar, spelt(form.write(CALLS)))
    assert follows(grammar, spelt(form.write(CALLS[1:2] * MAX_CALLS)))
    assert not follows(grammar, spelt(form.write(CALLS[1:2] * (MAX_CALLS + 1))))
    for call in WRONG:
        assert not follows(grammar, spelt(form.write([call])))
    for text in ("", "Hello", "{}"):
        assert not follows(grammar, text)


@each_format
def test_an_answer_that_must_be_one_call(form: ToolFormat) -> None:
    grammar = must_call(form, TOOLS[:1], False, no_special)
    assert follows(grammar, form.write(CALLS[:1]))
    assert not follows(grammar, form.write(CALLS[:1] * 2))
    assert not follows(grammar, form.write(CALLS[1:2]))


@each_format
@pytest.mark.parametrize("is_special", [False, True])
def test_text_in_which_calls_are_right(form: ToolFormat, is_special: bool) -> None:
    spelt = with_special if is_special else str
    grammar = may_call(form, TOOLS, special_id if is_special else no_special)
    for text in ("", "Hello", "Hello\n\n```python\nx = {}\n```\n", spelt(form.write(CALLS))):
        assert follows(grammar, text)
    if form.closer or form.may_have_header:
        assert follows(grammar, spelt(f"Let me see.\n{form.write(CALLS)}\nDone."))
    for call in WRONG:
        assert not follows(grammar, spelt(form.write([call])))


def test_what_cannot_be_guaranteed() -> None:
    """Is refused for a strict tool, and left out of account for others."""
    unmet = {"type": "object", "properties": {"a": {"not": {"type": "string"}}}}
    with pytest.raises(InvalidField) as caught:
        must_call(HERMES, [tool("f", unmet, strict=True)], True, no_special)
    assert caught.value.field == "tools[0].function.parameters"
    assert must_call(HERMES, [tool("f", unmet)], True, no_special)


@pytest.mark.parametrize(
    ("parameters", "closed"),
    [
        (WEATHER, True),
        ({"properties": {"a": {}}}, True),
        (WEATHER | {"additionalProperties": True}, False),
        ({}, False),
        ({"type": "object", "properties": {}}, False),
        (WEATHER | {"anyOf": [{"required": ["days"]}]}, False),
    ],
)
def test_arguments_that_are_not_defined(parameters: dict[str, Any], closed: bool) -> None:
    schema = arguments_schema(tool("f", parameters))
    assert schema is not None and schema["type"] == "object"
    assert (schema.get("additionalProperties") is False) == closed
    assert parameters.get("additionalProperties") is not False, "what the client sent is as it was"
