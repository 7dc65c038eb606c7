"""Calls in every format, cut anywhere: exactly these calls come out, and what is not a call is content."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway_svc.text.tools.events import Arguments, CallBegun, CallEnded, Content, Ending, Event
from gateway_svc.text.tools.formats import (
    BARE,
    HERMES,
    LLAMA3,
    MISTRAL,
    MISTRAL_WITH_HEADER,
    ToolFormat,
    WrittenCall,
)
from gateway_svc.text.tools.parser import ToolCallParser
from tests.property.test_json_scan import CUTS, JSON

FORMATS = [HERMES, LLAMA3, MISTRAL, MISTRAL_WITH_HEADER, BARE]
NAMES = ["get_weather", "get", "a.b-c", "search_2"]
# What a value may hold that looks like something else.
TRICKY = [
    *("</tool_call>", "<tool_call>", '{"name": "get", "arguments": {}}', "[TOOL_CALLS]", "[ARGS]"),
    *("```", "}\n{", '"'),
]
VALUES = JSON | st.sampled_from(TRICKY)
ARGUMENTS = st.dictionaries(st.text(max_size=8) | st.sampled_from(TRICKY), VALUES, max_size=4)
CALLS = st.lists(st.tuples(st.sampled_from(NAMES), ARGUMENTS), min_size=1, max_size=4)
STYLES = st.sampled_from(
    [{}, {"indent": 2}, {"ensure_ascii": False}, {"separators": (",", ":"), "ensure_ascii": False}]
)
# Words without a bracket, which can be parts of no call.
PROSE = st.text(
    alphabet=st.characters(codec="utf-8", exclude_characters="[]{}`<|,;", exclude_categories=["Cs"]),
    max_size=20,
)
FRAGMENTS = [
    *(
        "<tool_call>",
        "</tool_call>",
        "<|python_tag|>",
        "[TOOL_CALLS]",
        "[ARGS]",
        "[CALL_ID]",
        "```",
        "```json\n",
    ),
    *('{"name": "get"', '{"name": "other"', '"arguments": {"a": 1}', '"parameters": {', '"type": "function"'),
    *(
        '"function": ',
        "}",
        "]",
        "[",
        "{",
        ",",
        ", ",
        "\n",
        " ",
        ";",
        '"',
        ":",
        "<",
        "text",
        "get",
        "\\u00",
        "0",
    ),
    *('{"name": "get", "arguments": {"x": [1, "y"]}}', '{"arguments": {}, "name": "a.b-c"}', '{"a": oops}'),
    "é世👋",
]
SOUP = st.lists(st.sampled_from(FRAGMENTS), max_size=24).map("".join)


def events_of(
    form: ToolFormat, text: str, cuts: Sequence[int] = (), names: Sequence[str] = NAMES
) -> list[Event]:
    """The events of a text that comes in pieces, each run of content or arguments as one."""
    parser = ToolCallParser(form, names)
    edges = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    events = [event for begin, end in itertools.pairwise(edges) for event in parser.feed(text[begin:end])]
    joined: list[Event] = []
    for event in [*events, *parser.finish()]:
        last = joined[-1] if joined else None
        if isinstance(event, Content) and isinstance(last, Content):
            joined[-1] = Content(last.text + event.text)
        elif isinstance(event, Arguments) and isinstance(last, Arguments):
            joined[-1] = Arguments(last.text + event.text)
        else:
            joined.append(event)
    return joined


def calls_of(events: Sequence[Event]) -> list[tuple[str, str]]:
    """Names and arguments of whole calls."""
    assert all(event.how is Ending.WHOLE for event in events if isinstance(event, CallEnded))
    names = [event.name for event in events if isinstance(event, CallBegun)]
    arguments = [event.text for event in events if isinstance(event, Arguments)]
    return list(zip(names, arguments, strict=True))


def content_of(events: Sequence[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Content))


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: f"{form.name}{form.has_header:d}")
@given(calls=CALLS, style=STYLES, before=PROSE, cuts=CUTS)
def test_calls_come_out_as_they_were_written(
    form: ToolFormat, calls: list[tuple[str, Any]], style: dict[str, Any], before: str, cuts: list[int]
) -> None:
    written = [(name, json.dumps(arguments, **style)) for name, arguments in calls]
    parts_it = "\n" if form in (BARE, LLAMA3) else ""  # a call without an opener begins a line
    text = before + parts_it + form.write([WrittenCall(*call) for call in written])
    events = events_of(form, text, cuts)
    assert calls_of(events) == written
    assert content_of(events) == before.rstrip() or not before.strip()


def _draw_object(data: st.DataObject, name: str, arguments: Any) -> str:
    """A call's object, in any order of members, or in the shape that OpenAI gives calls."""
    members = {
        "name": name,
        data.draw(st.sampled_from(["arguments", "parameters"])): arguments,
        "type": "function",
        "id": "call_1",
    }
    call = {key: members[key] for key in data.draw(st.permutations(list(members)))}
    if data.draw(st.booleans()):
        inner = {key: value for key, value in call.items() if key not in ("type", "id")}
        call = {"type": "function", "function": inner}
    return json.dumps(call)


@given(CALLS, st.sampled_from(FORMATS), st.booleans(), st.booleans(), CUTS, st.data())
def test_calls_without_an_opener(
    calls: list[tuple[str, Any]],
    form: ToolFormat,
    array: bool,
    fence: bool,
    cuts: list[int],
    data: st.DataObject,
) -> None:
    """As small models write them: bare or fenced, alone or in an array."""
    objects = [_draw_object(data, name, arguments) for name, arguments in calls]
    parts_them = data.draw(st.sampled_from(["\n", "; ", ", "]))
    text = f"[{', '.join(objects)}]" if array else parts_them.join(objects)
    text = f"```json\n{text}\n```" if fence else text
    events = events_of(form, text, cuts)
    assert calls_of(events) == [(name, json.dumps(arguments)) for name, arguments in calls]
    assert content_of(events) == ""


