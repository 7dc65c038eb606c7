"""/metrics on a port of its own, so that scrapes need no way to the API."""

from __future__ import annotations

from collections.abc import Callable

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from gateway_svc.openai.middleware import TokenGuard

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def metrics_app(expose: Callable[[], bytes], token: str) -> ASGIApp:
    """An application with one route, behind the token where there is one."""

    async def metrics(_: Request) -> Response:
        return PlainTextResponse(expose(), media_type=METRICS_TYPE)

    app = Starlette(routes=[Route("/metrics", metrics)])
    return TokenGuard(app, token) if token else app
