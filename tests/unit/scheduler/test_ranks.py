"""The ranks of a group as real hub clients on a real hub: one answers, the others prove that they agree."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import grpc
import structlog

from gpu_worker.hub_client import EXIT_FAILED, HubClient
from gpu_worker.metrics import WorkerMetrics
from pagoda.internal.v1 import worker_pb2 as wire
from tests.support.session_client import SessionClient, request
from tests.support.sim_worker import SimDevice, SimExecutor, expected_output, hello_for
from tests.unit.scheduler.conftest import VOCAB, LocalScheduler, SimWorker, until

Change = Callable[[int, wire.StepResult], None]


def honest(_rank: int, _result: wire.StepResult) -> None:
    """Every rank draws what the others draw."""


async def attach_ranks(local: LocalScheduler, incarnation: str, change: Change = honest) -> list[SimWorker]:
    """Two ranks of the group w0, when they are attached; `change` may falsify what one of them has drawn."""
    ranks = []
    for rank in range(2):
        device = SimDevice(512, 4, 32, VOCAB, max_batched_tokens=4096, max_horizon=4)
        who: dict[str, Any] = {"rank": rank, "world_size": 2, "incarnation": incarnation}
        hello = hello_for(device, max_model_len=512, **who)
        client = HubClient(local.address, hello, "", WorkerMetrics("m", "w0"), structlog.get_logger())

        def deliver(result: wire.StepResult, rank: int = rank, client: HubClient = client) -> None:
            change(rank, result)
            client.deliver(result)

        executor = SimExecutor(device, 0.0005, deliver, client.fail)
        codes: list[int] = []

        def run(
            client: HubClient = client, executor: SimExecutor = executor, codes: list[int] = codes
        ) -> None:
            codes.append(client.run(executor))

        ranks.append(SimWorker(client, executor, device, threading.Thread(target=run, daemon=True), codes))
        ranks[-1].thread.start()
    local.workers += ranks
    await until(lambda: "w0" in local.engine.core.workers)
    return ranks


async def generate(local: LocalScheduler, count: int = 8, **sampling: Any) -> list[list[int]]:
    """The outputs of several requests at a time."""
    async with SessionClient(local.address) as session:
        prompts = [[1, 2, 3 + i] for i in range(count)]
        handles = await session.submit(*(request(p, **sampling) for p in prompts))
        return [received.tokens[0] for received in await session.results(handles)]


def expected(count: int, max_tokens: int) -> list[list[int]]:
    return [expected_output([1, 2, 3 + i], 1, max_tokens, VOCAB, (2,)) for i in range(count)]


async def test_two_ranks_serve_as_one_worker(local: LocalScheduler) -> None:
    ranks = await attach_ranks(local, "a")
    assert await generate(local, seed=1, max_tokens=30) == expected(8, 30)
    searched = await generate(local, count=1, beam_width=3, n=1, max_tokens=6, temperature=0)
    assert len(searched[0]) > 0
    assert local.engine.core.stats.replayed_requests == 0
    steps = [[(t.step_id, t.num_rows) for t in rank.executor.times] for rank in ranks]
    assert steps[0] == steps[1]
    local.check_idle()


async def disagreement_ends_both(local: LocalScheduler, change: Change, **sampling: Any) -> None:
    """Where `change` makes ranks differ, both end, and the next group makes up for it."""
    changed: list[int] = []

    def once(rank: int, result: wire.StepResult) -> None:
        if rank == 1 and result.step_id >= 3 and not changed:
            before = result.SerializeToString()
            change(rank, result)
            if result.SerializeToString() != before:
                changed.append(result.step_id)

    ranks = await attach_ranks(local, "a", once)
    generating = asyncio.create_task(generate(local, **sampling))
    await until(lambda: all(rank.exit_codes for rank in ranks))
    assert [rank.exit_codes for rank in ranks] == [[EXIT_FAILED], [EXIT_FAILED]]
    assert changed
    await attach_ranks(local, "b")
    outputs = await generating
    assert local.engine.core.stats.replayed_requests > 0
    if "beam_width" not in sampling:
        assert outputs == expected(8, sampling["max_tokens"])


async def test_a_token_that_differs_ends_both(local: LocalScheduler) -> None:
    def change(_rank: int, result: wire.StepResult) -> None:
        if result.tokens:
            result.tokens[0] ^= 1

    await disagreement_ends_both(local, change, seed=1, max_tokens=100)


async def test_a_row_that_sat_out_on_one_rank_ends_both(local: LocalScheduler) -> None:
    """The tokens may be the same, and be other rows'."""

    def change(_rank: int, result: wire.StepResult) -> None:
        result.num_sampled.append(1)

    await disagreement_ends_both(local, change, seed=1, max_tokens=100)


async def test_a_candidate_that_differs_ends_both(local: LocalScheduler) -> None:
    def change(_rank: int, result: wire.StepResult) -> None:
        if result.beam_tokens:
            result.beam_tokens[-1] ^= 1

    await disagreement_ends_both(local, change, beam_width=3, max_tokens=20, temperature=0)


async def test_a_rank_that_stops_ends_the_others(local: LocalScheduler) -> None:
    """It was told to, so it ends well; for the other one the group has failed."""
    ranks = await attach_ranks(local, "a")
    await ranks[1].stop()
    await until(lambda: bool(ranks[0].exit_codes))
    assert [rank.exit_codes for rank in ranks] == [[EXIT_FAILED], [0]]


async def test_a_rank_whose_session_has_not_begun_dials_again(local: LocalScheduler) -> None:
    """Nothing is lost by then: the scheduler may come and go while ranks wait for each other."""
    device = SimDevice(512, 4, 32, VOCAB, max_batched_tokens=4096, max_horizon=4)
    hello = hello_for(device, max_model_len=512, rank=0, world_size=2, incarnation="a")
    client = HubClient(local.address, hello, "", WorkerMetrics("m", "w0"), structlog.get_logger())
    executor = SimExecutor(device, 0.0005, client.deliver, client.fail)
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(client.run(executor)), daemon=True)
    thread.start()
    await until(lambda: "w0" in local.hub.groups)
    first = local.hub.groups["w0"]
    first.ranks[0].stream.cut(grpc.StatusCode.UNAVAILABLE, "for a test")
    await until(lambda: local.hub.groups.get("w0") not in (None, first))
    assert not codes
    client.stop()
    await asyncio.to_thread(thread.join, 20)
    assert codes == [0]
