"""Clients that are slow or leave: nobody else notices, and nothing of theirs runs on."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from gateway_svc.server import GatewayServer
from tests.unit.gateway.conftest import ids_of, until
from tests.unit.gateway.fake_scheduler import WHOLE_REQUEST, FakeScheduler

CANCELLED = 2
BODY = {"prompt": "x", "max_tokens": 1_000_000, "stream": True}


async def open_stream(port: int, body: dict[str, Any], receive_buffer: int | None = None) -> Any:
    """A raw connection that has asked for a stream and read nothing yet."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=receive_buffer or 2**16)
    content = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(content)}\r\n"
    writer.write(head.encode() + b"content-type: application/json\r\n\r\n" + content)
    await writer.drain()
    return reader, writer


async def reader_of_bytes(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """One byte after another."""
    while byte := await reader.read(1):
        yield byte


def text_of(raw: bytes) -> str:
    """The text in a chunked response of events."""
    lines = [line for line in raw.decode().splitlines() if line.startswith("data: {")]
    return "".join(json.loads(line[6:])["choices"][0]["text"] for line in lines)


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_frees_its_request(
    server: GatewayServer, fake: FakeScheduler, stream: bool
) -> None:
    fake.script = lambda request, index: ids_of(" word") * 100_000
    _, writer = await open_stream(server.http.port, BODY | {"stream": stream, "request_id": "left", "n": 2})
    await until(lambda: fake.num_live_rows == 2)
    writer.close()
    await until(lambda: fake.num_live_rows == 0)
    assert fake.stopped == [("left", WHOLE_REQUEST, CANCELLED)]
    await until(lambda: b"requests_cancelled_total" in server.gateway.metrics.expose())
    counted = b'pagoda:requests_cancelled_total{engine="gateway",model_name="test-model"} 1.0'
    assert counted in server.gateway.metrics.expose()
    assert server.gateway.link.num_open == 0


async def test_a_client_that_leaves_before_the_first_token(
    server: GatewayServer, fake: FakeScheduler
) -> None:
    fake.paused.clear()
    _, writer = await open_stream(server.http.port, BODY)
    await until(lambda: server.gateway.link.num_open == 1)
    writer.close()
    await until(lambda: server.gateway.link.num_open == 0)
    fake.paused.set()


async def test_every_prompt_of_a_call_is_stopped(server: GatewayServer, fake: FakeScheduler) -> None:
    fake.script = lambda request, index: ids_of(" word") * 100_000
    _, writer = await open_stream(server.http.port, BODY | {"prompt": ["a", "b", "c"]})
    await until(lambda: fake.num_live_rows == 3)
    writer.close()
    await until(lambda: len(fake.stopped) == 3 and fake.num_live_rows == 0)
    assert fake.messages["stop"] == 1, "the stops of one turn are one message"


async def test_slow_readers_block_nobody(server: GatewayServer, fake: FakeScheduler) -> None:
    """Some read one byte now and then, into small buffers: the others get everything, in time."""
    ids = ids_of(" some words in a row" * 300)
    fake.script = lambda request, index: list(ids)
    fake.tokens_a_step = 4
    slow = [await open_stream(server.http.port, BODY, receive_buffer=256) for _ in range(20)]

    async def drip(reader: asyncio.StreamReader) -> None:
        async for _ in reader_of_bytes(reader):
            await asyncio.sleep(0.1)

    drips = [asyncio.create_task(drip(reader)) for reader, _ in slow]

    async def fast(http: httpx.AsyncClient) -> str:
        response = await http.post("/v1/completions", json=BODY)
        return text_of(response.content)

    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(
        base_url=f"http://127.0.0.1:{server.http.port}", timeout=60, limits=limits
    ) as http:
        texts = await asyncio.gather(*(fast(http) for _ in range(60)))
    assert set(texts) == {" some words in a row" * 300}
    # The slow ones' tokens have been generated too: their slots were free long before their texts arrive.
    await until(lambda: fake.num_live_rows == 0)
    for task in drips:
        task.cancel()
    for _, writer in slow:
        writer.close()


async def test_a_slow_reader_gets_all_of_it_in_bigger_chunks(
    server: GatewayServer, fake: FakeScheduler
) -> None:
    """What gathers while a connection is full leaves as few events, not as one a token."""
    words = 40_000
    fake.script = lambda request, index: ids_of(" word") * words
    fake.tokens_a_step = 50
    reader, writer = await open_stream(server.http.port, BODY, receive_buffer=1024)
    await until(lambda: len(fake.submitted) == 1 and fake.num_live_rows == 0)
    raw = b""
    while b"data: [DONE]" not in raw[-200:]:
        raw += await reader.read(1 << 20)
    assert text_of(raw).split() == ["word"] * words
    writer.close()


async def test_a_stop_string_ends_the_sample_of_a_slow_reader(
    server: GatewayServer, fake: FakeScheduler
) -> None:
    """Text is searched as it arrives, whether or not the client takes it."""
    fake.script = lambda request, index: ids_of(" word") * 30_000 + ids_of(" END") + ids_of(" word") * 10**6
    fake.tokens_a_step = 50
    _, writer = await open_stream(server.http.port, BODY | {"stop": "END"}, receive_buffer=256)
    await until(lambda: len(fake.stopped) == 1)
    assert fake.num_live_rows == 0
    writer.close()


async def test_an_error_in_the_middle_is_the_streams_last_event(
    server: GatewayServer, fake: FakeScheduler
) -> None:
    fake.script = lambda request, index: ids_of(" word") * 100_000
    reader, _ = await open_stream(server.http.port, BODY)
    await reader.readuntil(b"word")
    await fake.stop()
    rest = await reader.readuntil(b"data: [DONE]")
    error = next(json.loads(line[6:]) for line in rest.decode().splitlines() if '"error"' in line)["error"]
    assert error["type"] == "service_unavailable_error" and error["code"] == "scheduler_lost"
