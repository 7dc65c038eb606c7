"""Gateways and direct clients over a real socket: every request ends once, with its tokens or a reason."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import pytest
from google.rpc import error_details_pb2, status_pb2

from pagoda.v1 import scheduler_pb2 as pb
from pagoda.v1 import scheduler_pb2_grpc
from scheduler_svc import session
from scheduler_svc.core.config import CoreConfig
from scheduler_svc.core.events import Finish, SessionOutput
from scheduler_svc.session import Outbox
from tests.support.session_client import Received, SessionClient, request
from tests.support.sim_worker import expected_output
from tests.unit.scheduler.conftest import VOCAB, LocalScheduler, local_scheduler, until

PROMPT = [1, 5, 7]
EOS = (2,)


def expected(seed: int, max_tokens: int, **options: Any) -> list[int]:
    return expected_output(PROMPT, seed, max_tokens, VOCAB, options.pop("stops", EOS), **options)


def detail(error: grpc.aio.AioRpcError, kind: Any) -> Any:
    """The first detail of a status."""
    trailers = dict(error.trailing_metadata() or ())
    status = status_pb2.Status.FromString(trailers["grpc-status-details-bin"])  # type: ignore[arg-type]
    found = kind()
    assert status.details[0].Unpack(found)
    return found


# -------------------------------------------------------------------------------------------- session


async def test_hello_is_answered_with_what_is_served(local: LocalScheduler) -> None:
    async with local.session() as client:
        assert not client.accepted[0].HasField("model")
        assert client.accepted[0].num_workers == 0
        worker = await local.attach()
        await until(lambda: len(client.accepted) == 2)
        assert client.accepted[1].num_workers == 1
        model = client.accepted[1].model
        assert (model.name, model.vocab_size, model.max_model_len) == ("simulated", VOCAB, 512)
        assert list(model.eos_token_ids) == [2] and model.digest == "sim-1"
        await worker.stop()
        await until(lambda: client.accepted[-1].num_workers == 0)
        assert client.accepted[-1].HasField("model"), "the model is known once and for all"


async def test_a_client_that_leaves_hears_the_end(serving: LocalScheduler) -> None:
    """Also with requests under way: a call left behind would end in another event loop, or in none."""
    async with serving.session() as client:
        (handle,) = await client.submit(request(PROMPT, max_tokens=400, ignore_eos=True))
        await client.received[handle].began.wait()
    assert await client.call.code() is grpc.StatusCode.OK
    await until(lambda: not serving.engine.sinks)
    serving.check_idle()


async def test_requests_of_a_session_get_their_tokens(serving: LocalScheduler) -> None:
    async with serving.session() as client:
        batch = [request(PROMPT, max_tokens=1 + i % 30, seed=i, n=1 + i % 3) for i in range(60)]
        results = await client.results(await client.submit(*batch))
    for i, received in enumerate(results):
        want = {k: expected(i + k, 1 + i % 30) for k in range(1 + i % 3)}
        assert received.tokens == want
        assert received.usage is not None and received.failure is None
        assert received.usage.prompt_tokens == 3
        assert received.usage.completion_tokens == sum(map(len, want.values()))
        for k, tokens in want.items():
            reason = pb.FINISH_REASON_STOP if tokens[-1] in EOS else pb.FINISH_REASON_LENGTH
            assert received.reasons[k] == reason
    serving.check_idle()


async def test_sampling_reaches_the_device(serving: LocalScheduler) -> None:
    stop = expected(4, 30, stops=())[5]
    async with serving.session() as client:
        handles = await client.submit(
            request(PROMPT, max_tokens=30, seed=4, stop_token_ids=[stop]),
            request(PROMPT, max_tokens=30, seed=4, stop_token_ids=[stop], min_tokens=10),
            request(PROMPT, max_tokens=3, seed=4, logprobs=2),
        )
        stopped, later, scored = await client.results(handles)
    assert stopped.tokens[0][-1] == stop and stopped.reasons[0] == pb.FINISH_REASON_STOP
    assert later.tokens[0] == expected(4, 30, stops=(2, stop), min_tokens=10)
    assert [round(entry.logprob * -VOCAB) for entry in scored.logprobs[0]] == scored.tokens[0]
    assert [list(entry.top_ids) for entry in scored.logprobs[0]] == [
        [token, (token + 1) % VOCAB] for token in scored.tokens[0]
    ]


async def test_bad_requests_fail_alone(serving: LocalScheduler) -> None:
    async with serving.session() as client:
        handles = await client.submit(
            request(PROMPT, max_tokens=5, seed=1),
            request([]),
            request(PROMPT, temperature=-1),
            request([VOCAB]),
            request(PROMPT, max_tokens=5, seed=2),
        )
        results = await client.results(handles)
    good, failed = [results[0], results[4]], results[1:4]
    assert [received.tokens[0] for received in good] == [expected(1, 5), expected(2, 5)]
    failures = [received.failure for received in failed]
    assert all(f is not None and f.code == grpc.StatusCode.INVALID_ARGUMENT.value[0] for f in failures)
    fields = [f.field for f in failures if f is not None]
    assert fields == ["prompt_token_ids", "sampling.temperature", "prompt_token_ids"]


async def test_a_live_request_id_is_refused_and_free_again_after_its_end(serving: LocalScheduler) -> None:
    async with serving.session() as client:
        first = await client.submit(request(PROMPT, "same", max_tokens=400, ignore_eos=True))
        second = await client.submit(request(PROMPT, "same", max_tokens=2))
        (refused,) = await client.results(second)
        assert refused.failure is not None
        assert refused.failure.code == grpc.StatusCode.ALREADY_EXISTS.value[0]
        assert refused.failure.field == "request_id"
        await client.results(first)
        (again,) = await client.results(await client.submit(request(PROMPT, "same", max_tokens=2)))
        assert again.usage is not None


async def test_a_full_queue_says_when_to_try_again() -> None:
    async with local_scheduler(max_waiting=3) as local:
        worker = await local.attach()
        await worker.stop()
        await until(lambda: not local.engine.core.workers)
        async with local.session() as client:
            handles = await client.submit(*(request(PROMPT, max_tokens=2, seed=i) for i in range(5)))
            for received in await client.results(handles[3:]):
                assert received.failure is not None
                assert received.failure.code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
                assert received.failure.retry_after_ms > 0
            await local.attach()
            assert all(r.failure is None for r in await client.results(handles[:3])), "the others ran"


async def test_without_any_worker_ever_requests_are_unavailable(local: LocalScheduler) -> None:
    async with local.session() as client:
        (received,) = await client.results(await client.submit(request(PROMPT)))
    assert received.failure is not None
    assert received.failure.code == grpc.StatusCode.UNAVAILABLE.value[0]


@pytest.mark.parametrize(
    "message",
    [
        pb.SessionRequest(hello=pb.SessionHello()),
        pb.SessionRequest(),
        pb.SessionRequest(submit=pb.SubmitBatch(handles=[1])),
        pb.SessionRequest(stop=pb.StopBatch(handles=[1], indexes=[0])),
        pb.SessionRequest(stop=pb.StopBatch(handles=[1], indexes=[0], reasons=[pb.STOP_REASON_UNSPECIFIED])),
        pb.SessionRequest(
            submit=pb.SubmitBatch(handles=[9, 9], requests=[request(PROMPT, max_tokens=99)] * 2)
        ),
    ],
)
async def test_a_gateway_that_breaks_the_protocol_is_cut(
    serving: LocalScheduler, message: pb.SessionRequest
) -> None:
    async with serving.session() as client:
        client.received[9] = Received()
        await client.call.write(message)
        assert await client.ended_with() is grpc.StatusCode.INVALID_ARGUMENT
    await until(lambda: not serving.engine.sinks)


async def test_a_gateway_that_is_cut_at_once_hears_of_it(local: LocalScheduler) -> None:
    """The status may overtake the answer to hello."""
    for _ in range(50):
        call = local.scheduler.Session()
        await call.write(pb.SessionRequest(hello=pb.SessionHello()))
        await call.write(pb.SessionRequest())
        with pytest.raises(grpc.aio.AioRpcError) as cut:
            async with asyncio.timeout(20):
                while await call.read() is not grpc.aio.EOF:  # type: ignore[attr-defined]
                    pass
        assert cut.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_hello_comes_first(local: LocalScheduler) -> None:
    call = local.scheduler.Session()
    await call.write(pb.SessionRequest(submit=pb.SubmitBatch()))
    assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT


# ------------------------------------------------------------------------------------------- stopping


async def running(client: SessionClient, **sampling: Any) -> int:
    """A long request that has begun; its handle."""
    fields = {"max_tokens": 450, "ignore_eos": True, "seed": 1, **sampling}
    (handle,) = await client.submit(request(PROMPT, "long", **fields))
    await until(lambda: client.received[handle].tokens)
    return handle


@pytest.mark.parametrize("finished", [True, False])
async def test_nothing_comes_after_a_stop(serving: LocalScheduler, finished: bool) -> None:
    async with serving.session() as client:
        handle = await running(client)
        await client.stop(handle, finished=finished)
        await until(lambda: not serving.engine.core.groups)
        (other,) = await client.results(await client.submit(request(PROMPT, "after", max_tokens=3)))
        received = client.received[handle]
        assert other.usage is not None
        assert received.usage is None and not received.reasons
        name = "stop" if finished else "cancelled"
        assert serving.engine.core.stats.finished[name] == 1
        await client.stop(handle)  # what has ended already is no error
        await client.stop(12345)
        await client.results(await client.submit(request(PROMPT, max_tokens=3)))
    await until(lambda: not serving.engine.core.groups)
    serving.check_idle()


async def test_one_sample_stops_and_the_others_go_on(serving: LocalScheduler) -> None:
    async with serving.session() as client:
        handle = await running(client, n=3, max_tokens=200)
        await client.stop(handle, index=1, finished=True)
        (received,) = await client.results([handle])
    assert received.usage is not None
    assert set(received.reasons) == {0, 2}
    assert len(received.tokens[0]) == len(received.tokens[2]) == 200
    assert len(received.tokens[1]) < 200
    serving.check_idle()


async def test_the_end_of_a_session_cancels_its_requests(serving: LocalScheduler) -> None:
    async with serving.session() as other:
        theirs = await other.submit(request(PROMPT, max_tokens=300, ignore_eos=True, seed=3))
        async with serving.session() as client:
            await running(client)
        await until(lambda: "long" not in serving.engine._live)
        assert serving.engine.core.stats.finished == {"cancelled": 1}
        (received,) = await other.results(theirs)
        assert received.tokens[0] == expected(3, 300, stops=())
    serving.check_idle()


# -------------------------------------------------------------------------------------- slow gateways


# A window that holds few steps, so that what is not read waits in the scheduler.
NARROW = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1024)]


@contextlib.asynccontextmanager
async def unread_session(local: LocalScheduler) -> AsyncIterator[Any]:
    """A session with thirty streams of 400 tokens and their logprobs, of which nothing has been read."""
    async with grpc.aio.insecure_channel(local.address, options=NARROW) as channel:
        call: Any = scheduler_pb2_grpc.SchedulerServiceStub(channel).Session()
        await call.write(pb.SessionRequest(hello=pb.SessionHello(client_name="slow")))
        requests = [request(PROMPT, max_tokens=400, ignore_eos=True, seed=i, logprobs=20) for i in range(30)]
        await call.write(pb.SessionRequest(submit=pb.SubmitBatch(handles=range(30), requests=requests)))
        yield call


async def test_a_slow_gateway_gets_bigger_messages_and_loses_nothing(local: LocalScheduler) -> None:
    await local.attach(blocks=4096)
    async with unread_session(local) as call:
        await until(lambda: local.engine.core.stats.finished.get("length") == 30, 60)
        slow = SessionClient(local.address)
        slow.received = {handle: Received() for handle in range(30)}
        while not all(received.ended.is_set() for received in slow.received.values()):
            slow._take(await call.read())
    for handle, received in slow.received.items():
        assert received.tokens[0] == expected(handle, 400, stops=())
        assert [round(entry.logprob * -VOCAB) for entry in received.logprobs[0]] == received.tokens[0]
    assert slow.num_messages < 100, "400 steps came in fewer messages"
    local.check_idle()


async def test_past_the_bound_a_slow_gateway_is_cut(
    local: LocalScheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "MAX_PENDING", 50_000)
    await local.attach(blocks=4096)
    async with unread_session(local) as call:
        await until(lambda: local.engine.sinks)
        await until(lambda: not local.engine.sinks, 60)
        with pytest.raises(grpc.aio.AioRpcError) as cut:
            while await call.read() is not grpc.aio.EOF:  # type: ignore[attr-defined]
                pass
        assert cut.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    await until(lambda: not local.engine.core.groups)
    local.check_idle()


async def test_an_outbox_merges_what_waits(local: LocalScheduler) -> None:
    outbox = Outbox(local.engine)
    for token in (5, 6, 7):
        outbox.deliver(SessionOutput(handles=[1], tokens=[token]))
    assert [output.tokens for output in outbox.take().outputs] == [[5], [6], [7]]
    assert not any(outbox.take())
    outbox.close()


# ---------------------------------------------------------------------------------------- one request


async def test_generate_tokens_streams_and_ends_with_usage(serving: LocalScheduler) -> None:
    responses = [
        r async for r in serving.scheduler.GenerateTokens(request(PROMPT, max_tokens=20, seed=9, n=2))
    ]
    for index in range(2):
        tokens = [t for r in responses if r.index == index for t in r.token_ids]
        assert tokens == expected(9 + index, 20)
    assert [r.HasField("usage") for r in responses] == [False] * (len(responses) - 1) + [True]
    assert sum(r.finish_reason != 0 for r in responses) == 2
    serving.check_idle()


async def test_generate_tokens_mints_a_seed(serving: LocalScheduler) -> None:
    async def run() -> list[int]:
        call = serving.scheduler.GenerateTokens(request(PROMPT, max_tokens=20, ignore_eos=True))
        return [t async for r in call for t in r.token_ids]

    assert await run() != await run()


async def test_generate_tokens_resumes(serving: LocalScheduler) -> None:
    whole = expected(9, 20, stops=())
    resumed = request(PROMPT, max_tokens=20, seed=9, ignore_eos=True)
    resumed.resume.add(token_ids=whole[:8])
    tokens = [t async for r in serving.scheduler.GenerateTokens(resumed) for t in r.token_ids]
    assert tokens == whole[8:]


@pytest.mark.parametrize(
    ("bad", "field"),
    [
        (request([]), "prompt_token_ids"),
        (request(PROMPT, n=0), "sampling.n"),
        (request(PROMPT, n=33), "sampling.n"),
        (request([1] * 512), "prompt_token_ids"),
    ],
)
async def test_generate_tokens_names_the_bad_field(
    serving: LocalScheduler, bad: pb.GenerateTokensRequest, field: str
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await serving.scheduler.GenerateTokens(bad).read()
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert detail(refused.value, error_details_pb2.BadRequest).field_violations[0].field == field
    assert not serving.engine.sinks


async def test_generate_tokens_other_refusals() -> None:
    async with local_scheduler(max_waiting=1) as local:
        with pytest.raises(grpc.aio.AioRpcError) as early:
            await local.scheduler.GenerateTokens(request(PROMPT)).read()
        assert early.value.code() is grpc.StatusCode.UNAVAILABLE
        worker = await local.attach()
        await worker.stop()
        await until(lambda: not local.engine.core.workers)
        first = local.scheduler.GenerateTokens(request(PROMPT, "one", max_tokens=2))
        await until(lambda: local.engine.core.num_waiting == 1)
        with pytest.raises(grpc.aio.AioRpcError) as twice:
            await local.scheduler.GenerateTokens(request(PROMPT, "one")).read()
        assert twice.value.code() is grpc.StatusCode.ALREADY_EXISTS
        assert detail(twice.value, error_details_pb2.ResourceInfo).resource_name == "one"
        with pytest.raises(grpc.aio.AioRpcError) as full:
            await local.scheduler.GenerateTokens(request(PROMPT, "two")).read()
        assert full.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert detail(full.value, error_details_pb2.RetryInfo).retry_delay.ToMilliseconds() == 1000
        first.cancel()
        await until(lambda: not local.engine.core.groups)


@pytest.mark.parametrize("how", ["cancel", "deadline"])
async def test_leaving_cancels_the_request(serving: LocalScheduler, how: str) -> None:
    timeout = 0.1 if how == "deadline" else None
    call = serving.scheduler.GenerateTokens(request(PROMPT, max_tokens=450, ignore_eos=True), timeout=timeout)
    await call.read()
    if how == "cancel":
        call.cancel()
    await until(lambda: not serving.engine.core.groups)
    assert serving.engine.core.stats.finished == {"cancelled": 1}
    serving.check_idle()


async def test_a_failed_request_says_why(serving: LocalScheduler) -> None:
    call = serving.scheduler.GenerateTokens(request(PROMPT, max_tokens=450, ignore_eos=True))
    await call.read()
    group = next(iter(serving.engine.core.groups.values()))
    end = group.end(Finish.ERROR, 0.0, "the logits were not finite")
    serving.engine.sinks[group.session].deliver(SessionOutput(ended=[end]))
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        while await call.read() is not grpc.aio.EOF:  # type: ignore[attr-defined]
            pass
    assert failed.value.code() is grpc.StatusCode.INTERNAL
    assert failed.value.details() == "the logits were not finite"


async def test_small_cache_preempts_and_every_request_gets_its_tokens() -> None:
    async with local_scheduler(CoreConfig(max_batched_tokens=64)) as local:
        await local.attach(blocks=80, slots=16, iteration_ms=0.2)
        async with local.session() as client:
            prompts = [[1 + i % 7] * (5 + i % 40) for i in range(60)]
            handles = await client.submit(*(request(p, max_tokens=60, seed=i) for i, p in enumerate(prompts)))
            for i, received in enumerate(await client.results(handles)):
                assert received.tokens[0] == expected_output(prompts[i], i, 60, VOCAB, EOS)
        assert local.engine.core.stats.num_preemptions > 5
        local.check_idle()
