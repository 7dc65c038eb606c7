"""The names of channel arguments are real, and the token guards every shape of call."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc._cython import cygrpc

from pagoda.transport import CHANNEL_OPTIONS, SERVER_OPTIONS, TokenInterceptor, bearer, server_interceptors

METHODS = ["UnaryUnary", "UnaryStream", "StreamUnary", "StreamStream"]


@pytest.fixture(scope="module")
def core_strings() -> bytes:
    """grpc's C core, in which every argument that it knows stands as a string."""
    return Path(cygrpc.__file__).read_bytes()


@pytest.mark.parametrize("name", sorted({name for name, _ in CHANNEL_OPTIONS + SERVER_OPTIONS}))
def test_channel_arguments_are_ones_that_grpc_knows(name: str, core_strings: bytes) -> None:
    assert b"\0" + name.encode() + b"\0" in core_strings


def test_a_misspelt_argument_would_be_noticed(core_strings: bytes) -> None:
    assert b"\0grpc.keepalive_tim_ms\0" not in core_strings


class Echo(grpc.GenericRpcHandler):
    """Answers `/test.Echo/<shape>` with what it got."""

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        async def one(request: bytes, _: Any) -> bytes:
            return request

        async def many(request: bytes, _: Any) -> AsyncIterator[bytes]:
            yield request

        async def gather(requests: AsyncIterator[bytes], _: Any) -> bytes:
            return b"".join([r async for r in requests])

        async def relay(requests: AsyncIterator[bytes], _: Any) -> AsyncIterator[bytes]:
            async for request in requests:
                yield request

        handlers = {
            "UnaryUnary": grpc.unary_unary_rpc_method_handler(one),
            "UnaryStream": grpc.unary_stream_rpc_method_handler(many),
            "StreamUnary": grpc.stream_unary_rpc_method_handler(gather),
            "StreamStream": grpc.stream_stream_rpc_method_handler(relay),
            "Check": grpc.unary_unary_rpc_method_handler(one),
        }
        service, _, method = details.method[1:].partition("/")
        return handlers.get(method) if service in ("test.Echo", "grpc.health.v1.Health") else None


@pytest.fixture
async def channel() -> AsyncIterator[grpc.aio.Channel]:
    server = grpc.aio.server(interceptors=server_interceptors("secret"), options=SERVER_OPTIONS)
    server.add_generic_rpc_handlers((Echo(),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=CHANNEL_OPTIONS) as channel:
        yield channel
    await server.stop(None)


async def call(channel: grpc.aio.Channel, shape: str, metadata: Any, says: str = "hello") -> bytes:
    async def requests() -> AsyncIterator[bytes]:
        if not says:
            await asyncio.Event().wait()
        yield says.encode()

    path = f"/test.Echo/{shape}"
    request: Any = requests() if shape.startswith("Stream") else says.encode()
    make = {
        "UnaryUnary": channel.unary_unary,
        "UnaryStream": channel.unary_stream,
        "StreamUnary": channel.stream_unary,
        "StreamStream": channel.stream_stream,
    }
    reply = make[shape](path)(request, metadata=metadata, timeout=20)
    if shape.endswith("Stream"):
        return b"".join([part async for part in reply])
    result: bytes = await reply
    return result


@pytest.mark.parametrize("shape", METHODS)
async def test_the_right_token_passes(channel: grpc.aio.Channel, shape: str) -> None:
    assert await call(channel, shape, bearer("secret")) == b"hello"


@pytest.mark.parametrize("shape", METHODS)
@pytest.mark.parametrize("token", ["", "wrong", "secret2", "sécret".encode().hex()])
async def test_no_token_and_a_wrong_one_are_refused(
    channel: grpc.aio.Channel, shape: str, token: str
) -> None:
    # A stream says nothing: grpc's client takes a write that meets the refusal on its way for a fault of its
    # own (INTERNAL), and forgets the status that the server sent.
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await call(channel, shape, bearer(token), says="")
    assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert "PAGODA_TOKEN" in (refused.value.details() or "")


async def test_an_unknown_method_stays_unknown(channel: grpc.aio.Channel) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await channel.unary_unary("/test.Echo/Nothing")(b"", timeout=20)
    assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_health_checks_need_no_token(channel: grpc.aio.Channel) -> None:
    assert await channel.unary_unary("/grpc.health.v1.Health/Check")(b"ok", timeout=20) == b"ok"


def test_without_a_token_nobody_asks_for_one() -> None:
    assert not any(isinstance(interceptor, TokenInterceptor) for interceptor in server_interceptors(""))
    assert isinstance(server_interceptors("x")[0], TokenInterceptor), "the first that a stranger meets"
    assert bearer("") == ()
