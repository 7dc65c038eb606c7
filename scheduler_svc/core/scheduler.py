"""The scheduler's core: events in, plans out. A pure function of its inputs (invariant 1).

`apply(events, now)` takes what happened; `plan(worker, now)` says what a worker does next, or None.
A plan is made from counts, not values: a row that decodes will have one more token, whichever it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq
from itertools import islice

from scheduler_svc.core.beams import Candidate, Candidates
from scheduler_svc.core.config import CoreConfig
from scheduler_svc.core.events import (
    Event,
    Finish,
    LogprobEntry,
    Outputs,
    Plan,
    PromptLogprobs,
    RequestArrived,
    RequestStopped,
    RowEnd,
    SessionOutput,
    StepDone,
    VerdictGiven,
    WorkerAttached,
    WorkerLost,
)
from scheduler_svc.core.group import Group, State
from scheduler_svc.core.planner import make_plan
from scheduler_svc.core.queue import WaitingQueue
from scheduler_svc.core.request import NEVER, NO_SLOT, Sequence
from scheduler_svc.core.router import Router, fits
from scheduler_svc.core.stats import Stats
from scheduler_svc.core.swap import drop_host
from scheduler_svc.core.worker import Flight, Worker

POISON_DEATHS = 3
UNASSIGNED = ""


class Scheduler:
    """All requests and all workers. Not thread-safe: one loop owns it."""

    def __init__(self, config: CoreConfig) -> None:
        self.config = config
        self.stats = Stats()
        self.workers: dict[str, Worker] = {}
        self.groups: dict[int, Group] = {}  # every group that has not ended, by key
        self._unassigned = WaitingQueue(UNASSIGNED)
        self._router = Router()
        self._last_attached: Worker | None = None
        self._num_arrived = 0
        self._outputs = Outputs({})

    @property
    def num_waiting(self) -> int:
        """Requests in queues."""
        return len(self._unassigned) + sum(len(w.queue) for w in self.workers.values())

    @property
    def num_running(self) -> int:
        """Requests that hold slots."""
        return sum(len(w.running) for w in self.workers.values())

    def refusal(self, prompt_tokens: int, n: int, max_tokens: int) -> str | None:
        """Why such a request can never run on any worker; None when it can."""
        workers = list(self.workers.values()) or ([self._last_attached] if self._last_attached else [])
        reason = "no worker has attached yet"
        for worker in workers:
            limit = min(prompt_tokens + max_tokens, worker.max_model_len)
            reason = fits(worker, prompt_tokens, n, limit)
            if not reason:
                return None
        return reason

    def plan(self, worker: str, now: float) -> Plan | None:
        """The next step for `worker`; None when its window is full or there is nothing to do."""
        state = self.workers.get(worker)
        return make_plan(state, self.config, self.stats, now) if state else None

    def apply(self, events: Seq[Event], now: float) -> Outputs:
        """Take in what happened, in order; what there is to say to each session."""
        self._outputs = Outputs({})
        for event in events:
            match event:
                case StepDone():
                    self._step_done(event, now)
                case RequestArrived():
                    self._arrived(event, now)
                case RequestStopped():
                    self._stopped(event, now)
                case VerdictGiven():
                    self._verdict_given(event, now)
                case WorkerAttached():
                    self._attached(event, now)
                case WorkerLost():
                    self._lost(event, now)
        for out in self._outputs.sessions.values():
            self.stats.generation_tokens += len(out.tokens)
            if not any(out.indexes):
                out.indexes = []
            if out.num_tokens.count(1) == len(out.num_tokens):
                out.num_tokens = []
        return self._outputs

    # -------------------------------------------------------------------------------------- requests

    def _arrived(self, event: RequestArrived, now: float) -> None:
        limit = self._last_attached.max_model_len if self._last_attached else NEVER
        group = Group(event, self._num_arrived, limit, now)
        self._num_arrived += 1
        self.groups[group.key] = group
        if not group.live():
            self._end_group(group, group.samples[-1].finish or Finish.STOP, now)
        else:
            self._route(group, now)

    def _route(self, group: Group, now: float) -> None:
        """Queue `group` where it should run, or fail it when it fits no worker that is attached."""
        group.resume_after = -1
        if not self.workers:
            self._unassigned.push(group)
            return
        worker = self._router.choose(self.workers.values(), group)
        if worker is None:
            one = next(iter(self.workers.values()))
            why = fits(one, group.num_prompt, len(group.live()), group.samples[0].last_position)
            self._fail(group, why, now)
        else:
            worker.queue.push(group)

    def _stopped(self, event: RequestStopped, now: float) -> None:
        group = self.groups.get(event.key)
        if group is None:
            return  # it ended while the stop was on its way
        if group.search is not None and event.index is not None:
            # A beam is no result yet: the search goes on while any result is wanted.
            group.search.wanted = [i for i in group.search.wanted if i != event.index]
            if group.search.wanted:
                return
            event = RequestStopped(event.key, None, event.reason)
        for sample in group.live():
            if event.index is None or sample.index == event.index:
                self._end_sample(sample, event.reason)
        if not group.live():
            self._end_group(group, event.reason, now)

    def _end_sample(self, sample: Sequence, reason: Finish) -> None:
        """Free the slot and the blocks of `sample`; a row that is in flight still is discarded."""
        sample.finish = reason
        if sample.host_blocks:
            drop_host(self.workers[sample.group.worker], sample)
        if sample.slot != NO_SLOT:
            group = sample.group
            if sample in group.followers:
                group.followers.remove(sample)
            self.workers[group.worker].remove(sample)

    def _end_group(self, group: Group, reason: Finish, now: float, failure: str = "") -> None:
        waited = group.state is State.WAITING
        end = group.end(reason, now, failure)
        if waited:
            queue = self.workers[group.worker].queue if group.worker else self._unassigned
            queue.leave(group)
        worker = self.workers.get(group.worker)
        if worker is not None:
            worker.running.pop(group.key, None)
            worker.gathering.pop(group.key, None)
        del self.groups[group.key]
        # A group and its samples refer to each other; cut, they go at once and not at a collection.
        group.samples = []
        name = reason.name.lower()
        self.stats.finished[name] = self.stats.finished.get(name, 0) + 1
        self._session(group.session).ended.append(end)

    def _fail(self, group: Group, why: str, now: float) -> None:
        for sample in group.live():
            self._end_sample(sample, Finish.ERROR)
        self._end_group(group, Finish.ERROR, now, why)

    # --------------------------------------------------------------------------------------- workers

    def _attached(self, event: WorkerAttached, now: float) -> None:
        if event.worker in self.workers:
            self._lost(WorkerLost(event.worker), now)
        worker = self._last_attached = Worker(event, self.config)
        waiting = self._unassigned.take_all()
        for other in self.workers.values():
            waiting.extend(other.queue.take_all(lambda group: group.first_scheduled is None))
        self.workers[event.worker] = worker
        for group in sorted(waiting, key=lambda g: g.rank):
            for sample in group.samples:
                sample.last_position = min(sample.last_position, worker.max_model_len)
                sample.hashes = []
            self._route(group, now)

    def _lost(self, event: WorkerLost, now: float) -> None:
        """Everything on the worker is gone but the tokens; its requests go to the front elsewhere."""
        worker = self.workers.pop(event.worker, None)
        if worker is None:
            return
        for group in list(worker.running.values()):
            for sample in group.samples:
                sample.slot, sample.blocks, sample.index_at = NO_SLOT, [], NEVER
            group.followers = []
            group.state = State.NEW
            output = group.num_output
            was_alone = group.alone
            group.num_deaths = group.num_deaths + 1 if output == group.output_at_death else 0
            group.output_at_death = output
            group.num_replays += 1
            group.pauses.append(("worker_lost", now))
            self.stats.replayed_requests += 1
            self.stats.replayed_tokens += output
            if was_alone and group.num_deaths >= POISON_DEATHS:
                self._fail(group, "the worker died three times in a row while it ran this request", now)
        survivors = [g for g in worker.running.values() if g.state is not State.ENDED]
        for group in sorted(survivors + worker.queue.take_all(), key=lambda g: g.rank):
            for sample in group.samples:
                sample.hashes, sample.host_blocks = [], []
            self._route(group, now)

    # ----------------------------------------------------------------------------------------- steps

    def _step_done(self, event: StepDone, now: float) -> None:
        worker = self.workers.get(event.worker)
        if worker is None or worker.epoch != event.epoch:
            return  # an answer from a session that has ended: its rows were replayed
        flight = worker.inflight.popleft()
        assert flight.step_id == event.step_id, f"step {event.step_id} answered, {flight.step_id} awaited"
        worker.confirmed_step = event.step_id
        if event.device_us:
            worker.took(flight, event.device_us, event.swap_us)
            self.stats.swap_us += event.swap_us
        for sequence in flight.first:
            if sequence.group.first_token is None:
                sequence.group.first_token = now
        for part in event.prompts:
            self._take_prompt_logprobs(*flight.prompts[part.of], part.entries)
        self._take_tokens(worker, flight, event, now)
        if flight.searches:
            self._take_candidates(worker, flight, event, now)

    def _take_prompt_logprobs(self, group: Group, told: range, entries: tuple[LogprobEntry, ...]) -> None:
        """Deliver what is new: a prompt that is computed again reports some of its tokens again."""
        if group.state is not State.ENDED and told.stop > group.next_logprob:
            new = entries[group.next_logprob - told.start :]
            group.next_logprob = told.stop
            self._session(group.session).prompts.append(PromptLogprobs(group.handle, new))

    def _take_tokens(self, worker: Worker, flight: Flight, event: StepDone, now: float) -> None:
        """Append the sampled tokens to their sequences, read only through the plan of their step."""
        counts = event.num_sampled or [flight.num_iterations] * len(flight.sampling)
        ended = dict(zip(event.ended_rows, event.ended_reasons, strict=True))
        logprobs = iter(event.logprobs)
        tokens, start = event.tokens, 0
        session, out = -1, SessionOutput()
        for row, (sequence, count) in enumerate(zip(flight.sampling, counts, strict=True)):
            new = tokens[start : start + count]
            start += count
            entries = []
            if event.logprobs and sequence.group.samplings[sequence.index].num_logprobs is not None:
                entries = list(islice(logprobs, count))
            if sequence.finish is not None:
                continue  # it ended before; what the step drew for it is discarded
            history = sequence.tokens
            history.extend(new)
            if count < flight.num_iterations and row not in ended:
                worker.fell_behind(sequence)
                if not count:
                    continue
            if len(history) > sequence.index_at:
                worker.index_blocks(sequence, len(history) - 1)
            if sequence.session != session:
                session, out = sequence.session, self._session(sequence.session)
            out.handles.append(sequence.handle)
            out.indexes.append(sequence.index)
            out.num_tokens.append(count)
            out.tokens += new
            if entries:
                out.logprob_rows.append(len(out.handles) - 1)
                out.logprobs += entries
            if row in ended:
                self._row_ended(worker, sequence, RowEnd(ended[row]), out, now)

    def _row_ended(
        self, worker: Worker, sequence: Sequence, end: RowEnd, out: SessionOutput, now: float
    ) -> None:
        reason = {RowEnd.STOP: Finish.STOP, RowEnd.LENGTH: Finish.LENGTH, RowEnd.NAN: Finish.ERROR}[end]
        if end is RowEnd.NAN:
            worker.forget_content(sequence)
        out.ended_rows.append(len(out.handles) - 1)
        out.ended_reasons.append(int(reason))
        group = sequence.group
        self._end_sample(sequence, reason)
        if not group.live():
            failure = "the model's logits were not finite" if end is RowEnd.NAN else ""
            if failure and group.samplings[0].grammar:
                failure += ", or its grammar allowed no token"
            self._end_group(group, reason, now, failure)

    # ----------------------------------------------------------------------------------------- beams

    def _take_candidates(self, worker: Worker, flight: Flight, event: StepDone, now: float) -> None:
        """Let each search of a step choose among its candidates, or ask its session."""
        found = map(Candidate, event.beam_parents, event.beam_tokens, event.beam_scores)
        tops = iter(event.beam_tops)
        for group in flight.searches:
            search = group.search
            assert search is not None
            best, rest = ([c for c in islice(found, search.width) if c.score != -math.inf] for _ in range(2))
            asks = search.sampling.num_logprobs is not None
            candidates = Candidates(best, rest, list(islice(tops, len(search.beams) if asks else 0)))
            if group.state is State.ENDED:
                continue  # it ended before; its candidates are discarded
            if any(math.isnan(candidate.score) for candidate in best + rest):
                for beam in search.beams:
                    worker.forget_content(beam.sequence)
                self._fail(group, "the model's logits were not finite", now)
                continue
            for beam in search.beams:
                if len(beam.sequence.tokens) >= beam.sequence.index_at:
                    worker.index_blocks(beam.sequence, len(beam.sequence.tokens))
            if search.sampling.await_verdicts:
                self._session(group.session).candidates.append(search.ask(group.handle, candidates))
            else:
                self._go_on(group, candidates, (), now)

    def _verdict_given(self, event: VerdictGiven, now: float) -> None:
        group = self.groups.get(event.key)
        search = group.search if group is not None else None
        if group is not None and search is not None and search.awaiting and search.num_steps == event.step:
            self._go_on(group, search.awaiting, event.stopped, now)

    def _go_on(self, group: Group, candidates: Candidates, stopped: Seq[int], now: float) -> None:
        search = group.search
        assert search is not None
        chosen = search.choose(candidates, stopped)
        if chosen:
            worker = self.workers[group.worker] if group.state is State.RUNNING else None
            search.go_on(worker, chosen, candidates, group.samples)
            return
        for sample in group.live():
            self._end_sample(sample, Finish.STOP)
        out = self._session(group.session)
        group.samples = [search.deliver(group, i, out) for i in search.wanted if i < len(search.results)]
        group.search = None
        self._end_group(group, search.results[0].finish, now)

    def _session(self, session: int) -> SessionOutput:
        out = self._outputs.sessions.get(session)
        if out is None:
            out = self._outputs.sessions[session] = SessionOutput()
        return out

    def check_integrity(self) -> None:
        """Raises AssertionError unless all counts agree; cheap enough for tests, not for every step."""
        for worker in self.workers.values():
            worker.check_integrity()
            there = [g for g in self.groups.values() if g.worker == worker.name]
            assert not any(g.swapped for g in there if g.state is State.RUNNING), "a group is in two places"
            worker.check_host(s.host_blocks for g in there for s in g.samples)
        waiting = [g for g in self.groups.values() if g.state is State.WAITING]
        assert len(waiting) == self.num_waiting, "a queue lost a request"
        running = [g for g in self.groups.values() if g.state is State.RUNNING]
        assert len(running) == self.num_running, "a worker lost a request"
