"""A job's answer over HTTP, whole or as server-sent events, written straight to ASGI.

The status line waits for the first token or the first error, so that a refusal by the scheduler is a status
and not a broken stream. While a slow client's connection is full, `send` waits and text gathers in the job.
"""

from __future__ import annotations

import asyncio
from typing import Any, Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gateway_svc.errors import GatewayError
from gateway_svc.gateway import Call, Gateway
from gateway_svc.generation import Job, Sample
from gateway_svc.openai import replies

DONE = b"data: [DONE]\n\n"
_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class Renderer(Protocol):
    """Turns what a job brought into JSON."""

    def whole(self, job: Job) -> Any:
        """The answer of a job that has ended."""

    def chunks(self, sample: Sample) -> list[Any]:
        """Events for what is new of a sample; none if nothing is to be shown yet."""

    def tail(self, job: Job) -> list[Any]:
        """Events after the last sample has ended."""


def event(data: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + replies.encode(data) + b"\n\n"


def error_reply(error: GatewayError) -> replies.Error:
    """The body of an error, in OpenAI's words: the scheduler's names of fields become the body's."""
    param = error.field.removeprefix("sampling.")
    param = "prompt" if param == "prompt_token_ids" else param
    message = error.message
    if error.field != param and message.startswith(error.field):
        message = param + message.removeprefix(error.field)
    return replies.Error(replies.ErrorDetail(message, error.kind, param or None, error.code))


class JsonReply(Response):
    """A struct as JSON."""

    def __init__(self, data: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        super().__init__(replies.encode(data), status, headers, media_type="application/json")


def error_response(error: GatewayError) -> JsonReply:
    """An error as a response; Retry-After where a later try may succeed."""
    headers = {} if error.retry_after_s is None else {"retry-after": str(error.retry_after_s)}
    return JsonReply(error_reply(error), error.http_status, headers)


class JobResponse(Response):
    """Waits on a job and writes its answer. Stops the job when the client leaves, and accounts for it."""

    def __init__(self, gateway: Gateway, call: Call, job: Job, renderer: Renderer) -> None:
        super().__init__()
        self._gateway = gateway
        self._call = call
        self._job = job
        self._renderer = renderer
        self._started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watcher = asyncio.create_task(self._watch(receive))
        error: GatewayError | None = GatewayError("a fault in the gateway")  # unless we get to know better
        try:
            if self._job.streams:
                await self._stream(send)
            else:
                await self._whole(scope, receive, send)
            error = None
        except GatewayError as caught:
            error = caught
            await self._fail(error, scope, receive, send)
        except asyncio.CancelledError:
            error = None  # the server gave this connection up
            raise
        finally:
            watcher.cancel()
            self._gateway.finish(self._call, self._job, error)

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._gateway.cancel(self._job)

    async def _whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._job.next()
        if not self._job.cancelled:
            headers = {"x-request-id": self._call.request_id}
            await JsonReply(self._renderer.whole(self._job), headers=headers)(scope, receive, send)

    async def _stream(self, send: Send) -> None:
        job, renderer = self._job, self._renderer
        news = await job.next()
        if job.cancelled:
            return
        await self._start(send)
        while True:
            events = [event(chunk) for sample in news for chunk in renderer.chunks(sample)]
            last = job.ended and not job.has_news
            if last and job.error is None and not job.cancelled:
                events += [event(chunk) for chunk in renderer.tail(job)]
                events.append(DONE)
                await send({"type": "http.response.body", "body": b"".join(events), "more_body": False})
                return
            if events:
                await send({"type": "http.response.body", "body": b"".join(events), "more_body": True})
            news = await job.next()
            if job.cancelled:
                return

    async def _start(self, send: Send) -> None:
        self._started = True
        headers = [*_STREAM_HEADERS, (b"x-request-id", self._call.request_id.encode("latin-1", "replace"))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})

    async def _fail(self, error: GatewayError, scope: Scope, receive: Receive, send: Send) -> None:
        """As a status if none has been sent; else as the stream's last event, which SDKs raise."""
        if not self._started:
            await error_response(error)(scope, receive, send)
            return
        body = event(error_reply(error)) + DONE
        await send({"type": "http.response.body", "body": body, "more_body": False})