@given(form=st.sampled_from(FORMATS), text=SOUP | st.text(), cuts=CUTS)
def test_text_without_calls_passes_unchanged(form: ToolFormat, text: str, cuts: list[int]) -> None:
    assert content_of(events_of(form, text, cuts, names=())) == text


@given(form=st.sampled_from(FORMATS), text=SOUP, cuts=CUTS)
def test_cuts_make_no_difference(form: ToolFormat, text: str, cuts: list[int]) -> None:
    events = events_of(form, text)
    assert events == events_of(form, text, cuts)
    for event in events:
        if isinstance(event, Content):
            assert event.text in text
    for name, arguments in zip(
        (event.name for event in events if isinstance(event, CallBegun)),
        (event.text for event in events if isinstance(event, Arguments)),
        strict=True,
    ):
        assert name in NAMES and arguments.startswith("{")


@given(form=st.sampled_from(FORMATS), calls=CALLS, cut=st.integers(0, 10_000))
def test_a_text_that_is_cut_off(form: ToolFormat, calls: list[tuple[str, Any]], cut: int) -> None:
    """Calls before the cut are whole; the one that is cut has the beginning of its arguments, if any."""
    written = [WrittenCall(name, json.dumps(arguments)) for name, arguments in calls]
    text = form.write(written)
    events = events_of(form, text[: cut % len(text)])
    ends = [event.how for event in events if isinstance(event, CallEnded)]
    assert ends[:-1] == [Ending.WHOLE] * len(ends[:-1])
    if ends and ends[-1] is Ending.CUT:
        assert content_of(events) == ""
    told = [event.text for event in events if isinstance(event, Arguments)]
    for how, arguments, call in zip(ends, told, written, strict=False):
        assert call.arguments == arguments if how is Ending.WHOLE else call.arguments.startswith(arguments)


@pytest.mark.parametrize(
    ("form", "text"),
    [
        (HERMES, '<tool_call>\n{"name": "nobody", "arguments": {}}\n</tool_call>'),
        (HERMES, "<tool_call>\n<function=get>\n</function>\n</tool_call>"),
        (HERMES, '<tool_call>\n{"name": "get", "arguments": "Paris"}\n</tool_call>'),
        (HERMES, '<tool_call>\n{"name": "get", "arguments": [1]}\n</tool_call>'),
        (LLAMA3, '<|python_tag|>brave_search.call(query="x")'),
        (LLAMA3, '{"name": "get", "description": "x", "parameters": {"type": "object"}}'),
        (LLAMA3, 'Well, {"name": "get", "parameters": {}} is how'),
        (MISTRAL, "[TOOL_CALLS]nobody[ARGS]{}"),
        (MISTRAL, "[1, 2]\n[link](x)\n[TOOL"),
        (BARE, '<tool_call>{"name": "get", "arguments": {}}</tool_call>'),
        (BARE, '```python\n{"a": 1}\n```\n'),
        (BARE, '{"answer": {"name": "get", "arguments": {}}}'),
        (BARE, '{"arguments": {"a": 1}}'),
    ],
)
def test_what_only_looks_like_a_call(form: ToolFormat, text: str) -> None:
    for size in (1, 3, len(text)):
        assert events_of(form, text, range(0, len(text), size)) == [Content(text)]


def test_broken_arguments_end_a_call() -> None:
    text = 'See\n<tool_call>\n{"name": "get", "arguments": {"a": oops}}\n</tool_call> and'
    events = events_of(HERMES, text)
    at = text.index("oops")
    assert events == [
        Content("See"),
        CallBegun("get", 3),
        Arguments(text[text.index('{"a"') : at]),
        CallEnded(Ending.BROKEN, at),
        Content(text[at:]),
    ]


def test_a_call_stands_when_its_arguments_do() -> None:
    """Small models forget the last brace."""
    events = events_of(HERMES, '<tool_call>\n{"name": "get", "arguments": {"a": 1}\n</tool_call>\nok')
    assert calls_of(events) == [("get", '{"a": 1}')] and content_of(events) == "ok"


def test_arguments_in_other_forms() -> None:
    for written, arguments in [('"{\\"a\\": 1}"', '{"a": 1}'), ("null", "{}"), ('" {} "', "{}")]:
        assert calls_of(events_of(BARE, f'{{"name": "get", "arguments": {written}}}')) == [("get", arguments)]
    assert calls_of(events_of(BARE, '{"name": "get"}')) == [("get", "{}")]


def test_a_call_begins_before_its_arguments_end() -> None:
    parser = ToolCallParser(HERMES, NAMES)
    assert parser.feed('Hi <tool_call>{"name": "get", "arguments": {"text": "a lon') == [
        Content("Hi"),
        CallBegun("get", 2),
        Arguments('{"text": "a lon'),
    ]
    assert parser.feed("g one") == [Arguments("g one")]


def test_text_around_calls() -> None:
    call = '<tool_call>\n{"name": "get", "arguments": {}}\n</tool_call>'
    assert content_of(events_of(HERMES, f"\n{call}\n\n{call}\n ")) == ""
    assert content_of(events_of(HERMES, f"Let me see.\n\n{call}\nDone. \n")) == "Let me see.\n\nDone."
    assert content_of(events_of(HERMES, f"{call}\nDone.")) == "Done."
    assert content_of(events_of(HERMES, call[:-3])) == "", "cut off in the closer"
