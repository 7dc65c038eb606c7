"""The loop around the core: events in, plans out to the workers, outputs out to the sessions.

Everything here runs on one asyncio loop. Whatever happens within one turn of that loop is applied to
the core together, in one turn of the engine. The engine hands messages to outboxes and never awaits a
write, so that no peer can slow a step.
"""

from __future__ import annotations

import asyncio
import random
import time
import uuid
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Protocol

import msgspec
import structlog

from pagoda.tracing import Tracing, sampled
from pagoda.v1 import scheduler_pb2 as pb
from scheduler_svc.codec import encode_step
from scheduler_svc.core.events import (
    Event,
    Finish,
    Outputs,
    Plan,
    RequestEnd,
    RequestStopped,
    SessionOutput,
    StepDone,
    VerdictGiven,
    WorkerAttached,
    WorkerLost,
)
from scheduler_svc.core.scheduler import Scheduler
from scheduler_svc.core.worker import Flight
from scheduler_svc.errors import DuplicateRequest, InvalidRequest, NoWorker, QueueFull, SchedulerError
from scheduler_svc.metrics import Metrics
from scheduler_svc.record import Recorder
from scheduler_svc.snapshot import snapshot_of
from scheduler_svc.spans import record_end
from scheduler_svc.validation import ServedModel, check_request


class Sink(Protocol):
    """Takes what the core has for one session. Must return at once."""

    def deliver(self, output: SessionOutput) -> None:
        """Queue `output`."""

    def sample_aborted(self, handle: int, index: int) -> None:
        """Say that Abort ended a sample, unless it had ended."""


# Takes a plan, what its answer is read through, and its message.
SendStep = Callable[[Plan, Flight, bytes], None]


class _Live(NamedTuple):
    """A request that has not ended, and where its outputs go."""

    key: int
    session: int
    handle: int
    trace: Callable[[RequestEnd], None] | None


