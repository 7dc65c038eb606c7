"""What one step costs the scheduler: plan + codec + apply, at a steady load of decodes.

Every row decodes; 1/16 of the rows cross into a new block and 1/200 end and are replaced at each step, the
prefix index is on, and one session is attached. Counted are planning, encoding the Step, decoding the
StepResult, applying it (with the arrivals), and encoding the session's OutputColumns. No wire, no device.
Medians of wall time count against the bars. The cost of a row is compared by CPU time, over as many further
steps, because a machine that is busy interrupts long steps more often than short ones. The cases take turns.

    make bench-scheduler                      # or: python -m benchmarks.scheduler --json FILE
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pagoda.internal.v1 import worker_pb2 as wire
from scheduler_svc.codec import decode_result, encode_output, encode_step
from scheduler_svc.core.config import CoreConfig
from scheduler_svc.core.events import Event, Plan, RequestArrived, Sampling, WorkerAttached
from scheduler_svc.core.scheduler import Scheduler

VOCAB = 49152
BLOCK_SIZE = 16
PROMPT_TOKENS = 40
LIFETIME = 200  # output tokens of a request: so many steps, so 1/200 of the rows end at each
WORKER = "w0"
CASES = ((256, 0), (1024, 0), (4096, 0), (256, 100_000))
BARS_MS = {(256, 0): 1.0, (1024, 0): 4.0}
MAX_RATIO = 1.3
STEPS_A_TURN = 50
PARTS = ("plan", "encode_step", "decode_result", "apply", "encode_output")


@dataclass
class Device:
    """Answers plans with as many tokens as they ask for; knows only how many each slot has left."""

    random: random.Random
    left: dict[int, int] = field(default_factory=dict)

    def answer(self, plan: Plan) -> bytes:
        """The result as it would come from the wire. Every chunk of this load is a whole prompt."""
        for row in plan.new_rows:
            self.left[row.slot] = row.last_position - len(row.tokens)
        result = wire.StepResult(epoch=plan.epoch, step_id=plan.step_id, device_us=8000)
        result.tokens.extend(self.random.randrange(VOCAB) for _ in plan.slots)
        for i, slot in enumerate(plan.slots):
            self.left[slot] -= 1
            if not self.left[slot]:
                result.ended_rows.append(i)
                result.ended_reasons.append(wire.ROW_END_LENGTH)
        return wire.AttachRequest(result=result).SerializeToString()


class Load:
    """A core with a full set of rows, kept full."""

    def __init__(self, num_rows: int, num_waiting: int) -> None:
        self.num_rows = num_rows
        self.random = random.Random(num_rows)
        self.core = Scheduler(CoreConfig(max_batched_tokens=1 << 20))
        self.device = Device(self.random)
        self.inflight: deque[tuple[Plan, int]] = deque()
        self.next_key = 0
        self.now = 0.0
        blocks_a_row = (PROMPT_TOKENS + LIFETIME) // BLOCK_SIZE + 2
        attached = WorkerAttached(
            worker=WORKER, epoch=1, num_blocks=2 * num_rows * blocks_a_row, block_size=BLOCK_SIZE,
            max_slots=num_rows, max_model_len=4096, max_batched_tokens=1 << 20, max_horizon=8, max_inflight=2,
        )  # fmt: skip
        # The first rows end one after another, evenly over a lifetime, and so do all that replace them.
        first = [1 + (i * LIFETIME) // num_rows for i in range(num_rows)]
        arrivals: list[Event] = [attached, *(self.arrival(count) for count in first)]
        arrivals += [self.arrival(LIFETIME) for _ in range(num_waiting)]
        self.core.apply(arrivals, self.now)

    def arrival(self, max_tokens: int) -> RequestArrived:
        """A request with a prompt of its own."""
        self.next_key += 1
        prompt = tuple(
            self.random.randrange(VOCAB) for _ in range(PROMPT_TOKENS + self.next_key % BLOCK_SIZE)
        )
        sampling = Sampling(temperature=0.7, top_p=0.9, seed=self.next_key, stop_token_ids=(2,))
        return RequestArrived(
            key=self.next_key, session=1, handle=self.next_key, request_id=f"request-{self.next_key}",
            prompt=prompt, n=1, max_tokens=max_tokens, sampling=sampling,
        )  # fmt: skip

    def step(self, clock: Callable[[], float] = time.perf_counter) -> dict[str, float]:
        """One step at the steady state; seconds of each part."""
        spent = dict.fromkeys(PARTS, 0.0)
        while True:
            start = clock()
            plan = self.core.plan(WORKER, self.now)
            planned = clock()
            spent["plan"] += planned - start
            if plan is None:
                break
            encode_step(plan)
            spent["encode_step"] += clock() - planned
            self.inflight.append((plan, self.core.workers[WORKER].inflight[-1]))
        plan, flight = self.inflight.popleft()
        raw = self.device.answer(plan)
        start = clock()
        message = wire.AttachRequest.FromString(raw)
        done = decode_result(WORKER, message.result, flight, VOCAB)
        decoded = clock()
        arrivals = [self.arrival(LIFETIME) for _ in done.ended_rows]
        self.now += 0.008
        before = clock()
        output = self.core.apply([done, *arrivals], self.now).sessions[1]
        applied = clock()
        encode_output([output], output.ended, [])
        spent["encode_output"] = clock() - applied
        spent["decode_result"], spent["apply"] = decoded - start, applied - before
        return spent


class Case:
    """One load, and what its steps took so far."""

    def __init__(self, num_rows: int, num_waiting: int) -> None:
        self.num_rows, self.num_waiting = num_rows, num_waiting
        self.load = Load(num_rows, num_waiting)
        self.wall: list[dict[str, float]] = []
        self.cpu: list[float] = []
        for _ in range(LIFETIME):  # the first rows all end at once and are not counted
            self.load.step()

    def run(self, steps: int) -> None:
        """Take so many steps on each clock."""
        self.wall += [self.load.step() for _ in range(steps)]
        self.cpu += [sum(self.load.step(time.thread_time).values()) for _ in range(steps)]
        missing = self.num_rows - self.load.core.num_running
        assert missing <= 2 * (self.num_rows // LIFETIME + 1), "the rows were not kept full"

    def figures(self) -> dict[str, Any]:
        """Medians, in milliseconds."""
        totals = np.array([sum(parts.values()) for parts in self.wall]) * 1000
        figures = {
            "rows": self.num_rows,
            "waiting": self.num_waiting,
            "steps": len(self.wall),
            "median_ms": round(float(np.median(totals)), 4),
            "p99_ms": round(float(np.percentile(totals, 99)), 4),
            "cpu_median_ms": round(float(np.median(self.cpu)) * 1000, 4),
            "cpu_us_per_row": round(float(np.median(self.cpu)) * 1e6 / self.num_rows, 4),
        }
        for part in PARTS:
            figures[f"{part}_ms"] = round(float(np.median([parts[part] for parts in self.wall])) * 1000, 4)
        return figures


def measure(steps: int) -> list[dict[str, Any]]:
    """The figures of all cases, in turns of a few steps each."""
    cases = []
    for num_rows, num_waiting in CASES:
        print(f"preparing {num_rows} rows, {num_waiting} waiting", file=sys.stderr, flush=True)
        cases.append(Case(num_rows, num_waiting))
    gc.collect()
    gc.freeze()
    for _ in range(0, steps, STEPS_A_TURN):
        for case in cases:
            case.run(STEPS_A_TURN)
    gc.unfreeze()
    for case in cases:
        case.load.core.check_integrity()
    figures = [case.figures() for case in cases]
    for figure in figures:
        figure["ratio_to_256"] = round(figure["cpu_us_per_row"] / figures[0]["cpu_us_per_row"], 3)
    return figures


def verdict(figures: list[dict[str, Any]]) -> list[str]:
    """What misses its bar."""
    missed = []
    for figure in figures:
        name = f"{figure['rows']} rows, {figure['waiting']} waiting"
        bar = BARS_MS.get((figure["rows"], figure["waiting"]))
        if bar is not None and figure["median_ms"] > bar:
            missed.append(f"{name}: {figure['median_ms']} ms a step; the bar is {bar} ms")
        if bar is None and figure["ratio_to_256"] > MAX_RATIO:
            ratio = figure["ratio_to_256"]
            missed.append(f"{name}: {ratio}x the cost of a row at 256; the bar is {MAX_RATIO}x")
    return missed


def main() -> None:
    """Print the table; exit 1 when a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    given = parser.parse_args()
    figures = measure(given.steps)
    head = f"{'rows':>5} {'waiting':>8} {'median ms':>10} {'p99 ms':>7} {'cpu ms':>7} {'cpu us/row':>11}"
    print(f"{head} {'ratio':>6}  {', '.join(PARTS)}")
    for f in figures:
        print(
            f"{f['rows']:>5} {f['waiting']:>8} {f['median_ms']:>10.3f} {f['p99_ms']:>7.3f} "
            f"{f['cpu_median_ms']:>7.3f} {f['cpu_us_per_row']:>11.3f} {f['ratio_to_256']:>6.2f}  "
            + "  ".join(f"{f[f'{part}_ms']:.3f}" for part in PARTS)
        )
    if given.json:
        given.json.write_text(json.dumps({"cases": figures}, indent=2))
    missed = verdict(figures)
    print("\n".join(missed) or "all bars met")
    sys.exit(bool(missed))


if __name__ == "__main__":
    main()
