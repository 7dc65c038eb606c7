"""Bodies to sampling parameters, and what this version does not do yet."""

from __future__ import annotations

from typing import Any

from gateway_svc.errors import InvalidField, NotSupported
from gateway_svc.gateway import check_stops, new_seed
from gateway_svc.generation import Best, GenerationSpec
from gateway_svc.openai.groups import fill_group
from gateway_svc.openai.schema import UINT32_MAX, ChatMessage, ChatRequest, CompletionRequest, SamplingBody
from gateway_svc.text.tokenizer import RESERVED_VARIABLES, Message
from pagoda.v1 import scheduler_pb2 as pb

DEFAULT_COMPLETION_TOKENS = 16
_COPIED = (
    "temperature",
    "top_p",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "min_tokens",
)


def check_supported(body: SamplingBody) -> None:
    """Raises NotSupported for what later versions may do, InvalidField for what is nothing."""
    if isinstance(body, CompletionRequest):
        if body.suffix:
            raise NotSupported("suffix")
        if body.max_tokens == 0 and not body.echo:
            raise InvalidField("max_tokens", "is 0; must be at least 1, unless the prompt is echoed")


def sampling_of(body: SamplingBody) -> tuple[pb.SamplingParams, Best | None]:
    """The sampling parameters, with a seed, and how many of the samples are told if not all.

    What is absent in the body is absent here.
    """
    sampling = pb.SamplingParams(n=body.n, ignore_eos=body.ignore_eos)
    for name in _COPIED:
        value = getattr(body, name)
        if value is not None:
            setattr(sampling, name, value)
    if body.top_k is not None and body.top_k > 0:
        sampling.top_k = body.top_k
    sampling.seed = new_seed() if body.seed is None else body.seed % 2**64
    sampling.stop_token_ids.extend(body.stop_token_ids or ())
    for token, bias in (body.logit_bias or {}).items():
        if not (token.isascii() and token.isdigit() and int(token) <= UINT32_MAX):
            raise InvalidField("logit_bias", f"has the key {token[:32]!r}; keys are token ids")
        sampling.logit_bias[int(token)] = bias
    max_tokens, logprobs = max_tokens_of(body), _logprobs_of(body)
    if max_tokens is not None:
        sampling.max_tokens = max(max_tokens, 1)  # a request draws a token; see `spec_of`
        if sampling.min_tokens > max_tokens:
            raise InvalidField("min_tokens", f"is {sampling.min_tokens}, but max_tokens is {max_tokens}")
    if logprobs is not None:
        sampling.logprobs = logprobs
    echoed = logprobs if isinstance(body, CompletionRequest) and body.echo else None
    wanted = [number for number in (body.prompt_logprobs, echoed) if number is not None]
    if wanted:
        sampling.prompt_logprobs = max(wanted)
    return sampling, fill_group(sampling, body)


def max_tokens_of(body: SamplingBody) -> int | None:
    """The most output tokens; None is as many as fit."""
    if isinstance(body, ChatRequest):
        return body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    return DEFAULT_COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens


def _logprobs_of(body: SamplingBody) -> int | None:
    """Alternatives to report for each token; None is no logprobs at all."""
    if isinstance(body, ChatRequest):
        if body.top_logprobs and not body.logprobs:
            raise InvalidField("top_logprobs", "needs logprobs to be true")
        return (body.top_logprobs or 0) if body.logprobs else None
    return body.logprobs if isinstance(body, CompletionRequest) else None


def spec_of(
    body: SamplingBody,
    sampling: pb.SamplingParams,
    prompt: list[int],
    request_id: str,
    best: Best | None,
    seen_tokens: tuple[str, ...] = (),
) -> GenerationSpec:
    """One prompt's request. `seen_tokens` are special tokens that are text, though others are skipped."""
    stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
    return GenerationSpec(
        request_id=request_id,
        prompt=prompt,
        sampling=sampling,
        stop=check_stops(stops),
        include_stop=body.include_stop_str_in_output,
        skip_special=body.skip_special_tokens,
        seen_tokens=seen_tokens,
        priority=body.priority,
        cache_salt=body.cache_salt or "",
        drop_output=max_tokens_of(body) == 0,
        best=best,
    )


def messages_of(messages: list[ChatMessage]) -> list[Message]:
    """Messages as templates take them: content is a string; parts are joined by line breaks."""
    plain = []
    for message in messages:
        fields = message.model_dump(exclude_none=True)
        if isinstance(message.content, list):
            fields["content"] = "\n".join(part.text for part in message.content)
        fields.setdefault("content", "")
        plain.append(fields)
    return plain


def template_options(body: Any, trust_template: bool) -> dict[str, Any]:
    """How to render a chat, from the body of a chat or of /tokenize.

    Raises:
        InvalidField: the options contradict each other, or bring a template that is not trusted.
    """
    if body.chat_template is not None and not trust_template:
        problem = "templates are not taken from requests; --trust-request-chat-template allows them"
        raise InvalidField("chat_template", problem)
    generate = body.add_generation_prompt
    if body.continue_final_message:
        if generate and "add_generation_prompt" in body.model_fields_set:
            problem = "cannot be true together with add_generation_prompt"
            raise InvalidField("continue_final_message", problem)
        generate = False
    variables = body.chat_template_kwargs or {}
    reserved = sorted(RESERVED_VARIABLES & variables.keys())
    if reserved:
        raise InvalidField("chat_template_kwargs", f"cannot set {', '.join(reserved)}")
    return {
        "add_generation_prompt": generate,
        "continue_final_message": body.continue_final_message,
        "chat_template": body.chat_template,
        "variables": variables,
        "add_special_tokens": bool(body.add_special_tokens),
    }
