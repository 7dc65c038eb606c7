"""What the output thread does with a step: waits for it, reads what was drawn, uses its events again."""

from __future__ import annotations

import pytest
import torch

from gpu_worker import output
from gpu_worker.output import EventPool, collect, wait
from gpu_worker.runner import StepOutputs
from kernels.rows import GOES_ON, NAN, WAS_DONE
from kernels.sample import LENGTH, STOP


class Clock:
    """Time that passes in sleeps alone, and an event that comes at its end."""

    def __init__(self, device_s: float) -> None:
        self.now, self.ends, self.sleeps = 100.0, 100.0 + device_s, 0

    def sleep(self, seconds: float) -> None:
        self.now, self.sleeps = self.now + seconds, self.sleeps + 1

    def perf_counter(self) -> float:
        return self.now

    def query(self) -> bool:
        return self.now >= self.ends


@pytest.mark.parametrize(
    ("device_s", "late_s", "sleeps"),
    [(0.0, 0.0, 0), (0.001, 60e-6, 21), (0.011, 60e-6, 225), (0.15, 0.6e-3, 1000), (5.0, 0.02, 2000)],
)
def test_a_step_is_seen_soon_and_looked_for_seldom(monkeypatch, device_s, late_s, sleeps):
    clock = Clock(device_s)
    monkeypatch.setattr(output, "time", clock)
    wait(clock)
    assert clock.now - clock.ends <= late_s
    assert clock.sleeps <= sleeps


def test_a_device_that_fails_is_no_endless_wait():
    class Failed:
        def query(self) -> bool:
            raise RuntimeError("an illegal memory access")

    with pytest.raises(RuntimeError, match="illegal"):
        wait(Failed())


def test_events_are_made_once_and_never_shared(monkeypatch):
    made = []
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: made.append(enable_timing) or object())
    pool = EventPool()
    first, second = pool.take(), pool.take()
    assert len({*first, *second}) == 4
    pool.give_back(first)
    assert pool.take() is first
    assert not set(pool.take()) & {*first, *second}
    assert made == [True] * 6


@pytest.mark.parametrize(
    ("outcomes", "tokens", "counts", "ended"),
    [
        ([[GOES_ON, GOES_ON]], [1, 2], [], []),
        ([[LENGTH]], [1], [], [(0, LENGTH)]),
        ([[GOES_ON, STOP], [LENGTH, WAS_DONE]], [1, 3, 2], [2, 1], [(0, LENGTH), (1, STOP)]),
        ([[NAN, WAS_DONE, GOES_ON]], [3], [0, 0, 1], [(0, NAN)]),
    ],
)  # fmt: skip
def test_collect(outcomes, tokens, counts, ended):
    """Row by row, and without counts where every row took a token in every iteration."""
    reasons = torch.tensor(outcomes, dtype=torch.int32)
    drawn = torch.stack(
        (torch.arange(1, reasons.numel() + 1, dtype=torch.int32).view_as(reasons), reasons), 1
    )
    result = collect(3, 7, StepOutputs([-1] * reasons.shape[1], drawn))
    assert (result.epoch, result.step_id) == (3, 7)
    assert list(result.tokens) == tokens
    assert list(result.num_sampled) == counts
    assert list(zip(result.ended_rows, result.ended_reasons, strict=True)) == ended
