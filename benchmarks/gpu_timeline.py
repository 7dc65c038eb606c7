"""Where the device's time went in a run: steps of a scheduler's record, by what they held.

    python -m benchmarks.gpu --scheduler-args '--record FILE' ...        # or: pagoda serve --record FILE
    python -m benchmarks.gpu_timeline FILE [--fewest 50]

Every step's device and idle time stand in the record as the worker measured them. Steps with more tokens than
rows are steps of prompts; the others are decodes, by the power of two that their rows reach. Seconds are of
the record's clock, from its first step on; the runs in a record (the device was idle for 50 ms between them)
are told apart. Idle is how long the device waited for a step after the one before it.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from scheduler_svc.core.events import StepDone
from scheduler_svc.record import Applied, Planned, read_frames

PAUSE_US = 50_000


class Step(NamedTuple):
    """One step: when its result came (seconds), what it held, and microseconds of the device."""

    ended: float
    rows: int
    tokens: int
    iterations: int
    device_us: int
    idle_us: int

    @property
    def kind(self) -> tuple[int, str]:
        """What to count it under, and in which place."""
        if self.tokens > self.rows:
            return 0, "prompts"
        reach = 1 << max(0, self.rows - 1).bit_length()
        return reach, f"decodes, <= {reach} rows"


def steps(path: Path) -> Iterator[Step]:
    """The steps of a record that were answered, in the order of their results."""
    planned: dict[tuple[str, int, int], tuple[int, int, int]] = {}
    for frame in read_frames(path):
        match frame:
            case Planned(worker, _, plan) if plan is not None:
                rows = len(plan.slots)
                counts = (rows, sum(plan.num_tokens) or rows, plan.num_iterations)
                planned[worker, plan.epoch, plan.step_id] = counts
            case Applied(now, events, _):
                for event in events:
                    if isinstance(event, StepDone):
                        counts = planned.pop((event.worker, event.epoch, event.step_id))
                        yield Step(now, *counts, event.device_us, event.idle_us)


def runs(path: Path) -> Iterator[list[Step]]:
    """Steps without a long pause between them."""
    run: list[Step] = []
    for step in steps(path):
        if run and step.idle_us > PAUSE_US:
            yield run
            run = []
        run.append(step)
    if run:
        yield run


def show(run: list[Step], origin: float) -> None:
    """Print a run's steps by kind."""
    wall = run[-1].ended - run[0].ended + run[0].device_us / 1e6
    device, idle = sum(s.device_us for s in run) / 1e6, sum(s.idle_us for s in run[1:]) / 1e6
    print(
        f"from {run[0].ended - origin:.1f} s: {len(run)} steps in {wall:.2f} s, "
        f"device {device:.2f} s, idle {idle:.3f} s, {sum(s.tokens * s.iterations for s in run)} tokens"
    )
    kinds: defaultdict[tuple[int, str], list[Step]] = defaultdict(list)
    for step in run:
        kinds[step.kind].append(step)
    for (_, name), same in sorted(kinds.items()):
        ms = sum(s.device_us for s in same) / 1e3
        iterations = sum(s.iterations for s in same)
        rows = sum(s.rows * s.iterations for s in same) / iterations
        tokens = sum(s.tokens * s.iterations for s in same)
        idle_us = sorted(s.idle_us for s in same if s is not run[0])  # before it, there was nothing to do
        waits = [idle_us[int(share * (len(idle_us) - 1))] for share in (0.5, 0.99)] if idle_us else [0, 0]
        print(
            f"   {name:24} {iterations:6} iterations {ms / 1e3:8.3f} s {ms / iterations:8.3f} ms each, "
            f"{rows:7.1f} rows, {tokens / iterations:8.1f} tokens, {tokens / ms:8.1f} tokens/ms, "
            f"idle p50 {waits[0]} us, p99 {waits[1]} us"
        )


def main() -> None:
    """Read and print."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("record", type=Path)
    p.add_argument("--fewest", type=int, default=50, help="steps of a run worth printing")
    o = p.parse_args()
    origin = None
    for run in runs(o.record):
        origin = run[0].ended if origin is None else origin
        if len(run) >= o.fewest:
            show(run, origin)


if __name__ == "__main__":
    main()
