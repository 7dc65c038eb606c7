"""Attaching over a real socket: who is taken, who is refused, and what ends a session."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import grpc
import grpc.aio
import pytest
from google.rpc import error_details_pb2, status_pb2

from pagoda.checksum import step_checksum
from pagoda.internal.v1 import worker_pb2 as wire
from pagoda.v1 import scheduler_pb2 as pb
from scheduler_svc import worker_hub
from tests.support.session_client import request
from tests.support.sim_worker import SimDevice, expected_output, hello_for
from tests.unit.scheduler.conftest import VOCAB, LocalScheduler, local_scheduler, until

DEVICE = SimDevice(64, 4, 8, VOCAB, max_batched_tokens=256, max_horizon=4)


class RawWorker:
    """A worker's end of the wire, for what no good worker does."""

    def __init__(self, local: LocalScheduler, **hello: Any) -> None:
        self.call = local.worker.Attach()
        self.hello = hello_for(DEVICE, **{"max_model_len": 512, **hello})

    async def say_hello(self) -> None:
        await self.call.write(wire.AttachRequest(hello=self.hello))

    async def attach(self) -> wire.SessionStart:
        await self.say_hello()
        response = await self.call.read()
        assert response.HasField("start"), await self.call.details()
        return response.start

    async def step(self) -> wire.Step:
        response = await self.call.read()
        return response.step

    async def answer(self, step: wire.Step, **result: Any) -> None:
        fields = {"epoch": step.epoch, "step_id": step.step_id, **result}
        await self.call.write(wire.AttachRequest(result=wire.StepResult(**fields)))

    async def status(self) -> tuple[grpc.StatusCode, str]:
        """How the stream ended; the status comes after everything that was sent before it."""
        async with asyncio.timeout(20):
            with contextlib.suppress(grpc.aio.AioRpcError):
                while isinstance(await self.call.read(), wire.AttachResponse):
                    pass
            return await self.call.code(), await self.call.details()

    async def violations(self) -> dict[str, str]:
        """What the refusal lists."""
        assert (await self.status())[0] is grpc.StatusCode.FAILED_PRECONDITION
        trailers = dict(await self.call.trailing_metadata())
        status = status_pb2.Status.FromString(trailers["grpc-status-details-bin"])
        detail = error_details_pb2.PreconditionFailure()
        assert status.details[0].Unpack(detail)
        return {violation.subject: violation.description for violation in detail.violations}


async def start_request(local: LocalScheduler, **sampling: Any) -> Any:
    """A request whose response is not awaited."""
    return local.scheduler.GenerateTokens(request([1, 2, 3], **{"max_tokens": 20, "seed": 1, **sampling}))


# ---------------------------------------------------------------------------------------------- hello


async def test_a_session_begins_with_what_was_agreed(local: LocalScheduler) -> None:
    start = await RawWorker(local).attach()
    assert start == wire.SessionStart(
        epoch=1, protocol=1, num_device_blocks=64, num_host_blocks=0, max_slots=8, max_inflight=2
    )


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("protocol", {"protocol_min": 2, "protocol_max": 3}),
        ("rank", {"rank": 1}),
        ("group_name", {"group": ""}),
        ("incarnation", {"incarnation": ""}),
        ("world_size", {"world_size": 0}),
        ("num_device_blocks", {"num_device_blocks": 0}),
        ("vocab_size", {"vocab_size": 0}),
    ],
)
async def test_a_hello_that_makes_no_sense_is_refused(
    local: LocalScheduler, field: str, changes: dict[str, Any]
) -> None:
    worker = RawWorker(local, **changes)
    await worker.say_hello()
    assert field in await worker.violations()


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("digest", {"model_digest": "sim-2"}),
        ("name", {"model_name": "other"}),
        ("vocab_size", {"vocab_size": 999}),
        ("max_model_len", {"max_model_len": 100}),
        ("eos_token_ids", {"eos_token_ids": [3]}),
    ],
)
async def test_all_workers_of_a_cluster_hold_one_model(
    local: LocalScheduler, field: str, changes: dict[str, Any]
) -> None:
    await RawWorker(local).attach()
    second = RawWorker(local, group="w1", **changes)
    await second.say_hello()
    found = await second.violations()
    assert list(found) == [field]
    assert "the cluster has" in found[field]
    assert list(local.engine.workers) == ["w0"], "who was there stays"


