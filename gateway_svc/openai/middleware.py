"""What every HTTP request passes through before it reaches a route."""

from __future__ import annotations

import hmac

from fastapi import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway_svc.metrics import Metrics
from gateway_svc.openai import replies
from gateway_svc.openai.responses import JsonReply
from gateway_svc.ui import routes as ui

OPEN_ROUTES = frozenset(["/health", "/ping", "/ready"]) | ui.OPEN_ROUTES


class CountRequests:
    """Counts responses by route and status. Outermost, so that refusals count too."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                # The pattern, not the path: paths are the client's choice, and each would be a series.
                route = getattr(scope.get("route"), "path", "other")
                self._metrics.http(route, scope["method"], message["status"])
            await send(message)

        await self._app(scope, receive, counted)


class TokenGuard:
    """Refuses requests without the bearer token. Health checks stay open, and the page that asks for it."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app = app
        self._expected = f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_ROUTES:
            given = next((v for k, v in scope["headers"] if k == b"authorization"), b"")
            if not hmac.compare_digest(given, self._expected):
                detail = replies.ErrorDetail(
                    "a bearer token is needed: Authorization: Bearer TOKEN",
                    "authentication_error",
                    None,
                    "invalid_api_key",
                )
                reply = JsonReply(replies.Error(detail), 401, {"www-authenticate": "Bearer"})
                await reply(scope, receive, send)
                return
        await self._app(scope, receive, send)


class BodyLimit:
    """Refuses bodies that are too large with 413, by their declared length or as they come."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = next((v for k, v in scope["headers"] if k == b"content-length"), b"")
        if declared.isdigit() and int(declared) > self._max_bytes:
            await self._refuse()(scope, receive, send)
            return
        received = 0

        async def limited() -> Message:
            nonlocal received
            message = await receive()
            if message["type"] == "http.request":
                received += len(message.get("body", b""))
                if received > self._max_bytes:
                    raise HTTPException(413, self._text())
            return message

        await self._app(scope, limited, send)

    def _refuse(self) -> JsonReply:
        detail = replies.ErrorDetail(self._text(), "invalid_request_error", None, "body_too_large")
        return JsonReply(replies.Error(detail), 413)

    def _text(self) -> str:
        return f"the body is larger than {self._max_bytes} bytes"
