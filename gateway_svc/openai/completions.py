"""POST /v1/completions."""

from __future__ import annotations

import time
from typing import Any, cast

from fastapi import APIRouter, Request
from msgspec import UNSET
from starlette.responses import Response

from gateway_svc.errors import GatewayError, InvalidField
from gateway_svc.gateway import FINISH_NAMES, MAX_SAMPLES, Gateway, usage_of
from gateway_svc.generation import Delta, Job, Sample
from gateway_svc.openai import replies
from gateway_svc.openai.groups import num_sequences
from gateway_svc.openai.logprobs import CompletionLogprobsBuilder, prompt_logprobs, score_of
from gateway_svc.openai.params import check_supported, max_tokens_of, sampling_of, spec_of
from gateway_svc.openai.requests import StrictJsonRoute, gateway_of, new_call
from gateway_svc.openai.responses import JobResponse
from gateway_svc.openai.schema import CompletionRequest
from gateway_svc.openai.structured import constrain

router = APIRouter(route_class=StrictJsonRoute)


@router.post("/v1/completions")
async def create_completion(body: CompletionRequest, request: Request) -> Response:
    """Continue one or several prompts; as server-sent events with `stream`."""
    gateway = gateway_of(request)
    call = new_call(request, body.request_id, bool(body.stream), max_tokens_of(body))
    try:
        gateway.check_model(body.model)
        check_supported(body)
        sampling, best = sampling_of(body)
        await constrain(gateway, sampling, body)
        prompts = await _prompts(gateway, body)
        number = len(prompts) * num_sequences(body)
        if number > MAX_SAMPLES:
            raise InvalidField("prompt", f"makes {number} samples; at most {MAX_SAMPLES}")
        echoes = await _echoes(gateway, body, prompts) if body.echo else None
        suffixes = [""] if len(prompts) == 1 else [f"-{i}" for i in range(len(prompts))]
        specs = [
            spec_of(body, sampling, prompt, call.request_id + suffix, best)
            for prompt, suffix in zip(prompts, suffixes, strict=True)
        ]
        job = gateway.start(call, specs)
    except GatewayError as error:
        gateway.finish(call, None, error)
        raise
    return JobResponse(gateway, call, job, CompletionRenderer(gateway, call.request_id, body, echoes))


async def _prompts(gateway: Gateway, body: CompletionRequest) -> list[list[int]]:
    """The prompts in tokens: a string, strings, token ids, or lists of token ids."""
    prompt = body.prompt
    if isinstance(prompt, str):
        prompt = [prompt]
    if not prompt:
        raise InvalidField("prompt", "is empty; at least one token is needed")
    if isinstance(prompt[0], str):
        special = True if body.add_special_tokens is None else body.add_special_tokens
        return await gateway.text_prompts(cast(list[str], prompt), "prompt", special)
    if isinstance(prompt[0], int):
        return [gateway.token_prompt(cast(list[int], prompt), "prompt")]
    return [gateway.token_prompt(ids, "prompt") for ids in cast(list[list[int]], prompt)]


async def _echoes(gateway: Gateway, body: CompletionRequest, prompts: list[list[int]]) -> list[str]:
    """The texts of the prompts: as they were given, or of their tokens."""
    if isinstance(body.prompt, str):
        return [body.prompt]
    if isinstance(body.prompt[0], str):
        return cast(list[str], body.prompt)
    return [await gateway.tokenizer.decode(ids) for ids in prompts]


class CompletionRenderer:
    """Completions as JSON."""

    def __init__(
        self, gateway: Gateway, request_id: str, body: CompletionRequest, echoes: list[str] | None
    ) -> None:
        self._id = f"cmpl-{request_id}"
        self._created = int(time.time())
        self._model = gateway.model_name
        self._echoes = echoes
        self._tokenizer = gateway.tokenizer
        self._num_prompt_logprobs = body.prompt_logprobs
        self._wants_ids = bool(body.return_token_ids)
        wants_usage = bool(body.stream_options and body.stream_options.include_usage)
        self._usage_of_chunks = None if wants_usage else UNSET
        self._num_logprobs = body.logprobs
        self._logprobs: dict[Sample, CompletionLogprobsBuilder] = {}
        self._begun: set[Sample] = set()

    def whole(self, job: Job) -> replies.Completion:
        """The answer of a job that has ended."""
        choices = [self._choice(sample) for sample in job.results]
        for choice in choices:
            if choice.stop_reason is UNSET:
                choice.stop_reason = None
        usage = replies.Usage.of(usage_of(job))
        return replies.Completion(self._id, self._created, self._model, choices, usage=usage)

    def chunks(self, sample: Sample) -> list[replies.Completion]:
        """An event for what is new of a sample, if anything is to be shown."""
        choice = self._choice(sample)
        has_tokens = choice.logprobs is not None or (self._wants_ids and choice.token_ids)
        if not (choice.text or choice.finish_reason or has_tokens):
            return []
        return [
            replies.Completion(self._id, self._created, self._model, [choice], usage=self._usage_of_chunks)
        ]

    def tail(self, job: Job) -> list[Any]:
        """The usage, if it was asked for."""
        if self._usage_of_chunks is UNSET:
            return []
        usage = replies.Usage.of(usage_of(job))
        return [replies.Completion(self._id, self._created, self._model, [], usage=usage)]

    def _choice(self, sample: Sample) -> replies.CompletionChoice:
        """What is new of a sample; the first time with the prompt, if it is echoed."""
        delta = sample.take()
        is_first = sample not in self._begun
        self._begun.add(sample)
        generation = sample.generation
        choice = replies.CompletionChoice(
            index=generation.first_place + sample.index,
            text=delta.text,
            logprobs=self._logprobs_of(sample, delta, is_first),
            finish_reason=FINISH_NAMES.get(sample.finish_reason),
        )
        if is_first and self._echoes is not None:
            choice.text = self._echo(sample) + choice.text
        if is_first and self._num_prompt_logprobs is not None:
            table = self._tokenizer.verbatim
            choice.prompt_logprobs = prompt_logprobs(table, generation, self._num_prompt_logprobs)
        if sample.finish_reason:
            choice.stop_reason = sample.stop_reason
            choice.score = score_of(sample)
        if self._wants_ids:
            choice.token_ids = delta.token_ids
            choice.prompt_token_ids = generation.spec.prompt if is_first else UNSET
        return choice

    def _echo(self, sample: Sample) -> str:
        assert self._echoes is not None
        return self._echoes[sample.generation.first_place // sample.generation.spec.num_results]

    def _logprobs_of(self, sample: Sample, delta: Delta, is_first: bool) -> replies.CompletionLogprobs | None:
        if self._num_logprobs is None:
            return None
        builder = self._logprobs.get(sample)
        if builder is None:
            builder = CompletionLogprobsBuilder(self._tokenizer.verbatim, self._num_logprobs)
            self._logprobs[sample] = builder
        pieces = []
        if is_first and self._echoes is not None:
            visible = self._tokenizer.visible
            pieces.append(builder.prompt(sample.generation, self._echo(sample), visible))
        if delta.token_ids:
            pieces.append(builder.piece(delta.token_ids, delta.logprobs))
        if not pieces:
            return None
        whole = pieces[0]
        for piece in pieces[1:]:
            whole.tokens += piece.tokens
            whole.token_logprobs += piece.token_logprobs
            whole.top_logprobs += piece.top_logprobs
            whole.text_offset += piece.text_offset
        return whole
