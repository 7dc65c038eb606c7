"""The hub client against a real gRPC server, with an executor that plays a device."""

from __future__ import annotations

import queue
import threading
import time

import grpc
import pytest
import structlog

from gpu_worker.hub_client import EXIT_REFUSED, HubClient
from gpu_worker.metrics import WorkerMetrics
from gpu_worker.staging import StepError
from pagoda.internal.v1 import worker_pb2
from pagoda.v1 import scheduler_pb2
from tests.unit.worker.fake_hub import WAIT_S, FakeHub


class EchoDevice:
    """Answers a step with its slots as tokens; slot 913 cannot be done, 966 breaks the device."""

    def __init__(self) -> None:
        self.hub: HubClient
        self.epochs: list[int] = []
        self.vocabularies: list[scheduler_pb2.Vocabulary] = []
        self._steps: queue.SimpleQueue = queue.SimpleQueue()
        threading.Thread(target=self._run, daemon=True).start()

    def reset(self, epoch: int) -> None:
        """See `hub_client.Executor`."""
        self.epochs.append(epoch)

    def submit(self, step: worker_pb2.Step) -> None:
        """See `hub_client.Executor`."""
        self._steps.put(step)

    def learn(self, vocabulary: scheduler_pb2.Vocabulary) -> None:
        """See `hub_client.Executor`."""
        self.vocabularies.append(vocabulary)

    def _run(self) -> None:
        while True:
            step = self._steps.get()
            if 913 in step.slots:
                self.hub.fail(StepError("cannot"), fatal=False)
            elif 966 in step.slots:
                self.hub.fail(RuntimeError("broken"), fatal=True)
            else:
                self.hub.deliver(
                    worker_pb2.StepResult(epoch=step.epoch, step_id=step.step_id, tokens=step.slots)
                )


class Running:
    """A hub client that runs in a thread."""

    def __init__(self, address: str, token: str = "") -> None:
        self.device = EchoDevice()
        self.metrics = WorkerMetrics("m", "g")
        hello = worker_pb2.Hello(model_name="m", group_name="g", protocol_min=1, protocol_max=1)
        self.hub = self.device.hub = HubClient(address, hello, token, self.metrics, structlog.get_logger())
        self.codes: list[int] = []
        self._thread = threading.Thread(target=lambda: self.codes.append(self.hub.run(self.device)))
        self._thread.start()

    def join(self) -> int:
        """The exit code."""
        self._thread.join(WAIT_S)
        return self.codes[0]


@pytest.fixture
def hub():
    server = FakeHub()
    yield server
    server.stop()


@pytest.fixture
def running(hub):
    client = Running(hub.address)
    yield client
    client.hub.stop()
    client.join()


def steps(epoch: int, count: int) -> list[worker_pb2.Step]:
    return [worker_pb2.Step(epoch=epoch, step_id=i, num_iterations=1, slots=[i, i + 1]) for i in range(count)]


def test_steps_are_answered_in_order(hub, running):
    session = hub.next_session()
    assert session.hello.model_name == "m"
    session.start(7)
    for step in steps(7, 50):
        session.send(step)
    results = [session.result() for _ in range(50)]
    assert [r.step_id for r in results] == list(range(50))
    assert {r.epoch for r in results} == {7}
    assert list(results[3].tokens) == [3, 4]
    assert running.device.epochs == [7]


def test_the_vocabulary_is_learnt(hub, running):
    session = hub.next_session()
    session.start(1)
    vocabulary = scheduler_pb2.Vocabulary(tokens=[b"a", b"\xff"], special_token_ids=[1], eos_token_id=1)
    session.outgoing.put(worker_pb2.AttachResponse(vocabulary=vocabulary))
    session.send(steps(1, 1)[0])
    session.result()
    assert running.device.vocabularies == [vocabulary]


def test_a_silent_worker_sends_heartbeats(hub, running):
    session = hub.next_session()
    session.start(1)
    for _ in range(2):
        session.heartbeats.get(timeout=WAIT_S)


def test_a_broken_stream_resets_and_dials_again(hub, running):
    first = hub.next_session()
    first.start(1)
    first.send(steps(1, 1)[0])
    first.result()
    first.close()
    second = hub.next_session()
    assert second.hello == first.hello
    assert running.device.epochs == [1, 0]
    second.start(2)
    second.send(steps(2, 1)[0])
    assert second.result().epoch == 2
    assert running.device.epochs == [1, 0, 2]


def test_a_scheduler_that_comes_back_is_found(hub):
    """The worker dials for ever; it may start before its scheduler."""
    address = hub.address
    hub.stop()
    client = Running(address)
    time.sleep(0.5)
    assert not client.codes
    client.hub.stop()
    assert client.join() == 0


def test_refusal_ends_the_worker(hub):
    hub.refusal = (grpc.StatusCode.FAILED_PRECONDITION, "model_digest differs")
    assert Running(hub.address).join() == EXIT_REFUSED


def test_a_wrong_token_ends_the_worker(hub):
    hub.refusal = (grpc.StatusCode.UNAUTHENTICATED, "a bearer token is needed")
    assert Running(hub.address).join() == EXIT_REFUSED


def test_the_token_is_presented(hub):
    client = Running(hub.address, token="secret")
    assert hub.next_session().metadata["authorization"] == "Bearer secret"
    client.hub.stop()
    assert client.join() == 0


def test_stop_ends_the_session(hub, running):
    session = hub.next_session()
    session.start(1)
    session.send(steps(1, 1)[0])
    session.result()
    running.hub.stop()
    session.ended.get(timeout=WAIT_S)
    assert running.join() == 0


def test_a_step_of_another_epoch_ends_the_session(hub, running):
    first = hub.next_session()
    first.start(4)
    first.send(steps(5, 1)[0])
    assert hub.next_session().hello.group_name == "g"
    assert first.results.empty()


def test_a_step_that_cannot_be_done_ends_the_session(hub, running):
    first = hub.next_session()
    first.start(1)
    first.send(worker_pb2.Step(epoch=1, slots=[913]))
    second = hub.next_session()
    second.start(2)
    second.send(steps(2, 1)[0])
    assert second.result().epoch == 2


def test_a_broken_device_ends_the_process(hub):
    client = Running(hub.address)
    session = hub.next_session()
    session.start(1)
    session.send(worker_pb2.Step(epoch=1, slots=[966]))
    assert client.join() == 1


def test_late_results_are_dropped(hub, running):
    first = hub.next_session()
    first.start(1)
    first.close()
    second = hub.next_session()
    running.hub.deliver(worker_pb2.StepResult(epoch=1, step_id=0))
    second.start(2)
    second.send(steps(2, 1)[0])
    assert second.result().epoch == 2
