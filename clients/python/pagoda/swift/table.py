"""The model types: names that ms-swift gave to models, where their files are, and how they are asked."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any

from pagoda.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class Entry:
    """One model: its id on ModelScope and on Hugging Face, and the name of its template."""

    modelscope: str
    huggingface: str
    template: str


def _qwen(name: str, template: str = "qwen") -> Entry:
    return Entry(f"qwen/{name}", f"Qwen/{name}", template)


MODELS: dict[str, Entry] = {
    "qwen-1_8b-chat": _qwen("Qwen-1_8B-Chat"),
    "qwen-7b-chat": _qwen("Qwen-7B-Chat"),
    "qwen-14b-chat": _qwen("Qwen-14B-Chat"),
    "qwen-72b-chat": _qwen("Qwen-72B-Chat"),
    "qwen1half-0_5b-chat": _qwen("Qwen1.5-0.5B-Chat"),
    "qwen1half-1_8b-chat": _qwen("Qwen1.5-1.8B-Chat"),
    "qwen1half-4b-chat": _qwen("Qwen1.5-4B-Chat"),
    "qwen1half-7b-chat": _qwen("Qwen1.5-7B-Chat"),
    "qwen1half-14b-chat": _qwen("Qwen1.5-14B-Chat"),
    "qwen1half-32b-chat": _qwen("Qwen1.5-32B-Chat"),
    "qwen1half-72b-chat": _qwen("Qwen1.5-72B-Chat"),
    "qwen2-0_5b-instruct": _qwen("Qwen2-0.5B-Instruct"),
    "qwen2-1_5b-instruct": _qwen("Qwen2-1.5B-Instruct"),
    "qwen2-7b-instruct": _qwen("Qwen2-7B-Instruct"),
    "qwen2-72b-instruct": _qwen("Qwen2-72B-Instruct"),
    "qwen2_5-0_5b-instruct": _qwen("Qwen2.5-0.5B-Instruct", "qwen2_5"),
    "qwen2_5-1_5b-instruct": _qwen("Qwen2.5-1.5B-Instruct", "qwen2_5"),
    "qwen2_5-3b-instruct": _qwen("Qwen2.5-3B-Instruct", "qwen2_5"),
    "qwen2_5-7b-instruct": _qwen("Qwen2.5-7B-Instruct", "qwen2_5"),
    "qwen2_5-14b-instruct": _qwen("Qwen2.5-14B-Instruct", "qwen2_5"),
    "qwen2_5-32b-instruct": _qwen("Qwen2.5-32B-Instruct", "qwen2_5"),
    "qwen2_5-72b-instruct": _qwen("Qwen2.5-72B-Instruct", "qwen2_5"),
    "llama3-8b-instruct": Entry(
        "LLM-Research/Meta-Llama-3-8B-Instruct", "meta-llama/Meta-Llama-3-8B-Instruct", "llama3"
    ),
    "llama3-70b-instruct": Entry(
        "LLM-Research/Meta-Llama-3-70B-Instruct", "meta-llama/Meta-Llama-3-70B-Instruct", "llama3"
    ),
    "mistral-7b-instruct": Entry(
        "AI-ModelScope/Mistral-7B-Instruct-v0.1", "mistralai/Mistral-7B-Instruct-v0.1", "mistral"
    ),
    "mistral-7b-instruct-v2": Entry(
        "AI-ModelScope/Mistral-7B-Instruct-v0.2", "mistralai/Mistral-7B-Instruct-v0.2", "mistral"
    ),
    "smollm2-135m-instruct": Entry(
        "HuggingFaceTB/SmolLM2-135M-Instruct", "HuggingFaceTB/SmolLM2-135M-Instruct", "smollm2"
    ),
}


class _Names(type):
    """Attributes that are the table's names, with _ where an attribute cannot have - or a dot."""

    def __getattr__(cls, name: str) -> str:
        for model_type in MODELS:
            if model_type.replace("-", "_") == name:
                return model_type
        near = difflib.get_close_matches(name, dir(cls), n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise AttributeError(f"ModelType has no {name!r}{hint}")

    def __dir__(cls) -> list[str]:
        return [model_type.replace("-", "_") for model_type in MODELS]


class ModelType(metaclass=_Names):
    """`ModelType.qwen_7b_chat` is "qwen-7b-chat", and so on for every name of the table."""


def entry_of(model_type: str) -> Entry | None:
    """The table's entry, None for a model that is not in it."""
    return MODELS.get(model_type)


def unknown(what: str, name: Any, known: list[str]) -> InvalidRequest:
    """The error for a name that is not among `known`; it lists them."""
    return InvalidRequest(f"{what} {name!r} is not known; there are {', '.join(sorted(known))}", field=what)
