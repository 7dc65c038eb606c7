"""/ui and what it consists of, and /ui/state: the state of the scheduler as server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
from importlib import resources

from fastapi import APIRouter, HTTPException, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gateway_svc.ui.live import LiveState

_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
# Nothing but what this server brings, and no other site's frame around it.
_POLICY = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
    ]
)
_HEADERS = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    # Asked for again each time: after an update, old scripts must not meet a new page.
    "cache-control": "no-cache",
}
_EVENT_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
    *((name.encode(), value.encode()) for name, value in _HEADERS.items() if name != "cache-control"),
]


def _load() -> dict[str, tuple[str, bytes]]:
    """The page's files: name to media type and content."""
    files = {}
    for file in resources.files("gateway_svc.ui").joinpath("static").iterdir():
        kind = _TYPES.get(file.name.rpartition(".")[2])
        if kind is not None:
            files[file.name] = (kind, file.read_bytes())
    return files


_FILES = _load()
PAGE = "index.html"
# Without the token: the page itself has no secrets, and it is what asks for the token.
OPEN_ROUTES = frozenset(["/ui", "/ui/", *(f"/ui/{name}" for name in _FILES)])
router = APIRouter(include_in_schema=False)


@router.get("/ui")
async def page() -> Response:
    """The page."""
    return _file(PAGE)


@router.get("/ui/state")
async def state(request: Request) -> Response:
    """The state of the scheduler, several times a second."""
    live: LiveState = request.app.state.live
    return _StateResponse(live)


@router.get("/ui/{name}")
async def file(name: str) -> Response:
    """A script, style or picture of the page."""
    return _file(name)


def _file(name: str) -> Response:
    if name not in _FILES:
        raise HTTPException(404, "no such file")
    kind, content = _FILES[name]
    return Response(content, media_type=kind, headers=_HEADERS)


class _StateResponse(Response):
    """Sends events until the viewer leaves or the gateway ends."""

    def __init__(self, live: LiveState) -> None:
        super().__init__()
        self._live = live

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sender = asyncio.create_task(self._send(send))
        watcher = asyncio.create_task(_left(receive))
        try:
            await asyncio.wait([sender, watcher], return_when=asyncio.FIRST_COMPLETED)
            if sender.done():
                await sender
        finally:
            for task in (sender, watcher):
                task.cancel()
            await asyncio.gather(sender, watcher, return_exceptions=True)

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": _EVENT_HEADERS})
        async with contextlib.aclosing(self._live.events()) as events:
            async for event in events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
