"""The real scheduler core on a simulated device: what it holds at every step of a load.

`scheduler_svc.core.Scheduler` gets the events that a worker and its callers would send and plans as it does
in service; only the tokens are made up. There is no clock: a step is a step. No part of memory is modelled
here; the figures are the core's own account (`Worker.memory`), which tests compare with a recount.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from benchmarks.paper_lengths import Trace
from scheduler_svc.core.config import CoreConfig
from scheduler_svc.core.events import Plan, RequestArrived, RowEnd, Sampling, StepDone, WorkerAttached
from scheduler_svc.core.scheduler import Scheduler
from scheduler_svc.core.worker import Worker

VOCAB = 49152
WORKER = "simulated"
CONTEXT = 2048
QUEUED = 64  # requests that wait, while there are more: the queue is never empty and never long


@dataclass(slots=True)
class Row:
    """A device row, as far as counts go."""

    known: int
    computed: int
    last_position: int


@dataclass
class Device:
    """Answers plans with as many tokens as they ask for; a row ends where its request's length is reached."""

    random: random.Random
    rows: dict[int, Row] = field(default_factory=dict)

    def run(self, plan: Plan) -> StepDone:
        """The result of one step."""
        forked = set()
        for new in plan.new_rows:
            known = len(new.tokens) or new.num_prompt_tokens
            computed = new.num_computed if new.parent_slot is None else known
            self.rows[new.slot] = Row(known, computed, new.last_position)
            if new.parent_slot is not None:
                forked.add(new.slot)
        sampled: list[int] = []
        ended: list[int] = []
        for slot, count in zip(plan.slots, plan.num_tokens or [1] * len(plan.slots), strict=True):
            row = self.rows[slot]
            if slot not in forked and row.computed + count < row.known:
                row.computed += count
                continue  # a prompt that is not complete draws nothing
            new = min(plan.num_iterations, row.last_position - row.known)
            row.known += new
            row.computed = row.known - 1
            sampled.append(new)
            if row.known >= row.last_position:
                ended.append(len(sampled) - 1)
        return StepDone(
            worker=plan.worker, epoch=plan.epoch, step_id=plan.step_id,
            tokens=[self.random.randrange(VOCAB) for _ in range(sum(sampled))], num_sampled=sampled,
            ended_rows=ended, ended_reasons=[int(RowEnd.LENGTH)] * len(ended), device_us=1000,
        )  # fmt: skip


class Seen(NamedTuple):
    """One moment: all steps that may be in flight are, which is when most is held ahead.

    Blocks, but for `running` (requests), and slots of tokens: `unused` of held blocks, and those of them that
    steps in flight are to fill (`ahead`; the most of one row is `most_ahead`).
    """

    running: int
    waiting: int
    references: int
    held: int
    shared: int
    lookahead: int
    unused: int
    ahead: int
    most_ahead: int


class Simulation:
    """A core with one worker, and the requests of a trace, of `n` samples each."""

    def __init__(
        self, trace: Trace, n: int = 1, *, num_blocks: int, block_size: int = 16, max_slots: int = 1024,
        depth: int = 2, seed: int = 0,
    ) -> None:  # fmt: skip
        self.random = random.Random(seed)
        self.n = n
        self.device = Device(self.random)
        self.answers: deque[StepDone] = deque()
        self.num_steps = 0
        # As in the paper's system: no horizon, and nothing is shared but within a request.
        self.core = Scheduler(CoreConfig(max_inflight=depth, horizon_us=0, prefix_cache=False))
        attached = WorkerAttached(
            worker=WORKER, epoch=1, num_blocks=num_blocks, block_size=block_size, max_slots=max_slots,
            max_model_len=CONTEXT, max_batched_tokens=8192, max_horizon=1, max_inflight=depth,
        )  # fmt: skip
        self.core.apply([attached], 0.0)
        self._arrivals = self._requests(trace)
        self._more = True

    @property
    def worker(self) -> Worker:
        """The one worker."""
        return self.core.workers[WORKER]

    def _requests(self, trace: Trace) -> Iterator[RequestArrived]:
        lengths = zip(trace.prompts.tolist(), trace.outputs.tolist(), strict=True)
        for key, (prompt, output) in enumerate(lengths):
            if refusal := self.core.refusal(prompt, self.n, output):
                raise ValueError(f"request {key} of the trace cannot run: {refusal}")
            ids = tuple(self.random.randrange(VOCAB) for _ in range(prompt))
            yield RequestArrived(
                key=key, session=1, handle=key, request_id=str(key), prompt=ids, n=self.n, max_tokens=output,
                sampling=Sampling(seed=key),
            )  # fmt: skip

    def steps(self) -> Iterator[Seen]:
        """Run all requests to their end; what is held whenever the window is full, at every step."""
        while True:
            self._arrive()
            while (plan := self.core.plan(WORKER, float(self.num_steps))) is not None:
                self.answers.append(self.device.run(plan))
            if not self.answers:
                assert not self.core.groups, "requests are left and nothing runs"
                return
            yield self.see()
            self.num_steps += 1
            self.core.apply([self.answers.popleft()], float(self.num_steps))

    def _arrive(self) -> None:
        while self._more and self.core.num_waiting < QUEUED:
            request = next(self._arrivals, None)
            self._more = request is not None
            if request is not None:
                self.core.apply([request], float(self.num_steps))

    def see(self) -> Seen:
        """What the core says that it holds."""
        worker = self.worker
        memory = worker.memory()
        scheduled = worker.rows.scheduled.tolist()
        rows = [s for s in worker.rows.sequences if s is not None]
        ahead = [max(0, scheduled[s.slot] - len(s.tokens)) for s in rows]
        return Seen(
            running=self.core.num_running,
            waiting=self.core.num_waiting,
            references=memory.references,
            held=memory.held,
            shared=worker.allocator.num_shared,
            lookahead=memory.lookahead,
            unused=memory.unused_slots,
            ahead=sum(ahead),
            most_ahead=max(ahead, default=0),
        )
