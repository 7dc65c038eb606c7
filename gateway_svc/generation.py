"""One request on its way: tokens come in from the session, text comes out.

Text is made the moment tokens arrive, whether or not anybody can take it yet, so that a stop string ends a
sample at once even for a client that reads one byte a second. What waits is text, and max_tokens bounds it.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from gateway_svc.errors import GatewayError
from gateway_svc.metrics import Metrics
from gateway_svc.text.detokenize import Detokenizer, TokenBytes
from gateway_svc.text.stops import StopMatcher
from gateway_svc.text.verdicts import StopVerdicts
from pagoda.v1 import scheduler_pb2 as pb

STOP = int(pb.FINISH_REASON_STOP)
LENGTH = int(pb.FINISH_REASON_LENGTH)
NOT_ENDED = int(pb.FINISH_REASON_UNSPECIFIED)


@dataclass(frozen=True, slots=True)
class Best:
    """The client gets `count` of the samples: those with the best mean logprob a token, once all have ended.

    So logprobs are drawn; `hides_logprobs` says that they are for nothing else.
    """

    count: int
    hides_logprobs: bool


@dataclass(frozen=True, slots=True)
class GenerationSpec:
    """One prompt, in tokens, and how to continue it. `sampling` has its seed and n set."""

    request_id: str
    prompt: list[int]
    sampling: pb.SamplingParams
    stop: tuple[str, ...] = ()
    include_stop: bool = False
    skip_special: bool = True
    seen_tokens: tuple[str, ...] = ()  # special ones that are not skipped
    priority: int = 0
    cache_salt: str = ""
    best: Best | None = None  # absent: the client gets all samples
    drop_output: bool = False  # only the prompt is wanted; the one token that must be drawn is nobody's

    @property
    def num_results(self) -> int:
        """How many samples the client gets."""
        return self.sampling.n if self.best is None else self.best.count


@dataclass(slots=True)
class Delta:
    """What is new of one sample."""

    text: str
    token_ids: list[int]
    logprobs: list[pb.TokenLogprob]


class Sample:
    """One continuation of the prompt.

    `token_ids` is all of its output, which is what a resubmission after a lost scheduler needs. The token
    that completes a stop string is the last one that counts.
    """

    __slots__ = (
        "_detokenizer",
        "_logprobs",
        "_matcher",
        "_num_taken",
        "_spec",
        "_text",
        "finish_reason",
        "generation",
        "has_news",
        "index",
        "last_token_at",
        "score",
        "stop_reason",
        "token_ids",
    )

    def __init__(self, generation: Generation, index: int, table: TokenBytes) -> None:
        spec = generation.spec
        self.generation = generation
        self.index = index
        self.token_ids: list[int] = []
        self.finish_reason = NOT_ENDED
        self.stop_reason: str | int | None = None
        self.score: float | None = None  # of a beam search's result, or of one of the best
        self.last_token_at = 0.0
        self.has_news = False
        self._spec = spec
        self._detokenizer = Detokenizer(table)
        self._matcher = StopMatcher(spec.stop, spec.include_stop) if spec.stop else None
        self._text: list[str] = []
        self._logprobs: list[pb.TokenLogprob] = []
        self._num_taken = 0

    def feed(self, token_ids: list[int], logprobs: Sequence[pb.TokenLogprob], reason: int) -> bool:
        """Take new tokens, and the reason if they are the last. True if a stop string ended the sample."""
        if self.finish_reason != NOT_ENDED:
            return False  # tokens that were on their way when a stop string was seen
        # The token that the scheduler stopped at (EOS or a stop id) counts, but is not text. The last one of
        # a beam that our verdict ended is.
        is_stop_id = reason == STOP and bool(token_ids) and self.generation.is_stop_id(token_ids[-1])
        textual = token_ids[:-1] if is_stop_id and not self._spec.include_stop else token_ids
        if self._matcher is None:
            text = self._detokenizer.feed(textual)
            if text:
                self._text.append(text)
        else:
            used = self._feed_matcher(self._matcher, textual)
            if self._matcher.matched is not None:
                self.token_ids += token_ids[:used]
                self._logprobs += logprobs[:used]
                self.finish_reason, self.stop_reason = STOP, self._matcher.matched
                return reason == NOT_ENDED
        self.token_ids += token_ids
        self._logprobs += logprobs
        if reason != NOT_ENDED:
            self._end(reason)
        return False

    def take(self) -> Delta:
        """What is new since the last call."""
        hidden = self._spec.best is not None and self._spec.best.hides_logprobs
        logprobs = [] if hidden else self._logprobs
        delta = Delta("".join(self._text), self.token_ids[self._num_taken :], logprobs)
        self._text = []
        self._logprobs = []
        self._num_taken = len(self.token_ids)
        self.has_news = False
        return delta

    @property
    def is_whole(self) -> bool:
        """Whether it ended as it should."""
        return self.finish_reason in (STOP, LENGTH)

    def mean_logprob(self) -> float:
        """Of its tokens, before any of them is taken; minus infinity where there are none."""
        logprobs = [entry.logprob for entry in self._logprobs]
        return math.fsum(logprobs) / len(logprobs) if logprobs else -math.inf

    def _feed_matcher(self, matcher: StopMatcher, token_ids: Sequence[int]) -> int:
        """Token by token, because the usage depends on which of them completes a stop string."""
        for used, token_id in enumerate(token_ids, start=1):
            text = matcher.feed(self._detokenizer.feed((token_id,)))
            if text:
                self._text.append(text)
            if matcher.matched is not None:
                return used
        return len(token_ids)

    def _end(self, reason: int) -> None:
        self.finish_reason = reason
        rest = self._detokenizer.flush()
        if self._matcher is not None:
            rest = self._matcher.feed(rest) + self._matcher.flush()
            self.stop_reason = self._matcher.matched
        if rest:
            self._text.append(rest)
        if reason == STOP and self.token_ids and self.token_ids[-1] in self._spec.sampling.stop_token_ids:
            self.stop_reason = self.token_ids[-1]


class Generation:
    """One prompt with its samples. The link calls the `on_` methods; `job` is told of what is new."""

    def __init__(
        self, spec: GenerationSpec, table: TokenBytes, job: Job, eos_token_ids: Collection[int] = ()
    ) -> None:
        self.spec = spec
        self.job = job
        self.samples = [Sample(self, i, table) for i in range(spec.sampling.n)]
        # What the client gets, in its order. The best of the samples are known when all have ended.
        self.results = self.samples if spec.best is None else []
        self.first_place = 0  # of the results among the job's
        self.verdicts: StopVerdicts | None = None
        if spec.stop and spec.sampling.HasField("beam_width"):
            self.verdicts = StopVerdicts(table, spec.stop)
        eos = () if spec.sampling.ignore_eos else eos_token_ids
        self._stop_ids = frozenset([*spec.sampling.stop_token_ids, *eos])
        self.prompt_logprobs: list[pb.TokenLogprob] = []  # of the prompt's tokens after the first
        self.usage: pb.Usage | None = None
        self.first_token_at: float | None = None
        self.ended = False

    def request(self) -> pb.GenerateTokensRequest:
        """The request as the scheduler takes it, with the output that is there already, if any."""
        spec = self.spec
        request = pb.GenerateTokensRequest(
            request_id=spec.request_id,
            prompt_token_ids=spec.prompt,
            sampling=spec.sampling,
            priority=spec.priority,
            cache_salt=spec.cache_salt,
            traceparent=self.job.traceparent,
        )
        request.sampling.await_verdicts = self.verdicts is not None
        if self.first_token_at is None or spec.sampling.HasField("beam_width"):  # which comes whole, or anew
            self.prompt_logprobs.clear()  # they all come again
        else:
            request.resume.extend(
                pb.ResumedSample(token_ids=sample.token_ids, finished=sample.finish_reason != NOT_ENDED)
                for sample in self.samples
            )
        return request

    def is_stop_id(self, last: int) -> bool:
        """Whether a sample that the scheduler says has stopped did so by its `last` token."""
        return self.verdicts is None or last in self._stop_ids

    def on_row(
        self,
        index: int,
        token_ids: list[int],
        logprobs: Sequence[pb.TokenLogprob],
        reason: int,
        now: float,
        score: float | None = None,
    ) -> bool:
        """New tokens of one sample. Whether a stop string ended it, so that the scheduler must be told.

        `score` is a result's of a beam search, of which everything comes at once.
        """
        sample = self.samples[index]
        sample.score = score
        if token_ids:
            if self.first_token_at is None:
                self.first_token_at = now
                self.job.metrics.time_to_first_token.observe(now - self.job.arrived_at)
            elif sample.last_token_at:
                interval = (now - sample.last_token_at) / len(token_ids)
                self.job.metrics.inter_token_latency.add(interval, len(token_ids))
            sample.last_token_at = now
        if self.spec.drop_output:
            token_ids, logprobs, reason = [], [], LENGTH if reason == STOP else reason
        stopped = sample.feed(token_ids, logprobs, reason)
        if self.spec.best is None:
            self.job.on_news(sample)
        return stopped

    def on_usage(self, usage: pb.Usage) -> None:
        """Everything has ended."""
        self.usage = usage
        if self.spec.best is not None:
            self._choose(self.spec.best.count)
        self._end()

    def on_failure(self, error: GatewayError) -> None:
        """The request was refused, failed, or lost its scheduler."""
        if self.spec.best is not None:
            error.rename("sampling.n", "best_of")
        self.job.error = self.job.error or error
        self._end()

    def _choose(self, count: int) -> None:
        """All samples have ended: the best are the results, best first; of equals, the one drawn first.

        A sample that somebody aborted is behind those that are whole.
        """
        ranked = sorted(self.samples, key=lambda s: (s.is_whole, s.mean_logprob()), reverse=True)
        self.results = ranked[:count]
        for index, sample in enumerate(self.results):
            sample.index, sample.score = index, sample.mean_logprob()
            self.job.on_news(sample)

    def _end(self) -> None:
        self.ended = True
        self.job.on_end()

    @property
    def num_output_tokens(self) -> int:
        """Output tokens of all samples."""
        return sum(len(sample.token_ids) for sample in self.samples)


class Job:
    """What one client asked for: one generation for each prompt, and what has come for whom.

    One task waits on a job. It is woken for new text if it streams, else only when everything has ended.
    """

    def __init__(self, metrics: Metrics, arrived_at: float, streams: bool) -> None:
        self.metrics = metrics
        self.arrived_at = arrived_at
        self.streams = streams
        self.traceparent = ""  # of its span, where it is traced
        self.generations: list[Generation] = []
        self.error: GatewayError | None = None  # the first one of a generation
        self.cancelled = False
        self._num_open = 0
        self._news: list[Sample] = []
        self._waiter: asyncio.Future[None] | None = None

    @property
    def samples(self) -> list[Sample]:
        """All samples that were drawn, prompt by prompt."""
        return [sample for generation in self.generations for sample in generation.samples]

    @property
    def results(self) -> list[Sample]:
        """What the client gets: a sample's place is its index in an OpenAI response."""
        return [sample for generation in self.generations for sample in generation.results]

    def add(self, generation: Generation) -> None:
        """A generation is on its way."""
        generation.first_place = sum(before.spec.num_results for before in self.generations)
        self.generations.append(generation)
        self._num_open += 1

    @property
    def ended(self) -> bool:
        """Nothing more comes."""
        return self.cancelled or self._num_open == 0

    @property
    def has_news(self) -> bool:
        """A sample has something new."""
        return bool(self._news)

    async def next(self) -> list[Sample]:
        """The samples that have news, as soon as there are any; none when everything has ended.

        Raises:
            GatewayError: a generation was refused or failed.
        """
        while not self._news or not self.streams:
            if self.error is not None:
                raise self.error
            if self.ended:
                break
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        news, self._news = self._news, []
        return news

    def on_news(self, sample: Sample) -> None:
        """`sample` has new text or has ended."""
        if not sample.has_news:
            sample.has_news = True
            self._news.append(sample)
        if self.streams:
            self._wake()

    def on_end(self) -> None:
        """A generation has ended."""
        self._num_open -= 1
        if self.streams or self.error is not None or self.ended:
            self._wake()

    def cancel(self) -> None:
        """The client has left: nothing more is delivered."""
        self.cancelled = True
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
