"""A scheduler for tests: a real gRPC server on loopback whose sessions the test drives by hand."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from concurrent import futures
from dataclasses import dataclass, field

import grpc

from pagoda.internal.v1 import worker_pb2, worker_pb2_grpc

WAIT_S = 60.0


@dataclass
class Session:
    """One worker's stream: what it said, and what it is to be told."""

    hello: worker_pb2.Hello
    metadata: dict[str, str]
    outgoing: queue.SimpleQueue = field(default_factory=queue.SimpleQueue)
    results: queue.SimpleQueue = field(default_factory=queue.SimpleQueue)
    heartbeats: queue.SimpleQueue = field(default_factory=queue.SimpleQueue)
    ended: queue.SimpleQueue = field(default_factory=queue.SimpleQueue)

    def start(self, epoch: int) -> None:
        """Accept the worker."""
        self.outgoing.put(
            worker_pb2.AttachResponse(start=worker_pb2.SessionStart(epoch=epoch, protocol=1, max_inflight=2))
        )

    def send(self, step: worker_pb2.Step) -> None:
        """Send a step."""
        self.outgoing.put(worker_pb2.AttachResponse(step=step))

    def result(self) -> worker_pb2.StepResult:
        """The next result."""
        return self.results.get(timeout=WAIT_S)

    def close(self) -> None:
        """End the stream as a scheduler does that goes away."""
        self.outgoing.put(None)


class FakeHub(worker_pb2_grpc.WorkerServiceServicer):
    """Serves WorkerService; `next_session` gives the test each worker that dials."""

    def __init__(self) -> None:
        self.refusal: tuple[grpc.StatusCode, str] | None = None
        self._sessions: queue.SimpleQueue[Session] = queue.SimpleQueue()
        self._server = grpc.server(futures.ThreadPoolExecutor(8))
        worker_pb2_grpc.add_WorkerServiceServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port("127.0.0.1:0")
        self._server.start()

    @property
    def address(self) -> str:
        """Where workers dial."""
        return f"127.0.0.1:{self.port}"

    def next_session(self) -> Session:
        """The next worker that says hello."""
        return self._sessions.get(timeout=WAIT_S)

    def stop(self) -> None:
        """Stop serving at once."""
        self._server.stop(None).wait()

    def Attach(
        self, requests: Iterator[worker_pb2.AttachRequest], context: grpc.ServicerContext
    ) -> Iterator[worker_pb2.AttachResponse]:
        """See worker.proto."""
        hello = next(requests).hello
        if self.refusal is not None:
            context.abort(*self.refusal)
        session = Session(hello, dict(context.invocation_metadata()))
        self._sessions.put(session)
        reader = futures.ThreadPoolExecutor(1)
        reader.submit(self._read, requests, session)
        while (message := session.outgoing.get()) is not None:
            yield message

    def _read(self, requests: Iterator[worker_pb2.AttachRequest], session: Session) -> None:
        try:
            for request in requests:
                queue_of = session.results if request.HasField("result") else session.heartbeats
                queue_of.put(request.result if request.HasField("result") else request.heartbeat)
        except grpc.RpcError as error:
            session.ended.put(error)
        session.ended.put(None)
        session.outgoing.put(None)
