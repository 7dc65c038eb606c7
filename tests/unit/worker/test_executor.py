"""The executor's thread: order, idle times, resets, and what it does about steps it cannot run."""

from __future__ import annotations

import queue
import threading

import pytest

from gpu_worker.executor import DeviceExecutor
from gpu_worker.metrics import WorkerMetrics
from gpu_worker.spans import RowSpans
from gpu_worker.staging import StepError
from pagoda.internal.v1 import worker_pb2
from tests.unit.worker.harness import CPU, prompt

WAIT_S = 60.0


class Harness:
    """An executor over a tiny model, with its results and failures in queues."""

    def __init__(self, device) -> None:
        self.device = device
        self.results: queue.SimpleQueue = queue.SimpleQueue()
        self.failures: queue.SimpleQueue = queue.SimpleQueue()
        self.metrics = WorkerMetrics("m", "g")
        self.executor = DeviceExecutor(
            device.runner, device.stager, self.metrics, self.results.put, self.failures.put, CPU,
            RowSpans(None, "g", 0),
        )  # fmt: skip
        self.executor.start()

    def result(self) -> worker_pb2.StepResult:
        return self.results.get(timeout=WAIT_S)

    def failure(self) -> BaseException:
        return self.failures.get(timeout=WAIT_S)


@pytest.fixture
def worker(device):
    harness = Harness(device)
    yield harness
    harness.executor.close(WAIT_S)


def first_step(epoch: int, tokens: list[int], slot: int = 0, **sampling) -> worker_pb2.Step:
    return worker_pb2.Step(
        epoch=epoch,
        num_iterations=1,
        slots=[slot],
        num_tokens=[len(tokens)],
        new_rows=[
            worker_pb2.NewRow(
                slot=slot,
                tokens=tokens,
                num_prompt_tokens=len(tokens),
                blocks=range(4),
                last_position=60,
                sampling=worker_pb2.RowSampling(**sampling),
            )
        ],
    )


def decode(epoch: int, step_id: int, m: int = 1) -> worker_pb2.Step:
    return worker_pb2.Step(epoch=epoch, step_id=step_id, num_iterations=m, slots=[0])


def test_results_come_in_order_and_equal_direct_runs(worker):
    expected = worker.device.generate(0, prompt(9), 8)
    worker.executor.reset(3)
    worker.executor.submit(first_step(3, prompt(9)))
    for step_id in range(1, 6):
        worker.executor.submit(decode(3, step_id))
    worker.executor.submit(decode(3, 6, m=2))
    results = [worker.result() for _ in range(7)]
    assert [r.step_id for r in results] == list(range(7))
    assert {r.epoch for r in results} == {3}
    assert [t for r in results for t in r.tokens] == expected
    assert all(r.device_us > 0 for r in results)
    assert results[0].idle_us == 0


def test_idle_time_counts_only_when_nothing_waited(worker):
    worker.executor.reset(1)
    worker.executor.submit(first_step(1, prompt(9)))
    worker.result()
    threading.Event().wait(0.05)
    worker.executor.submit(decode(1, 1))
    assert 40_000 < worker.result().idle_us < 10_000_000


def test_reset_drops_queued_steps_and_rows(worker):
    worker.executor.reset(1)
    worker.executor.submit(first_step(1, prompt(9)))
    for step_id in range(1, 40):
        worker.executor.submit(decode(1, step_id))
    worker.executor.reset(2)
    count = 0
    while not worker.results.empty():
        assert worker.result().epoch == 1
        count += 1
    assert count <= 40
    worker.executor.submit(first_step(2, prompt(9)))  # slot 0 is free again
    assert worker.result().epoch == 2


def test_a_bad_step_is_reported_and_a_reset_mends(worker):
    worker.executor.reset(1)
    worker.executor.submit(decode(1, 0))
    assert isinstance(worker.failure(), StepError)
    worker.executor.submit(first_step(1, prompt(9)))  # of the session that is lost
    worker.executor.reset(2)
    worker.executor.submit(first_step(2, prompt(9)))
    assert worker.result().epoch == 2
    assert worker.failures.empty() and worker.results.empty()


def test_a_step_of_another_epoch_is_refused(worker):
    worker.executor.reset(1)
    worker.executor.submit(first_step(2, prompt(9)))
    assert "epoch 2" in str(worker.failure())


def test_a_broken_device_is_reported_and_ends_the_thread(worker):
    def broken(*_):
        raise MemoryError("no memory")

    worker.device.runner.run = broken
    worker.executor.reset(1)
    worker.executor.submit(first_step(1, prompt(9)))
    assert isinstance(worker.failure(), MemoryError)
    worker.executor.reset(2)  # returns, although nobody works any more


def test_metrics(worker):
    worker.executor.reset(1)
    worker.executor.submit(first_step(1, prompt(9)))
    worker.executor.submit(decode(1, 1, m=3))
    worker.result(), worker.result()
    worker.executor.reset(2)  # by now the metrics of both are written
    labels = {"model_name": "m", "engine": "g"}
    value = worker.metrics.registry.get_sample_value
    assert value("pagoda:worker_steps_total", labels) == 2
    assert value("pagoda:worker_generated_tokens_total", labels) == 4
    for part in ("stage", "device", "output"):
        assert value("pagoda:worker_step_seconds_count", {**labels, "part": part}) == 2
    assert value("pagoda:worker_idle_seconds_count", labels) == 2
