"""What the SDK takes and hands out: options as keyword arguments, results as frozen dataclasses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

Prompt = str | Sequence[int]
Messages = Sequence[Mapping[str, str]]


class Options(TypedDict, total=False):
    """Keyword arguments of every generating call; what is absent has the server's default."""

    model: str
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    logit_bias: Mapping[int, float]
    seed: int
    n: int
    best_of: int
    """Draw so many samples; the n of the best mean logprob, best first, come when all have ended."""
    beam_width: int
    """Search with so many beams instead of drawing; the n best results, best first, come when it ends."""
    length_penalty: float
    early_stopping: bool | Literal["never"]
    max_tokens: int
    min_tokens: int
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    logprobs: int
    prompt_logprobs: int
    stop: str | Sequence[str]
    include_stop_str_in_output: bool
    skip_special_tokens: bool
    request_id: str
    priority: int
    cache_salt: str
    continue_final_message: bool
    structured_output: Mapping[str, Any]
    """One of json_object (True), json_schema (a dict, or its JSON), regex, choice (texts), grammar (Lark)."""
    timeout: float


@dataclass(frozen=True, slots=True)
class Usage:
    """How many tokens a request took."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One token's logprob, its rank (1 is the best) and the alternatives, best first."""

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Chunk:
    """What is new of one sample. `text` may be empty while a character is incomplete.

    `prompt_logprobs` are of the prompt, whatever `index` says, and come before anything of a sample.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: str | None = None
    stop_reason: str | None = None
    usage: Usage | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    score: float | None = None


@dataclass(frozen=True, slots=True)
class Sample:
    """One whole answer. `finish_reason` is stop, length, cancelled or error.

    `score` is what results of a beam search, and of `best_of`, are ordered by.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: str | None
    stop_reason: str | None
    score: float | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """The answer to a request: `samples`, of which the first is also at hand directly.

    `prompt_logprobs` are of the prompt's tokens after the first, where they were asked for.
    """

    request_id: str
    samples: tuple[Sample, ...]
    usage: Usage | None
    prompt_logprobs: tuple[TokenLogprob, ...] = ()

    @property
    def text(self) -> str:
        """The first sample's text."""
        return self.samples[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The first sample's token ids."""
        return self.samples[0].token_ids

    @property
    def finish_reason(self) -> str | None:
        """Why the first sample ended."""
        return self.samples[0].finish_reason


@dataclass(frozen=True, slots=True)
class Model:
    """A model that is served."""

    name: str
    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    digest: str
    device: str
    dtype: str
