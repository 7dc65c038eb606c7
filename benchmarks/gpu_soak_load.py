"""The mixed requests of the long run: seeded, endless, of every kind that a scheduler meets.

`Mix.draw` gives one request after another, each with what must come of it: how it ends, and when the client
changes its mind about it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import grpc
import numpy as np

from pagoda.v1 import scheduler_pb2 as pb

LONGEST_PROMPT, LONGEST_ANSWER = 2000, 512
# Of log-normal lengths, clipped: prompts like ShareGPT's (mean 230), answers half as long (mean 95), so that
# requests come and go quickly: what leaks does so with each of them, not with each token.
PROMPT_MU, ANSWER_MU, SIGMA = 4.883, 4.05, 1.10
NUM_PREFIXES, SHORTEST_PREFIX, LONGEST_PREFIX = 50, 64, 1024
# Now and then many short prompts with long answers: admitted together, they outgrow the cache.
SURGE_SHARE, SURGE_PROMPTS = 0.08, (16, 64)
RESERVED_IDS = 10  # ids below are special tokens in small vocabularies
STOP_BIAS = 8.0  # makes a stop id some 3,000 times as likely as any other id of random weights


class End(Enum):
    """What the client does to a request, or the scheduler must."""

    NATURAL = "runs to its end"
    REFUSED = "refused"
    CANCELLED = "stopped: cancelled"
    FINISHED = "stopped: finished"  # as a gateway does that has seen a stop string
    SAMPLE_CANCELLED = "one sample stopped"
    ABORTED = "aborted by an operator"


@dataclass(frozen=True)
class Moment:
    """When a request is ended from outside: at once, after a time, or once it has so many tokens."""

    seconds: float | None = None
    tokens: int | None = None


@dataclass
class Planned:
    """A request and what must come of it."""

    request: pb.GenerateTokensRequest
    end: End = End.NATURAL
    moment: Moment | None = None
    index: int = 0
    """The sample that is stopped, for `End.SAMPLE_CANCELLED`."""
    code: int = 0
    field: str = ""
    """With `code`, what a refusal must say."""
    twice: bool = False
    """Sent a second time in the same message, which must be refused."""

    n: int = 1
    max_tokens: int = 1
    min_tokens: int = 0
    stops: frozenset[int] = frozenset()
    num_logprobs: int | None = None
    num_resumed: int = 0


@dataclass
class Mix:
    """Draws requests for one model; the same arguments draw the same ones."""

    seed: int
    vocab_size: int
    max_model_len: int
    eos: tuple[int, ...]
    max_stop_ids: int
    """Of one request, EOS included."""
    longest_prompt: int = LONGEST_PROMPT
    longest_answer: int = LONGEST_ANSWER
    cycle: int = 2000
    """Of so many requests the first `SURGE_SHARE` are a surge."""
    num_drawn: int = 0
    _random: np.random.Generator = field(init=False)
    _prefixes: list[list[int]] = field(init=False)

    def __post_init__(self) -> None:
        self._random = np.random.Generator(np.random.PCG64(self.seed))
        bounds = (SHORTEST_PREFIX, min(LONGEST_PREFIX, self.longest_prompt // 2) + 1)
        lengths = self._random.integers(*bounds, NUM_PREFIXES) if bounds[0] < bounds[1] else [bounds[0]]
        self._prefixes = [self._ids(int(n)) for n in lengths]

    def draw(self) -> Planned:
        """The next request."""
        self.num_drawn += 1
        if self._chance(0.02):
            return self._invalid()
        if self.num_drawn % self.cycle < self.cycle * SURGE_SHARE:
            return self._surging()
        planned = self._valid()
        if self._chance(0.17):
            self._changed_mind(planned)
        elif self._chance(0.005):
            planned.twice = True
        return planned

    # ------------------------------------------------------------------------------------- requests

    def _valid(self) -> Planned:
        prompt = self._prompt()
        answer_len = self._length(ANSWER_MU, self.longest_answer)
        request = pb.GenerateTokensRequest(request_id=f"soak-{self.num_drawn}", prompt_token_ids=prompt)
        params = request.sampling
        params.max_tokens, params.ignore_eos = answer_len, self._chance(0.8)
        planned = Planned(request, max_tokens=answer_len)
        if self._chance(0.3):
            request.priority = int(self._random.integers(-2, 3))
        if self._chance(0.05):
            request.cache_salt = f"salt-{self._random.integers(3)}"
        self._drawing(params)
        if self._chance(0.08):
            params.n = planned.n = int(self._random.integers(2, 5))
        if self._chance(0.08):
            params.logprobs = planned.num_logprobs = int(self._random.choice([0, 1, 5, 20]))
        if self._chance(0.15):
            self._stops(planned)
        if planned.n == 1 and answer_len > 4 and self._chance(0.02):
            planned.num_resumed = int(self._random.integers(1, answer_len - 1))
            request.resume.add(token_ids=self._ids(planned.num_resumed))
        eos = () if params.ignore_eos else self.eos
        planned.stops = frozenset([*eos, *params.stop_token_ids])
        if planned.num_resumed and request.resume[0].token_ids[-1] in planned.stops:
            request.resume[0].token_ids[-1] = next(
                i for i in range(RESERVED_IDS, self.vocab_size) if i not in planned.stops
            )
        return planned

    def _surging(self) -> Planned:
        prompt = self._ids(int(self._random.integers(*SURGE_PROMPTS)))
        answer_len = int(self._random.integers(self.longest_answer * 4 // 5, self.longest_answer + 1))
        request = pb.GenerateTokensRequest(request_id=f"soak-{self.num_drawn}", prompt_token_ids=prompt)
        request.sampling.max_tokens, request.sampling.ignore_eos = answer_len, True
        self._drawing(request.sampling)
        return Planned(request, max_tokens=answer_len)

    def _drawing(self, params: pb.SamplingParams) -> None:
        """A third greedy, the rest random, some of them with all that a sampler can do."""
        if self._chance(1 / 3):
            params.temperature = 0.0
        else:
            params.temperature = float(np.float32(self._random.uniform(0.2, 1.5)))
            if self._chance(0.7):
                params.seed = int(self._random.integers(0, 1 << 63))
            if self._chance(0.15):
                params.top_k = int(self._random.integers(1, 200))
            if self._chance(0.15):
                params.top_p = float(self._random.uniform(0.05, 1.0))
            if self._chance(0.1):
                params.min_p = float(self._random.uniform(0.0, 0.3))
        if self._chance(0.08):
            params.presence_penalty = float(self._random.uniform(-2, 2))
            params.frequency_penalty = float(self._random.uniform(-2, 2))
        if self._chance(0.08):
            params.repetition_penalty = float(self._random.uniform(0.5, 2))
        if self._chance(0.03):
            for token in self._ids(5):
                params.logit_bias[token] = float(self._random.uniform(-5, 5))

    def _stops(self, planned: Planned) -> None:
        params = planned.request.sampling
        most = self.max_stop_ids - len(self.eos)
        count = min(most, int(self._random.choice([1, 8, 15, 256, 760])), self.vocab_size // 4)
        ids = self._random.choice(self.vocab_size - RESERVED_IDS, count, replace=False) + RESERVED_IDS
        params.stop_token_ids.extend(ids.tolist())
        if count <= 8 and self._chance(0.7):  # so few are hardly ever drawn
            for token in ids.tolist():
                params.logit_bias[token] = STOP_BIAS
        if self._chance(0.3):
            planned.min_tokens = params.min_tokens = int(self._random.integers(0, planned.max_tokens))

    def _changed_mind(self, planned: Planned) -> None:
        """Let the request be ended from outside, at any moment between its sending and its end."""
        kinds, shares = zip(*_MINDS.items(), strict=True)
        planned.end = End(self._random.choice([kind.value for kind in kinds], p=shares))
        if planned.end is End.SAMPLE_CANCELLED:
            planned.n = planned.request.sampling.n = max(planned.n, 2)
            planned.index = int(self._random.integers(planned.n))
            del planned.request.resume[:]
            planned.num_resumed = 0
        # A third before it can run, a third somewhere in the middle by its tokens, a third at a random time.
        third = self._random.integers(3)
        if third == 0:
            planned.moment = Moment(seconds=0.0 if self._chance(0.5) else self._random.uniform(0, 0.05))
        elif third == 1:
            planned.moment = Moment(tokens=int(self._random.integers(1, planned.max_tokens + 1)))
        else:
            planned.moment = Moment(seconds=self._random.uniform(0.05, 2.0))

    def _invalid(self) -> Planned:
        name, code, spoil = _INVALID[int(self._random.integers(len(_INVALID)))]
        planned = Planned(self._valid().request, End.REFUSED, code=code, field=name)
        spoil(planned.request, self)
        return planned

    # --------------------------------------------------------------------------------------- pieces

    def _prompt(self) -> list[int]:
        prompt = self._ids(self._length(PROMPT_MU, self.longest_prompt))
        if self._chance(0.4):
            prefix = self._prefixes[int(self._random.integers(len(self._prefixes)))]
            prompt = (prefix + prompt)[: self.longest_prompt]
        return prompt

    def _ids(self, count: int) -> list[int]:
        ids: list[int] = self._random.integers(RESERVED_IDS, self.vocab_size, count).tolist()
        return ids

    def _length(self, mu: float, longest: int) -> int:
        return int(np.clip(np.rint(self._random.lognormal(mu, SIGMA)), 1, longest))

    def _chance(self, share: float) -> bool:
        return bool(self._random.random() < share)


# How those requests end that a client changes its mind about: 10 of 13 are plainly cancelled.
_MINDS = {End.CANCELLED: 10 / 13, End.FINISHED: 1 / 13, End.SAMPLE_CANCELLED: 1 / 13, End.ABORTED: 1 / 13}


def _setting(**fields: Any) -> Callable[[pb.GenerateTokensRequest, Mix], None]:
    def spoil(request: pb.GenerateTokensRequest, _: Mix) -> None:
        for name, value in fields.items():
            setattr(request.sampling, name, value)

    return spoil


def _empty(request: pb.GenerateTokensRequest, _: Mix) -> None:
    del request.prompt_token_ids[:]


def _foreign(request: pb.GenerateTokensRequest, mix: Mix) -> None:
    request.prompt_token_ids.append(mix.vocab_size)


def _too_long(request: pb.GenerateTokensRequest, mix: Mix) -> None:
    request.prompt_token_ids.extend([RESERVED_IDS] * mix.max_model_len)


def _foreign_stop(request: pb.GenerateTokensRequest, mix: Mix) -> None:
    del request.sampling.stop_token_ids[:]
    request.sampling.stop_token_ids.append(mix.vocab_size)


_WRONG = grpc.StatusCode.INVALID_ARGUMENT.value[0]
_INVALID: list[tuple[str, int, Callable[[pb.GenerateTokensRequest, Mix], None]]] = [
    ("prompt_token_ids", _WRONG, _empty),
    ("prompt_token_ids", _WRONG, _foreign),
    ("prompt_token_ids", _WRONG, _too_long),
    ("sampling.temperature", _WRONG, _setting(temperature=-1.0)),
    ("sampling.temperature", _WRONG, _setting(temperature=float("nan"))),
    ("sampling.top_p", _WRONG, _setting(top_p=1.5)),
    ("sampling.top_k", _WRONG, _setting(top_k=0)),
    ("sampling.n", _WRONG, _setting(n=0)),
    ("sampling.n", _WRONG, _setting(n=1 << 20)),
    ("sampling.max_tokens", _WRONG, _setting(max_tokens=0)),
    ("sampling.min_tokens", _WRONG, _setting(min_tokens=1 << 20)),
    ("sampling.logprobs", _WRONG, _setting(logprobs=21)),
    ("sampling.stop_token_ids", _WRONG, _foreign_stop),
]
