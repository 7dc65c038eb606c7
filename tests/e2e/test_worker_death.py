"""A worker that dies or hangs while streams run: every stream completes with the tokens it would have had.

fp32, greedy and seeded requests and groups of samples, under the supervisor of `make cluster`. What is
compared is a run that nobody disturbed; differences are excused as in the exactness tests.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, replace

import pytest

from scheduler_svc import record
from tests.support import figures
from tests.support.cluster import assert_idle
from tests.support.cluster_sched import wait_until
from tests.support.data import prompts
from tests.support.reference import GREEDY, SAMPLED
from tests.support.runs import Case, Run, check, run, shorter_than
from tests.support.scale import scaled
from tests.support.supervised import Streams, Supervised, disturb, supervised

NUM_STREAMS = scaled(12, 50)
pytestmark = pytest.mark.timeout(scaled(300, 3600))


def cases() -> list[Case]:
    """Greedy and seeded in turn, and every sixth a group of three samples."""
    chosen = prompts(NUM_STREAMS) if scaled(False, True) else shorter_than(300, NUM_STREAMS)
    mixed = [Case(prompt, SAMPLED if i % 2 else GREEDY) for i, prompt in enumerate(chosen)]
    return [replace(case, n=3) if i % 6 == 5 else case for i, case in enumerate(mixed)]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Supervised]:
    """One worker. Small chunks, so that a kill finds prompts in every state."""
    run_dir = tmp_path_factory.mktemp("death")
    with supervised(
        run_dir,
        scheduler_args=("--max-batched-tokens", "256"),
        worker_args=("--num-blocks", "2048"),
    ) as cluster:
        yield cluster
    record.replay(cluster.record)


@pytest.fixture(scope="module")
def undisturbed(running: Supervised) -> Run:
    """What comes when nobody dies."""
    return run(running.address, cases())


@dataclass
class Killer:
    """Kills the only worker at moments of a run."""

    streams: Streams
    num_tokens: int
    """Of the whole run."""

    async def kill(self) -> None:
        """kill -9, and wait until the supervisor has brought the worker back."""
        cluster = self.streams.cluster
        epochs = cluster.epochs()
        killed = cluster.signal("worker-0", signal.SIGKILL)
        await asyncio.to_thread(cluster.wait_attached, epochs)
        assert cluster.pid("worker-0") != killed

    async def in_prefill(self) -> None:
        """The first prompts are being computed."""
        await self.streams.until_prefill()
        await self.kill()

    async def at_first_tokens(self) -> None:
        """Some streams have begun, others wait for their prompts."""
        await self.streams.until_tokens(1)
        await self.kill()

    async def halfway(self) -> None:
        """All streams have begun."""
        await self.streams.until_tokens(self.num_tokens // 2)
        await self.kill()

    async def again_and_again(self) -> None:
        """While prompts are computed, while what they had is computed again, and near the end."""
        await self.at_first_tokens()
        await self.streams.until_prefill()
        await self.kill()
        await self.streams.until_tokens(self.num_tokens * 9 // 10)
        await self.kill()


@pytest.mark.parametrize(
    ("moment", "num_kills"),
    [
        (Killer.in_prefill, 1),
        (Killer.at_first_tokens, 1),
        (Killer.halfway, 1),
        (Killer.again_and_again, 3),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_every_stream_completes_with_equal_tokens(
    running: Supervised,
    undisturbed: Run,
    moment: Callable[[Killer], Awaitable[None]],
    num_kills: int,
) -> None:
    num_tokens = sum(map(len, undisturbed.tokens))
    before = running.epochs()["worker-0"]
    replays = running.num_replayed()
    got = asyncio.run(
        disturb(running, cases(), lambda streams: moment(Killer(streams, num_tokens)), salt=moment.__name__)
    )
    assert running.epochs()["worker-0"] == before + num_kills
    replays = running.num_replayed() - replays
    assert replays
    singles = [single for case in cases() for single in case.singles()]
    differences = check(singles, got.tokens, undisturbed.tokens)
    assert_idle(running.address)
    figures.record(
        "worker death",
        moment=moment.__name__,
        streams=NUM_STREAMS,
        kills=num_kills,
        replayed_requests=replays,
        **differences.figures(),
    )


def test_a_worker_that_hangs_is_given_up_and_finds_its_stream_gone(
    running: Supervised, undisturbed: Run
) -> None:
    """A stopped process breaks no connection: only its silence tells. When it goes on, it attaches anew."""
    pid = running.pid("worker-0")
    epoch = running.epochs()["worker-0"]

    async def hang(streams: Streams) -> None:
        await streams.until_tokens(sum(map(len, undisturbed.tokens)) // 4)
        running.signal("worker-0", signal.SIGSTOP)
        try:
            await asyncio.to_thread(wait_until, lambda: not running.epochs(), 60, "the silent worker is lost")
            assert not streams.client.accepted[-1].num_workers
        finally:
            running.signal("worker-0", signal.SIGCONT)
        await asyncio.to_thread(running.wait_attached)

    got = asyncio.run(disturb(running, cases(), hang, salt="hang"))
    assert running.pid("worker-0") == pid and running.epochs()["worker-0"] == epoch + 1
    singles = [single for case in cases() for single in case.singles()]
    differences = check(singles, got.tokens, undisturbed.tokens)
    assert_idle(running.address)
    figures.record("worker death", moment="SIGSTOP", streams=NUM_STREAMS, **differences.figures())
