"""What has come of one request. To the caller its tries are one: nothing is repeated or lost between them."""

from __future__ import annotations

from pagoda.types import Chunk, Completion, Sample, TokenLogprob, Usage
from pagoda.v1 import inference_pb2 as pb
from pagoda.v1 import scheduler_pb2 as spb

_FINISH_REASONS: dict[int, str | None] = {
    spb.FINISH_REASON_UNSPECIFIED: None,
    spb.FINISH_REASON_STOP: "stop",
    spb.FINISH_REASON_LENGTH: "length",
    spb.FINISH_REASON_CANCELLED: "cancelled",
    spb.FINISH_REASON_ERROR: "error",
}


class Progress:
    """What has come of one request so far, and so what a retry need not ask for again."""

    def __init__(self, request: pb.GenerateRequest) -> None:
        self._request = request
        self._samples = [_SampleProgress() for _ in range(max(request.sampling.n, 1))]
        # The results of best_of and of a beam search come whole, each in a message, when all are there.
        self._come_whole = request.sampling.HasField("beam_width") or (request.best_of > len(self._samples))
        self._usage: Usage | None = None
        self._prompt_ids: tuple[int, ...] = ()
        self._prompt_logprobs: list[TokenLogprob] = []
        self._num_repeated = 0  # of these, how many this try will bring again

    @property
    def request_id(self) -> str:
        """The id under which the request runs, the same for all tries."""
        return self._request.request_id

    @property
    def complete(self) -> bool:
        """Whether every sample has ended."""
        return all(sample.finish_reason for sample in self._samples)

    def next_request(self) -> pb.GenerateRequest:
        """The request to send now: as it was, with the tokens that have come.

        Results that come whole are made again, the same from the same seed; those that came are not repeated.
        """
        request = pb.GenerateRequest()
        request.CopyFrom(self._request)
        begun = any(sample.token_ids or sample.finish_reason for sample in self._samples)
        if begun and not self._come_whole:
            for sample in self._samples:
                request.resume.add(token_ids=sample.token_ids, finished=bool(sample.finish_reason))
        else:
            self._num_repeated = len(self._prompt_logprobs)
        return request

    def accept(self, response: pb.GenerateResponse) -> Chunk:
        """Take what came, and hand it on."""
        logprobs = tuple(map(_logprob, response.token_ids, response.logprobs))
        usage = None
        if response.HasField("usage"):
            u = response.usage
            usage = self._usage = Usage(u.prompt_tokens, u.cached_tokens, u.completion_tokens)
        if self._come_whole and self._samples[response.index].finish_reason:
            return Chunk(response.index, "", (), usage=usage, prompt_logprobs=self._of_prompt(response))
        chunk = Chunk(
            index=response.index,
            text=response.text,
            token_ids=tuple(response.token_ids),
            logprobs=logprobs,
            finish_reason=_FINISH_REASONS.get(response.finish_reason, "error"),
            stop_reason=response.stop_reason or None,
            usage=usage,
            prompt_logprobs=self._of_prompt(response),
            score=response.score if response.HasField("score") else None,
        )
        self._samples[chunk.index].add(chunk)
        return chunk

    def completion(self) -> Completion:
        """Everything that has come."""
        samples = tuple(sample.result(i) for i, sample in enumerate(self._samples))
        return Completion(self.request_id, samples, self._usage, tuple(self._prompt_logprobs))

    def _of_prompt(self, response: pb.GenerateResponse) -> tuple[TokenLogprob, ...]:
        """What is new of the prompt's logprobs."""
        if response.prompt_token_ids:
            self._prompt_ids = tuple(response.prompt_token_ids)
        repeated = min(self._num_repeated, len(response.prompt_logprobs))
        self._num_repeated -= repeated
        ids = self._prompt_ids[len(self._prompt_logprobs) + 1 :]
        new = tuple(map(_logprob, ids, response.prompt_logprobs[repeated:]))
        self._prompt_logprobs += new
        return new


class _SampleProgress:
    """One sample's share of a `Progress`."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.finish_reason: str | None = None
        self.stop_reason: str | None = None
        self.score: float | None = None

    def add(self, chunk: Chunk) -> None:
        self.texts.append(chunk.text)
        self.token_ids.extend(chunk.token_ids)
        self.logprobs.extend(chunk.logprobs)
        self.finish_reason = chunk.finish_reason or self.finish_reason
        self.stop_reason = chunk.stop_reason or self.stop_reason
        self.score = self.score if chunk.score is None else chunk.score

    def result(self, index: int) -> Sample:
        return Sample(
            index=index,
            text="".join(self.texts),
            token_ids=tuple(self.token_ids),
            logprobs=tuple(self.logprobs),
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            score=self.score,
        )


def _logprob(token_id: int, entry: spb.TokenLogprob) -> TokenLogprob:
    top = tuple(zip(entry.top_ids, entry.top_logprobs, strict=True))
    return TokenLogprob(token_id, entry.logprob, entry.rank, top)
