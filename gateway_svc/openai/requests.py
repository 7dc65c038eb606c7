"""How requests are read: strict JSON, and which gateway serves them."""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine
from typing import Any

import msgspec
from fastapi import HTTPException, Request
from fastapi.routing import APIRoute
from starlette.responses import Response

from gateway_svc.gateway import MAX_REQUEST_ID_BYTES, Call, Gateway, new_request_id
from pagoda.tracing import contexts_in


class _StrictJsonRequest(Request):
    """A request whose JSON is UTF-8 and Unicode throughout: no lone surrogates, no NaN."""

    async def json(self) -> Any:
        try:
            return msgspec.json.decode(await self.body())
        except (ValueError, RecursionError) as error:
            raise HTTPException(400, f"the body is not valid JSON in UTF-8: {error}") from error


class StrictJsonRoute(APIRoute):
    """A route that reads its body with `_StrictJsonRequest`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            return await handler(_StrictJsonRequest(request.scope, request.receive))

        return handle


def gateway_of(request: Request) -> Gateway:
    """The gateway that serves this request."""
    gateway: Gateway = request.app.state.gateway
    return gateway


def new_call(request: Request, request_id: str | None, stream: bool, max_tokens: int | None) -> Call:
    """The call that a request makes. Its id is the body's, else the X-Request-Id header's, else new."""
    header = request.headers.get("x-request-id", "")
    usable = header.isascii() and header.isprintable() and len(header) <= MAX_REQUEST_ID_BYTES - 8
    name = request_id or (header if usable else "") or new_request_id()
    call = Call(request.url.path, name, time.monotonic(), stream, max_tokens)
    if (spans := gateway_of(request).spans) is not None:
        operation = "chat" if "/chat/" in call.route else "text_completion"
        spans.begin(call, operation, contexts_in(request.headers.items()))
        request.state.call = call
    return call
