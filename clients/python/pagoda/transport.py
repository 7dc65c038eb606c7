"""What every gRPC server and channel of Pagoda has in common: limits, keepalive and the bearer token."""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio

from pagoda.malformed import MalformedInterceptor

MAX_MESSAGE_BYTES = 64 << 20

# Streams that are silent for a while must not be cut for pinging too much, hence max_ping_strikes 0.
# A misspelt argument is ignored without a word: tests/unit/test_transport.py checks these names.
SERVER_OPTIONS: list[tuple[str, Any]] = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.so_reuseport", 0),
]
CHANNEL_OPTIONS: list[tuple[str, Any]] = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
]


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    """Call metadata that presents `token`; nothing when it is empty."""
    return (("authorization", f"Bearer {token}"),) if token else ()


class TokenInterceptor(grpc.aio.ServerInterceptor):
    """Refuses calls without the token with UNAUTHENTICATED. Health checks stay open."""

    def __init__(self, token: str) -> None:
        self._expected = f"Bearer {token}"

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        given = str(dict(details.invocation_metadata or ()).get("authorization", ""))
        if details.method.startswith("/grpc.health.v1.") or hmac.compare_digest(
            given.encode(), self._expected.encode()
        ):
            return await continuation(details)
        handler = await continuation(details)
        return _refusal_like(handler)


def _refusal_like(handler: grpc.RpcMethodHandler) -> grpc.RpcMethodHandler:
    """A handler of the same shape that refuses: the shape decides how grpc calls it."""

    async def refuse_one(_: Any, context: grpc.aio.ServicerContext) -> None:
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, "a bearer token is needed: set PAGODA_TOKEN")

    async def refuse_stream(_: Any, context: grpc.aio.ServicerContext) -> Any:
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, "a bearer token is needed: set PAGODA_TOKEN")
        yield  # an async generator, as grpc expects of a streaming method

    make = {
        (False, False): (grpc.unary_unary_rpc_method_handler, refuse_one),
        (False, True): (grpc.unary_stream_rpc_method_handler, refuse_stream),
        (True, False): (grpc.stream_unary_rpc_method_handler, refuse_one),
        (True, True): (grpc.stream_stream_rpc_method_handler, refuse_stream),
    }
    if handler is None:
        return handler
    method, behaviour = make[(handler.request_streaming, handler.response_streaming)]
    # What a stranger sent is not even parsed.
    return method(behaviour, None, handler.response_serializer)


def server_interceptors(token: str) -> list[grpc.aio.ServerInterceptor]:
    """The interceptors of a server: what strangers send goes no further than the first."""
    return [*([TokenInterceptor(token)] if token else []), MalformedInterceptor()]
