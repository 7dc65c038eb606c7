"""Bytes that are no message: INVALID_ARGUMENT with the field, for every shape of call, and calls go on."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from pagoda.transport import bearer, server_interceptors
from pagoda.v1 import inference_pb2 as ipb

SHAPES = ["UnaryUnary", "UnaryStream", "StreamUnary", "StreamStream", "Written"]
GARBAGE = b"\xff\xff\xff"
MESSAGES = [
    (GARBAGE, "message"),
    (b"\x12\x02\xff\xfe", "text"),
    (b"\x1a\x08\x0a\x06\x0a\x01u\x12\x01\xff", "chat.messages[0].content"),
    (b"\x32\x01a\x32\x01\xff", "stop[1]"),
]


class Texts(grpc.GenericRpcHandler):
    """Answers `/test.Texts/<shape>` with the texts of the requests that it got."""

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        async def one(request: Any, _: Any) -> bytes:
            return str(request.text).encode()

        async def many(request: Any, _: Any) -> AsyncIterator[bytes]:
            yield str(request.text).encode()

        async def gather(requests: AsyncIterator[Any], _: Any) -> bytes:
            return b"".join([str(r.text).encode() async for r in requests])

        async def relay(requests: AsyncIterator[Any], _: Any) -> AsyncIterator[bytes]:
            async for request in requests:
                yield str(request.text).encode()

        async def written(_: Any, context: Any) -> None:
            while (request := await context.read()) is not grpc.aio.EOF:  # type: ignore[attr-defined]
                await context.write(str(request.text).encode())

        parse = ipb.GenerateRequest.FromString
        handlers = {
            "UnaryUnary": grpc.unary_unary_rpc_method_handler(one, parse),
            "UnaryStream": grpc.unary_stream_rpc_method_handler(many, parse),
            "StreamUnary": grpc.stream_unary_rpc_method_handler(gather, parse),
            "StreamStream": grpc.stream_stream_rpc_method_handler(relay, parse),
            "Written": grpc.stream_stream_rpc_method_handler(written, parse),
        }
        return handlers.get(details.method.rpartition("/")[2])


@pytest.fixture
async def channel() -> AsyncIterator[grpc.aio.Channel]:
    server = grpc.aio.server(interceptors=server_interceptors("secret"))
    server.add_generic_rpc_handlers((Texts(),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield channel
    await server.stop(None)


async def call(channel: grpc.aio.Channel, shape: str, *messages: bytes, token: str = "secret") -> bytes:
    make = {
        "UnaryUnary": channel.unary_unary,
        "UnaryStream": channel.unary_stream,
        "StreamUnary": channel.stream_unary,
    }.get(shape, channel.stream_stream)
    request: Any = messages[-1] if shape.startswith("Unary") else iter(messages)
    reply: Any = make(f"/test.Texts/{shape}")(request, metadata=bearer(token), timeout=20)
    if shape.endswith("Unary"):
        result: bytes = await reply
        return result
    return b"".join([part async for part in reply])


def fields(error: grpc.aio.AioRpcError) -> list[str]:
    status = rpc_status.from_call(error)  # type: ignore[arg-type]
    request = error_details_pb2.BadRequest()
    details = status.details if status is not None else []
    return [v.field for d in details if d.Unpack(request) for v in request.field_violations]


@pytest.mark.parametrize("shape", SHAPES)
async def test_the_field_is_named_and_the_next_call_is_answered(
    channel: grpc.aio.Channel, shape: str, caplog: pytest.LogCaptureFixture
) -> None:
    good = ipb.GenerateRequest(text="good").SerializeToString()
    for bad, field in MESSAGES:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call(channel, shape, good, bad)
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert fields(refused.value) == [field]
        assert (refused.value.details() or "").startswith(field)
    assert await call(channel, shape, good) == b"good"
    assert not caplog.records, "strangers cannot fill the log with tracebacks"


@pytest.mark.parametrize("shape", SHAPES)
async def test_what_a_stranger_sends_is_not_read(channel: grpc.aio.Channel, shape: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await call(channel, shape, GARBAGE, token="wrong")
    assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
