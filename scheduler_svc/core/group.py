"""A request is a sequence group: n samples of one prompt that share its blocks.

A group is admitted, preempted and resumed as a whole. Its *leader*, the first sample that has not
ended, computes the prompt; the others, the *followers*, fork from it: before any output by sampling
from the leader's logits, on resume by sharing the leader's full prompt blocks.
"""

from __future__ import annotations

from array import array
from enum import IntEnum

import msgspec

from scheduler_svc.core.beams import Search
from scheduler_svc.core.events import Finish, RequestArrived, RequestEnd, Sampling
from scheduler_svc.core.prefix import root_hash
from scheduler_svc.core.request import Sequence


class State(IntEnum):
    """Where a group stands."""

    NEW = 0  # in no queue and on no worker, between two of them
    WAITING = 1
    RUNNING = 2
    ENDED = 3


class Group:
    """One request. `order` is its place in arrival; lower `priority` runs first."""

    def __init__(self, event: RequestArrived, order: int, max_model_len: int, now: float) -> None:
        self.key = event.key
        self.session = event.session
        self.handle = event.handle
        self.request_id = event.request_id
        self.traceparent = event.traceparent
        self.priority = event.priority
        self.order = order
        self.root = root_hash(event.cache_salt)
        self.num_prompt = len(event.prompt)
        self.state = State.NEW
        self.worker = ""  # the worker whose queue or rows it is in
        self.followers: list[Sequence] = []  # samples that hold a slot and wait for the leader
        self.num_preemptions = 0
        self.resume_after = -1  # step that must be confirmed before it may run again
        self.num_replays = 0
        self.num_deaths = 0  # worker deaths in a row without a token gained
        self.output_at_death = 0
        self.pauses: list[tuple[str, float]] = []
        self.cached_tokens = 0
        self.arrived = now
        self.first_scheduled: float | None = None
        self.first_token: float | None = None
        # The first prompt token whose logprob has not been delivered; num_prompt when no more are wanted.
        self.next_logprob = self.num_prompt
        if event.sampling.num_prompt_logprobs is not None and not any(r.tokens for r in event.resume):
            self.next_logprob = 1
        # A search that had not ended starts anew; one that had is n samples like others.
        width = None if event.resume and all(r.finished for r in event.resume) else event.sampling.beam_width
        num_samples = width or event.n
        self.samplings = [_with_seed(event.sampling, i) for i in range(num_samples)]
        limit = min(self.num_prompt + event.max_tokens, max_model_len)
        self.samples = [
            Sequence(self, i, array("I", event.prompt), self.num_prompt, limit) for i in range(num_samples)
        ]
        self.search = Search(event.sampling, event.n, self.samples[0]) if width else None
        for sample, resumed in zip(self.samples, () if width else event.resume, strict=False):
            sample.tokens.extend(resumed.tokens)
            sample.finish = Finish.STOP if resumed.finished else self._finish_of(sample)

    def _finish_of(self, sample: Sequence) -> Finish | None:
        """How a resumed sample had ended by its own tokens, if it had."""
        sampling = self.samplings[sample.index]
        if not sample.num_output:
            return None
        if sample.tokens[-1] in sampling.stop_token_ids and sample.num_output > sampling.min_tokens:
            return Finish.STOP
        return Finish.LENGTH if len(sample.tokens) >= sample.last_position else None

    @property
    def rank(self) -> tuple[int, int]:
        """Place in every queue: priority first, then arrival."""
        return (self.priority, self.order)

    def live(self) -> list[Sequence]:
        """Samples that have not ended."""
        return [s for s in self.samples if s.finish is None]

    def starters(self) -> list[Sequence]:
        """Samples that enter a row when the group is admitted; a search's others are moved to."""
        return self.live() if self.search is None else [beam.sequence for beam in self.search.beams]

    def num_to_prefill(self, sequence: Sequence) -> int:
        """Tokens of `sequence` that come before it decodes: several beams compute their last one together."""
        return len(sequence.tokens) - (self.search is not None and len(self.search.beams) > 1)

    @property
    def num_output(self) -> int:
        """Output tokens of all samples."""
        return sum(s.num_output for s in self.samples)

    @property
    def swapped(self) -> bool:
        """Its KV is in host blocks."""
        return any(s.host_blocks for s in self.samples)

    @property
    def alone(self) -> bool:
        """It was there at two deaths in a row without gaining a token: it may be their cause."""
        return self.num_deaths >= 2

    def blocks_needed(self, block_size: int, lengths: list[int]) -> int:
        """Blocks for live samples of these lengths: the prompt's full blocks once, the rest for each."""
        shared = self.num_prompt // block_size
        return shared + sum(-(-length // block_size) - shared for length in lengths)

    def end(self, reason: Finish, now: float, failure: str = "") -> RequestEnd:
        """The record of this group's end, once every sample has ended."""
        self.state = State.ENDED
        return RequestEnd(
            key=self.key,
            handle=self.handle,
            request_id=self.request_id,
            reason=reason,
            reasons=tuple(int(s.finish or reason) for s in self.samples),
            prompt_tokens=self.num_prompt,
            cached_tokens=self.cached_tokens,
            completion_tokens=0 if self.search else self.num_output,  # a search's beams are nobody's
            num_preemptions=self.num_preemptions,
            num_replays=self.num_replays,
            arrived=self.arrived,
            first_scheduled=self.first_scheduled,
            first_token=self.first_token,
            last_token=now if reason in (Finish.STOP, Finish.LENGTH) else None,
            ended=now,
            failure=failure,
            pauses=tuple(self.pauses),
        )


def _with_seed(sampling: Sampling, index: int) -> Sampling:
    """Sample `index` draws with seed + index, so that it equals a single request with that seed."""
    if index == 0:
        return sampling
    return msgspec.structs.replace(sampling, seed=(sampling.seed + index) % (1 << 64))
