"""The loop around the core: one turn for everything that came together, and what breaks it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import structlog

from pagoda.v1 import scheduler_pb2 as pb
from scheduler_svc.__main__ import Service
from scheduler_svc.config import SchedulerSettings
from scheduler_svc.core.config import CoreConfig
from scheduler_svc.core.events import (
    Finish,
    Outputs,
    Plan,
    RequestArrived,
    RequestStopped,
    StepDone,
    WorkerAttached,
)
from scheduler_svc.core.scheduler import Scheduler
from scheduler_svc.engine import Engine
from scheduler_svc.errors import InvalidRequest, NoWorker
from scheduler_svc.metrics import Metrics
from scheduler_svc.validation import ServedModel
from tests.support.session_client import request

MODEL = ServedModel("m", "d", 1000, 100, (2,), 4)
ATTACHED = WorkerAttached("w0", 1, 64, 4, 8, 100, 256, 4, 2)


class Watched(Scheduler):
    """A core that remembers what it was given."""

    def __init__(self) -> None:
        super().__init__(CoreConfig())
        self.given: list[tuple[float, list[str]]] = []

    def apply(self, events: Any, now: float) -> Outputs:
        self.given.append((now, [type(event).__name__ for event in events]))
        return super().apply(events, now)


class Box:
    """A session that keeps what it gets."""

    def __init__(self) -> None:
        self.outputs: list[Any] = []

    def deliver(self, output: Any) -> None:
        self.outputs.append(output)

    def sample_aborted(self, handle: int, index: int) -> None:
        self.outputs.append((handle, index))


@pytest.fixture
async def core() -> Watched:
    return Watched()


@pytest.fixture
async def sent() -> list[Plan]:
    return []


@pytest.fixture
async def engine(core: Watched, sent: list[Plan]) -> Engine:
    """An engine with a worker attached."""
    made = Engine(core, 100, Metrics(), structlog.get_logger(), clock=lambda: 5.0)
    made.connect(lambda plan, num_sampling, message: sent.append(plan), lambda message: None)
    made.worker_attached(ATTACHED, MODEL, 1)
    await asyncio.sleep(0)
    return made


async def test_what_comes_in_one_turn_is_applied_together(
    engine: Engine, core: Watched, sent: list[Plan]
) -> None:
    session = engine.open_session(Box())
    for i in range(3):
        engine.submit(session, i, request([1, 2], f"r{i}", max_tokens=5))
    engine.stop(2, None, Finish.CANCELLED)
    assert len(core.given) == 1, "nothing is applied while events still come in"
    await asyncio.sleep(0)
    assert core.given[1:] == [(5.0, ["RequestArrived"] * 3 + ["RequestStopped"])]
    assert [len(plan.slots) for plan in sent] == [2, 2], "two steps ahead, the stopped request left out"


async def test_metrics_and_log_lines_come_after_the_writers(engine: Engine, sent: list[Plan]) -> None:
    happened: list[str] = []
    wake = asyncio.Event()

    class Waking(Box):
        def deliver(self, output: Any) -> None:
            wake.set()

    async def write() -> None:
        await wake.wait()
        happened.append("written")

    for name in ("planned", "turn", "step", "request_ended"):
        setattr(engine.metrics, name, lambda *_, name=name: happened.append(name))
    session = engine.open_session(Waking())
    engine.submit(session, 1, request([1, 2], "r", max_tokens=1))
    await asyncio.sleep(0)
    assert len(sent) == 1 and happened == [], "the step goes first"
    await asyncio.sleep(0)
    assert happened == ["planned", "turn"]
    happened.clear()
    writer = asyncio.create_task(write())
    await asyncio.sleep(0)
    engine.step_done(StepDone("w0", 1, 0, [7], [], [0], [2], (), 11_000, 5), 0.001)
    await asyncio.sleep(0)
    assert happened == [], "neither before what is written"
    await writer
    await asyncio.sleep(0)
    assert happened == ["written", "step", "request_ended", "turn"]


async def test_a_request_gets_a_key_an_id_and_a_seed(engine: Engine, core: Watched) -> None:
    session = engine.open_session(Box())
    seen: list[RequestArrived] = []
    engine.core.apply = lambda events, now: seen.extend(events) or Outputs({})  # type: ignore[method-assign]
    keys = [engine.submit(session, i, request([1], max_tokens=5)) for i in range(2)]
    await asyncio.sleep(0)
    assert [event.key for event in seen] == keys == [1, 2]
    assert seen[0].request_id and seen[0].request_id != seen[1].request_id
    assert seen[0].sampling.seed != seen[1].sampling.seed


async def test_until_the_core_has_the_first_worker_requests_are_unavailable() -> None:
    """It could not tell yet whether they fit."""
    made = Engine(Watched(), 100, Metrics(), structlog.get_logger())
    session = made.open_session(Box())
    made.worker_attached(ATTACHED, MODEL, 1)
    with pytest.raises(NoWorker):
        made.submit(session, 1, request([1]))
    await asyncio.sleep(0)
    assert made.submit(session, 1, request([1]))


async def test_outputs_of_a_closed_session_are_dropped(engine: Engine, core: Watched) -> None:
    box = Box()
    session = engine.open_session(box)
    key = engine.submit(session, 7, request([1, 2], "r", max_tokens=5))
    await asyncio.sleep(0)
    engine.close_session(session)
    engine.stop(key, None, Finish.CANCELLED)
    await asyncio.sleep(0)
    assert not box.outputs
    assert not engine.abort("r", None), "it is known to have ended all the same"


async def test_refusals_change_nothing(engine: Engine, core: Watched) -> None:
    session = engine.open_session(Box())
    with pytest.raises(InvalidRequest):
        engine.submit(session, 1, pb.GenerateTokensRequest())
    engine.model = None
    with pytest.raises(NoWorker):
        engine.submit(session, 1, request([1]))
    await asyncio.sleep(0)
    assert len(core.given) == 1


async def test_a_core_that_breaks_ends_the_service(engine: Engine, core: Watched) -> None:
    """What the core thinks cannot be trusted any more; nothing is planned from it."""

    def broken(_events: Any, _now: float) -> Outputs:
        raise AssertionError("a block is lost")

    core.apply = broken  # type: ignore[method-assign]
    engine.stop(1, None, Finish.CANCELLED)
    await asyncio.sleep(0)
    assert engine.failed.done()
    engine.stop(1, None, Finish.CANCELLED)
    await asyncio.sleep(0)
    service = Service(SchedulerSettings(), structlog.get_logger())
    service._engine = engine
    with pytest.raises(AssertionError, match="a block is lost"):
        await service._until_told([])


async def test_stop_is_an_event_like_any_other(engine: Engine, core: Watched) -> None:
    seen: list[Any] = []
    core.apply = lambda events, now: seen.extend(events) or Outputs({})  # type: ignore[method-assign]
    engine.stop(3, 1, Finish.STOP)
    await asyncio.sleep(0)
    assert seen == [RequestStopped(3, 1, Finish.STOP)]
