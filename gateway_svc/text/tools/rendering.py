"""Telling a model of tools, and of calls it made before, in the way that its chat template takes them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

from gateway_svc.text.tools.definitions import Tool
from gateway_svc.text.tools.formats import ToolFormat, WrittenCall, mentions_tools

Message = dict[str, Any]

_MISTRAL_ID = re.compile(r"[a-zA-Z0-9]{9}")
_INSTRUCTIONS = """# Tools

You can call functions. Here are their signatures, a JSON object a line:
{signatures}

To call one, answer with its name and a JSON object of its arguments, written like this:
{example}"""


def render_tools(
    messages: Sequence[Message], tools: Sequence[Tool], template: str, form: ToolFormat
) -> tuple[list[Message], list[dict[str, Any]] | None]:
    """Messages and tools for the template.

    Arguments of earlier calls become objects, results get the name of their function, and ids become what
    Mistral's templates insist on. If the template has no word of tools, a system message tells of them, and
    if it has none of calls, calls and results become text.

    Returns:
        The messages, and the template's variable `tools`: None where there are none, or it has none.
    """
    shown = [_readable(message) for message in messages]
    _name_results(shown)
    if form.may_have_header:
        _shorten_ids(shown)
    if "tool_calls" not in template:
        shown = list(_as_text(shown, form))
    if not tools:
        return shown, None
    if mentions_tools(template):
        return shown, [tool.definition for tool in tools]
    return _instructed(shown, tools, form), None


def _readable(message: Message) -> Message:
    """A copy of a message, in which calls have objects for arguments, where they are JSON of objects."""
    shown = {key: value for key, value in message.items() if key != "tool_calls"}
    calls = []
    for call in message.get("tool_calls", ()):
        function = call["function"]
        calls.append(call | {"function": function | {"arguments": _as_object(function["arguments"])}})
    return shown | {"tool_calls": calls} if calls else shown


def _as_object(arguments: Any) -> Any:
    """An object, where the arguments are its JSON; else as they are: a model may have written anything."""
    if not isinstance(arguments, str):
        return arguments
    if not arguments.strip():
        return {}
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
    return value if isinstance(value, dict) else arguments


def _name_results(messages: Sequence[Message]) -> None:
    """Some templates want the function's name with a result, which OpenAI's API has only in the call."""
    names: dict[str, str] = {}
    for message in messages:
        for call in message.get("tool_calls", ()):
            names[call.get("id", "")] = call["function"]["name"]
        name = names.get(message.get("tool_call_id", ""))
        if message["role"] == "tool" and name is not None and "name" not in message:
            message["name"] = name


def _shorten_ids(messages: Sequence[Message]) -> None:
    for message in messages:
        for call in message.get("tool_calls", ()):
            if "id" in call:
                call["id"] = _short(call["id"])
        if "tool_call_id" in message:
            message["tool_call_id"] = _short(message["tool_call_id"])


def _short(call_id: str) -> str:
    """Nine letters and digits, the same for the same id."""
    return call_id if _MISTRAL_ID.fullmatch(call_id) else hashlib.sha256(call_id.encode()).hexdigest()[:9]


def _as_text(messages: Iterable[Message], form: ToolFormat) -> Iterable[Message]:
    """Calls as the model writes them, and results as a user's words; those of one turn are one message."""
    results: list[str] = []
    for message in messages:
        if message["role"] == "tool":
            # Small models repeat what stands in tags, and answer what is said in words.
            results.append(f"The result of {message.get('name', 'the call')} is:\n{message['content']}")
            continue
        if results:
            yield {"role": "user", "content": "\n\n".join(results)}
            results = []
        if "tool_calls" in message:
            written = form.write([_written(call["function"]) for call in message["tool_calls"]])
            content = "\n".join(filter(None, (message["content"], written)))
            yield {"role": message["role"], "content": content}
        else:
            yield message
    if results:
        yield {"role": "user", "content": "\n\n".join(results)}


def _written(function: dict[str, Any]) -> WrittenCall:
    arguments = function["arguments"]
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return WrittenCall(function["name"], text)


def _instructed(messages: Sequence[Message], tools: Sequence[Tool], form: ToolFormat) -> list[Message]:
    """The messages, with a word of the tools in the system message."""
    signatures = "\n".join(
        json.dumps(tool.definition.get("function", tool.definition), ensure_ascii=False) for tool in tools
    )
    example = form.write([WrittenCall("function_name", '{"argument_name": "value"}')])
    words = _INSTRUCTIONS.format(signatures=signatures, example=example)
    if messages and messages[0]["role"] in ("system", "developer"):
        first = messages[0] | {"content": "\n\n".join(filter(None, (messages[0]["content"], words)))}
        return [first, *messages[1:]]
    return [{"role": "system", "content": words}, *messages]
