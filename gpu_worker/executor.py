"""The thread that works: takes steps in order, runs them on the device, hands out their results."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from gpu_worker.grammar import Entering
from gpu_worker.metrics import WorkerMetrics
from gpu_worker.output import Launched, OutputThread, collect, microseconds
from gpu_worker.runner import Runner
from gpu_worker.spans import RowSpans
from gpu_worker.staging import Stager, StepError
from pagoda.internal.v1 import worker_pb2
from pagoda.v1 import scheduler_pb2

OnResult = Callable[[worker_pb2.StepResult], None]
OnFailure = Callable[[BaseException], None]

# Without a step for so long, a worker is at rest: under any load the next one comes sooner.
REST_S = 0.25


@dataclass
class _Reset:
    """Stands in the queue between two sessions' steps."""

    epoch: int
    done: threading.Event


_Item = tuple[worker_pb2.Step, Entering] | _Reset


class DeviceExecutor:
    """Runs steps on a device, one at a time. See `hub_client.Executor` for what its callers rely on."""

    def __init__(
        self,
        runner: Runner,
        stager: Stager,
        metrics: WorkerMetrics,
        on_result: OnResult,
        on_failure: OnFailure,
        device: torch.device,
        spans: RowSpans,
    ) -> None:
        """`on_result` and `on_failure` are called from a thread of the executor. After a `StepError` it waits
        for the next reset; after any other error it has ended."""
        self._device = device
        self._runner, self._stager = runner, stager
        self._metrics, self._spans = metrics, spans
        self._epoch = 0
        self._on_result, self._on_failure = on_result, on_failure
        self._queue: queue.SimpleQueue[_Item | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="executor", daemon=True)

        # A CPU is done with a step when the call returns; any other device is given the next one meanwhile.
        self._output: OutputThread | None = None
        self._stream: torch.cuda.Stream | None = None
        if device.type != "cpu":
            self._output = OutputThread(device, self._report, on_failure)
            self._stream = torch.cuda.Stream(device)

    def start(self) -> None:
        """Start working."""
        self._thread.start()

    def reset(self, epoch: int) -> None:
        """Drop what is queued, wait for the step that runs, forget all rows, and go on in `epoch`."""
        self._drop_queued()
        reset = _Reset(epoch, threading.Event())
        self._queue.put(reset)
        while not reset.done.wait(0.2) and self._thread.is_alive():
            continue

    def submit(self, step: worker_pb2.Step) -> None:
        """Queue a step of the current epoch."""
        self._queue.put((step, self._runner.grammars.prepare(step)))

    def learn(self, vocabulary: scheduler_pb2.Vocabulary) -> None:
        """What tokens stand for, for the grammars of steps submitted from now on."""
        self._runner.grammars.learn(vocabulary)

    def close(self, timeout: float) -> None:
        """Drop what is queued and end the thread; returns after `timeout` seconds in any case."""
        self._drop_queued()
        self._queue.put(None)
        self._thread.join(timeout)
        if self._output is not None:
            self._output.close(timeout)

    def _drop_queued(self) -> None:
        while True:
            try:
                self._queue.get_nowait()
            except queue.Empty:
                return

    @torch.inference_mode()
    def _run(self) -> None:
        if self._stream is None:
            self._work()
            return
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            self._work()

    def _work(self) -> None:
        ended = None
        broken = False
        while True:
            waited = self._queue.empty()
            item = self._next()
            if item is None:
                return
            if isinstance(item, _Reset):
                if self._output is not None:
                    self._output.flush()
                self._stager.clear()
                self._spans.clear()
                self._runner.grammars.clear()
                self._epoch, ended, broken = item.epoch, None, False
                item.done.set()
                continue
            if broken:
                continue
            started = time.perf_counter()
            idle = started - ended if waited and ended is not None else 0.0
            try:
                ended = self._step(*item, started, idle)
            except StepError as error:
                broken = True
                self._on_failure(error)
            except BaseException as error:
                self._on_failure(error)
                return

    def _next(self) -> _Item | None:
        """What to do next. At rest, graphs are captured until it comes, and memory is given back that only
        the largest steps need: a step would wait for either."""
        graphs = self._runner.graphs
        if graphs is not None:
            try:
                return self._queue.get(timeout=REST_S)
            except queue.Empty:
                while self._queue.empty() and graphs.num_wanted:
                    graphs.capture_next()
                    self._metrics.graphs(graphs.num_wanted)
                torch.cuda.empty_cache()
        return self._queue.get()

    def _step(self, step: worker_pb2.Step, entering: Entering, started: float, idle: float) -> float:
        """Run one step; returns when the host was done with it."""
        if step.epoch != self._epoch:
            raise StepError(f"step {step.step_id} is of epoch {step.epoch}, the session's is {self._epoch}")
        diff, batch = self._stager.stage(step)
        report = self._spans.staged(step, batch.sampling)
        self._runner.grammars.change(step.released_slots, entering)
        staged = time.perf_counter()
        if self._output is not None:
            events = self._output.events.take()
            events[0].record(self._stream)
            outputs = self._runner.run(diff, batch)
            events[1].record(self._stream)
            self._output.put(Launched(step.epoch, step.step_id, outputs, events, staged - started, report))
            return time.perf_counter()
        result = collect(step.epoch, step.step_id, self._runner.run(diff, batch))
        ended = time.perf_counter()
        result.device_us = microseconds(ended - started)
        result.idle_us = microseconds(idle)
        self._on_result(result)
        if report is not None:
            report(result)
        reported = time.perf_counter()
        self._metrics.step(staged - started, ended - staged, reported - ended, idle, len(result.tokens))
        return ended

    def _report(self, result: worker_pb2.StepResult, step: Launched) -> None:
        """A result of the output thread."""
        begun = time.perf_counter()
        self._on_result(result)
        if step.report is not None:
            step.report(result)
        spent = time.perf_counter() - begun
        device, idle = result.device_us / 1e6, result.idle_us / 1e6
        self._metrics.step(step.staged, device, spent, idle, len(result.tokens))
