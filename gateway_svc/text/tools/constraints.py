"""Grammars that make a model call tools as it must: any of them, a certain one, or exactly as defined.

They are written in llguidance's dialect of Lark. Calls are written as `ToolFormat.write` writes them.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from typing import Any

from gateway_svc.errors import InvalidField
from gateway_svc.text.grammars import FREE_TOKENS, checked, json_schema_grammar
from gateway_svc.text.tools.definitions import Tool
from gateway_svc.text.tools.formats import ARGS_MARK, ToolFormat

# Of one answer that must be calls: a small model might never come to an end.
MAX_CALLS = 16
_SHAPE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
# Where a schema has one of these, properties may be defined in other places than `properties`.
_COMPOSING = frozenset(["allOf", "anyOf", "oneOf", "$ref", "if", "patternProperties", "dependentSchemas"])

TokenId = Callable[[str], int | None]


def must_call(form: ToolFormat, tools: Sequence[Tool], parallel: bool, special_id: TokenId) -> str:
    """The grammar of one call, or if `parallel` of several, and nothing else.

    Args:
        special_id: the id of a special token, by its text; None if there is no such token.

    Raises:
        InvalidField: a tool's parameters cannot be guaranteed.
    """
    return _checked(tools, _Writer(form, tools, special_id).only_calls(MAX_CALLS if parallel else 1))


def may_call(form: ToolFormat, tools: Sequence[Tool], special_id: TokenId) -> str:
    """The grammar of any text in which calls are as their tools define them.

    In formats without an opener, that is where the answer begins with a call. Arguments as in `must_call`.
    """
    return _checked(tools, _Writer(form, tools, special_id).text_and_calls())


def either(one: str, other: str) -> str:
    """The grammar of answers that follow one of two."""
    parts = [{"name": name, "lark_grammar": text} for name, text in (("one", one), ("other", other))]
    first = {"name": "either", "lark_grammar": f"{FREE_TOKENS}start: @one | @other"}
    return json.dumps({"grammars": [first, *parts]}, ensure_ascii=False)


def _checked(tools: Sequence[Tool], lark: str) -> str:
    try:
        return _compiled(lark)
    except InvalidField:
        for tool in tools:  # whose fault is it?
            schema = arguments_schema(tool)
            json_schema_grammar(True if schema is None else schema, f"{tool.field}.parameters")
        raise


@functools.lru_cache(maxsize=256)
def _compiled(lark: str) -> str:
    """The grammar, once it has been checked: the same tools come with every turn of a conversation."""
    return checked(FREE_TOKENS + lark, "tools")


class _Writer:
    """Rules of a grammar."""

    def __init__(self, form: ToolFormat, tools: Sequence[Tool], special_id: TokenId) -> None:
        self._form = form
        self._tools = tools
        self._special_id = special_id

    def only_calls(self, most: int) -> str:
        form = self._form
        opener, _ = self._mark(form.opener)
        parts_them = "" if form.has_header else '", "' if form.may_have_header else '"\\n"'
        start = "call" if most == 1 else f"call ({parts_them} call){{0,{most - 1}}}"
        if form.may_have_header and not form.has_header:
            start = f'{opener} "[" {start} "]"'
        return self._grammar(start, [self._call_rule(opener)])

    def text_and_calls(self) -> str:
        form = self._form
        opener, is_special = self._mark(form.opener)
        if not form.closer and not form.may_have_header:
            plain = "PLAIN: /\\s*([^\\s{\\[](.|\\n)*)?/"
            start = 'call ("\\n" call)* | PLAIN' + (f" | PLAIN {opener} call" if is_special else "")
            return self._grammar(start, [self._call_rule(None), plain])
        begin = f"begin{'' if is_special else '[lazy]'}: TEXT {opener}"
        inside = '/ ?/ "[" call (", " call)* "]"' if form.may_have_header and not form.has_header else "call"
        rules = ["TEXT: /(.|\\n)*/", begin, self._call_rule(None)]
        return self._grammar(f"(begin {inside})* TEXT", rules)

    def _grammar(self, start: str, rules: Sequence[str]) -> str:
        lines = [f"start: {start}", *rules]
        lines.append("body: " + " | ".join(f"tool_{i}" for i in range(len(self._tools))))
        for i, tool in enumerate(self._tools):
            if self._form.has_header:
                args_mark, _ = self._mark(ARGS_MARK)
                lines.append(f"tool_{i}: {_quoted(tool.name)} {args_mark} args_{i}")
            else:
                parts = (
                    "{",
                    '"name"',
                    ": ",
                    json.dumps(tool.name),
                    ", ",
                    f'"{self._form.arguments_key}"',
                    ": ",
                )
                lines.append(f'tool_{i}: {" ".join(map(_quoted, parts))} args_{i} "}}"')
            schema = arguments_schema(tool)
            lines.append(f'args_{i}: "{{}}"' if schema is None else f"args_{i}: %json {json.dumps(schema)}")
        return "\n".join(lines) + "\n"

    def _call_rule(self, opener: str | None) -> str:
        """One call; `opener` is None where it has been read."""
        form = self._form
        if form.closer:
            before = "" if opener is None else f"{opener} "
            return f'call: {before}"\\n" body "\\n" {self._mark(form.closer)[0]}'
        return f"call: {opener} body" if form.has_header and opener else "call: body"

    def _mark(self, text: str) -> tuple[str, bool]:
        """A mark as a grammar writes it: a special token has no text. Whether it is one."""
        special = self._special_id(text) if text else None
        return (_quoted(text), False) if special is None else (f"<[{special}]>", True)


def arguments_schema(tool: Tool) -> dict[str, Any] | None:
    """What the arguments of a call must be; None if there are none.

    That is narrower than the tool's schema in one point: arguments that it does not define are left out,
    unless it says something about them or defines none.
    """
    if tool.parameters is None:
        return None
    schema = {"type": "object"} | tool.parameters
    if schema.get("properties") and not _COMPOSING & schema.keys():
        schema.setdefault("additionalProperties", False)
    return schema | {"x-guidance": _SHAPE | {"lenient": not tool.strict}}


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
