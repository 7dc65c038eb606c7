"""The stream to the scheduler: batching, loss and return, and what is refused meanwhile."""

from __future__ import annotations

import asyncio

import httpx

from gateway_svc.server import GatewayServer
from pagoda.v1 import scheduler_pb2 as pb
from tests.unit.gateway.conftest import Running, ids_of, until
from tests.unit.gateway.fake_scheduler import FakeScheduler

BODY = {"prompt": "x"}


async def test_requests_of_one_turn_are_one_message(http: httpx.AsyncClient, fake: FakeScheduler) -> None:
    response = await http.post("/v1/completions", json={"prompt": [f"prompt {i}" for i in range(50)]})
    assert response.status_code == 200 and len(fake.submitted) == 50
    assert fake.messages["submit"] == 1


async def test_large_batches_are_cut(http: httpx.AsyncClient, fake: FakeScheduler) -> None:
    prompts = [[5] * 8000] * 150
    response = await http.post("/v1/completions", json={"prompt": prompts}, timeout=60)
    assert response.status_code == 200 and len(fake.submitted) == 150
    assert fake.messages["submit"] == 2, "no message grows past a bound"


async def test_not_ready_until_a_worker_is_there(start: Running, fake: FakeScheduler) -> None:
    model, fake.model, fake.num_workers = fake.model, None, 0
    server = await start(wait_ready=False)
    await until(lambda: server.gateway.link.connected)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.http.port}") as http:
        for response in (await http.get("/ready"), await http.post("/v1/completions", json=BODY)):
            assert response.status_code == 503 and response.headers["retry-after"] == "1"
            assert response.json()["error"]["code"] == "starting"
        assert (await http.get("/health")).status_code == 200
        assert (await http.get("/v1/models")).json()["data"][0]["max_model_len"] is None
        fake.model, fake.num_workers = model, 1
        fake.announce()
        await until(lambda: server.gateway.ready)
        assert (await http.get("/ready")).status_code == 200
        # A worker that dies is awaited: requests are taken, but no first token can be served.
        fake.num_workers = 0
        fake.announce()
        await until(lambda: not server.gateway.ready)
        assert (await http.get("/ready")).json()["error"]["code"] == "no_worker"
        assert (await http.post("/v1/completions", json=BODY)).status_code == 200


async def test_a_lost_scheduler_and_its_return(
    http: httpx.AsyncClient, server: GatewayServer, fake: FakeScheduler
) -> None:
    fake.script = lambda request, index: ids_of(" word") * 100_000
    running = asyncio.create_task(http.post("/v1/completions", json=BODY | {"max_tokens": 100_000}))
    await until(lambda: fake.num_live_rows == 1)
    await fake.stop()
    response = await running
    assert response.status_code == 503 and response.headers["retry-after"]
    assert response.json()["error"]["code"] == "scheduler_lost"
    assert (await http.get("/ready")).status_code == 503
    refused = await http.post("/v1/completions", json=BODY)
    assert refused.status_code == 503 and refused.json()["error"]["code"] == "disconnected"
    await fake.start()
    await until(lambda: server.gateway.ready)
    fake.script = lambda request, index: [2]
    assert (await http.post("/v1/completions", json=BODY)).status_code == 200


async def test_a_scheduler_that_comes_later(start: Running, fake: FakeScheduler) -> None:
    await fake.stop()
    server = await start(wait_ready=False)
    assert not server.gateway.ready
    await fake.start()
    await until(lambda: server.gateway.ready)


async def test_a_wrong_token_is_not_the_end(start: Running, fake: FakeScheduler) -> None:
    await fake.stop()
    fake.token = "right"
    await fake.start()
    server = await start(wait_ready=False, token="wrong")
    await asyncio.sleep(0.3)
    assert not server.gateway.link.connected
    await fake.stop()
    fake.token = "wrong"
    await fake.start()
    await until(lambda: server.gateway.ready)


async def test_aborted_samples(http: httpx.AsyncClient, fake: FakeScheduler) -> None:
    """Somebody called Abort: what there is is the answer, and the reason says so."""
    fake.script = lambda request, index: ids_of("some words")
    fake.end_with = pb.FINISH_REASON_CANCELLED
    response = await http.post("/v1/completions", json=BODY)
    assert response.json()["choices"][0]["text"] == "some words"
    assert response.json()["choices"][0]["finish_reason"] == "abort"
