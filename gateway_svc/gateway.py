"""What both doors share: requests checked, tokenized, sent on their way, and accounted for at their end."""

from __future__ import annotations

import secrets
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import structlog

from gateway_svc.config import GatewaySettings
from gateway_svc.errors import (
    ContextTooLong,
    GatewayError,
    InvalidField,
    Unavailable,
    UnknownModel,
)
from gateway_svc.generation import Best, Generation, GenerationSpec, Job
from gateway_svc.metrics import Metrics
from gateway_svc.scheduler_link import SchedulerLink
from gateway_svc.spans import Spans
from gateway_svc.text.grammars import ModelGrammars
from gateway_svc.text.tokenizer import Message, ModelTokenizer
from pagoda.tracing import traceparent_of
from pagoda.v1 import scheduler_pb2 as pb

MAX_REQUEST_ID_BYTES = 128
MAX_SAMPLES = 1024  # of one call, over all of its prompts
MAX_SAMPLES_A_REQUEST = 128
MAX_STOPS, MAX_STOP_LENGTH = 64, 1024
FINISH_NAMES: dict[int, str] = {
    pb.FINISH_REASON_STOP: "stop",
    pb.FINISH_REASON_LENGTH: "length",
    pb.FINISH_REASON_CANCELLED: "abort",
    pb.FINISH_REASON_ERROR: "error",
}


def server_version() -> str:
    """The version of this distribution."""
    try:
        return version("pagoda-server")
    except PackageNotFoundError:
        return "0+unknown"  # run from a folder that was never installed


@dataclass(slots=True)
class Call:
    """One call of a client, for the log line at its end."""

    route: str
    request_id: str
    arrived_at: float
    stream: bool = False
    max_tokens: int | None = None
    span: Any = None  # of OpenTelemetry, where requests are traced


