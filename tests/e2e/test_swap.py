"""Requests that lose their blocks, and keep their KV in host memory or compute it again: no token differs.

fp32, greedy and seeded requests and groups of samples, in a cache that holds a fraction of what they need.
What is compared is a run with room for all; differences are excused as in the exactness tests.
"""

from __future__ import annotations

import asyncio
import signal
from collections import Counter
from functools import partial
from pathlib import Path

import pytest

from pagoda.v1 import scheduler_pb2 as pb
from scheduler_svc import record
from tests.support import figures
from tests.support.cluster import cluster
from tests.support.data import model_folder
from tests.support.metrics import scrape, total
from tests.support.reference import GREEDY, SAMPLED
from tests.support.runs import Case, Run, check, run, shorter_than
from tests.support.scale import scaled
from tests.support.supervised import Streams, disturb, supervised

pytestmark = pytest.mark.timeout(scaled(300, 3600))

NUM_CASES = scaled(10, 40)
LONGEST = scaled(100, 300)
TIGHT = ("--num-blocks", scaled("30", "96"))


def cases() -> list[Case]:
    """Greedy ones in turn with groups of three seeded samples."""
    chosen = shorter_than(LONGEST, NUM_CASES)
    return [Case(prompt, SAMPLED, n=3) if i % 2 else Case(prompt, GREEDY) for i, prompt in enumerate(chosen)]


def singles() -> list[Case]:
    return [single for case in cases() for single in case.singles()]


@pytest.fixture(scope="module")
def undisturbed() -> Run:
    """What comes when there is room."""
    with cluster(model=str(model_folder()), worker_args=("--num-blocks", "2048")) as running:
        return run(running.scheduler.address, cases())


def num_shared(recorded: Path) -> int:
    """Blocks that came back for several rows at once."""
    plans = [f.plan for f in record.read_frames(recorded) if isinstance(f, record.Planned) and f.plan]
    tables = (Counter(b for row in plan.new_rows for b in row.blocks) for plan in plans)
    came = (set(plan.swap_in_device_blocks) for plan in plans)
    return sum(table[b] > 1 for table, back in zip(tables, came, strict=True) for b in back)


@pytest.mark.parametrize("mode", ["swap", "recompute", "auto"])
def test_no_mode_changes_a_token(mode: str, undisturbed: Run, tmp_path: Path) -> None:
    recorded = tmp_path / "record"
    with cluster(
        model=str(model_folder()),
        scheduler_args=("--record", str(recorded), "--preemption-mode", mode),
        worker_args=TIGHT,
    ) as running:
        got = run(running.scheduler.address, cases())
        now = running.snapshot()
        measured = partial(total, scrape(f"http://{running.scheduler.metrics_address}/metrics"))
        swaps = measured("pagoda:preemptions_total", mode="swap")
        recomputed = measured("pagoda:preemptions_total", mode="recompute")
        size = measured("pagoda:swapped_bytes_total", direction="out")
        times = {name: measured(f"pagoda:{name}_seconds_total") for name in ("swap", "recompute")}
        out, back = (measured("pagoda:swapped_blocks_total", direction=d) for d in ("out", "in"))
    assert now.num_preemptions == swaps + recomputed > 3
    if mode == "recompute":
        assert not (swaps or now.swapped_tokens or size or out or times["swap"])
        assert now.recomputed_tokens and times["recompute"]
    else:  # a CPU copies a block much faster than it computes one
        assert swaps > 3 and now.swapped_tokens and times["swap"]
        assert out >= back > 0 and size == out * 2 * 30 * 16 * 3 * 64 * 4
        assert num_shared(recorded), "samples of a group came back on blocks that they share"
    record.replay(recorded)
    differences = check(singles(), got.tokens, undisturbed.tokens)
    figures.record(
        "swap",
        mode=mode,
        requests=NUM_CASES,
        preemptions=now.num_preemptions,
        swaps=swaps,
        swapped_tokens=now.swapped_tokens,
        recomputed_tokens=now.recomputed_tokens,
        seconds=times,
        **differences.figures(),
    )


def test_a_worker_that_dies_takes_its_host_blocks_with_it(undisturbed: Run, tmp_path: Path) -> None:
    """kill -9 while requests are swapped out: they are replayed from their tokens."""
    with supervised(tmp_path, scheduler_args=("--preemption-mode", "swap"), worker_args=TIGHT) as running:

        async def kill(streams: Streams) -> None:
            await streams.until(lambda: streams.num_in(pb.REQUEST_STATE_SWAPPED) > 1, "two are swapped out")
            worker = running.snapshot().workers[0]
            assert 0 < worker.num_host_blocks_used < worker.num_host_blocks
            epochs = running.epochs()
            running.signal("worker-0", signal.SIGKILL)
            await asyncio.to_thread(running.wait_attached, epochs)

        got = asyncio.run(disturb(running, cases(), kill, salt="kill"))
        assert running.num_replayed()
    record.replay(running.record)
    differences = check(singles(), got.tokens, undisturbed.tokens)
    figures.record("swap", mode="killed while swapped out", requests=NUM_CASES, **differences.figures())
