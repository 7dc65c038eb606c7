"""The HTTP application: its routes, and errors in OpenAI's words."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp

from gateway_svc.errors import GatewayError, InvalidField
from gateway_svc.gateway import Gateway
from gateway_svc.openai import chat, completions, operations, replies
from gateway_svc.openai.middleware import BodyLimit, CountRequests, TokenGuard
from gateway_svc.openai.openapi import openapi
from gateway_svc.openai.requests import gateway_of, new_call
from gateway_svc.openai.responses import JsonReply, error_response
from gateway_svc.ui import routes as ui
from gateway_svc.ui.live import LiveState

_TYPE_NAMES = frozenset(["str", "int", "float", "bool", "dict", "list"])


def build_app(gateway: Gateway, live: LiveState) -> ASGIApp:
    """The application with everything around it."""
    app = FastAPI(title="Pagoda", docs_url="/docs", redoc_url=None)
    app.state.gateway = gateway
    app.state.live = live
    app.openapi = functools.partial(openapi, app)  # type: ignore[method-assign]
    for module in (chat, completions, operations, ui):
        app.include_router(module.router)
    app.add_exception_handler(GatewayError, _on_gateway_error)
    app.add_exception_handler(RequestValidationError, _on_invalid_body)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(Exception, _on_fault)
    settings = gateway.settings
    guarded: ASGIApp = BodyLimit(app, settings.max_body_bytes)
    if settings.token:
        guarded = TokenGuard(guarded, settings.token)
    return CountRequests(guarded, gateway.metrics)


async def _on_gateway_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, GatewayError)
    return error_response(error)


async def _on_invalid_body(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    invalid = _first_problem(error.errors())
    gateway = gateway_of(request)
    gateway.finish(new_call(request, None, False, None), None, invalid)
    return error_response(invalid)


async def _on_http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    detail = replies.ErrorDetail(str(error.detail), "invalid_request_error", None, None)
    return JsonReply(replies.Error(detail), error.status_code, dict(error.headers or {}))


async def _on_fault(request: Request, __: Exception) -> Response:
    """Anything else is our fault; the traceback goes to the log."""
    spans = gateway_of(request).spans
    if spans is not None and hasattr(request.state, "call"):
        spans.fault(request.state.call)
    return error_response(GatewayError("a fault in the gateway"))


def _first_problem(errors: Sequence[Any]) -> InvalidField:
    """The problem to report: the first, or the most telling one where a value could have several types.

    That is the one found deepest; then one of the type with the fewest problems; then the last.
    """
    branches = Counter(_branch(error["loc"]) for error in errors)
    rivals = [error for error in errors if error["loc"][:2] == errors[0]["loc"][:2]]
    error = max(rivals, key=lambda e: (len(e["loc"]), -branches[_branch(e["loc"])], _last_index(e["loc"])))
    place = error["loc"][1:]
    if not place:
        return InvalidField("body", "must be a JSON object, sent as application/json")
    field = str(place[0])
    for part in place[1:]:
        if isinstance(part, int):
            field += f"[{part}]"
        elif not _names_a_type(part):
            field += f".{part}"
    problem = str(error["msg"])
    return InvalidField(field, problem[0].lower() + problem[1:], "invalid_" + str(error["type"]))


def _names_a_type(part: int | str) -> bool:
    """Whether a part of a place is one of several possible types, and not a field or an index."""
    if not isinstance(part, str):
        return False
    return not part.isidentifier() or part in _TYPE_NAMES or part[0].isupper()


def _branch(place: Sequence[int | str]) -> tuple[int | str, ...]:
    end = next((i + 1 for i, part in enumerate(place) if _names_a_type(part)), len(place))
    return tuple(place[:end])


def _last_index(place: Sequence[int | str]) -> int:
    return next((part for part in reversed(place) if isinstance(part, int)), -1)