class Gateway:
    """The text tier, without its doors."""

    def __init__(
        self,
        settings: GatewaySettings,
        tokenizer: ModelTokenizer,
        link: SchedulerLink,
        metrics: Metrics,
        spans: Spans | None = None,
    ) -> None:
        self.settings = settings
        self.spans = spans
        self.tokenizer = tokenizer
        self._grammars = ModelGrammars(tokenizer)
        self.link = link
        self.metrics = metrics
        self.model_name = settings.served_name
        self.created = int(time.time())
        self.draining = False
        self._log = structlog.get_logger().bind(service="gateway")

    @property
    def ready(self) -> bool:
        """A request that comes now can be served."""
        return self.link.ready and not self.draining

    def check_model(self, name: str | None) -> None:
        """Raises UnknownModel unless `name` is what is served; nothing is what is served."""
        if name and name != self.model_name:
            raise UnknownModel(name, self.model_name)

    def model_info(self) -> pb.ModelInfo:
        """The model as the tokens tier describes it. Raises Unavailable while it is not known."""
        if self.draining:
            raise Unavailable("the gateway is shutting down", "draining")
        return self.link.served_model()

    # ---------------------------------------------------------------------------------- prompts to tokens

    async def text_prompts(
        self, texts: Sequence[str], field: str, add_special_tokens: bool = True
    ) -> list[list[int]]:
        """Texts to tokens, each within the model's context."""
        model = self.model_info()
        for text in texts:
            self._check_length(text, field, model)
        prompts = await self.tokenizer.encode_all(texts, add_special_tokens)
        for ids in prompts:
            self._check_count(ids, field, model)
        return prompts

    async def chat_prompt(self, messages: Sequence[Message], field: str, **options: Any) -> list[int]:
        """A chat to tokens, within the model's context."""
        model = self.model_info()
        self._check_length(_text_of(messages), field, model)
        ids = await self.tokenizer.encode_chat(messages, **options)
        self._check_count(ids, field, model)
        return ids

    def token_prompt(self, ids: Sequence[int], field: str) -> list[int]:
        """Tokens from a client, each of them the model's."""
        model = self.model_info()
        prompt = list(ids)
        if prompt and not 0 <= min(prompt) <= max(prompt) < model.vocab_size:
            bad = next(i for i in prompt if not 0 <= i < model.vocab_size)
            raise InvalidField(field, f"holds {bad}; token ids are from 0 to {model.vocab_size - 1}")
        self._check_count(prompt, field, model)
        return prompt

    async def constrain(self, sampling: pb.SamplingParams, make: Callable[[], str], field: str) -> None:
        """Let outputs follow the grammar that `make` makes (see `gateway_svc.text.grammars`).

        Raises:
            InvalidField: there is no such grammar, or it is to be searched with beams.
            Unavailable: the model is not known yet.
        """
        if sampling.HasField("beam_width"):
            raise InvalidField(field, "cannot be together with beam search; give one of them")
        model = self.model_info()
        compiled = await self.tokenizer.in_thread(lambda: self._grammars.compile(make, field, model))
        sampling.grammar, self.link.vocabulary = compiled

    def _check_length(self, text: str, field: str, model: pb.ModelInfo) -> None:
        """Refuse a text that cannot fit, whatever its tokens are, before seconds are spent on it.

        Composing characters (NFC) may halve it, so twice the longest token is allowed for each.
        """
        at_least = len(text) // (2 * self.tokenizer.longest_token)
        if at_least >= model.max_model_len:
            raise ContextTooLong(field, at_least, model.max_model_len, at_least=True)

    def _check_count(self, prompt: Sequence[int], field: str, model: pb.ModelInfo) -> None:
        if not prompt:
            raise InvalidField(field, "is empty; at least one token is needed")
        if len(prompt) >= model.max_model_len:
            raise ContextTooLong(field, len(prompt), model.max_model_len)

    # ---------------------------------------------------------------------------------------- running

    def start(self, call: Call, specs: Sequence[GenerationSpec]) -> Job:
        """Send requests on their way.

        Raises:
            Unavailable, Overloaded: they are not admitted.
        """
        job = Job(self.metrics, call.arrived_at, call.stream)
        if call.span is not None:
            job.traceparent = traceparent_of(call.span)
        try:
            model = self.model_info()
            for spec in specs:
                table = self.tokenizer.table(spec.skip_special, spec.seen_tokens)
                generation = Generation(spec, table, job, model.eos_token_ids)
                self.link.submit(generation)
                job.add(generation)
        except GatewayError:
            self._release(job)
            raise
        return job

    def cancel(self, job: Job) -> None:
        """The client has left."""
        if not job.ended:
            self._release(job)
            job.cancel()

    def finish(self, call: Call, job: Job | None, error: GatewayError | None) -> None:
        """Account for a call that is over, however it ended. What still runs of it is stopped."""
        generations = job.generations if job is not None else []
        # Without a job and without an error, it was cancelled while its prompt was being tokenized.
        left = error is None if job is None else job.cancelled or not (job.ended or error)
        if job is not None and not job.ended:
            self._release(job)
        if left:
            self.metrics.cancelled()
        elif error is not None:
            begun = any(generation.first_token_at is not None for generation in generations)
            if not begun and error.http_status in (400, 404, 409, 429, 503):
                temporary = error.retry_after_ms is not None
                self.metrics.rejected(error.code or "unavailable" if temporary else "invalid")
            else:
                self.metrics.failed(error.status.name.lower())
        for generation in generations:
            self._observe(call, generation)
        fields = self._summary(call, job, error, left)
        self._log.info("request_end", **fields)
        if self.spans is not None:
            self.spans.end(call, job, fields)

    def _release(self, job: Job) -> None:
        for generation in job.generations:
            self.link.cancel(generation)

    def _observe(self, call: Call, generation: Generation) -> None:
        metrics, first = self.metrics, generation.first_token_at
        if first is None:
            return
        metrics.prompt_tokens.observe(len(generation.spec.prompt))
        metrics.params_n.observe(generation.spec.num_results)
        if call.max_tokens is not None:
            metrics.params_max_tokens.observe(call.max_tokens)
        metrics.generation_tokens.observe(generation.num_output_tokens)
        last = max(sample.last_token_at for sample in generation.samples)
        searched = generation.spec.sampling.HasField("beam_width")  # then all tokens come at once
        if generation.usage is not None:
            metrics.e2e_latency.observe(last - call.arrived_at)
        for sample in generation.samples:
            intervals = len(sample.token_ids) - 1
            if intervals > 0 and not searched:
                metrics.time_per_output_token.observe((sample.last_token_at - first) / intervals)
            if sample.finish_reason:
                metrics.success(FINISH_NAMES[sample.finish_reason])

    def _summary(
        self, call: Call, job: Job | None, error: GatewayError | None, cancelled: bool
    ) -> dict[str, Any]:
        """One line for each request's end. Never its text."""
        fields: dict[str, Any] = {
            "request_id": call.request_id,
            "model": self.model_name,
            "route": call.route,
            "stream": call.stream,
            "status": "cancelled" if cancelled else "ok" if error is None else error.status.name.lower(),
            "e2e_s": round(time.monotonic() - call.arrived_at, 4),
        }
        if error is not None and error.field:
            fields["field"] = error.field
        if job is not None:
            generations = job.generations
            firsts = [g.first_token_at for g in generations if g.first_token_at is not None]
            fields |= {
                "finish_reasons": [FINISH_NAMES.get(s.finish_reason) for s in job.samples],
                "prompt_tokens": sum(len(g.spec.prompt) for g in generations),
                "cached_tokens": sum(g.usage.cached_tokens for g in generations if g.usage is not None),
                "completion_tokens": sum(g.num_output_tokens for g in generations),
                "ttft_s": round(min(firsts) - call.arrived_at, 4) if firsts else None,
            }
        return fields


