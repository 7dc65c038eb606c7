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

from benchmarks.paper_beams import Dynamics, Parents
from benchmarks.paper_lengths import Trace
from scheduler_svc.core.beams import EarlyStopping
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
    """Answers plans with as many tokens as they ask for; a row ends where its request's length is reached.

    Beams go on from each other as `dynamics` tells.
    """

    random: random.Random
    dynamics: Dynamics | None = None
    rows: dict[int, Row] = field(default_factory=dict)
    genealogies: dict[int, Iterator[Parents]] = field(default_factory=dict)

    def run(self, plan: Plan, searches: list[int]) -> StepDone:
        """The result of one step; `searches` are the keys of those that get candidates."""
        forked = set()
        for new in plan.new_rows:
            known = len(new.tokens) or new.num_prompt_tokens
            computed = new.num_computed if new.parent_slot is None else known
            self.rows[new.slot] = Row(known, computed, new.last_position)
            if new.parent_slot is not None:
                forked.add(new.slot)
        sampled: list[int] = []
        ended: list[int] = []
        beams = {plan.slots[place] for place in plan.beam_rows}
        for slot, count in zip(plan.slots, plan.num_tokens or [1] * len(plan.slots), strict=True):
            row = self.rows[slot]
            if slot in beams:
                continue  # it gets candidates
            if slot not in forked and row.computed + count < row.known:
                row.computed += count
                continue  # a prompt that is not complete draws nothing
            new = min(plan.num_iterations, row.last_position - row.known)
            row.known += new
            row.computed = row.known - 1
            sampled.append(new)
            if row.known >= row.last_position:
                ended.append(len(sampled) - 1)
        parents: list[int] = []
        for search in zip(searches, plan.beam_counts, plan.beam_widths, strict=True):
            parents += self._parents(*search)
        return StepDone(
            worker=plan.worker, epoch=plan.epoch, step_id=plan.step_id, beam_parents=parents,
            beam_tokens=[self.random.randrange(VOCAB) for _ in parents],
            beam_scores=[-float(place) for place in range(len(parents))],
            tokens=[self.random.randrange(VOCAB) for _ in range(sum(sampled))], num_sampled=sampled,
            ended_rows=ended, ended_reasons=[int(RowEnd.LENGTH)] * len(ended), device_us=1000,
        )  # fmt: skip

    def _parents(self, key: int, count: int, width: int) -> Parents:
        """Of a search's candidates: the best, and the same again as those that do not end, for none does."""
        assert self.dynamics is not None and self.dynamics.width == width
        if count == 1:
            # The prompt's step. A search that was preempted has all its beams and goes on where it was.
            self.genealogies[key] = self.dynamics.replay(key)
            return (0,) * width * 2
        return next(self.genealogies[key]) * 2


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
    """A core with one worker, and the requests of a trace: of `n` samples, or of beams with dynamics."""

    def __init__(
        self, trace: Trace, n: int = 1, *, num_blocks: int, block_size: int = 16, max_slots: int = 1024,
        depth: int = 2, seed: int = 0, dynamics: Dynamics | None = None,
    ) -> None:  # fmt: skip
        self.random = random.Random(seed)
        self.n = n
        self.device = Device(self.random, dynamics)
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
            rows = self.device.dynamics.width if self.device.dynamics else self.n
            if refusal := self.core.refusal(prompt, rows, output):
                raise ValueError(f"request {key} of the trace cannot run: {refusal}")
            ids = tuple(self.random.randrange(VOCAB) for _ in range(prompt))
            sampling = Sampling(seed=key)
            if self.device.dynamics is not None:
                # One that never stops early: it is as long as its trace says.
                width, never = self.device.dynamics.width, int(EarlyStopping.NEVER)
                sampling = Sampling(seed=key, beam_width=width, early_stopping=never)
            yield RequestArrived(
                key=key, session=1, handle=key, request_id=str(key), prompt=ids, n=self.n, max_tokens=output,
                sampling=sampling,
            )  # fmt: skip

    def steps(self) -> Iterator[Seen]:
        """Run all requests to their end; what is held whenever the window is full, at every step."""
        while True:
            self._arrive()
            while (plan := self.core.plan(WORKER, float(self.num_steps))) is not None:
                searches = [group.key for group in self.worker.inflight[-1].searches]
                self.answers.append(self.device.run(plan, searches))
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
