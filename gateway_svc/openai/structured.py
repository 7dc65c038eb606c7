"""`response_format` and `structured_outputs`: from what a body asks for to a grammar."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from gateway_svc.errors import InvalidField
from gateway_svc.gateway import Gateway
from gateway_svc.openai.schema import ResponseFormat, SamplingBody, StructuredOutputs
from gateway_svc.text import grammars
from pagoda.v1 import scheduler_pb2 as pb

Form = tuple[Callable[[], str], str]
"""What makes a grammar, and the field that asked for it."""


async def constrain(gateway: Gateway, sampling: pb.SamplingParams, body: SamplingBody) -> None:
    """Let outputs have the form that a body asks for, if any.

    Raises:
        InvalidField: it asks for two, or for one that is not possible.
    """
    form = form_of(body)
    if form is not None:
        await gateway.constrain(sampling, *form)


def form_of(body: SamplingBody) -> Form | None:
    """The form that a body asks for. Raises InvalidField where it asks for two."""
    asked = _response_format(body.response_format) if body.response_format is not None else None
    if body.structured_outputs is None:
        return asked
    if asked is not None:
        raise InvalidField("structured_outputs", "cannot be together with response_format; give one of them")
    return _structured_outputs(body.structured_outputs)


def _response_format(asked: ResponseFormat) -> Form | None:
    if asked.type == "json_object":
        return partial(grammars.json_object_grammar, "response_format"), "response_format"
    if asked.type == "text":
        return None
    if asked.json_schema is None:
        raise InvalidField("response_format.json_schema", "is missing")
    field = "response_format.json_schema.schema"
    return partial(grammars.json_schema_grammar, asked.json_schema.schema_, field), field


def _structured_outputs(asked: StructuredOutputs) -> Form:
    forms: dict[str, Any] = {
        "json": asked.json_,
        "regex": asked.regex,
        "choice": asked.choice,
        "grammar": asked.grammar,
        "json_object": asked.json_object or None,
    }
    given = [name for name, value in forms.items() if value is not None]
    if len(given) != 1:
        problem = f"has {' and '.join(given) or 'none'} of {', '.join(forms)}; give exactly one"
        raise InvalidField("structured_outputs", problem)
    name, value = given[0], forms[given[0]]
    field = f"structured_outputs.{name}"
    options: dict[str, Any] = {}
    if asked.whitespace_pattern is not None:
        options["whitespace_pattern"] = asked.whitespace_pattern
    elif asked.disable_any_whitespace:
        options |= {"whitespace_flexible": False, "whitespace_pattern": None}
    if name == "json":
        return partial(grammars.json_schema_grammar, value, field, **options), field
    if name == "json_object":
        return partial(grammars.json_object_grammar, field, **options), field
    make: Callable[[Any, str], str] = {
        "regex": grammars.regex_grammar,
        "choice": grammars.choice_grammar,
        "grammar": grammars.lark_grammar,
    }[name]
    return partial(make, value, field), field
