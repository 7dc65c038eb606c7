"""A recorded run of the real services replays to identical plans; a changed policy and damage are caught.

The run has everything that makes plans differ: cancels, preemptions, samples, priorities and horizons, with
the real worker in bf16. `tests/unit/scheduler/test_record.py` does the same in one process, with a death.
"""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pagoda.v1 import scheduler_pb2 as pb
from scheduler_svc import record
from scheduler_svc.core import planner, preempt, room
from scheduler_svc.core.group import Group
from scheduler_svc.core.worker import Worker
from tests.support import figures
from tests.support.cluster import cluster
from tests.support.data import model_folder, prompts
from tests.support.runs import read_record
from tests.support.scale import scaled
from tests.support.session_client import SessionClient, request

NUM_REQUESTS = scaled(60, 500)
AT_ONCE = 32
pytestmark = pytest.mark.timeout(scaled(300, 1800))


def requests() -> list[pb.GenerateTokensRequest]:
    """Short pieces of real prompts, some of which begin alike."""
    choose = random.Random(11)
    texts = [prompt.ids for prompt in prompts() if len(prompt.ids) > 100]
    return [
        request(
            choose.choice(texts)[: choose.randrange(4, 100)],
            max_tokens=choose.randrange(1, 41),
            temperature=choose.choice((0.0, 0.8)),
            seed=i,
            n=choose.choice((1, 1, 1, 2)),
        )
        for i in range(NUM_REQUESTS)
    ]