class Engine:
    """Owns the core, its queue of events and the registry of live requests."""

    def __init__(
        self,
        core: Scheduler,
        max_waiting: int,
        metrics: Metrics,
        log: structlog.stdlib.BoundLogger,
        recorder: Recorder | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.core = core
        self.metrics = metrics
        self.tracing: Tracing | None = None
        self.model: ServedModel | None = None
        self.vocabulary = b""
        self.workers: dict[str, WorkerAttached] = {}
        self.devices: dict[str, str] = {}
        self.num_ranks: dict[str, int] = {}
        self.sinks: dict[int, Sink] = {}
        self.on_change: list[Callable[[], None]] = []
        self.num_aborted = 0
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._loop = asyncio.get_running_loop()
        self._log = log
        self._max_waiting = max_waiting
        self._recorder = recorder
        self._clock = clock
        self._send: SendStep | None = None
        self._tell: Callable[[bytes], None] = lambda message: None
        self._events: list[Event] = []
        self._num_arriving = 0
        self._turn_scheduled = False
        self._next_key = 0
        self._next_session = 0
        self._max_slots = 1
        self._ready = False  # the core has had a worker, so that it can tell what fits
        self._live: dict[str, _Live] = {}  # by request_id
        self._aborted: list[tuple[_Live, int]] = []  # samples that this turn's events abort
        self._late: list[Callable[[], None]] = []  # metrics and log lines of this turn

    # -------------------------------------------------------------------------- towards the workers

    def connect(self, send: SendStep, tell: Callable[[bytes], None]) -> None:
        """Give the engine its ways to the workers: for a step, and for a message to each of them."""
        self._send, self._tell = send, tell

    def learn(self, vocabulary: bytes) -> None:
        """What tokens stand for, as the message that every worker is told, now or when it attaches."""
        if vocabulary != self.vocabulary:
            self.vocabulary = vocabulary
            self._tell(vocabulary)

    def worker_attached(self, event: WorkerAttached, model: ServedModel, num_ranks: int) -> None:
        """A group of so many ranks is complete; the first one decides what the cluster serves."""
        self.model = self.model or model
        self.workers[event.worker] = event
        self.devices[event.worker] = model.device
        self.num_ranks[event.worker] = num_ranks
        self._max_slots = max(worker.max_slots for worker in self.workers.values())
        self.metrics.set_model(self.model.name)
        self._post(event)
        self._changed()

    def worker_lost(self, name: str) -> None:
        """A group's session ended."""
        del self.workers[name]
        self._post(WorkerLost(name))
        self._changed()

    def step_done(self, event: StepDone, wire_s: float) -> None:
        """A worker answered a step, of whose time the wire took `wire_s` that no other step hid."""
        self._late.append(partial(self.metrics.step, wire_s, event.device_us / 1e6, event.idle_us / 1e6))
        self._post(event)

    def _changed(self) -> None:
        for listener in self.on_change:
            listener()

    # ------------------------------------------------------------------------- towards the sessions

    def open_session(self, sink: Sink) -> int:
        """Register a session; returns its number."""
        self._next_session += 1
        self.sinks[self._next_session] = sink
        return self._next_session

    def close_session(self, session: int) -> None:
        """Forget a session. Its requests are the caller's to stop."""
        del self.sinks[session]

    def submit(self, session: int, handle: int, request: pb.GenerateTokensRequest) -> int:
        """Check and queue a request; returns its key.

        Raises SchedulerError where it is refused.
        """
        try:
            return self._submit(session, handle, request)
        except SchedulerError as error:
            self.metrics.rejected(error.reason)
            raise

    def _submit(self, session: int, handle: int, request: pb.GenerateTokensRequest) -> int:
        if self.model is None or not self._ready:
            raise NoWorker
        request_id = request.request_id or uuid.uuid4().hex
        if request_id in self._live:
            raise DuplicateRequest(request_id)
        num_waiting = self.core.num_waiting + self._num_arriving
        if num_waiting >= self._max_waiting:
            raise QueueFull(num_waiting)
        if request.sampling.grammar and not self.vocabulary:
            raise InvalidRequest("sampling.grammar", "cannot be followed: no session has told the vocabulary")
        # The core draws nothing: a seed that nobody gave is minted here and recorded with the request.
        seed = random.getrandbits(64)
        checked = check_request(request, self.model, self._max_slots, self.core.refusal, seed)
        self._next_key += 1
        traceparent = sampled(request.traceparent)
        trace = None
        if self.tracing is not None and traceparent:
            num_resumed = sum(len(sample.token_ids) for sample in request.resume)
            trace = partial(record_end, self.tracing, traceparent, num_resumed)
        self._live[request_id] = _Live(self._next_key, session, handle, trace)
        self._num_arriving += 1
        whose = {"key": self._next_key, "session": session, "handle": handle, "request_id": request_id}
        self._post(msgspec.structs.replace(checked, **whose, traceparent=traceparent))
        return self._next_key

    def stop(self, key: int, index: int | None, reason: Finish) -> None:
        """The caller wants no more of a request, or of one sample; no error if it had ended."""
        self._post(RequestStopped(key, index, reason))

    def verdict(self, key: int, step: int, stopped: tuple[int, ...]) -> None:
        """Which candidates of a beam search's step end."""
        self._post(VerdictGiven(key, step, stopped))

    def abort(self, request_id: str, index: int | None) -> bool:
        """End somebody's request, or one sample of it; False when no such request is live."""
        live = self._live.get(request_id)
        if live is None:
            return False
        self.num_aborted += 1
        if index is not None:
            self._aborted.append((live, index))
        self.stop(live.key, index, Finish.CANCELLED)
        return True

    def snapshot(self, include_requests: bool, include_blocks: bool, max_requests: int) -> pb.Snapshot:
        """The core's state now."""
        return snapshot_of(self.core, self._clock(), include_requests, include_blocks, max_requests)

    # ------------------------------------------------------------------------------------- the turn

    def _post(self, event: Event) -> None:
        self._events.append(event)
        if not self._turn_scheduled:
            self._turn_scheduled = True
            self._loop.call_soon(self._turn)

    def _turn(self) -> None:
        self._turn_scheduled = False
        if self.failed.done():
            return
        events, self._events = self._events, []
        self._num_arriving = 0
        try:
            started = self._clock()
            outputs = self._apply(events, started)
            self._dispatch(started)
            dispatched = self._clock()
            self._deliver(outputs)
            self._late.append(partial(self.metrics.turn, dispatched - started, self._clock() - dispatched))
            # After the writers, which this turn has woken: nobody waits for a metric or a log line.
            late, self._late = self._late, []
            self._loop.call_soon(_call_all, late)
        except Exception as error:
            # The core's state can no longer be trusted; the process ends and its supervisor restarts it.
            self.failed.set_exception(error)

    def _apply(self, events: list[Event], now: float) -> Outputs:
        outputs = self.core.apply(events, now)
        if self._recorder is not None:
            self._recorder.applied(now, events, outputs)
        self._ready = self._ready or bool(self.core.workers)
        if any(type(event) is StepDone for event in events):
            self.metrics.progress()
        return outputs

    def _dispatch(self, now: float) -> None:
        for worker in list(self.workers):
            while worker in self.workers:  # sending may cut a worker that does not read
                plan = self.core.plan(worker, now)
                if self._recorder is not None:
                    self._recorder.planned(worker, now, plan)
                if plan is None:
                    break
                if self._send is not None:
                    self._send(plan, self.core.workers[worker].inflight[-1], encode_step(plan))
                self._late.append(partial(self.metrics.planned, plan))

    def _deliver(self, outputs: Outputs) -> None:
        for session, output in outputs.sessions.items():
            sink = self.sinks.get(session)
            if sink is not None:
                sink.deliver(output)
            for end in output.ended:
                live = self._live.pop(end.request_id, None)
                self._late.append(partial(self._ended, end))
                if live is not None and live.trace is not None:
                    self._late.append(partial(live.trace, end))
        for live, index in self._aborted:
            if live.session in self.sinks:
                self.sinks[live.session].sample_aborted(live.handle, index)
        self._aborted.clear()

    def _ended(self, end: RequestEnd) -> None:
        self.metrics.request_ended(end)
        self._log.info(
            "request_end",
            request_id=end.request_id,
            reason=end.reason.name.lower(),
            prompt_tokens=end.prompt_tokens,
            cached_tokens=end.cached_tokens,
            completion_tokens=end.completion_tokens,
            num_samples=len(end.reasons),
            num_preemptions=end.num_preemptions,
            num_replays=end.num_replays,
            queue_s=_between(end.arrived, end.first_scheduled),
            prefill_s=_between(end.first_scheduled, end.first_token),
            decode_s=_between(end.first_token, end.last_token),
            total_s=_between(end.arrived, end.ended),
            failure=end.failure,
        )


def _call_all(calls: list[Callable[[], None]]) -> None:
    for call in calls:
        call()


def _between(start: float | None, end: float | None) -> float | None:
    return None if start is None or end is None else round(end - start, 6)
