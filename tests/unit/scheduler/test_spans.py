"""The spans of requests in the tokens tier: from the core's times, over a real socket."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from pagoda.tracing import Tracing
from pagoda.v1 import scheduler_pb2 as pb
from scheduler_svc.core.config import CoreConfig
from scheduler_svc.core.events import Finish, RequestEnd
from scheduler_svc.spans import record_end
from tests.support.otlp import Receiver, receiver
from tests.support.session_client import request
from tests.unit.scheduler.conftest import LocalScheduler, local_scheduler

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = f"00-{TRACE}-00f067aa0ba902b7-01"


def end(**changes: object) -> RequestEnd:
    fields: dict[str, object] = {
        "key": 1, "handle": 1, "request_id": "r", "reason": Finish.STOP, "reasons": (1,), "prompt_tokens": 10,
        "cached_tokens": 4, "completion_tokens": 7, "num_preemptions": 0, "num_replays": 0, "arrived": 1.0,
        "first_scheduled": 2.0, "first_token": 3.0, "last_token": 9.0, "ended": 9.0,
    }  # fmt: skip
    return RequestEnd(**{**fields, **changes})


def spans_of(end: RequestEnd) -> list[tuple[str, float, float, str]]:
    """Name, beginning and end in seconds since the request came, and what failed."""
    with receiver() as taken:
        tracing = Tracing.start(taken.url, "scheduler")
        assert tracing is not None
        record_end(tracing, PARENT, 0, end)
        tracing.close()
        spans = taken.of(TRACE)
    begin = spans[0].start
    return [
        (s.name, round((s.start - begin) / 1e9, 3), round((s.end - begin) / 1e9, 3), s.message) for s in spans
    ]


def test_a_request_is_queue_prefill_and_decode() -> None:
    assert spans_of(end()) == [("queue", 0, 1, ""), ("prefill", 1, 2, ""), ("decode", 2, 8, "")]


@pytest.mark.parametrize(
    ("come_to", "expected"),
    [
        ({"first_scheduled": None, "first_token": None}, [("queue", 0, 8, "it broke")]),
        ({"first_token": None}, [("queue", 0, 1, ""), ("prefill", 1, 8, "it broke")]),
    ],
)
def test_what_it_did_not_come_to_is_no_span(come_to: dict, expected: list) -> None:
    failed = end(reason=Finish.ERROR, failure="it broke", last_token=None, **come_to)
    assert spans_of(failed) == expected


def test_each_pause_is_a_span() -> None:
    pauses = (
        ("preempted", 4.0),
        ("resumed", 5.0),
        ("worker_lost", 6.0),
        ("resumed", 7.0),
        ("preempted", 8.0),
    )
    assert spans_of(end(pauses=pauses))[3:] == [
        ("preempted", 3, 4, ""),
        ("worker_lost", 5, 6, ""),
        ("preempted", 7, 8, ""),
    ]


@pytest.fixture
async def traced() -> AsyncIterator[tuple[LocalScheduler, Receiver]]:
    with receiver() as taken:
        async with local_scheduler(CoreConfig(prefix_cache=False)) as local:
            tracing = local.engine.tracing = Tracing.start(taken.url, "scheduler")
            assert tracing is not None
            yield local, taken
            local.engine.tracing = None
            tracing.close()


def asked(trace: int, **options: object) -> pb.GenerateTokensRequest:
    """A request of the trace with this number."""
    made = request([1 + trace, 2, 3], ignore_eos=True, **options)
    made.traceparent = f"00-{trace:032x}-00f067aa0ba902b7-01"
    return made


async def test_preempted_and_replayed_requests_say_when(traced: tuple[LocalScheduler, Receiver]) -> None:
    local, taken = traced
    worker = await local.attach(blocks=32, iteration_ms=1)
    async with local.session() as client:
        handles = await client.submit(*(asked(i, max_tokens=60) for i in range(1, 5)))
        await client.results(handles)
        (long,) = await client.submit(asked(9, max_tokens=100))
        await client.received[long].began.wait()
        await worker.stop()
        await local.attach(blocks=32)
        await client.results([long])
    assert local.engine.tracing is not None
    local.engine.tracing.close()
    paused = [span for i in range(1, 5) for span in taken.of(f"{i:032x}") if span.name == "preempted"]
    assert len(paused) == local.engine.core.stats.num_preemptions > 0
    names = taken.names(f"{9:032x}")
    assert sorted(names) == ["decode", "prefill", "queue", "worker_lost"]
    for span in paused:
        decode = next(s for s in taken.of(span.trace_id) if s.name == "decode")
        assert decode.start <= span.start < span.end <= decode.end


async def test_untraced_requests_have_no_spans(traced: tuple[LocalScheduler, Receiver]) -> None:
    local, taken = traced
    await local.attach()
    plain, off = request([1, 2, 3], max_tokens=3), asked(2, max_tokens=3)
    off.traceparent = off.traceparent[:-1] + "0"
    malformed = asked(3, max_tokens=3)
    malformed.traceparent = "nonsense"
    async with local.session() as client:
        await client.results(await client.submit(plain, off, malformed, asked(4, max_tokens=3)))
    assert local.engine.tracing is not None
    local.engine.tracing.close()
    assert {span.trace_id for span in taken.spans} == {f"{4:032x}"}