async def test_the_model_outlives_its_workers(local: LocalScheduler) -> None:
    worker = RawWorker(local)
    await worker.attach()
    worker.call.cancel()
    await until(lambda: not local.engine.workers)
    other = RawWorker(local, model_digest="sim-2")
    await other.say_hello()
    assert "digest" in await other.violations()


@pytest.mark.parametrize("message", [wire.AttachRequest(), wire.AttachRequest(heartbeat=wire.Heartbeat())])
async def test_hello_comes_first(local: LocalScheduler, message: wire.AttachRequest) -> None:
    worker = RawWorker(local)
    await worker.call.write(message)
    assert "hello" in await worker.violations()


async def test_hello_must_come_soon(local: LocalScheduler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_hub, "HELLO_TIMEOUT_S", 0.05)
    assert "hello" in await RawWorker(local).violations()


async def test_hello_comes_once(local: LocalScheduler) -> None:
    worker = RawWorker(local)
    await worker.attach()
    await worker.say_hello()
    assert (await worker.status())[0] is grpc.StatusCode.INVALID_ARGUMENT
    await until(lambda: not local.engine.workers)


# ------------------------------------------------------------------------------------- newest session


async def test_the_newest_session_of_a_group_wins(local: LocalScheduler) -> None:
    """A worker whose connection broke without a word dials again while its old session lives."""
    old = RawWorker(local, incarnation="a")
    assert (await old.attach()).epoch == 1
    new = RawWorker(local, incarnation="a")
    assert (await new.attach()).epoch == 2
    code, reason = await old.status()
    assert code is grpc.StatusCode.ABORTED and "newer session" in reason
    assert local.engine.workers["w0"].epoch == 2
    again = RawWorker(local, incarnation="a")
    assert (await again.attach()).epoch == 3


async def test_a_replaced_process_does_not_come_back(local: LocalScheduler) -> None:
    """Two processes under one name would cut each other for ever; the older one is told to go."""
    old = RawWorker(local, incarnation="a")
    await old.attach()
    new = RawWorker(local, incarnation="b")
    await new.attach()
    back = RawWorker(local, incarnation="a")
    await back.say_hello()
    assert "incarnation" in await back.violations()
    assert local.engine.workers["w0"].epoch == 2


# -------------------------------------------------------------------------------------------- results


async def step_in_flight(local: LocalScheduler, **sampling: Any) -> tuple[RawWorker, wire.Step]:
    """A worker that has been sent a step with one row."""
    worker = RawWorker(local)
    await worker.attach()
    worker.request = await start_request(local, **sampling)  # type: ignore[attr-defined]
    return worker, await worker.step()


@pytest.mark.parametrize(
    "result",
    [
        {"epoch": 2, "tokens": [5]},
        {"step_id": 1, "tokens": [5]},
        {"tokens": []},
        {"tokens": [5, 6]},
        {"tokens": [VOCAB]},
        {"tokens": [5], "ended_rows": [0], "ended_reasons": [7]},
    ],
)
async def test_a_bad_result_ends_the_session_and_not_the_scheduler(
    local: LocalScheduler, result: dict[str, Any]
) -> None:
    worker, step = await step_in_flight(local)
    await worker.answer(step, **result)
    assert (await worker.status())[0] is grpc.StatusCode.ABORTED
    await until(lambda: not local.engine.workers)
    await local.attach()
    tokens = [t async for response in worker.request for t in response.token_ids]  # type: ignore[attr-defined]
    assert tokens == expected_output([1, 2, 3], 1, 20, VOCAB, (2,))


async def test_an_answer_without_a_step_ends_the_session(local: LocalScheduler) -> None:
    worker = RawWorker(local)
    start = await worker.attach()
    await worker.answer(wire.Step(epoch=start.epoch, step_id=0))
    code, reason = await worker.status()
    assert code is grpc.StatusCode.ABORTED and "never sent" in reason


async def test_no_more_steps_are_in_flight_than_agreed() -> None:
    async with local_scheduler() as local:
        worker, first = await step_in_flight(local)
        second = await worker.step()
        assert (first.step_id, second.step_id) == (0, 1)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await worker.step()


# --------------------------------------------------------------------------------------------- losses


async def test_a_silent_worker_is_lost(local: LocalScheduler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_hub, "HEARTBEAT_TIMEOUT_S", 0.3)
    worker = RawWorker(local)
    await worker.attach()
    for _ in range(10):
        await worker.call.write(wire.AttachRequest(heartbeat=wire.Heartbeat()))
        await asyncio.sleep(0.1)
    assert local.engine.workers, "heartbeats keep it"
    assert (await worker.status())[0] is grpc.StatusCode.DEADLINE_EXCEEDED
    await until(lambda: not local.engine.core.workers)


