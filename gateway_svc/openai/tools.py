"""Tools in a chat request: checked, told to the model, and what they make of its answer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from gateway_svc.errors import InvalidField
from gateway_svc.gateway import Gateway
from gateway_svc.openai.schema import ChatRequest, NamedToolChoice, ToolDefinition
from gateway_svc.openai.structured import Form, form_of
from gateway_svc.openai.tool_calls import ToolCallReader
from gateway_svc.text.tokenizer import Message
from gateway_svc.text.tools import constraints
from gateway_svc.text.tools.definitions import Tool, check_parameters
from gateway_svc.text.tools.formats import ToolFormat, format_of
from gateway_svc.text.tools.rendering import render_tools


@dataclass(frozen=True, slots=True)
class ToolUse:
    """What the tools of a request mean for its prompt, its sampling and its answer."""

    messages: list[Message]
    shown: list[dict[str, Any]] | None  # the template's variable `tools`
    form: Form | None  # that the answer must have
    marks: tuple[str, ...]  # special tokens that must be seen
    reader: ToolCallReader | None  # None: the answer is text


def tool_use(gateway: Gateway, body: ChatRequest, messages: list[Message]) -> ToolUse:
    """The tools of a request.

    Raises:
        InvalidField: a tool is not defined well, or the choice is not one of them.
    """
    tools = tools_of(body.tools or [])
    _check_choice(body, tools)
    if body.tool_choice == "none":
        tools = []
    form, messages, shown = told(gateway, messages, tools, body.chat_template)
    if not tools:
        return ToolUse(messages, None, form_of(body), (), None)
    parallel = body.parallel_tool_calls is not False
    reader = ToolCallReader(form, [tool.name for tool in tools], parallel)
    return ToolUse(messages, shown, _answers(gateway, body, tools, form), form.marks, reader)


def told(
    gateway: Gateway, messages: list[Message], tools: list[Tool], chat_template: str | None
) -> tuple[ToolFormat, list[Message], list[dict[str, Any]] | None]:
    """The format of calls, and messages and tools as the template takes them."""
    tokenizer = gateway.tokenizer
    template = tokenizer.template_in_use(chat_template, bool(tools))
    form = format_of(gateway.settings.tool_call_parser, template, tokenizer.has_token)
    messages, shown = render_tools(messages, tools, template, form)
    return form, messages, shown


def tools_of(definitions: list[ToolDefinition]) -> list[Tool]:
    """The tools that a request defines. Raises InvalidField."""
    tools: list[Tool] = []
    for place, definition in enumerate(definitions):
        function, field = definition.function, f"tools[{place}].function"
        if any(tool.name == function.name for tool in tools):
            raise InvalidField(f"{field}.name", f"is {function.name!r}, as of a tool before it")
        if function.parameters is not None:
            check_parameters(function.parameters, f"{field}.parameters")
        tools.append(
            Tool(function.name, function.parameters, bool(function.strict), _shown(definition), field)
        )
    return tools


def _shown(definition: ToolDefinition) -> dict[str, Any]:
    """A tool for chat templates, of which some take it for granted that nothing is missing."""
    shown = definition.model_dump(exclude_none=True)
    function = {"name": definition.function.name, "description": "", **shown["function"]}
    function.setdefault("parameters", {"type": "object", "properties": {}})
    function.pop("strict", None)
    return shown | {"function": function}


def _check_choice(body: ChatRequest, tools: list[Tool]) -> None:
    choice = body.tool_choice
    if choice in (None, "none", "auto"):
        return
    if not tools:
        raise InvalidField("tool_choice", "wants a call, but there are no tools")
    if isinstance(choice, NamedToolChoice) and choice.function.name not in [tool.name for tool in tools]:
        raise InvalidField("tool_choice", f"names {choice.function.name!r}, which is not among the tools")


def _answers(gateway: Gateway, body: ChatRequest, tools: list[Tool], form: ToolFormat) -> Form | None:
    """What answers there may be: calls alone, or beside text that a body asks for in a certain form."""
    special_id = gateway.tokenizer.special_id
    if isinstance(body.tool_choice, NamedToolChoice):
        named = [tool for tool in tools if tool.name == body.tool_choice.function.name]
        return partial(constraints.must_call, form, named, False, special_id), "tools"
    parallel = body.parallel_tool_calls is not False
    calls = partial(constraints.must_call, form, tools, parallel, special_id)
    if body.tool_choice == "required":
        return calls, "tools"
    other = form_of(body)
    if other is not None:
        make, field = other
        return lambda: constraints.either(calls(), make()), field
    if any(tool.strict for tool in tools):
        return partial(constraints.may_call, form, tools, special_id), "tools"
    return None
