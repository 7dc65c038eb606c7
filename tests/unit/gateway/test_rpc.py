"""The public gRPC service: text, chats and tokens in; text and tokens out; errors with their fields."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import grpc.aio
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status

from gateway_svc.server import GatewayServer
from pagoda.v1 import inference_pb2 as pb
from pagoda.v1 import inference_pb2_grpc as rpc
from pagoda.v1 import scheduler_pb2
from tests.unit.gateway.conftest import MODEL, Running, ids_of, until
from tests.unit.gateway.fake_scheduler import FakeScheduler

TEXT = "Hello 世界 👋🏽!"
Sampling = scheduler_pb2.SamplingParams


def chat(text: str = "hi", role: str = "user") -> pb.Chat:
    return pb.Chat(messages=[pb.ChatMessage(role=role, content=text)])


async def answer(stub: Any, request: pb.GenerateRequest, **options: Any) -> list[pb.GenerateResponse]:
    return [response async for response in stub.Generate(request, **options)]


@pytest.mark.parametrize(
    "request_",
    [
        pb.GenerateRequest(text="Once"),
        pb.GenerateRequest(chat=chat(), model=MODEL),
        pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5, 6])),
    ],
)
@pytest.mark.parametrize("tokens_a_step", [1, 5])
async def test_generate(
    stub: Any, fake: FakeScheduler, request_: pb.GenerateRequest, tokens_a_step: int
) -> None:
    fake.tokens_a_step, fake.cached_tokens = tokens_a_step, 3
    responses = await answer(stub, request_)
    assert "".join(r.text for r in responses) == TEXT
    assert [i for r in responses for i in r.token_ids] == [*ids_of(TEXT), 2]
    assert all("\ufffd" not in r.text for r in responses)
    assert responses[0].request_id and not any(r.request_id for r in responses[1:])
    assert [r.finish_reason for r in responses if r.finish_reason] == [scheduler_pb2.FINISH_REASON_STOP]
    assert not any(r.HasField("usage") for r in responses[:-1])
    usage = responses[-1].usage
    assert usage.prompt_tokens == len(fake.submitted[0].prompt_token_ids)
    assert (usage.completion_tokens, usage.cached_tokens) == (len(ids_of(TEXT)) + 1, 3)


async def test_several_samples_with_logprobs_and_a_stop(stub: Any, fake: FakeScheduler) -> None:
    fake.script = lambda request, index: [*ids_of(f"sample {index} of two"), 2]
    request = pb.GenerateRequest(text="x", sampling=Sampling(n=2, logprobs=1), stop=[" of", "zzz"])
    responses = await answer(stub, request)
    for index in (0, 1):
        mine = [r for r in responses if r.index == index]
        assert "".join(r.text for r in mine) == f"sample {index}"
        assert mine[-1].stop_reason == " of" and mine[-1].finish_reason == scheduler_pb2.FINISH_REASON_STOP
        assert sum(len(r.logprobs) for r in mine) == sum(len(r.token_ids) for r in mine)
    assert responses[-1].HasField("usage")


async def test_a_token_does_not_wait_for_the_next(stub: Any, fake: FakeScheduler) -> None:
    fake.interval_s = 0.05
    call = stub.Generate(pb.GenerateRequest(text="x", sampling=Sampling(ignore_eos=True)))
    assert (await call.read()).text == "Hello"
    assert fake.num_live_rows == 1, "the others are still to come"
    call.cancel()


BAD = [
    (pb.GenerateRequest(text="x", model="another"), grpc.StatusCode.NOT_FOUND, "model"),
    (pb.GenerateRequest(), grpc.StatusCode.INVALID_ARGUMENT, "prompt"),
    (pb.GenerateRequest(text=""), grpc.StatusCode.INVALID_ARGUMENT, "text"),
    (pb.GenerateRequest(chat=pb.Chat()), grpc.StatusCode.INVALID_ARGUMENT, "chat.messages"),
    (pb.GenerateRequest(chat=chat(role="wizard")), grpc.StatusCode.INVALID_ARGUMENT, "chat.messages[0].role"),
    (pb.GenerateRequest(token_ids=pb.TokenIds()), grpc.StatusCode.INVALID_ARGUMENT, "token_ids.ids"),
    (
        pb.GenerateRequest(token_ids=pb.TokenIds(ids=[49152])),
        grpc.StatusCode.INVALID_ARGUMENT,
        "token_ids.ids",
    ),
    (
        pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5] * 9000)),
        grpc.StatusCode.INVALID_ARGUMENT,
        "token_ids.ids",
    ),
    (pb.GenerateRequest(text="word " * 9000), grpc.StatusCode.INVALID_ARGUMENT, "text"),
    (pb.GenerateRequest(text="x", stop=[""]), grpc.StatusCode.INVALID_ARGUMENT, "stop"),
    (pb.GenerateRequest(text="x", sampling=Sampling(n=0)), grpc.StatusCode.INVALID_ARGUMENT, "sampling.n"),
    (pb.GenerateRequest(text="x", request_id="x" * 200), grpc.StatusCode.INVALID_ARGUMENT, "request_id"),
    (
        pb.GenerateRequest(text="x", resume=[scheduler_pb2.ResumedSample(token_ids=[1])]),
        grpc.StatusCode.INVALID_ARGUMENT,
        "resume",
    ),
]


async def test_bad_input_names_the_field(stub: Any, server: GatewayServer, fake: FakeScheduler) -> None:
    for request, code, field in BAD:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await answer(stub, request)
        assert (caught.value.code(), violations(caught.value)) == (code, [field]), caught.value.details()
    assert not fake.submitted and server.gateway.link.num_open == 0
    assert await answer(stub, pb.GenerateRequest(text="x"))


async def test_what_the_scheduler_refuses(stub: Any, fake: FakeScheduler) -> None:
    fake.refuse = lambda request: scheduler_pb2.RequestFailure(
        code=3, message="sampling.temperature: is -1", field="sampling.temperature"
    )
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await answer(stub, pb.GenerateRequest(text="x", sampling=Sampling(temperature=-1)))
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert violations(caught.value) == ["sampling.temperature"]
    fake.refuse = lambda request: scheduler_pb2.RequestFailure(code=8, message="full", retry_after_ms=1500)
    with pytest.raises(grpc.aio.AioRpcError) as full:
        await answer(stub, pb.GenerateRequest(text="x"))
    assert full.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    retry = error_details_pb2.RetryInfo()
    assert any(d.Unpack(retry) for d in details(full.value)) and retry.retry_delay.ToMilliseconds() == 1500


def details(error: grpc.aio.AioRpcError) -> list[Any]:
    status = rpc_status.from_call(error)  # type: ignore[arg-type]
    return list(status.details) if status is not None else []


def violations(error: grpc.aio.AioRpcError) -> list[str]:
    request = error_details_pb2.BadRequest()
    return [v.field for d in details(error) if d.Unpack(request) for v in request.field_violations]


async def test_tokenize_and_models(stub: Any) -> None:
    tokens = await stub.Tokenize(pb.TokenizeRequest(text=TEXT))
    assert list(tokens.token_ids) == ids_of(TEXT) and tokens.max_model_len == 8192
    assert len((await stub.Tokenize(pb.TokenizeRequest(chat=chat()))).token_ids) > 5
    model = (await stub.GetModel(pb.GetModelRequest())).model
    assert (model.name, model.vocab_size, model.max_model_len) == (MODEL, 49152, 8192)
    assert [m.name for m in (await stub.ListModels(pb.ListModelsRequest())).models] == [MODEL]
    for call in (
        stub.Tokenize(pb.TokenizeRequest(text="x", model="another")),
        stub.GetModel(pb.GetModelRequest(model="another")),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert caught.value.code() == grpc.StatusCode.NOT_FOUND
    with pytest.raises(grpc.aio.AioRpcError) as missing:
        await stub.Tokenize(pb.TokenizeRequest())
    assert violations(missing.value) == ["input"]


async def test_cancel_and_deadline_stop_the_request(stub: Any, fake: FakeScheduler) -> None:
    fake.script = lambda request, index: [*ids_of(" word") * 100_000]
    call = stub.Generate(pb.GenerateRequest(text="x", request_id="cancelled"))
    await call.read()
    call.cancel()
    await until(lambda: ("cancelled", 0xFFFFFFFF, 2) in fake.stopped)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await answer(stub, pb.GenerateRequest(text="x", request_id="late"), timeout=0.2)
    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    await until(lambda: ("late", 0xFFFFFFFF, 2) in fake.stopped and fake.num_live_rows == 0)


async def test_a_call_that_is_cancelled_while_its_prompt_is_tokenized_is_counted(
    stub: Any, server: GatewayServer, fake: FakeScheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = asyncio.Event()

    async def endless(*_: Any) -> None:
        begun.set()
        await asyncio.Event().wait()

    monkeypatch.setattr("gateway_svc.text.tokenizer.ModelTokenizer.encode_all", endless)
    call = stub.Generate(pb.GenerateRequest(text="x"))
    await asyncio.wait_for(begun.wait(), 20)
    call.cancel()
    counted = b'pagoda:requests_cancelled_total{engine="gateway",model_name="test-model"} 1.0'
    await until(lambda: counted in server.gateway.metrics.expose())
    assert not fake.submitted


async def test_a_slow_reader_gets_bigger_pieces(stub: Any, fake: FakeScheduler) -> None:
    ids = ids_of(" some words" * 2000)
    fake.script = lambda request, index: list(ids)
    call = stub.Generate(pb.GenerateRequest(text="x"))
    pieces = []
    while (response := await call.read()) is not grpc.aio.EOF:  # type: ignore[attr-defined]
        pieces.append(list(response.token_ids))
        await asyncio.sleep(0.02 if len(pieces) < 20 else 0)
    assert [i for piece in pieces for i in piece] == ids


async def test_health_follows_the_workers(start: Running, fake: FakeScheduler) -> None:
    fake.num_workers, fake.model = 0, None
    server = await start(wait_ready=False)
    states = health_pb2.HealthCheckResponse
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.rpc.port}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for name in ("", "pagoda.v1.InferenceService"):
            state = await stub.Check(health_pb2.HealthCheckRequest(service=name))
            assert state.status == states.NOT_SERVING
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await answer(rpc.InferenceServiceStub(channel), pb.GenerateRequest(text="x"))
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
        fake.num_workers, fake.model = 1, scheduler_pb2.ModelInfo(vocab_size=49152, max_model_len=100)
        fake.announce()
        watch = stub.Watch(health_pb2.HealthCheckRequest(service="pagoda.v1.InferenceService"))
        async with asyncio.timeout(10):
            while (await watch.read()).status != states.SERVING:
                pass
        watch.cancel()


async def test_reflection(server: GatewayServer) -> None:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.rpc.port}") as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        async for response in stub.ServerReflectionInfo(iter([request])):
            names = {service.name for service in response.list_services_response.service}
    assert {"pagoda.v1.InferenceService", "grpc.health.v1.Health"} <= names


async def test_a_token_is_needed_where_one_is_set(start: Running, fake: FakeScheduler) -> None:
    await fake.stop()
    fake.token = "secret"
    await fake.start()
    server = await start(token="secret", grpc_host="::1")
    async with grpc.aio.insecure_channel(f"[::1]:{server.rpc.port}") as channel:
        stub = rpc.InferenceServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await answer(stub, pb.GenerateRequest(text="x"))
        assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED
        assert await answer(
            stub, pb.GenerateRequest(text="x"), metadata=(("authorization", "Bearer secret"),)
        )
        health = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert health.status == health_pb2.HealthCheckResponse.SERVING