async def test_a_worker_that_leaves_is_lost_and_its_requests_go_on_elsewhere(local: LocalScheduler) -> None:
    worker, step = await step_in_flight(local)
    expected = expected_output([1, 2, 3], 1, 20, VOCAB, (2,))
    await worker.answer(step, tokens=expected[:1])
    await until(lambda: local.engine.core.stats.generation_tokens == 1)
    worker.call.cancel()
    await until(lambda: not local.engine.core.workers)
    await local.attach()
    tokens = [t async for response in worker.request for t in response.token_ids]  # type: ignore[attr-defined]
    assert tokens == expected
    assert local.engine.core.stats.replayed_requests == 1


async def test_a_worker_that_does_not_read_is_cut(
    local: LocalScheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_hub, "MAX_OUTBOX", 0)
    worker = RawWorker(local)
    await worker.say_hello()
    await until(lambda: "w0" in local.engine.core.workers)
    await start_request(local)
    assert (await worker.status())[0] is grpc.StatusCode.RESOURCE_EXHAUSTED


# ---------------------------------------------------------------------------------------------- ranks


async def pair(local: LocalScheduler, **second: Any) -> tuple[RawWorker, RawWorker]:
    """Two ranks of a group that have said hello."""
    common = {"incarnation": "a", "world_size": 2}
    ranks = RawWorker(local, rank=0, **common), RawWorker(local, **{"rank": 1, **common, **second})
    await ranks[0].say_hello()
    await until(lambda: "w0" in local.hub.groups)
    await ranks[1].say_hello()
    return ranks


async def starts(*ranks: RawWorker) -> list[wire.SessionStart]:
    return [(await rank.call.read()).start for rank in ranks]


async def test_a_group_is_complete_when_all_ranks_are_there(local: LocalScheduler) -> None:
    first = RawWorker(local, rank=0, world_size=2, incarnation="a")
    await first.say_hello()
    await asyncio.sleep(0.1)
    assert not local.engine.workers
    second = RawWorker(local, rank=1, world_size=2, incarnation="a", num_device_blocks=40, max_slots=5)
    await second.say_hello()
    one, two = await starts(first, second)
    assert one == two
    assert (one.num_device_blocks, one.max_slots) == (40, 5), "the minimum over the ranks"
    (shown,) = (await local.control.Snapshot(pb.SnapshotRequest())).snapshot.workers
    assert (shown.name, shown.num_ranks) == ("w0", 2)


async def test_ranks_that_differ_are_refused(local: LocalScheduler) -> None:
    _, second = await pair(local, block_size=8)
    assert "block_size" in await second.violations()


async def test_every_rank_gets_the_same_steps_and_rank_0_counts(local: LocalScheduler) -> None:
    ranks = await pair(local)
    await starts(*ranks)
    call = await start_request(local, max_tokens=2)
    expected = expected_output([1, 2, 3], 1, 2, VOCAB)
    for k, token in enumerate(expected):
        steps = [await rank.step() for rank in ranks]
        assert steps[0] == steps[1]
        last = k == len(expected) - 1
        ended = {"ended_rows": [0], "ended_reasons": [wire.ROW_END_LENGTH]} if last else {}
        await ranks[0].answer(steps[0], tokens=[token], **ended)
        await ranks[1].answer(steps[1], checksum=step_checksum(wire.StepResult(tokens=[token])))
    assert [t async for response in call for t in response.token_ids] == expected
    await until(lambda: not local.hub.groups["w0"].checksums)


async def test_a_checksum_that_differs_ends_the_session(local: LocalScheduler) -> None:
    ranks = await pair(local)
    await starts(*ranks)
    await start_request(local)
    steps = [await rank.step() for rank in ranks]
    await ranks[1].answer(steps[1], checksum=step_checksum(wire.StepResult(tokens=[6])))
    await ranks[0].answer(steps[0], tokens=[5])
    for rank in ranks:
        code, reason = await rank.status()
        assert code is grpc.StatusCode.ABORTED and "drew differs" in reason


async def test_a_lost_rank_takes_its_group_with_it(local: LocalScheduler) -> None:
    ranks = await pair(local)
    await starts(*ranks)
    ranks[1].call.cancel()
    assert (await ranks[0].status())[0] is grpc.StatusCode.ABORTED
    await until(lambda: not local.engine.workers)
    again = await pair(local)
    assert [start.epoch for start in await starts(*again)] == [2, 2]
