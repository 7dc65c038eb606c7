"""Tools as clients define them, and whether their parameters are a schema."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jsonschema_rs

from gateway_svc.errors import InvalidField

# A schema that does not say its draft may be of any of these: generators differ.
_DRAFTS = (
    "https://json-schema.org/draft/2020-12/schema",
    "http://json-schema.org/draft-07/schema#",
    "http://json-schema.org/draft-04/schema#",
)


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call."""

    name: str
    # A JSON schema of an object; None is a function without arguments.
    parameters: dict[str, Any] | None
    # Whether arguments are to follow the schema exactly.
    strict: bool
    # What the chat template gets.
    definition: dict[str, Any]
    # The place of its definition in the request.
    field: str


def check_parameters(schema: dict[str, Any], field: str) -> None:
    """Raises InvalidField: it is not a JSON schema, or not one of an object."""
    kind = schema.get("type", "object")
    if kind != "object" and not (isinstance(kind, list) and "object" in kind):
        raise InvalidField(field, f"has the type {kind!r}; arguments are an object")
    problem = None
    for draft in _DRAFTS:
        try:
            # The draft is given, for one that the schema names would be looked for in the network.
            jsonschema_rs.meta.validate({**schema, "$schema": draft})
            return
        except jsonschema_rs.ValidationError as error:
            problem = problem or error
    if problem is not None:
        place = "".join(f"[{part!r}]" for part in problem.instance_path)
        raise InvalidField(field, f"is not a JSON schema: {place or 'it'}: {problem.message}")
