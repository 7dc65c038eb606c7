"""Two workers of one thread each: both serve, requests that begin alike meet on one, and either may die.

What comes is compared with transformers' references, with the excuse of the exactness tests.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from dataclasses import replace

import pytest

from scheduler_svc import record
from tests.support import figures
from tests.support.cluster import assert_idle
from tests.support.data import Prompt, prompts
from tests.support.reference import GREEDY, SAMPLED
from tests.support.runs import Case, check, read_record, run, shorter_than
from tests.support.scale import scaled
from tests.support.supervised import Streams, Supervised, disturb, supervised

NUM_STREAMS = scaled(8, 50)
NUM_FAMILIES, NUM_MEMBERS = 4, 4
SHARED_TOKENS = 192  # of a family: whole blocks
WORKERS = ("worker-0", "worker-1")
pytestmark = pytest.mark.timeout(scaled(300, 3600))


def cases() -> list[Case]:
    """Greedy and seeded in turn."""
    chosen = prompts(NUM_STREAMS) if scaled(False, True) else shorter_than(300, NUM_STREAMS)
    return [Case(prompt, SAMPLED if i % 2 else GREEDY) for i, prompt in enumerate(chosen)]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Supervised]:
    """Two workers; on a machine of two cores the supervisor's configuration gives each one thread."""
    with supervised(
        tmp_path_factory.mktemp("two"),
        workers=2,
        scheduler_args=("--max-batched-tokens", "256"),
        worker_args=("--threads", "1", "--num-blocks", "1024"),
    ) as cluster:
        yield cluster
    plans = read_record(cluster.record)
    assert set(plans.num_plans) == set(WORKERS)
    record.replay(cluster.record)
    figures.record("WORKERS=2", plans=dict(plans.num_plans), sessions=dict(plans.num_epochs))


def family(number: int) -> list[Case]:
    """Prompts that share their first tokens and nothing after them."""
    # Articles: chats begin with the same system prompt, so that their families would be related.
    texts = [p.ids for p in prompts() if p.kind == "article" and len(p.ids) > 2 * SHARED_TOKENS]
    head, tails = texts[number][:SHARED_TOKENS], texts[NUM_FAMILIES:]
    params = replace(GREEDY, max_tokens=8)
    return [
        Case(Prompt((*head, *tails[i][200 : 220 + i]), "made up", "en", seed=i), params)
        for i in range(NUM_MEMBERS)
    ]


def test_requests_with_a_shared_prefix_meet_on_one_worker(running: Supervised) -> None:
    families = [family(number) for number in range(NUM_FAMILIES)]
    first = run(running.address, [members[0] for members in families])
    assert first.cached_tokens == 0
    cached = [worker.num_cached_blocks for worker in running.snapshot().workers]
    assert all(cached), f"one worker has computed nothing: {cached}"
    # Few at a time: under load it may be cheaper to compute a prefix again than to wait where it is.
    rest = run(running.address, [case for members in families for case in members[1:]], at_once=2)
    for received in rest.received:
        assert received.usage is not None and received.usage.cached_tokens == SHARED_TOKENS
    assert_idle(running.address)
    figures.record("WORKERS=2", met=len(rest.received), cached_blocks=cached)


@pytest.mark.parametrize(
    "killed", [(), ("worker-0",), ("worker-1",), WORKERS], ids=lambda names: " and ".join(names) or "nobody"
)
def test_all_complete_with_equal_tokens_whoever_dies(running: Supervised, killed: tuple[str, ...]) -> None:
    before, replays = running.epochs(), running.num_replayed()

    async def kill(streams: Streams) -> None:
        await streams.until(lambda: all(w.num_slots_used for w in running.snapshot().workers), "both serve")
        await streams.until_tokens(NUM_STREAMS * 8)
        for name in killed:
            running.signal(name, signal.SIGKILL)
        if killed:
            await asyncio.to_thread(running.wait_attached, {name: before[name] for name in killed})

    got = asyncio.run(disturb(running, cases(), kill, salt=f"without {killed}"))
    assert running.epochs() == {name: before[name] + (name in killed) for name in WORKERS}
    replays = running.num_replayed() - replays
    assert bool(replays) == bool(killed)
    differences = check(cases(), got.tokens)
    assert_idle(running.address)
    figures.record(
        "WORKERS=2", killed=killed, streams=NUM_STREAMS, replayed_requests=replays, **differences.figures()
    )
