"""A gateway on real ports, with a fake scheduler behind it."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc.aio
import httpx
import openai
import pytest

from gateway_svc.config import GatewaySettings
from gateway_svc.server import GatewayServer
from gateway_svc.text.tokenizer import ModelTokenizer, load_tokenizer
from pagoda.v1 import inference_pb2_grpc as rpc
from tests.support.data import model_folder
from tests.unit.gateway.fake_scheduler import FakeScheduler

MODEL = "test-model"
Running = Callable[..., Awaitable[GatewayServer]]


@functools.cache
def model_tokenizer() -> ModelTokenizer:
    """The real model's tokenizer, loaded once."""
    return load_tokenizer(model_folder())


def ids_of(text: str) -> list[int]:
    """Token ids of `text` by the model's tokenizer."""
    return model_tokenizer()._encode([text], False)[0]


@pytest.fixture
async def fake() -> AsyncIterator[FakeScheduler]:
    """The scheduler; answers with the tokens of "Hello 世界 👋🏽!" and EOS."""
    async with FakeScheduler() as scheduler:
        scheduler.script = lambda request, index: [*ids_of("Hello 世界 👋🏽!"), 2]
        yield scheduler


@pytest.fixture
async def start(fake: FakeScheduler) -> AsyncIterator[Running]:
    """Starts gateways, and stops them at the end."""
    started: list[GatewayServer] = []

    async def run(wait_ready: bool = True, **changes: Any) -> GatewayServer:
        options: dict[str, Any] = {
            "scheduler": fake.address,
            "served_model_name": MODEL,
            "http_port": 0,
            "grpc_port": 0,
            "metrics_port": 0,
            "grace_s": 0.2,
        }
        server = GatewayServer(GatewaySettings(**(options | changes)), model_tokenizer(), shares_port=False)
        await server.start()
        started.append(server)
        if wait_ready:
            await until(lambda: server.gateway.ready)
        return server

    yield run
    for server in started:
        await server.stop()


@pytest.fixture
async def server(start: Running) -> GatewayServer:
    """One gateway that is ready."""
    return await start()


@pytest.fixture
async def http(server: GatewayServer) -> AsyncIterator[httpx.AsyncClient]:
    """A client of its HTTP port."""
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.http.port}", timeout=30) as client:
        yield client


@pytest.fixture
async def sdk(server: GatewayServer) -> AsyncIterator[openai.AsyncOpenAI]:
    """The OpenAI SDK, without retries."""
    url = f"http://127.0.0.1:{server.http.port}/v1"
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
async def stub(server: GatewayServer) -> AsyncIterator[Any]:
    """A stub of its gRPC port."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.rpc.port}") as channel:
        yield rpc.InferenceServiceStub(channel)


async def until(condition: Callable[[], bool], timeout_s: float = 20) -> None:
    """Wait for a condition."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(0.005)
