"""The HTTP surface against its own OpenAPI document: whatever is sent, what comes back is documented.

schemathesis makes requests from the document, well-formed ones and others, and checks each answer's status,
type and shape. The gateway is real; the scheduler behind it is the fake of the unit tests.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode, checks

from gateway_svc.config import GatewaySettings
from gateway_svc.server import GatewayServer
from tests.unit.gateway.conftest import MODEL, ids_of, model_tokenizer, until
from tests.unit.gateway.fake_scheduler import FakeScheduler

# What is said to everybody. It is a call for those who have such a tool.
CALL = '{"name": "look", "arguments": {}}'


@pytest.fixture(scope="module")
def base_url() -> Iterator[str]:
    """A gateway on a thread of its own, because schemathesis calls it synchronously."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    fake: FakeScheduler
    server: GatewayServer

    async def start() -> None:
        nonlocal fake, server
        fake = FakeScheduler()
        fake.script = lambda request, index: [*ids_of(f"Hello 世界\n{CALL}"), 2]
        await fake.start()
        options: dict[str, Any] = {"http_port": 0, "grpc_port": 0, "metrics_port": 0, "grace_s": 0}
        gateway_settings = GatewaySettings(scheduler=fake.address, served_model_name=MODEL, **options)
        server = GatewayServer(gateway_settings, model_tokenizer(), shares_port=False)
        await server.start()
        await until(lambda: server.gateway.ready)

    async def stop() -> None:
        await server.stop()
        await fake.stop()

    asyncio.run_coroutine_threadsafe(start(), loop).result(60)
    yield f"http://127.0.0.1:{server.http.port}"
    asyncio.run_coroutine_threadsafe(stop(), loop).result(60)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()


@pytest.fixture(scope="module")
def api(base_url: str) -> schemathesis.BaseSchema:
    return schemathesis.openapi.from_url(f"{base_url}/openapi.json")


OPERATIONS = [
    *(
        ("GET", path)
        for path in (
            *("/v1/models", "/v1/models/{model}", "/health", "/ping", "/ready", "/version"),
            "/tokenizer_info",
        )
    ),
    *(("POST", path) for path in ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize")),
    ("GET", "/metrics"),
]
CHECKS = [
    checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
    checks.negative_data_rejection,
]


CASES = [(method, path, GenerationMode.POSITIVE) for method, path in OPERATIONS]
# Where there is something to be wrong about.
CASES += [(method, path, GenerationMode.NEGATIVE) for method, path in OPERATIONS if method == "POST"]


@pytest.mark.parametrize(("method", "path", "mode"), CASES)
def test_what_comes_back_is_documented(
    api: schemathesis.BaseSchema, method: str, path: str, mode: GenerationMode
) -> None:
    operation = api[path][method]

    @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(case=operation.as_strategy(generation_mode=mode))
    def check(case: schemathesis.Case) -> None:
        case.call_and_validate(checks=CHECKS)

    check()


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}]}),
        ("/v1/completions", {"prompt": "Hi"}),
    ],
)
def test_streams_are_documented(api: schemathesis.BaseSchema, path: str, body: dict[str, Any]) -> None:
    case = api[path]["POST"].Case(
        body={"model": MODEL, "stream": True, **body}, media_type="application/json"
    )
    response = case.call_and_validate(checks=CHECKS)
    assert response.headers["content-type"][0].startswith("text/event-stream")


@pytest.mark.parametrize("stream", [False, True])
def test_calls_of_tools_are_documented(api: schemathesis.BaseSchema, stream: bool) -> None:
    body = {
        "messages": [{"role": "user", "content": "Hi"}],
        "tools": [{"type": "function", "function": {"name": "look"}}],
        "stream": stream,
    }
    case = api["/v1/chat/completions"]["POST"].Case(body=body, media_type="application/json")
    response = case.call_and_validate(checks=CHECKS)
    assert b'"tool_calls":[{' in response.content


def test_the_surface_is_all_there(base_url: str) -> None:
    paths = httpx.get(f"{base_url}/openapi.json").json()["paths"]
    assert {(method.upper(), path) for path in paths for method in paths[path]} == set(OPERATIONS)
