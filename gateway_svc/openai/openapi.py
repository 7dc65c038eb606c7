"""The OpenAPI document: requests as pydantic describes them, responses as msgspec does."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from gateway_svc.gateway import server_version
from gateway_svc.openai import replies

JSON, TEXT, EVENTS = "application/json", "text/plain", "text/event-stream"
# What a route answers with, and whether it can be a stream of events too.
ANSWERS: dict[str, tuple[type, bool]] = {
    "/v1/chat/completions": (replies.ChatCompletion, True),
    "/v1/completions": (replies.Completion, True),
    "/v1/models": (replies.ModelList, False),
    "/v1/models/{model}": (replies.Model, False),
    "/tokenize": (replies.Tokenized, False),
    "/detokenize": (replies.Detokenized, False),
    "/tokenizer_info": (replies.TokenizerInfo, False),
    "/health": (replies.Health, False),
    "/ping": (replies.Health, False),
    "/ready": (replies.Ready, False),
    "/version": (replies.Version, False),
}
# Before OpenAPI 3.2, the schema of a stream describes each of its events.
EVENT = {
    "type": "object",
    "description": "A server-sent event. Its data is a chunk as JSON, or an error; the last one's is [DONE].",
    "required": ["data"],
    "properties": {"data": {"type": "string"}},
}
ERRORS = {
    "400": "A field is wrong; `param` names it.",
    "401": "The bearer token is missing or wrong.",
    "404": "No such model.",
    "409": "A request of this id is running.",
    "413": "The body is too large.",
    "429": "Too much is waiting; Retry-After says when to try again.",
    "500": "The request failed.",
    "503": "Starting, or the tiers below are away; Retry-After says when to try again.",
    "504": "The time is up.",
}


def openapi(app: FastAPI) -> dict[str, Any]:
    """The document of an application, made once."""
    if app.openapi_schema is None:
        app.openapi_schema = _build(app)
    return app.openapi_schema


def _build(app: FastAPI) -> dict[str, Any]:
    document = get_openapi(title="Pagoda", version=server_version(), routes=app.routes)
    types = [*dict.fromkeys(answer for answer, _ in ANSWERS.values()), replies.Error]
    schemas, components = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
    schema_of = dict(zip(types, schemas, strict=True))
    known = document["components"]["schemas"]
    for unused in ("HTTPValidationError", "ValidationError"):
        known.pop(unused, None)
    known.update(components)
    error = {JSON: {"schema": schema_of[replies.Error]}}
    for path, methods in document["paths"].items():
        for operation in methods.values():
            content: dict[str, Any] = {TEXT: {"schema": {"type": "string"}}}
            if path in ANSWERS:
                answer, streams = ANSWERS[path]
                content = {JSON: {"schema": schema_of[answer]}}
                if streams:
                    content[EVENTS] = {"schema": EVENT}
            refusals = {code: {"description": text, "content": error} for code, text in ERRORS.items()}
            operation["responses"] = {"200": {"description": "Success.", "content": content}} | refusals
    return document
