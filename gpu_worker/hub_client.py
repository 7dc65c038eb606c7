"""The worker's end of the wire: dial the scheduler, say Hello, pass steps in and results out, for ever.

A rank of a group serves one session: when that ends, another rank may already be waited for inside a kernel,
so the process must end, and whoever started the ranks starts all of them again.

The stream is read in the thread that calls `run`, and written by gRPC's own thread from a queue. Blocking
gRPC, not asyncio: measured at steps of 8 ms, both bring a step to the executor equally fast, and a thread
that waits inside gRPC's core needs no turn of an event loop between a message and the executor's queue.
"""

from __future__ import annotations

import queue
import random
import threading
from collections.abc import Iterator
from typing import Any, Protocol

import grpc
import structlog

from gpu_worker.metrics import WorkerMetrics
from pagoda import transport
from pagoda.checksum import step_checksum
from pagoda.internal.v1 import worker_pb2, worker_pb2_grpc
from pagoda.v1 import scheduler_pb2

HEARTBEAT_S = 1.0
BACKOFF_S = (0.1, 1.0)
EXIT_REFUSED = 78  # a supervisor does not retry it
EXIT_FAILED = 1
REFUSALS = (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.UNAUTHENTICATED)

Outbox = queue.SimpleQueue[worker_pb2.AttachRequest | None]


class Executor(Protocol):
    """What does the steps: a device, or something that plays one.

    Its results come through `HubClient.deliver`, which it is given when it is made and calls from a thread of
    its own, once for each step and in their order. What it cannot do it says through `HubClient.fail`.
    """

    def reset(self, epoch: int) -> None:
        """Forget all rows and queued steps; what is submitted from now on belongs to `epoch` (0: nothing
        will be). When this returns, no result of an earlier step is delivered any more."""
        ...

    def submit(self, step: worker_pb2.Step) -> None:
        """Queue a step and return at once."""
        ...

    def learn(self, vocabulary: scheduler_pb2.Vocabulary) -> None:
        """What tokens stand for, for the grammars of later steps; returns at once."""
        ...


class HubClient:
    """Keeps a worker attached to its scheduler."""

    def __init__(
        self,
        address: str,
        hello: worker_pb2.Hello,
        token: str,
        metrics: WorkerMetrics,
        log: structlog.stdlib.BoundLogger,
    ) -> None:
        self._address, self._hello, self._token = address, hello, token
        self._metrics, self._log = metrics, log
        self._results: Outbox | None = None
        self._call: Any = None  # gRPC's type of a stream is private
        self._stopping = threading.Event()
        self._fatal = False
        self._failures = 0  # to attach, since the last session
        self._started = False  # the session, or the last one
        self.in_group = hello.world_size > 1

    def run(self, executor: Executor) -> int:
        """Serve sessions until `stop`, a refusal or a broken executor; as a rank of a group, one session.

        Returns:
            The process's exit code: 0 after `stop`, 78 when the scheduler refuses this worker, 1 after a
            failure of the executor that is not the session's fault, and after a group's session.
        """
        while not self._stopping.is_set():
            try:
                self._session(executor)
            except grpc.RpcError as error:
                code, details = error.code(), error.details()
                if code in REFUSALS and not self._fatal:
                    self._log.error("the scheduler refuses this worker", code=code.name, reason=details)
                    return EXIT_REFUSED
                if not self._stopping.is_set():
                    say = self._log.debug if self._failures else self._log.warning
                    say(
                        "no session with the scheduler", address=self._address, code=code.name, reason=details
                    )
            if self._fatal or (self._started and self.in_group and not self._stopping.is_set()):
                return EXIT_FAILED
            first, most = BACKOFF_S
            self._stopping.wait(random.uniform(first / 2, min(most, first * 2**self._failures)))
            self._failures = min(self._failures + 1, 10)
        return 0

    def stop(self) -> None:
        """End the session and let `run` return 0. May be called from a signal handler or another thread."""
        self._stopping.set()
        if (call := self._call) is not None:
            call.cancel()

    def deliver(self, result: worker_pb2.StepResult) -> None:
        """Send a step's result; without a session it is dropped. Called by the executor, in step order.

        Ranks above 0 send what tells whether they drew the same.
        """
        if self._hello.rank:
            epoch, step_id = result.epoch, result.step_id
            result = worker_pb2.StepResult(epoch=epoch, step_id=step_id, checksum=step_checksum(result))
        if (outbox := self._results) is not None:
            outbox.put(worker_pb2.AttachRequest(result=result))

    def fail(self, error: BaseException, fatal: bool) -> None:
        """End the session because a step cannot be done; `fatal` says that none will ever be, as for a rank
        whose group has gone on without it."""
        self._log.error("a step failed", error=repr(error), exc_info=error if fatal else None)
        self._metrics.failure()
        self._fatal = self._fatal or fatal or self.in_group
        if (call := self._call) is not None:
            call.cancel()

    def _session(self, executor: Executor) -> None:
        """One stream, from Hello to its end.

        Raises:
            grpc.RpcError: the stream broke or was refused.
        """
        self._started = False
        outbox: Outbox = queue.SimpleQueue()
        outbox.put(worker_pb2.AttachRequest(hello=self._hello))
        with grpc.insecure_channel(self._address, options=transport.CHANNEL_OPTIONS) as channel:
            stub = worker_pb2_grpc.WorkerServiceStub(channel)
            call = self._call = stub.Attach(self._requests(outbox), metadata=transport.bearer(self._token))
            try:
                if self._stopping.is_set() or self._fatal:
                    return
                self._receive(call, executor, outbox)
                self._log.info("the session ended")
            finally:
                self._results = self._call = None
                outbox.put(None)
                call.cancel()
                self._metrics.session(0)
                if not (self._stopping.is_set() or self.in_group):
                    executor.reset(0)

    def _receive(self, call: Any, executor: Executor, outbox: Outbox) -> None:
        epoch = None
        for response in call:
            if response.HasField("step"):
                if response.step.epoch != epoch:
                    self._log.error("a step of another epoch", epoch=response.step.epoch, session=epoch)
                    return
                executor.submit(response.step)
            elif response.HasField("vocabulary"):
                executor.learn(response.vocabulary)
            elif epoch is None:
                epoch = response.start.epoch
                executor.reset(epoch)
                self._results = outbox
                self._failures = 0
                self._started = True
                self._metrics.session(epoch)
                self._log.info(
                    "attached", address=self._address, epoch=epoch, depth=response.start.max_inflight
                )

    def _requests(self, outbox: Outbox) -> Iterator[worker_pb2.AttachRequest]:
        """What gRPC's writing thread sends: the outbox, and a heartbeat when that is silent."""
        while True:
            try:
                message = outbox.get(timeout=HEARTBEAT_S)
            except queue.Empty:
                message = worker_pb2.AttachRequest(heartbeat=worker_pb2.Heartbeat())
            if message is None:
                return
            self._metrics.sent()
            yield message
