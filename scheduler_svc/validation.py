"""Checks of what callers send, field by field, before anything reaches the core."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import msgspec

from pagoda.v1 import scheduler_pb2 as pb
from scheduler_svc.core.beams import EarlyStopping
from scheduler_svc.core.events import RequestArrived, Resumed, Sampling
from scheduler_svc.errors import InvalidRequest

MAX_REQUEST_ID_BYTES = 128
MAX_LOGIT_BIAS = 300
MAX_LOGPROBS = 20
MAX_GRAMMAR_BYTES = 1 << 20
MAX_BEAM_WIDTH = 16
MAX_LENGTH_PENALTY = 10.0  # of either sign, so that no length to its power leaves a float's range

# Why a request of (prompt tokens, n, max_tokens) can never fit, or None.
Refusal = Callable[[int, int, int], str | None]


class ServedModel(msgspec.Struct, frozen=True):
    """What every worker of the cluster holds, and what requests are checked against."""

    name: str
    digest: str
    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    max_stop_ids: int
    device: str = ""  # for people
    dtype: str = ""  # for people


def check_request(
    request: pb.GenerateTokensRequest, model: ServedModel, max_slots: int, refusal: Refusal, seed: int
) -> RequestArrived:
    """The request as the core takes it, but for whose it is; `seed` is used where the caller gave none.

    Raises InvalidRequest, which names the field.
    """
    if len(request.request_id.encode()) > MAX_REQUEST_ID_BYTES:
        raise InvalidRequest("request_id", f"is longer than {MAX_REQUEST_ID_BYTES} bytes")
    prompt = tuple(request.prompt_token_ids[:])  # a slice is made in C, an iteration is not
    if not prompt:
        raise InvalidRequest("prompt_token_ids", "is empty; at least one token is needed")
    _check_ids("prompt_token_ids", prompt, model.vocab_size)
    if len(prompt) >= model.max_model_len:
        raise InvalidRequest(
            "prompt_token_ids",
            f"has {len(prompt)} tokens; the model's context of {model.max_model_len} must hold them "
            "and at least one of output",
        )
    params = request.sampling
    n = params.n if params.HasField("n") else 1
    _check_range("sampling.n", n, 1, max_slots)
    width = _beam_width(params, n, max_slots)
    max_tokens = _max_tokens(params, len(prompt), width or n, model.max_model_len, refusal)
    return RequestArrived(
        key=0,
        session=0,
        handle=0,
        request_id=request.request_id,
        prompt=prompt,
        n=n,
        max_tokens=max_tokens,
        sampling=_sampling(params, model, max_tokens, seed),
        priority=request.priority,
        cache_salt=request.cache_salt,
        resume=_resume(request, n, max_tokens, model),
    )


def _beam_width(params: pb.SamplingParams, n: int, max_slots: int) -> int | None:
    """Beams of a search whose options go together; None where the request draws."""
    if not params.HasField("beam_width"):
        for field, _ in params.ListFields():
            if field.name in ("length_penalty", "early_stopping", "await_verdicts"):
                raise InvalidRequest(f"sampling.{field.name}", "is for beam searches: it needs beam_width")
        return None
    width = params.beam_width
    _check_range("sampling.beam_width", width, 1, min(MAX_BEAM_WIDTH, max_slots))
    if n > width:
        raise InvalidRequest("sampling.n", f"is {n}; a search returns at most the {width} of beam_width")
    if params.grammar:
        raise InvalidRequest("sampling.grammar", "cannot be followed by a beam search")
    if params.early_stopping not in (0, *EarlyStopping):
        raise InvalidRequest("sampling.early_stopping", f"is {params.early_stopping}, which is no way to end")
    return width


def _check_range(field: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise InvalidRequest(field, f"is {value}; must be from {low} to {high}")


def _check_ids(field: str, ids: Iterable[int], vocab_size: int) -> None:
    largest = max(ids, default=0)
    if largest >= vocab_size:
        raise InvalidRequest(field, f"holds {largest}; token ids are below {vocab_size}")


def _max_tokens(
    params: pb.SamplingParams, num_prompt: int, n: int, max_model_len: int, refusal: Refusal
) -> int:
    """Output tokens of a sample: what the caller asked for, or as many as context and cache can hold."""
    room = max_model_len - num_prompt
    if params.HasField("max_tokens"):
        if params.max_tokens < 1:
            raise InvalidRequest("sampling.max_tokens", "is 0; must be at least 1")
        max_tokens = min(params.max_tokens, room)
    else:
        max_tokens = _largest_that_fits(room, lambda count: refusal(num_prompt, n, count) is None)
    why = refusal(num_prompt, n, max_tokens)
    if why is not None:
        several = "sampling.beam_width" if params.beam_width else "sampling.n"
        raise InvalidRequest(several if n > 1 else "sampling.max_tokens", why)
    return max_tokens


def _largest_that_fits(room: int, fits: Callable[[int], bool]) -> int:
    """The largest count from 1 to `room` for which `fits`; 1 when none does."""
    if fits(room):
        return room
    low, high = 1, room
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _number(params: pb.SamplingParams, name: str, low: float, high: float, off: float) -> float | None:
    """A field within [low, high]; None where it is absent or has the value that changes nothing."""
    if not params.HasField(name):  # type: ignore[arg-type]
        return None
    value = float(getattr(params, name))
    if not (low <= value <= high and math.isfinite(value)):
        bounds = f"from {low:g} to {high:g}" if math.isfinite(high) else f"a finite number from {low:g}"
        raise InvalidRequest(f"sampling.{name}", f"is {value:g}; must be {bounds}")
    return None if value == off else value


def _above_zero(field: str, value: float | None) -> float | None:
    if value == 0:
        raise InvalidRequest(field, "is 0; must be above 0")
    return value


def _top_k(params: pb.SamplingParams, vocab_size: int) -> int | None:
    if not params.HasField("top_k"):
        return None
    if params.top_k < 1:
        raise InvalidRequest("sampling.top_k", "is 0; must be at least 1, or absent for all")
    return params.top_k if params.top_k < vocab_size else None


def _sampling(params: pb.SamplingParams, model: ServedModel, max_tokens: int, seed: int) -> Sampling:
    temperature = _number(params, "temperature", 0, math.inf, math.nan)
    if params.min_tokens > max_tokens:
        raise InvalidRequest(
            "sampling.min_tokens", f"is {params.min_tokens}; must be at most the {max_tokens} of max_tokens"
        )
    if len(params.grammar.encode()) > MAX_GRAMMAR_BYTES:
        raise InvalidRequest("sampling.grammar", f"is longer than {MAX_GRAMMAR_BYTES} bytes")
    penalty = _number(params, "length_penalty", -MAX_LENGTH_PENALTY, MAX_LENGTH_PENALTY, 1)
    return Sampling(
        temperature=1.0 if temperature is None else temperature,
        top_k=_top_k(params, model.vocab_size),
        top_p=_above_zero("sampling.top_p", _number(params, "top_p", 0, 1, 1)),
        min_p=_number(params, "min_p", 0, 1, 0),
        presence_penalty=_number(params, "presence_penalty", -2, 2, 0),
        frequency_penalty=_number(params, "frequency_penalty", -2, 2, 0),
        repetition_penalty=_above_zero(
            "sampling.repetition_penalty", _number(params, "repetition_penalty", 0, math.inf, 1)
        ),
        logit_bias=_logit_bias(params, model.vocab_size),
        seed=params.seed if params.HasField("seed") else seed,
        # A grammar says where its output ends: it must be able to.
        min_tokens=0 if params.grammar else params.min_tokens,
        stop_token_ids=_stop_ids(params, model),
        num_logprobs=_num_logprobs(params, "logprobs"),
        num_prompt_logprobs=_num_logprobs(params, "prompt_logprobs"),
        grammar=params.grammar or None,
        beam_width=params.beam_width or None,
        length_penalty=1.0 if penalty is None else penalty,
        early_stopping=int(params.early_stopping or EarlyStopping.HEURISTIC),
        await_verdicts=params.await_verdicts,
    )


def _num_logprobs(params: pb.SamplingParams, name: Literal["logprobs", "prompt_logprobs"]) -> int | None:
    if not params.HasField(name):
        return None
    number: int = getattr(params, name)
    _check_range(f"sampling.{name}", number, 0, MAX_LOGPROBS)
    return number


def _logit_bias(params: pb.SamplingParams, vocab_size: int) -> tuple[tuple[int, float], ...]:
    if len(params.logit_bias) > MAX_LOGIT_BIAS:
        raise InvalidRequest(
            "sampling.logit_bias", f"has {len(params.logit_bias)} entries; at most {MAX_LOGIT_BIAS}"
        )
    _check_ids("sampling.logit_bias", params.logit_bias, vocab_size)
    # A proto map has no order of its own: sorted, the same request is the same event.
    bias = tuple(sorted(params.logit_bias.items()))
    for token, value in bias:
        if not math.isfinite(value):
            raise InvalidRequest("sampling.logit_bias", f"is {value} for token {token}; must be finite")
    return bias


def _stop_ids(params: pb.SamplingParams, model: ServedModel) -> tuple[int, ...]:
    """The caller's stop ids, and EOS unless it is ignored where no grammar needs it."""
    given: Any = params.stop_token_ids
    _check_ids("sampling.stop_token_ids", given, model.vocab_size)
    eos = () if params.ignore_eos and not params.grammar else model.eos_token_ids
    stops = tuple(dict.fromkeys([*eos, *given]))
    if len(stops) > model.max_stop_ids:
        raise InvalidRequest(
            "sampling.stop_token_ids",
            f"makes {len(stops)} stop ids, EOS included; a row holds at most {model.max_stop_ids}",
        )
    if params.beam_width + len(stops) > model.vocab_size:
        raise InvalidRequest("sampling.beam_width", f"leaves too few tokens beside {len(stops)} stop ids")
    return stops


def _resume(
    request: pb.GenerateTokensRequest, n: int, max_tokens: int, model: ServedModel
) -> tuple[Resumed, ...]:
    if not request.resume:
        return ()
    if len(request.resume) != n:
        raise InvalidRequest("resume", f"has {len(request.resume)} samples; n is {n}")
    samples = tuple(Resumed(tuple(sample.token_ids), sample.finished) for sample in request.resume)
    begun = any(s.tokens for s in samples) and not all(s.finished for s in samples)
    if begun and request.sampling.beam_width:
        raise InvalidRequest("resume", "holds tokens, but a beam search that has not ended starts anew")
    for i, sample in enumerate(samples):
        _check_ids(f"resume[{i}].token_ids", sample.tokens, model.vocab_size)
        if len(sample.tokens) > max_tokens:
            raise InvalidRequest(
                f"resume[{i}].token_ids", f"has {len(sample.tokens)} tokens; max_tokens is {max_tokens}"
            )
    return samples
