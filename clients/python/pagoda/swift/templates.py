"""How a query, its history and a system message become what the model reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pagoda.errors import InvalidRequest
from pagoda.swift.table import entry_of, unknown
from pagoda.swift.unsupported import refuse

Turn = dict[str, str]
IM_END = "<|im_end|>"
QWEN_SYSTEM = "You are a helpful assistant."

# `qwen` for servers: the same text, as a chat template for models that bring none.
QWEN_JINJA = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\n" + QWEN_SYSTEM + "<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# Templates of ours, and names under which the model's own is used: the server renders it. `default` is for
# models of no table.
OURS = ("qwen",)
THE_MODELS_OWN = ("default", "llama3", "mistral", "qwen2_5", "smollm2")
TEMPLATES = (*OURS, *THE_MODELS_OWN)
DEFAULT = "default"

_OF_A_REQUEST = ("query", "history", "system")
_NOT_YET: dict[str, Any] = {"max_length": None, "truncation_strategy": "delete"}


@dataclass(frozen=True, slots=True)
class Template:
    """A template by its name. `tokenizer` is kept for programs that look at it."""

    template_type: str
    tokenizer: Any = None
    default_system: str | None = None

    @property
    def suffix(self) -> str | None:
        """What ends an answer, where it is ours to know."""
        return IM_END if self.template_type in OURS else None

    def messages(self, request: Mapping[str, Any]) -> list[Turn]:
        """A request as a chat, oldest turn first.

        Without a system message the template's default counts; an empty one means none.

        Raises:
            InvalidRequest: it has no query, or something that is not a query, a history or a system message.
        """
        for name, value in request.items():
            if name not in _OF_A_REQUEST and value:
                raise InvalidRequest(f"a request's {name!r} is not supported", field=name)
        turns = [_turn("user", request.get("query"), "query")]
        for question, answer in reversed(history_of(request)):
            turns[:0] = [_turn("user", question, "history"), _turn("assistant", answer, "history")]
        system = request.get("system")
        if system is None:
            system = self.default_system
        return [_turn("system", system, "system"), *turns] if system else turns

    def prompt(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """A request as the SDK takes it: `prompt`, rendered here, or `messages` for the model's template."""
        messages = self.messages(request)
        if self.template_type not in OURS:
            return {"messages": messages}
        turns = "".join(f"<|im_start|>{m['role']}\n{m['content']}{IM_END}\n" for m in messages)
        return {"prompt": f"{turns}<|im_start|>assistant\n"}


def get_default_template_type(model_type: str) -> str:
    """The name of a model's template; "default", the model's own, where it is not in the table."""
    entry = entry_of(model_type)
    return entry.template if entry else DEFAULT


def get_template(
    template_type: str, tokenizer: Any = None, default_system: str | None = None, **unsupported: Any
) -> Template:
    """A template by its name. Raises InvalidRequest that lists the names when there is no such one."""
    refuse("get_template", unsupported, _NOT_YET)
    if template_type not in TEMPLATES:
        raise unknown("template_type", template_type, list(TEMPLATES))
    if default_system is None and template_type in OURS:
        default_system = QWEN_SYSTEM
    return Template(template_type, tokenizer, default_system)


def history_of(request: Mapping[str, Any]) -> list[list[str]]:
    """A request's history, copied: pairs of query and response. Raises InvalidRequest."""
    history: Sequence[Any] = request.get("history") or []
    for pair in history:
        if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2:
            raise InvalidRequest(f"history: {pair!r} is not a pair [query, response]", field="history")
    return [list(pair) for pair in history]


def _turn(role: str, text: Any, field: str) -> Turn:
    if not isinstance(text, str):
        raise InvalidRequest(f"{field}: {text!r} is not a string", field=field)
    return {"role": role, "content": text}
