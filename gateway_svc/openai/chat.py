"""POST /v1/chat/completions."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter, Request
from msgspec import UNSET, UnsetType
from starlette.responses import Response

from gateway_svc.errors import GatewayError
from gateway_svc.gateway import FINISH_NAMES, Gateway, usage_of
from gateway_svc.generation import Generation, Job, Sample
from gateway_svc.openai import replies
from gateway_svc.openai.logprobs import chat_logprobs, prompt_logprobs, score_of
from gateway_svc.openai.params import (
    check_supported,
    max_tokens_of,
    messages_of,
    sampling_of,
    spec_of,
    template_options,
)
from gateway_svc.openai.requests import StrictJsonRoute, gateway_of, new_call
from gateway_svc.openai.responses import JobResponse
from gateway_svc.openai.schema import ChatRequest
from gateway_svc.openai.tool_calls import ToolCallReader
from gateway_svc.openai.tools import tool_use

router = APIRouter(route_class=StrictJsonRoute)


@router.post("/v1/chat/completions")
async def create_chat_completion(body: ChatRequest, request: Request) -> Response:
    """Answer a conversation; as server-sent events with `stream`."""
    gateway = gateway_of(request)
    call = new_call(request, body.request_id, bool(body.stream), max_tokens_of(body))
    try:
        gateway.check_model(body.model)
        check_supported(body)
        sampling, best = sampling_of(body)
        options = template_options(body, gateway.settings.trust_request_chat_template)
        use = tool_use(gateway, body, messages_of(body.messages))
        if use.form is not None:
            await gateway.constrain(sampling, *use.form)
        prompt = await gateway.chat_prompt(use.messages, "messages", tools=use.shown, **options)
        job = gateway.start(call, [spec_of(body, sampling, prompt, call.request_id, best, use.marks)])
    except GatewayError as error:
        gateway.finish(call, None, error)
        raise
    return JobResponse(gateway, call, job, ChatRenderer(gateway, call.request_id, body, use.reader))


class ChatRenderer:
    """A chat's answer as JSON."""

    def __init__(
        self, gateway: Gateway, request_id: str, body: ChatRequest, tools: ToolCallReader | None
    ) -> None:
        self._id = f"chatcmpl-{request_id}"
        self._created = int(time.time())
        self._model = gateway.model_name
        self._table = gateway.tokenizer.verbatim
        self._tools = tools
        self._wants_logprobs = bool(body.logprobs)
        self._wants_ids = bool(body.return_token_ids)
        self._num_prompt_logprobs = body.prompt_logprobs
        wants_usage = bool(body.stream_options and body.stream_options.include_usage)
        self._usage_of_chunks = None if wants_usage else UNSET
        self._begun: set[int] = set()

    def whole(self, job: Job) -> replies.ChatCompletion:
        """The answer of a job that has ended."""
        choices = []
        for place, sample in enumerate(job.results):
            delta = sample.take()
            message, reason = replies.Message(delta.text), FINISH_NAMES[sample.finish_reason]
            if self._tools is not None:
                message, reason = self._tools.whole(delta.text, reason)
            choices.append(
                replies.ChatChoice(
                    index=place,
                    message=message,
                    logprobs=self._logprobs(delta),
                    finish_reason=reason,
                    stop_reason=sample.stop_reason,
                    score=score_of(sample),
                    token_ids=delta.token_ids if self._wants_ids else UNSET,
                )
            )
        return replies.ChatCompletion(
            id=self._id,
            created=self._created,
            model=self._model,
            choices=choices,
            usage=replies.Usage.of(usage_of(job)),
            prompt_token_ids=job.generations[0].spec.prompt if self._wants_ids else UNSET,
            prompt_logprobs=self._prompt_logprobs(job.generations[0]),
        )

    def chunks(self, sample: Sample) -> list[replies.ChatChunk]:
        """Events for what is new of a sample. Its first one carries the role, and no text."""
        delta = sample.take()
        place, reason = sample.index, FINISH_NAMES.get(sample.finish_reason)
        chunks = []
        if place not in self._begun:
            is_first = not self._begun
            self._begun.add(place)
            first = self._chunk(replies.ChunkChoice(place, replies.ChoiceDelta("assistant", ""), None, None))
            if self._wants_ids:
                first.prompt_token_ids = sample.generation.spec.prompt
            if is_first:
                first.prompt_logprobs = self._prompt_logprobs(sample.generation)
            chunks.append(first)
        said = replies.ChoiceDelta(None, delta.text)
        if self._tools is not None:
            said, reason = self._tools.delta(sample, delta.text, reason)
        has_tokens = (self._wants_logprobs or self._wants_ids) and delta.token_ids
        if said.content or said.tool_calls or reason or has_tokens:
            choice = replies.ChunkChoice(place, said, self._logprobs(delta), reason)
            if reason:
                choice.stop_reason = sample.stop_reason
                choice.score = score_of(sample)
            if self._wants_ids:
                choice.token_ids = delta.token_ids
            chunks.append(self._chunk(choice))
        return chunks

    def tail(self, job: Job) -> list[Any]:
        """The usage, if it was asked for."""
        if self._usage_of_chunks is UNSET:
            return []
        usage = replies.Usage.of(usage_of(job))
        return [replies.ChatChunk(self._id, self._created, self._model, [], usage=usage)]

    def _chunk(self, choice: replies.ChunkChoice) -> replies.ChatChunk:
        return replies.ChatChunk(self._id, self._created, self._model, [choice], usage=self._usage_of_chunks)

    def _prompt_logprobs(self, generation: Generation) -> replies.PromptLogprobs | UnsetType:
        if self._num_prompt_logprobs is None:
            return UNSET
        return prompt_logprobs(self._table, generation, self._num_prompt_logprobs)

    def _logprobs(self, delta: Any) -> replies.ChatLogprobs | None:
        if not self._wants_logprobs or not delta.token_ids:
            return None
        return chat_logprobs(self._table, delta.token_ids, delta.logprobs)
