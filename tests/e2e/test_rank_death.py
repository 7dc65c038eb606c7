"""A rank that dies takes its group along, and every stream completes with the tokens it would have had.

Two ranks in fp32 under the supervisor of `make cluster`. Rank 0, rank 1 and the process that started them are
killed in turn, at moments spread over a run, one run after another.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from scheduler_svc import record
from tests.support import figures
from tests.support.cluster import assert_idle
from tests.support.data import prompts
from tests.support.reference import GREEDY, SAMPLED
from tests.support.runs import Case, Run, check, run, shorter_than
from tests.support.scale import scaled
from tests.support.supervised import Streams, Supervised, disturb, supervised

NUM_STREAMS, NUM_DEATHS = scaled((8, 3), (50, 20))
pytestmark = pytest.mark.timeout(scaled(300, 3600))
VICTIMS = ("rank 0", "rank 1", "parent")


def cases() -> list[Case]:
    """Greedy and seeded in turn."""
    chosen = prompts(NUM_STREAMS) if scaled(False, True) else shorter_than(300, NUM_STREAMS)
    return [Case(prompt, SAMPLED if i % 2 else GREEDY) for i, prompt in enumerate(chosen)]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Supervised]:
    """One worker of two ranks. Small chunks, so that a kill finds prompts in every state."""
    with supervised(
        tmp_path_factory.mktemp("ranks"),
        scheduler_args=("--max-batched-tokens", "256"),
        worker_args=("--num-blocks", "2048", "--tensor-parallel", "2"),
    ) as cluster:
        yield cluster
    record.replay(cluster.record)


@pytest.fixture(scope="module")
def undisturbed(running: Supervised) -> Run:
    """What comes when nobody dies."""
    return run(running.address, cases())


def processes(running: Supervised) -> dict[str, int]:
    """Process ids by who can be killed. Ranks are started in their order."""
    parent = running.pid("worker-0")
    ranks = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return {"parent": parent, **{f"rank {rank}": int(pid) for rank, pid in enumerate(ranks)}}


def test_every_stream_completes_whichever_rank_dies(running: Supervised, undisturbed: Run) -> None:
    num_tokens = sum(map(len, undisturbed.tokens))
    first = running.epochs()["worker-0"]
    replays = running.num_replayed()
    for death in range(NUM_DEATHS):
        before = processes(running)
        assert set(before) == set(VICTIMS)

        async def kill(
            streams: Streams,
            victim: str = VICTIMS[death % 3],
            before: dict[str, int] = before,
            death: int = death,
        ) -> None:
            await streams.until_tokens(num_tokens * death // NUM_DEATHS)
            epochs = running.epochs()
            os.kill(before[victim], signal.SIGKILL)
            await asyncio.to_thread(running.wait_attached, epochs)
            assert not set(before.values()) & set(processes(running).values()), "all of them are new"

        got = asyncio.run(disturb(running, cases(), kill, salt=f"death {death}"))
        differences = check(cases(), got.tokens, undisturbed.tokens)
        figures.record(
            "rank death",
            death=death,
            victim=VICTIMS[death % 3],
            streams=NUM_STREAMS,
            **differences.figures(),
        )
    assert running.epochs()["worker-0"] == first + NUM_DEATHS
    assert running.num_replayed() - replays >= NUM_DEATHS
    assert_idle(running.address)
