"""The gateway's span: what is in it, what is sent on, and that it ends however the call does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from gateway_svc.server import GatewayServer
from tests.support.otlp import Receiver, Span, receiver
from tests.unit.gateway.conftest import Running
from tests.unit.gateway.fake_scheduler import FakeScheduler

TRACE, PARENT_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
PARENT = f"00-{TRACE}-{PARENT_ID}-01"


@pytest.fixture
def taken() -> Iterator[Receiver]:
    with receiver() as running:
        yield running


async def ask(server: GatewayServer, context: str = PARENT, **body: Any) -> httpx.Response:
    url = f"http://127.0.0.1:{server.http.port}/v1/completions"
    headers = [("traceparent", context), ("tracestate", "a=1"), ("tracestate", "b=2")]
    async with httpx.AsyncClient(timeout=30) as client:
        return await client.post(url, json={"prompt": "Hi", "max_tokens": 20, **body}, headers=headers)


def flushed(server: GatewayServer, taken: Receiver) -> list[Span]:
    """The spans of the trace, once the gateway has sent all that it has."""
    assert server.tracing is not None
    server.tracing.close()
    return taken.of(TRACE)


async def test_its_context_goes_to_the_scheduler(
    start: Running, fake: FakeScheduler, taken: Receiver
) -> None:
    server = await start(otlp_traces_endpoint=taken.url)
    assert (await ask(server, temperature=0.25, stop=["!"])).status_code == 200
    (span,) = flushed(server, taken)
    assert fake.submitted[0].traceparent == f"00-{TRACE}-{span.span_id}-01"
    assert span.parent_id == PARENT_ID and span.state == "a=1,b=2"
    assert span.name == "text_completion test-model"
    assert span.attributes["gen_ai.request.temperature"] == 0.25
    assert span.attributes["gen_ai.response.finish_reasons"] == ["stop"]
    assert 0 < span.attributes["gen_ai.latency.time_to_first_token"] <= span.attributes["gen_ai.latency.e2e"]


async def test_nothing_goes_on_from_what_is_not_recorded(
    start: Running, fake: FakeScheduler, taken: Receiver
) -> None:
    traced, plain = await start(otlp_traces_endpoint=taken.url), await start()
    await ask(traced, PARENT[:-1] + "0")
    await ask(plain)
    assert [request.traceparent for request in fake.submitted] == ["", ""]
    assert not flushed(traced, taken)


async def test_a_fault_ends_its_span(
    start: Running, taken: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = await start(otlp_traces_endpoint=taken.url)

    def fault(_: object) -> None:
        raise RuntimeError("a bug that quotes the prompt")

    monkeypatch.setattr(server.gateway, "check_model", fault)
    assert (await ask(server)).status_code == 500
    (span,) = flushed(server, taken)
    assert span.failed and span.attributes["error.type"] == "internal"
    assert not any(b"quotes" in message for message in taken.messages)


async def test_a_lost_scheduler_is_an_error(start: Running, fake: FakeScheduler, taken: Receiver) -> None:
    server = await start(otlp_traces_endpoint=taken.url, wait_ready=False, scheduler="127.0.0.1:1")
    assert (await ask(server)).status_code == 503
    (span,) = flushed(server, taken)
    assert span.failed and span.attributes["error.type"] == "unavailable"
