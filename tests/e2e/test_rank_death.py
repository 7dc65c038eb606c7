"""A rank of two that dies while streams run: its group ends, comes back whole, and no token is lost.

fp32, greedy and seeded requests and groups of samples, under the supervisor of `make cluster`. A rank or the
process that started them is killed at a random moment, one run after another. What is
compared is a run that nobody disturbed; differences are excused as in the exactness tests.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from scheduler_svc import record
from tests.support import figures
from tests.support.cluster import assert_idle
from tests.support.cluster_sched import wait_until
from tests.support.reference import GREEDY, SAMPLED
from tests.support.runs import Case, check, run, shorter_than
from tests.support.scale import scaled
from tests.support.supervised import Streams, disturb, supervised

NUM_STREAMS, NUM_DEATHS = scaled(8, 16), scaled(3, 20)
RANKS = 2
GONE_S = 60
pytestmark = pytest.mark.timeout(scaled(400, 7200))


def cases() -> list[Case]:
    """Greedy and seeded in turn, and every fourth a group of three samples."""
    chosen = shorter_than(300, NUM_STREAMS)
    mixed = [Case(prompt, SAMPLED if i % 2 else GREEDY) for i, prompt in enumerate(chosen)]
    return [replace(case, n=3) if i % 4 == 3 else case for i, case in enumerate(mixed)]


def ranks(parent: int) -> list[int]:
    """The processes of a worker's ranks, in their order."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    found = {}
    for child in map(int, children):
        pairs = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        values = dict(pair.partition(b"=")[::2] for pair in pairs)
        found[int(values[b"PAGODA_WORKER_RANK"])] = child
    return [found[rank] for rank in sorted(found)]


def gone(pid: int) -> bool:
    """Whether a process has ended, its corpse aside."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_any_rank_killed_at_any_point(tmp_path: Path) -> None:
    chance = random.Random(20261126)
    with supervised(
        tmp_path,
        scheduler_args=("--max-batched-tokens", "256"),
        worker_args=("--num-blocks", "2048", "--tensor-parallel", str(RANKS)),
    ) as running:
        undisturbed = run(running.address, cases())
        num_tokens = sum(map(len, undisturbed.tokens))
        moments = []

        async def kill(streams: Streams) -> None:
            if (part := chance.random()) < 0.25:
                await streams.until_prefill()
            else:
                await streams.until_tokens(round(part * 0.9 * num_tokens))
            before, parent = running.epochs(), running.pid("worker-0")
            pids = [*ranks(parent), parent]
            assert len(pids) == RANKS + 1
            victim = chance.randrange(RANKS + 1)
            moments.append(("parent" if victim == RANKS else victim, streams.num_tokens))
            os.kill(pids[victim], signal.SIGKILL)
            await asyncio.to_thread(
                wait_until, lambda: all(map(gone, pids)), GONE_S, "nobody outlives another"
            )
            await asyncio.to_thread(running.wait_attached, before)

        singles = [single for case in cases() for single in case.singles()]
        excused = []
        for death in range(NUM_DEATHS):
            got = asyncio.run(disturb(running, cases(), kill, salt=f"death {death}"))
            excused.append(check(singles, got.tokens, undisturbed.tokens).figures())
        assert_idle(running.address)
        assert running.epochs()["worker-0"] == NUM_DEATHS + 1
        assert running.num_replayed() >= NUM_DEATHS
    record.replay(running.record)
    figures.record("rank death", streams=NUM_STREAMS, deaths=NUM_DEATHS, moments=moments, excused=excused)
