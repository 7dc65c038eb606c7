"""What came for each request of the long run, held against what must come: each one ends exactly once.

No input or output happens here: `Book.take` is given the scheduler's messages and notes what is wrong.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from itertools import repeat

import grpc

from benchmarks.gpu_soak_load import End, Planned
from pagoda.v1 import scheduler_pb2 as pb

MOST_PROBLEMS = 100  # kept; more are only counted
_TAKEN = grpc.StatusCode.ALREADY_EXISTS.value[0]


@dataclass
class Entry:
    """A request that is open, or that was stopped and of which something may still be on its way."""

    planned: Planned
    counts: list[int]
    tokens: list[list[int]]
    """Of each sample, where they matter: where there are stop ids."""
    reasons: dict[int, int] = field(default_factory=dict)
    stopped: set[int] = field(default_factory=set)
    """Samples that were stopped one by one."""
    fence: int | None = None
    """The first handle sent after the whole request was stopped."""

    @classmethod
    def of(cls, planned: Planned) -> Entry:
        """The entry of a request that was just sent."""
        return cls(planned, [0] * planned.n, [[] for _ in range(planned.n)])


class Book:
    """All requests of one session.

    `problems` are violations, for people; `ended` counts how requests ended, by a word.
    """

    def __init__(self, vocab_size: int) -> None:
        self.problems: list[str] = []
        self.num_problems = 0
        self.ended: Counter[str] = Counter()
        self.num_tokens = self.num_cached = self.num_prompt = 0
        self.open: dict[int, Entry] = {}
        self._vocab_size = vocab_size
        self._stopped: dict[int, Entry] = {}
        self._closed: dict[int, str] = {}
        self._newest = 0  # the newest handle with a token before the message that is being read
        self._next = 1

    def send(self, planned: Planned) -> list[int]:
        """Handles for a request; two where it is sent twice, of which the second must be refused."""
        handles = [self._next]
        self.open[self._next] = Entry.of(planned)
        self._next += 1
        if planned.twice:
            refused = Planned(planned.request, End.REFUSED, code=_TAKEN, field="request_id")
            self.open[self._next] = Entry.of(refused)
            handles.append(self._next)
            self._next += 1
        return handles

    def stop(self, handle: int) -> bool:
        """The whole request is stopped now; False when it had ended."""
        entry = self.open.pop(handle, None)
        if entry is None:
            return False
        entry.fence = self._next
        self._stopped[handle] = entry
        return True

    def stop_sample(self, handle: int, index: int) -> bool:
        """One sample is stopped now; False when it had ended."""
        entry = self.open.get(handle)
        if entry is None or index in entry.reasons:
            return False
        entry.stopped.add(index)
        return True

    def drop(self) -> None:
        """The session is over: what is open is nobody's concern any more."""
        self.ended["dropped with the session"] += len(self.open)
        self.ended[End.CANCELLED.value] += len(self._stopped)
        self.open.clear()
        self._stopped.clear()

    def settle(self) -> None:
        """The scheduler is idle: what was stopped has been."""
        for handle, entry in self._stopped.items():
            self._close(handle, entry.planned.end.value)
        self._stopped.clear()

    def _close(self, handle: int, how: str) -> None:
        self._closed[handle] = how
        self.ended[how] += 1

    def _wrong(self, problem: str) -> None:
        self.num_problems += 1
        if len(self.problems) < MOST_PROBLEMS:
            self.problems.append(problem)

    # --------------------------------------------------------------------------------- what came

    def take(self, out: pb.OutputColumns) -> None:
        """One message of the scheduler."""
        tokens = list(out.tokens)
        self.num_tokens += len(tokens)
        if tokens and max(tokens) >= self._vocab_size:
            self._wrong(f"token {max(tokens)} is out of the vocabulary")
        rows = len(out.handles)
        indexes = out.indexes or repeat(0, rows)
        counts = out.num_tokens or repeat(1, rows)
        reasons = dict(zip(out.ended_rows, out.ended_reasons, strict=True))
        with_logprobs = frozenset(out.logprob_rows)
        start = entry = newest = 0
        for row, (handle, index, count) in enumerate(zip(out.handles, indexes, counts, strict=True)):
            logprobs = None
            if row in with_logprobs:
                logprobs = out.logprobs[entry : entry + count]
                entry += count
            self._row(handle, index, tokens[start : start + count], reasons.get(row), logprobs)
            start += count
            newest = max(newest, handle)
        if start != len(tokens) or entry != len(out.logprobs):
            self._wrong("the columns of a message do not add up")
        for handle, usage in zip(out.usage_handles, out.usages, strict=True):
            self._end(handle, usage)
        for failure in out.failures:
            self._failure(failure)
        self._newest = max(self._newest, newest)

    def _row(
        self,
        handle: int,
        index: int,
        new: list[int],
        reason: int | None,
        logprobs: list[pb.TokenLogprob] | None,
    ) -> None:
        entry = self.open.get(handle)
        if entry is None:
            self._late(handle, f"{len(new)} tokens")
            return
        if index >= entry.planned.n or index in entry.reasons:
            self._wrong(f"sample {index} of request {handle} gained tokens after its end, or is none of it")
            return
        entry.counts[index] += len(new)
        if entry.planned.stops:
            entry.tokens[index] += new
        if reason is not None:
            entry.reasons[index] = reason
        if entry.planned.num_logprobs is not None:
            self._logprobs(handle, entry.planned.num_logprobs, len(new), logprobs)
        elif logprobs:
            self._wrong(f"request {handle} got logprobs that it did not ask for")

    def _logprobs(
        self, handle: int, wanted: int, num_tokens: int, logprobs: list[pb.TokenLogprob] | None
    ) -> None:
        if len(logprobs or ()) != num_tokens:
            self._wrong(f"request {handle} got {len(logprobs or ())} logprobs with {num_tokens} tokens")
        for one in logprobs or ():
            if len(one.top_ids) != wanted or len(one.top_logprobs) != wanted or one.rank < 1:
                self._wrong(f"request {handle} got {len(one.top_ids)} alternatives of {wanted}")
            elif not one.logprob <= 1e-3:
                self._wrong(f"request {handle} got a logprob of {one.logprob}")

    def _late(self, handle: int, what: str) -> None:
        """Something came for a request that is not open."""
        stopped = self._stopped.get(handle)
        if stopped is None:
            how = self._closed.get(handle)
            self._wrong(
                f"{what} came for request {handle}, which " + (f"had ended ({how})" if how else "is none")
            )
        elif stopped.fence is not None and self._newest >= stopped.fence:
            # The scheduler reads in order: it has begun what was sent after the stop.
            self._wrong(f"{what} came for request {handle} though its stop had been read")

    def _end(self, handle: int, usage: pb.Usage) -> None:
        entry = self.open.pop(handle, None)
        if entry is None:
            self._late(handle, "an end")
            if self._stopped.pop(handle, None) is not None:
                self._close(handle, "ended before its stop was read")
            return
        self._verify(handle, entry, usage)
        self.num_cached += usage.cached_tokens
        self.num_prompt += usage.prompt_tokens
        ends = set(entry.reasons.values())
        if entry.planned.end is End.ABORTED and pb.FINISH_REASON_CANCELLED in ends:
            self._close(handle, End.ABORTED.value)
        elif entry.stopped:
            self._close(handle, End.SAMPLE_CANCELLED.value)
        else:
            self._close(handle, "stop id" if pb.FINISH_REASON_STOP in ends else "length")

    def _failure(self, failure: pb.RequestFailure) -> None:
        handle, said = failure.handle, f"{failure.code} {failure.field!r} {failure.message}"
        entry = self.open.pop(handle, None)
        if entry is None:
            self._late(handle, f"a failure ({said})")
            return
        self._close(handle, End.REFUSED.value)
        planned = entry.planned
        if planned.end is not End.REFUSED:
            self._wrong(f"request {handle} failed: {said}")
        elif (failure.code, failure.field) != (planned.code, planned.field):
            self._wrong(f"request {handle} was refused for {said}, not {planned.code} {planned.field!r}")
        if any(entry.counts):
            self._wrong(f"request {handle} was refused and has tokens")

    # ---------------------------------------------------------------------------------- at its end

    def _verify(self, handle: int, entry: Entry, usage: pb.Usage) -> None:
        planned = entry.planned
        who = f"request {handle} ({planned.request.request_id})"
        if planned.end is End.REFUSED:
            self._wrong(f"{who} was served, and should have been refused for {planned.field}")
            return
        for index in range(planned.n):
            if problem := _sample_problem(entry, index):
                self._wrong(f"sample {index} of {who} {problem}")
        if usage.prompt_tokens != len(planned.request.prompt_token_ids):
            self._wrong(f"{who} counts {usage.prompt_tokens} prompt tokens")
        if usage.cached_tokens > usage.prompt_tokens:
            self._wrong(f"{who} found {usage.cached_tokens} of {usage.prompt_tokens} prompt tokens cached")
        completion = sum(entry.counts) + planned.num_resumed
        if usage.completion_tokens != completion:
            self._wrong(f"{who} counts {usage.completion_tokens} output tokens, {completion} came")


def _sample_problem(entry: Entry, index: int) -> str:
    """What is wrong with a sample of a request that has ended; empty when nothing is."""
    planned, reason = entry.planned, entry.reasons.get(index)
    count = entry.counts[index] + planned.num_resumed
    if reason is None:
        return "" if index in entry.stopped else "never ended"
    if reason == pb.FINISH_REASON_CANCELLED and planned.end is End.ABORTED:
        return "" if count <= planned.max_tokens else f"has {count} tokens of {planned.max_tokens}"
    tokens = entry.tokens[index]
    at_stop = bool(tokens) and tokens[-1] in planned.stops
    if planned.stops.intersection(tokens[:-1]):
        return "went on after a stop id"
    if reason == pb.FINISH_REASON_STOP:
        if not at_stop:
            return "says it stopped, and its last token is no stop id"
        return "" if planned.min_tokens < count <= planned.max_tokens else f"stopped after {count} tokens"
    if reason != pb.FINISH_REASON_LENGTH:
        return f"ended for reason {reason}"
    if at_stop:
        return "ended with a stop id and says that its length ended it"
    return "" if count == planned.max_tokens else f"has {count} tokens, not {planned.max_tokens}"
