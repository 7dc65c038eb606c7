"""Spans of rows: from the step that brings a row to the last one that it took part in."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from gpu_worker.spans import RowSpans
from pagoda.internal.v1.worker_pb2 import ROW_END_STOP, NewRow, Step, StepResult
from pagoda.tracing import Tracing
from tests.support.otlp import Receiver, receiver

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = f"00-{TRACE}-00f067aa0ba902b7-01"


@pytest.fixture
def taken() -> Iterator[Receiver]:
    with receiver() as running:
        yield running


@pytest.fixture
def spans(taken: Receiver) -> RowSpans:
    return RowSpans(Tracing.start(taken.url, "worker"), "w7", 1)


def run(spans: RowSpans, step: Step, sampling: list[int], result: StepResult | None = None) -> bool:
    """A step and its result; whether anyone wanted it."""
    report = spans.staged(step, np.array(sampling, dtype=np.int64))
    if report is not None:
        report(result or StepResult())
    return report is not None


def counts(taken: Receiver) -> dict[int, tuple[int, int]]:
    """(steps, tokens) of each span, by slot."""
    found = {}
    for span in taken.of(TRACE):
        seen = span.attributes
        assert (span.name, seen["pagoda.worker"], seen["pagoda.rank"]) == ("worker", "w7", 1)
        found[seen["pagoda.slot"]] = (seen["pagoda.steps"], seen["pagoda.tokens"])
    return found


class Blind:
    """Stands for a step of untraced rows: whoever reads a column of it fails."""

    new_rows = ()


def test_steps_of_untraced_rows_are_not_read(spans: RowSpans) -> None:
    assert not run(spans, Blind(), [3])  # type: ignore[arg-type]
    assert not run(spans, Step(new_rows=[NewRow(slot=3)], slots=[3], num_iterations=1), [3])
    assert not run(RowSpans(None, "w", 0), Step(new_rows=[NewRow(slot=3, traceparent=PARENT)]), [])


def test_a_row_counts_its_steps_and_tokens_until_it_ends(spans: RowSpans, taken: Receiver) -> None:
    rows = [NewRow(slot=4, traceparent=PARENT), NewRow(slot=5), NewRow(slot=6, traceparent=PARENT)]
    # Slot 6 is in the middle of its prompt: it takes part, and does not sample.
    assert run(spans, Step(new_rows=rows, slots=[4, 5, 6], num_iterations=1), [5, 4])
    assert run(spans, Step(slots=[4, 5, 6], num_iterations=1), [4, 5, 6])
    ended = StepResult(num_sampled=[4, 2, 4], ended_rows=[1], ended_reasons=[ROW_END_STOP])
    assert run(spans, Step(slots=[6, 4, 5], num_iterations=4), [6, 4, 5], ended)
    masked = StepResult(num_sampled=[4, 0, 4])
    assert run(spans, Step(slots=[6, 4, 5], num_iterations=4), [6, 4, 5], masked)
    assert run(spans, Step(slots=[5], num_iterations=1, released_slots=[4, 6]), [5])
    assert not run(spans, Step(slots=[5], num_iterations=1), [5])
    spans.close()
    assert counts(taken) == {4: (3, 4), 6: (4, 9)}


def test_a_result_that_comes_late_counts(spans: RowSpans, taken: Receiver) -> None:
    new = [NewRow(slot=1, traceparent=PARENT)]
    first = spans.staged(Step(new_rows=new, slots=[1], num_iterations=1), np.array([1]))
    second = spans.staged(Step(slots=[1], num_iterations=3), np.array([1]))
    third = spans.staged(Step(released_slots=[1], new_rows=new, slots=[1], num_iterations=1), np.array([1]))
    for report in (first, second, third):
        assert report is not None
        report(StepResult())
    spans.close()
    assert sorted(s.attributes["pagoda.tokens"] for s in taken.of(TRACE)) == [1, 4]
    assert [s.failed for s in taken.of(TRACE)] == [False, True], "the second was there when the worker ended"


def test_the_end_of_a_session_ends_its_rows(spans: RowSpans, taken: Receiver) -> None:
    assert run(spans, Step(new_rows=[NewRow(slot=2, traceparent=PARENT)], slots=[2], num_iterations=1), [2])
    spans.clear()
    assert not run(spans, Step(slots=[2], num_iterations=1), [2])
    spans.close()
    (span,) = taken.of(TRACE)
    assert span.failed and span.message == "the session ended"