async def load(address: str) -> int:
    """Run all requests, so many at a time, cancelling every sixth; how many were cancelled."""
    gate = asyncio.Semaphore(AT_ONCE)

    async def one(client: SessionClient, number: int, item: pb.GenerateTokensRequest) -> bool:
        async with gate:
            item.priority = number % 3
            (handle,) = await client.submit(item)
            if number % 6:
                await client.results([handle])
                return False
            if number % 12:  # it runs; the others still wait, or are in prefill
                await asyncio.wait_for(client.received[handle].began.wait(), 120)
            await client.stop(handle)
            return True

    async with SessionClient(address) as client:
        return sum(await asyncio.gather(*(one(client, i, item) for i, item in enumerate(requests()))))


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The record of the run."""
    path = tmp_path_factory.mktemp("replay") / "run.rec"
    with cluster(
        model=str(model_folder()),
        dtype="bfloat16",
        scheduler_args=("--record", str(path), "--horizon-ms", "1000", "--max-batched-tokens", "256"),
        worker_args=("--num-blocks", "18", "--max-horizon", "4"),
    ) as running:
        cancelled = asyncio.run(load(running.scheduler.address))
        num_preemptions = running.snapshot().num_preemptions
    plans = read_record(path)
    assert cancelled >= NUM_REQUESTS // 7 and num_preemptions > scaled(0, 20), (cancelled, num_preemptions)
    assert max(plans.horizons) == 4, plans.horizons
    figures.record(
        "replay",
        requests=NUM_REQUESTS,
        cancelled=cancelled,
        preemptions=num_preemptions,
        plans=plans.num_plans.total(),
        bytes=path.stat().st_size,
    )
    return path


def replay_command(path: Path, patch: str = "") -> subprocess.CompletedProcess[str]:
    """`pagoda replay PATH`, by a scheduler in which `patch` has been run before."""
    code = f"{patch}\nfrom pagoda.cli.main import main\nmain()"
    command = [sys.executable, "-c", code, "replay", str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


def test_the_run_replays_to_identical_plans(recorded: Path) -> None:
    report = record.replay(recorded)
    assert report.num_requests == NUM_REQUESTS and not report.truncated
    assert report.num_plans == read_record(recorded).num_plans.total()


def test_the_command_says_so(recorded: Path) -> None:
    done = replay_command(recorded)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("identical: ") and f" {NUM_REQUESTS} requests" in done.stdout


# ------------------------------------------------------------------------------------ changed policies


def most_lost_work(worker: Worker) -> Iterator[Group]:
    """The opposite of `victims`, but for the group that is never one."""
    protected = min(worker.running.values(), key=lambda group: group.rank)
    others = [group for group in worker.running.values() if group is not protected]
    yield from sorted(others, key=lambda group: (-group.priority, -preempt.lost_work(worker, group)))


def no_horizon(step: Any, _: int) -> None:
    """One iteration a step."""
    step.worker.horizon = 1


def cautious(honest: Callable[[Any, Any], str]) -> Callable[[Any, Any], str]:
    """Admit nobody while four groups run."""
    return lambda step, group: "it is too full" if len(step.worker.running) > 3 else honest(step, group)


@pytest.mark.parametrize(
    ("target", "name", "change", "field"),
    [
        (room, "victims", lambda _: most_lost_work, "released_slots"),
        (planner._Step, "look_ahead", lambda _: no_horizon, "num_iterations"),
        (planner._Step, "_why_not", cautious, "new_rows"),
    ],
    ids=["victim", "horizon", "admission"],
)
def test_a_changed_policy_is_caught_and_the_field_named(
    recorded: Path,
    monkeypatch: pytest.MonkeyPatch,
    target: Any,
    name: str,
    change: Callable[[Any], Any],
    field: str,
) -> None:
    monkeypatch.setattr(target, name, change(getattr(target, name)))
    with pytest.raises(record.Divergence, match=r"plan \d+ of worker 'w0' differs") as caught:
        record.replay(recorded)
    assert any(line.startswith(f"  {field}: recorded") for line in caught.value.differences), caught.value


def test_the_command_fails_on_a_changed_policy(recorded: Path) -> None:
    patch = "from scheduler_svc.core import planner\nplanner._Step.look_ahead = lambda step, _: None"
    done = replay_command(recorded, patch)
    assert done.returncode == 1 and not done.stdout
    assert "of worker 'w0' differs" in done.stderr and "num_iterations: recorded" in done.stderr
    assert "Traceback" not in done.stderr


# ------------------------------------------------------------------------------------- damaged records


def frames(path: Path) -> Iterator[tuple[int, int]]:
    """Where each frame of a record begins and ends."""
    content, start = path.read_bytes(), 0
    while start < len(content):
        length, _ = record.FRAME_HEAD.unpack_from(content, start)
        end = start + record.FRAME_HEAD.size + length
        yield start, end
        start = end


def test_a_plan_that_was_tampered_with_is_named(recorded: Path, tmp_path: Path) -> None:
    content = recorded.read_bytes()
    places = list(frames(recorded))
    decoded = list(record.read_frames(recorded))
    number = next(
        i
        for i, frame in enumerate(decoded)
        if isinstance(frame, record.Planned) and frame.plan and i > len(decoded) // 2
    )
    frame = decoded[number]
    assert isinstance(frame, record.Planned) and frame.plan is not None
    frame.plan.slots[-1] += 1
    body = msgspec.msgpack.encode(frame)
    start, end = places[number]
    changed = tmp_path / "changed.rec"
    head = record.FRAME_HEAD.pack(len(body), zlib.crc32(body))
    changed.write_bytes(content[:start] + head + body + content[end:])
    with pytest.raises(record.Divergence, match=f"frame {number}: plan {frame.plan.step_id}") as caught:
        record.replay(changed)
    assert {line.split(":")[0] for line in caught.value.differences} == {"  slots"}


def test_a_record_cut_off_anywhere_says_so(recorded: Path, tmp_path: Path) -> None:
    content, cut = recorded.read_bytes(), tmp_path / "cut.rec"
    places = list(frames(recorded))
    start, end = places[len(places) // 2]
    for length in (start + 1, start + record.FRAME_HEAD.size, end - 1):
        cut.write_bytes(content[:length])
        report = record.replay(cut)
        assert report.truncated and report.num_requests <= NUM_REQUESTS
    done = replay_command(cut)
    assert done.returncode == 0 and "cut off" in done.stdout


def test_no_damage_passes_for_a_record(recorded: Path, tmp_path: Path) -> None:
    """Any byte: the frame is named, or its length reaches beyond the end, which looks like a cut."""
    content, damaged = recorded.read_bytes(), tmp_path / "damaged.rec"
    choose = random.Random(3)
    for _ in range(scaled(50, 200)):
        place = choose.randrange(len(content))
        byte = content[place] ^ 1 << choose.randrange(8)
        damaged.write_bytes(content[:place] + bytes([byte]) + content[place + 1 :])
        try:
            found = list(record.read_frames(damaged))
        except record.BadRecord as error:
            assert str(damaged) in str(error) and "frame" in str(error)
        else:
            assert found[-1] is None
    start, _ = list(frames(recorded))[5]
    place = start + record.FRAME_HEAD.size
    damaged.write_bytes(content[:place] + bytes([content[place] ^ 255]) + content[place + 1 :])
    done = replay_command(damaged)
    assert done.returncode == 1
    assert done.stderr.strip() == f"error: {damaged}: frame 5 is damaged: its checksum is wrong"