def usage_of(job: Job) -> pb.Usage:
    """Tokens of a whole call. A prompt counts once, whatever n is; tokens after a stop string do not."""
    return pb.Usage(
        prompt_tokens=sum(len(g.spec.prompt) for g in job.generations),
        cached_tokens=sum(g.usage.cached_tokens for g in job.generations if g.usage is not None),
        completion_tokens=sum(g.num_output_tokens for g in job.generations),
    )


def new_request_id() -> str:
    """An id for a request whose client gave none."""
    return uuid.uuid4().hex


def new_seed() -> int:
    """A seed for a request whose client gave none."""
    return secrets.randbits(64)


def best_of(sampling: pb.SamplingParams, num_drawn: int) -> Best | None:
    """Let `num_drawn` samples be drawn, of which the n best are told.

    Where these are all, there is nothing to choose, and their order is that of their seeds.
    """
    if num_drawn == sampling.n:
        return None
    best = Best(sampling.n, hides_logprobs=not sampling.HasField("logprobs"))
    sampling.n = num_drawn
    sampling.logprobs = sampling.logprobs  # set, if only to 0: the samples are ordered by them
    return best


def check_stops(stops: Sequence[str], field: str = "stop") -> tuple[str, ...]:
    """Stop strings as the matcher takes them. Raises InvalidField."""
    if len(stops) > MAX_STOPS:
        raise InvalidField(field, f"has {len(stops)} strings; at most {MAX_STOPS}")
    for stop in stops:
        if not stop:
            raise InvalidField(field, "holds an empty string")
        if len(stop) > MAX_STOP_LENGTH:
            raise InvalidField(field, f"holds a string of {len(stop)} characters; at most {MAX_STOP_LENGTH}")
    return tuple(dict.fromkeys(stops))


def _text_of(messages: Sequence[Message]) -> str:
    return "".join(m["content"] for m in messages if isinstance(m.get("content"), str))
