"""A recorded run replays to identical plans, and what differs is caught and named."""

from __future__ import annotations

import asyncio
import random
import stat
import zlib
from pathlib import Path
from typing import Any

import msgspec
import pytest

from scheduler_svc import record
from scheduler_svc.core import planner
from scheduler_svc.core.config import CoreConfig
from scheduler_svc.core.events import Outputs, Plan, SessionOutput, WorkerAttached
from scheduler_svc.record import Applied, BadRecord, Divergence, Planned, Recorder, read_frames, replay
from tests.support.session_client import request
from tests.unit.scheduler.conftest import local_scheduler

NUM_REQUESTS = 500


async def run_recorded(path: Path, num_requests: int) -> None:
    """A busy run over the wire: shared prompts, samples, cancels, a cache that is too small, a death."""
    choose = random.Random(5)
    async with local_scheduler(CoreConfig(max_batched_tokens=64), record=path) as local:
        worker = await local.attach(blocks=80, slots=16, iteration_ms=0.1)
        async with local.session() as client:
            running = []
            for i in range(num_requests):
                prompt = [1 + i % 3] * choose.randrange(1, 30) + [choose.randrange(999)]
                n = choose.choice((1, 1, 1, 2))
                asks = {"prompt_logprobs": 2} if i % 4 == 0 else {}
                made = request(prompt, max_tokens=1 + i % 40, seed=i, n=n, **asks)
                (handle,) = await client.submit(made)
                if choose.random() < 0.1:
                    await client.stop(handle, choose.choice((None, 0)))
                else:
                    running.append(handle)
                if i % 10 == 0:
                    await asyncio.sleep(0.005)
                if i == num_requests // 2:
                    await worker.stop()
                    await local.attach(blocks=80, slots=16, iteration_ms=0.1)
            await client.results(running)
        stats = local.engine.core.stats
        assert stats.num_preemptions > 5 and stats.finished["cancelled"] > 5 and stats.replayed_requests
        local.check_idle()


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The record of a run of 500 requests."""
    path = tmp_path_factory.mktemp("record") / "run.rec"
    asyncio.run(run_recorded(path, NUM_REQUESTS))
    return path


def test_a_recorded_run_replays_to_identical_plans(recorded: Path) -> None:
    report = replay(recorded)
    assert report.num_requests == NUM_REQUESTS
    assert report.num_plans > 200 and report.num_events > report.num_plans
    assert not report.truncated


def test_a_changed_policy_is_caught_and_the_difference_named(
    recorded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = planner.make_plan

    def slower(worker: Any, *rest: Any) -> Plan | None:
        worker.budget = 32
        return honest(worker, *rest)

    monkeypatch.setattr("scheduler_svc.core.scheduler.make_plan", slower)
    with pytest.raises(Divergence) as caught:
        replay(recorded)
    assert "of worker 'w0' differs" in str(caught.value)
    assert any("num_tokens" in line for line in caught.value.differences)


def test_a_plan_too_few_is_caught(recorded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scheduler_svc.core.scheduler.make_plan", lambda *_: None)
    with pytest.raises(Divergence, match="the core plans none"):
        replay(recorded)


def test_changed_outputs_are_caught(recorded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = record.Scheduler.apply

    def chatty(self: Any, *inputs: Any) -> Outputs:
        outputs = honest(self, *inputs)
        outputs.sessions[99] = SessionOutput(handles=[1], tokens=[1])
        return outputs

    monkeypatch.setattr(record.Scheduler, "apply", chatty)
    with pytest.raises(Divergence, match="the outputs of apply"):
        replay(recorded)


def test_a_record_that_was_cut_off_replays_up_to_there(recorded: Path, tmp_path: Path) -> None:
    whole = recorded.read_bytes()
    for length in (len(whole) // 2, len(whole) - 1):
        cut = tmp_path / "cut.rec"
        cut.write_bytes(whole[:length])
        assert replay(cut).num_requests <= NUM_REQUESTS
    assert replay(cut).truncated


def test_only_its_owner_may_read_a_record(tmp_path: Path) -> None:
    path = tmp_path / "run.rec"
    path.write_text("something old")
    path.chmod(0o644)
    Recorder(path, CoreConfig()).close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert replay(path).num_events == 0


def test_a_record_that_is_being_written_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "run.rec"
    recorder = Recorder(path, CoreConfig())
    with pytest.raises(OSError, match="--record"):
        Recorder(path, CoreConfig())
    assert len(list(read_frames(path))) == 1
    recorder.close()


def test_frames_are_written_when_flushed(tmp_path: Path) -> None:
    path = tmp_path / "run.rec"
    recorder = Recorder(path, CoreConfig(max_inflight=3))
    event = WorkerAttached("w0", 1, 10, 4, 2, 100, 50, 4, 3)
    recorder.applied(1.5, [event], Outputs({}))
    recorder.planned("w0", 1.5, None)
    assert len(list(read_frames(path))) == 1
    recorder.flush()
    header, applied, planned = list(read_frames(path))
    assert header == record.Header(record.FORMAT_VERSION, CoreConfig(max_inflight=3))
    assert applied == Applied(1.5, [event], record.digest(Outputs({})))
    assert planned == Planned("w0", 1.5, None)
    recorder.close()


@pytest.mark.parametrize("content", [b"", b"not a record at all", b"\x05\x00\x00\x00hello"])
def test_another_file_is_no_record(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "other"
    path.write_bytes(content)
    with pytest.raises(BadRecord):
        replay(path)


def test_a_record_of_another_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.rec"
    body = msgspec.msgpack.encode(record.Header(99, CoreConfig()))
    path.write_bytes(record.FRAME_HEAD.pack(len(body), zlib.crc32(body)) + body)
    with pytest.raises(BadRecord, match="version"):
        replay(path)
