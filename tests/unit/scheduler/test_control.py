"""Abort, Snapshot and Watch over a real socket."""

from __future__ import annotations

import grpc
import grpc.aio
import pytest

from pagoda.v1 import scheduler_pb2 as pb
from tests.support.session_client import SessionClient, request
from tests.unit.scheduler.conftest import LocalScheduler, until

PROMPT = [1, 5, 7]


async def start(client: SessionClient, request_id: str, n: int = 1) -> int:
    """A long request that has begun; its handle."""
    (handle,) = await client.submit(request(PROMPT, request_id, max_tokens=400, ignore_eos=True, seed=1, n=n))
    await until(lambda: client.received[handle].tokens)
    return handle


async def test_abort_ends_a_request_and_its_client_is_told(serving: LocalScheduler) -> None:
    async with serving.session() as client:
        handle = await start(client, "mine", n=2)
        assert (await serving.control.Abort(pb.AbortRequest(request_id="mine"))).found
        (received,) = await client.results([handle])
    assert received.reasons == {0: pb.FINISH_REASON_CANCELLED, 1: pb.FINISH_REASON_CANCELLED}
    assert received.usage is not None and received.usage.completion_tokens < 800
    assert serving.engine.num_aborted == 1
    serving.check_idle()


async def test_abort_of_one_sample_lets_the_others_go_on(serving: LocalScheduler) -> None:
    async with serving.session() as client:
        handle = await start(client, "mine", n=3)
        assert (await serving.control.Abort(pb.AbortRequest(request_id="mine", index=1))).found
        await until(lambda: 1 in client.received[handle].reasons)
        assert client.received[handle].usage is None
        (received,) = await client.results([handle])
    length, cancelled = pb.FINISH_REASON_LENGTH, pb.FINISH_REASON_CANCELLED
    assert received.reasons == {0: length, 1: cancelled, 2: length}
    assert len(received.tokens[0]) == 400
    serving.check_idle()


async def test_abort_reaches_direct_clients(serving: LocalScheduler) -> None:
    call = serving.scheduler.GenerateTokens(request(PROMPT, "mine", max_tokens=400, ignore_eos=True))
    await call.read()
    assert (await serving.control.Abort(pb.AbortRequest(request_id="mine"))).found
    responses = []
    while (response := await call.read()) is not grpc.aio.EOF:  # type: ignore[attr-defined]
        responses.append(response)
    assert responses[-1].finish_reason == pb.FINISH_REASON_CANCELLED
    assert responses[-1].HasField("usage")


async def test_abort_of_what_is_not_there(serving: LocalScheduler) -> None:
    assert not (await serving.control.Abort(pb.AbortRequest(request_id="nobody"))).found
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await serving.control.Abort(pb.AbortRequest())
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_snapshot_tells_who_runs_and_why_others_do_not(local: LocalScheduler) -> None:
    await local.attach(slots=2)
    async with local.session() as client:
        await start(client, "a")
        await start(client, "b")
        await client.submit(request(PROMPT, "c", max_tokens=5), request(PROMPT, "d", max_tokens=5))
        await until(lambda: local.engine.core.num_waiting == 2)
        options = pb.SnapshotRequest(include_requests=True, include_blocks=True)
        snapshot = (await local.control.Snapshot(options)).snapshot
    assert (snapshot.num_running, snapshot.num_waiting, snapshot.num_sessions) == (2, 2, 1)
    assert snapshot.model.name == "simulated"
    assert [r.request_id for r in snapshot.requests] == ["a", "b", "c", "d"]
    assert [r.state for r in snapshot.requests[:2]] == [pb.REQUEST_STATE_DECODE] * 2
    assert [r.state for r in snapshot.requests[2:]] == [pb.REQUEST_STATE_WAITING] * 2
    assert all(not r.why_not_running for r in snapshot.requests[:2])
    assert all(r.why_not_running for r in snapshot.requests[2:])
    (worker,) = snapshot.workers
    assert (worker.name, worker.epoch, worker.device, worker.num_ranks) == ("w0", 1, "simulated", 1)
    assert (worker.num_blocks, worker.max_slots, worker.num_slots_used) == (512, 2, 2)
    assert len(worker.ref_counts) == 512
    held = [block for r in snapshot.requests for sample in r.samples for block in sample.blocks]
    assert all(worker.ref_counts[block] >= 1 for block in held)
    assert sum(worker.ref_counts) == len(held)
    assert not snapshot.requests[2].samples[0].HasField("slot")


async def test_snapshot_lists_only_what_was_asked_for(serving: LocalScheduler) -> None:
    async with serving.session() as client:
        await start(client, "a")
        await start(client, "b")
        plain = (await serving.control.Snapshot(pb.SnapshotRequest())).snapshot
        assert not plain.requests and not plain.workers[0].ref_counts
        one = pb.SnapshotRequest(include_requests=True, max_requests=1)
        limited = (await serving.control.Snapshot(one)).snapshot
        assert len(limited.requests) == 1 and not limited.requests[0].samples[0].blocks


async def test_watch_streams_snapshots(serving: LocalScheduler) -> None:
    call = serving.control.Watch(pb.WatchRequest(interval_ms=50))
    first = (await call.read()).snapshot
    async with serving.session() as client:
        await client.results(await client.submit(request(PROMPT, max_tokens=5)))
    await until(lambda: serving.engine.core.stats.generation_tokens)
    while (later := (await call.read()).snapshot).generation_tokens == 0:
        assert later.unix_us > first.unix_us
    call.cancel()


async def test_watch_refuses_to_be_hurried(serving: LocalScheduler) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await serving.control.Watch(pb.WatchRequest(interval_ms=49)).read()
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "interval_ms" in (refused.value.details() or "")
