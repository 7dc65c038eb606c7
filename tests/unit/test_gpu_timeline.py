"""Steps of a scheduler's record, counted by what they held."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import gpu_timeline
from scheduler_svc.core.config import CoreConfig
from scheduler_svc.core.events import Event, RequestArrived, Sampling, StepDone, WorkerAttached
from scheduler_svc.core.scheduler import Scheduler
from scheduler_svc.record import Recorder


class Recorded:
    """A core with one worker, whose record a run of steps goes into."""

    def __init__(self, path: Path) -> None:
        config = CoreConfig(max_inflight=1, prefix_cache=False)
        self.core, self.recorder, self.now = Scheduler(config), Recorder(path, config), 0.0
        self.apply(WorkerAttached("w", 1, 900, 16, 64, 900, 1000, 4, 4))

    def apply(self, event: Event) -> None:
        self.recorder.applied(self.now, [event], self.core.apply([event], self.now))

    def arrive(self, key: int, prompt: int, max_tokens: int) -> None:
        self.apply(RequestArrived(key, 1, key, str(key), (1,) * prompt, 1, max_tokens, Sampling()))

    def step(self, device_us: int, idle_us: int) -> None:
        plan = self.core.plan("w", self.now)
        self.recorder.planned("w", self.now, plan)
        assert plan is not None
        self.now += (device_us + idle_us) / 1e6
        rows = len(self.core.workers["w"].inflight[0].sampling)
        counts = [plan.num_iterations] * rows
        tokens = [1] * sum(counts)
        self.apply(StepDone("w", 1, plan.step_id, tokens, counts, [], [], (), device_us, idle_us))


def test_runs_and_kinds_of_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Recorded(tmp_path / "run.rec")
    for key in range(3):
        run.arrive(key, prompt=100, max_tokens=50)
    run.step(7_000, 0)  # 300 tokens of prompts
    run.step(1_000, 10)
    run.step(4_000, 10)  # as many iterations as the horizon allows
    run.step(3_000, 90_000)  # the device had nothing to do before it
    run.recorder.close()
    first, second = gpu_timeline.runs(tmp_path / "run.rec")
    assert [(s.rows, s.tokens, s.iterations, s.kind) for s in first] == [
        (3, 300, 1, (0, "prompts")),
        (3, 3, 1, (4, "decodes, <= 4 rows")),
        (3, 3, 4, (4, "decodes, <= 4 rows")),
    ]
    assert [(s.device_us, s.idle_us) for s in second] == [(3_000, 90_000)]
    gpu_timeline.show(first, first[0].ended)
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith("from 0.0 s: 3 steps") and shown[0].endswith("315 tokens")
    assert shown[1].split()[0] == "prompts" and shown[2].split()[:5] == ["decodes,", "<=", "4", "rows", "5"]
    assert shown[1].endswith("idle p50 0 us, p99 0 us"), "before the first step there was nothing to do"
    assert shown[2].endswith("idle p50 10 us, p99 10 us")
