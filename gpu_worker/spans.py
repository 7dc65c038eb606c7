"""A span for each traced row, from the step that brings it to the last one that it took part in.

A row that ends by itself is reported at once. One that is taken away (its client left, it was preempted) is
reported when a later step releases its slot: an idle worker has none.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from pagoda.internal.v1.worker_pb2 import Step, StepResult
from pagoda.tracing import Attributes, Span, Tracing

Report = Callable[[StepResult], None]


@dataclass(eq=False)
class _Row:
    span: Span
    slot: int
    last: float
    num_steps: int = 0
    num_tokens: int = 0


class RowSpans:
    """The traced rows of a worker; none without `tracing`."""

    def __init__(self, tracing: Tracing | None, group: str, rank: int) -> None:
        self._tracing = tracing
        self._worker: Attributes = {"pagoda.worker": group, "pagoda.rank": rank}
        self._rows: dict[int, _Row] = {}

    def staged(self, step: Step, sampling: np.ndarray) -> Report | None:
        """A step enters the device; `sampling` (int64[R]) are the slots that sample.

        Returns:
            What wants the step's result, from whatever thread and however late; None where no row is traced,
            without a look at the step's columns.
        """
        rows, tracing = self._rows, self._tracing
        if tracing is None or not (rows or any(new.traceparent for new in step.new_rows)):
            return None
        released = [rows.pop(slot) for slot in step.released_slots if slot in rows]
        for new in step.new_rows:
            if new.traceparent:
                span = tracing.begin("worker", {"traceparent": new.traceparent}, self._worker)
                rows[new.slot] = _Row(span, new.slot, time.monotonic())
        taking_part = [rows[slot] for slot in rows.keys() & step.slots]
        drawing = [(place, rows[slot]) for place, slot in enumerate(sampling.tolist()) if slot in rows]

        def report(result: StepResult) -> None:
            for row in taking_part:
                row.num_steps, row.last = row.num_steps + 1, time.monotonic()
            for place, row in drawing:
                row.num_tokens += result.num_sampled[place] if result.num_sampled else step.num_iterations
            _end(tracing, [*released, *(row for place, row in drawing if place in result.ended_rows)])

        return report

    def clear(self) -> None:
        """The session has ended, and with it every row."""
        if self._tracing is not None:
            _end(self._tracing, self._rows.values(), "the session ended")
        self._rows = {}

    def close(self) -> None:
        """The worker ends: send what is left, within a bound."""
        self.clear()
        if self._tracing is not None:
            self._tracing.close()


def _end(tracing: Tracing, rows: Iterable[_Row], error: str = "") -> None:
    for row in rows:
        if row.span.is_recording():  # not ended yet
            counts = {"pagoda.slot": row.slot, "pagoda.steps": row.num_steps, "pagoda.tokens": row.num_tokens}
            tracing.finish(row.span, counts, error, row.last)
