"""How models write calls of tools: what each family does, and which of it a model does."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

AUTO = "auto"
FENCE = "```"
ARGS_MARK, ID_MARK = "[ARGS]", "[CALL_ID]"
_MENTIONS_TOOLS = re.compile(r"\btools\b")


@dataclass(frozen=True, slots=True)
class WrittenCall:
    """A call as a model wrote it, or as it would: `arguments` is JSON."""

    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """How a family of models writes calls.

    A call is a JSON object of a name and arguments, in an array perhaps; `opener` comes before and `closer`
    after it. Calls without the opener are taken in every format, because small models leave it out.
    """

    name: str
    opener: str = ""
    closer: str = ""
    arguments_key: str = "arguments"
    # After the opener there may be name[ARGS]{...} instead of an object; with `has_header` there usually is.
    may_have_header: bool = False
    has_header: bool = False

    @property
    def marks(self) -> tuple[str, ...]:
        """Texts that calls are known by. As special tokens they must be seen, though others are skipped."""
        header = (ARGS_MARK, ID_MARK) if self.may_have_header else ()
        return tuple(filter(None, (self.opener, self.closer, *header)))

    def write(self, calls: Sequence[WrittenCall]) -> str:
        """The calls as a model of this family writes them."""
        if self.has_header:
            return "".join(f"{self.opener}{call.name}{ARGS_MARK}{call.arguments}" for call in calls)
        objects = [
            f'{{"name": {json.dumps(call.name)}, "{self.arguments_key}": {call.arguments}}}' for call in calls
        ]
        if self.may_have_header:
            return f"{self.opener}[{', '.join(objects)}]"
        if self.closer:
            objects = [f"{self.opener}\n{written}\n{self.closer}" for written in objects]
        return "\n".join(objects)


HERMES = ToolFormat("hermes", "<tool_call>", "</tool_call>")
LLAMA3 = ToolFormat("llama3", "<|python_tag|>", arguments_key="parameters")
MISTRAL = ToolFormat("mistral", "[TOOL_CALLS]", may_have_header=True)
MISTRAL_WITH_HEADER = ToolFormat("mistral", "[TOOL_CALLS]", may_have_header=True, has_header=True)
BARE = ToolFormat("json")


def mentions_tools(template: str) -> bool:
    """Whether a chat template tells the model of tools."""
    return _MENTIONS_TOOLS.search(template) is not None


def format_of(chosen: str, template: str, has_token: Callable[[str], bool]) -> ToolFormat:
    """The format of a model.

    Args:
        chosen: the name of a format, or "auto": from the template, else from what the vocabulary has.
        template: the chat template that is in use.
        has_token: whether a text is one token of the model's.
    """
    mistral = MISTRAL_WITH_HEADER if ARGS_MARK in template else MISTRAL
    if chosen != AUTO:
        return {form.name: form for form in (HERMES, LLAMA3, mistral, BARE)}[chosen]
    if mistral.opener in template:
        return mistral
    if LLAMA3.opener in template or ("ipython" in template and '"parameters"' in template):
        return LLAMA3
    if HERMES.opener in template or not mentions_tools(template):
        return HERMES  # which is also what a model is asked to write whose template says nothing of tools
    return next((form for form in (mistral, LLAMA3, HERMES) if has_token(form.opener)), BARE)
