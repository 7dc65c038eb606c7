"""Every field of a request is checked, and the error names it."""

from __future__ import annotations

import math
from typing import Any

import pytest
from google.rpc import error_details_pb2

from pagoda.v1 import scheduler_pb2 as pb
from scheduler_svc.core.beams import EarlyStopping
from scheduler_svc.core.events import RequestArrived
from scheduler_svc.errors import InvalidRequest, to_status
from scheduler_svc.validation import ServedModel, check_request

MODEL = ServedModel(
    name="m", digest="d", vocab_size=1000, max_model_len=100, eos_token_ids=(2, 3), max_stop_ids=4
)
MAX_SLOTS = 8
MINTED = 77


def never(_prompt: int, _n: int, _max_tokens: int) -> str | None:
    return None


def check(prompt: Any = (5, 6), refusal: Any = never, resume: Any = (), **sampling: Any) -> RequestArrived:
    request = pb.GenerateTokensRequest(prompt_token_ids=prompt, resume=resume)
    request.sampling.CopyFrom(pb.SamplingParams(**sampling))
    return check_request(request, MODEL, MAX_SLOTS, refusal, MINTED)


def test_absent_fields_get_their_defaults() -> None:
    checked = check()
    assert (checked.n, checked.priority, checked.resume) == (1, 0, ())
    assert checked.max_tokens == 98, "as many as fit"
    sampling = checked.sampling
    assert sampling.temperature == 1.0
    assert sampling.seed == MINTED
    assert sampling.stop_token_ids == (2, 3), "EOS ends a sample"
    for name in ("top_k", "top_p", "min_p", "presence_penalty", "frequency_penalty", "num_logprobs"):
        assert getattr(sampling, name) is None


def test_values_that_change_nothing_are_off() -> None:
    sampling = check(
        top_k=1000, top_p=1, min_p=0, presence_penalty=0, frequency_penalty=0, repetition_penalty=1
    ).sampling
    assert sampling.top_k is sampling.top_p is sampling.min_p is None
    assert sampling.presence_penalty is sampling.frequency_penalty is sampling.repetition_penalty is None


def test_given_values_arrive() -> None:
    checked = check(
        temperature=0, top_k=5, top_p=0.5, min_p=0.25, presence_penalty=-2, frequency_penalty=2,
        repetition_penalty=1.5, logit_bias={9: -1.5, 4: 2}, seed=0, n=8, max_tokens=7, min_tokens=7,
        stop_token_ids=[9, 2], logprobs=0, prompt_logprobs=20,
    )  # fmt: skip
    sampling = checked.sampling
    assert (checked.n, checked.max_tokens) == (8, 7)
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p) == (0, 5, 0.5, 0.25)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (-2, 2)
    assert sampling.repetition_penalty == 1.5
    assert sampling.logit_bias == ((4, 2.0), (9, -1.5))
    assert (sampling.seed, sampling.min_tokens, sampling.num_logprobs) == (0, 7, 0)
    assert sampling.num_prompt_logprobs == 20
    assert sampling.stop_token_ids == (2, 3, 9)


def test_ignore_eos_keeps_only_the_callers_stop_ids() -> None:
    assert check(ignore_eos=True, stop_token_ids=[9]).sampling.stop_token_ids == (9,)


def test_max_tokens_is_cut_to_the_context() -> None:
    assert check(max_tokens=5000).max_tokens == 98


def test_absent_max_tokens_is_cut_to_what_the_cache_can_hold() -> None:
    def cache_of_41(prompt: int, n: int, max_tokens: int) -> str | None:
        return "too big" if prompt + n * max_tokens > 41 else None

    assert check(refusal=cache_of_41).max_tokens == 39
    assert check(refusal=cache_of_41, n=3).max_tokens == 13


@pytest.mark.parametrize(
    ("field", "sampling"),
    [
        ("temperature", {"temperature": -1}),
        ("temperature", {"temperature": math.nan}),
        ("temperature", {"temperature": math.inf}),
        ("top_k", {"top_k": 0}),
        ("top_p", {"top_p": 0}),
        ("top_p", {"top_p": 1.1}),
        ("top_p", {"top_p": math.nan}),
        ("min_p", {"min_p": -0.1}),
        ("min_p", {"min_p": 1.1}),
        ("presence_penalty", {"presence_penalty": 2.1}),
        ("frequency_penalty", {"frequency_penalty": -2.1}),
        ("repetition_penalty", {"repetition_penalty": 0}),
        ("repetition_penalty", {"repetition_penalty": -1}),
        ("repetition_penalty", {"repetition_penalty": math.inf}),
        ("logit_bias", {"logit_bias": {1000: 1}}),
        ("logit_bias", {"logit_bias": {1: math.nan}}),
        ("logit_bias", {"logit_bias": {i: 1 for i in range(301)}}),
        ("n", {"n": 0}),
        ("n", {"n": MAX_SLOTS + 1}),
        ("max_tokens", {"max_tokens": 0}),
        ("min_tokens", {"min_tokens": 11, "max_tokens": 10}),
        ("min_tokens", {"min_tokens": 99}),
        ("stop_token_ids", {"stop_token_ids": [1000]}),
        ("stop_token_ids", {"stop_token_ids": [4, 5, 6]}),
        ("logprobs", {"logprobs": 21}),
        ("prompt_logprobs", {"prompt_logprobs": 21}),
    ],
)
def test_bad_sampling_names_the_field(field: str, sampling: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as refused:
        check(**sampling)
    assert refused.value.field == f"sampling.{field}"
    assert str(refused.value).startswith(f"sampling.{field}: ")


@pytest.mark.parametrize(
    ("field", "request_"),
    [
        ("prompt_token_ids", {}),
        ("prompt_token_ids", {"prompt_token_ids": [1, 1000]}),
        ("prompt_token_ids", {"prompt_token_ids": [1] * 100}),
        ("request_id", {"prompt_token_ids": [1], "request_id": "é" * 65}),
        ("resume", {"prompt_token_ids": [1], "resume": [{}, {}]}),
        ("resume[0].token_ids", {"prompt_token_ids": [1], "resume": [{"token_ids": [1000]}]}),
        ("resume[0].token_ids", {"prompt_token_ids": [1], "resume": [{"token_ids": [1] * 100}]}),
    ],
)
def test_bad_requests_name_the_field(field: str, request_: dict[str, Any]) -> None:
    request = pb.GenerateTokensRequest(**request_)
    with pytest.raises(InvalidRequest) as refused:
        check_request(request, MODEL, MAX_SLOTS, never, MINTED)
    assert refused.value.field == field


def test_the_longest_prompt_and_the_longest_id_pass() -> None:
    request = pb.GenerateTokensRequest(prompt_token_ids=[999] * 99, request_id="é" * 64)
    assert check_request(request, MODEL, MAX_SLOTS, never, MINTED).max_tokens == 1


@pytest.mark.parametrize(("n", "field"), [(1, "sampling.max_tokens"), (2, "sampling.n")])
def test_what_can_never_fit_is_refused_with_the_cores_reason(n: int, field: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        check(refusal=lambda *_: "needs 900 blocks, there are 4", n=n)
    assert refused.value.field == field
    assert "900 blocks" in str(refused.value)


def test_the_status_carries_the_field() -> None:
    status = to_status(InvalidRequest("sampling.n", "is 0"))
    detail = error_details_pb2.BadRequest()
    assert status.details[0].Unpack(detail)
    assert detail.field_violations[0].field == "sampling.n"
    assert detail.field_violations[0].description == "is 0"


def test_a_beam_search_arrives() -> None:
    checked = check(beam_width=4, n=3, length_penalty=-0.5, early_stopping=pb.EARLY_STOPPING_NEVER)
    sampling = checked.sampling
    assert (checked.n, sampling.beam_width, sampling.length_penalty) == (3, 4, -0.5)
    assert (sampling.early_stopping, sampling.await_verdicts) == (EarlyStopping.NEVER, False)
    default = check(beam_width=1, await_verdicts=True).sampling
    assert (default.length_penalty, default.early_stopping) == (1.0, EarlyStopping.HEURISTIC)
    assert default.await_verdicts


@pytest.mark.parametrize(
    ("field", "sampling"),
    [
        ("sampling.beam_width", {"beam_width": 0}),
        ("sampling.beam_width", {"beam_width": MAX_SLOTS + 1}),
        ("sampling.beam_width", {"beam_width": 17}),
        ("sampling.n", {"beam_width": 2, "n": 3}),
        ("sampling.grammar", {"beam_width": 2, "grammar": "{}"}),
        ("sampling.early_stopping", {"beam_width": 2, "early_stopping": 9}),
        ("sampling.length_penalty", {"beam_width": 2, "length_penalty": 11.0}),
        ("sampling.length_penalty", {"beam_width": 2, "length_penalty": math.nan}),
        ("sampling.length_penalty", {"length_penalty": 1.0}),
        ("sampling.early_stopping", {"early_stopping": pb.EARLY_STOPPING_FIRST}),
        ("sampling.await_verdicts", {"await_verdicts": True}),
    ],
)
def test_options_of_beam_searches_are_checked(field: str, sampling: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check(**sampling)
    assert caught.value.field == field


def test_a_beam_search_needs_the_blocks_of_all_its_beams() -> None:
    asked: list[int] = []

    def refusal(_prompt: int, n: int, _max_tokens: int) -> str | None:
        asked.append(n)
        return "too many"

    with pytest.raises(InvalidRequest) as caught:
        check(beam_width=4, n=2, max_tokens=5, refusal=refusal)
    assert caught.value.field == "sampling.beam_width" and set(asked) == {4}


def test_a_beam_search_resumes_only_where_it_had_ended() -> None:
    ended = pb.ResumedSample(token_ids=[4], finished=True)
    assert len(check(beam_width=2, n=2, resume=[ended, ended]).resume) == 2
    check(beam_width=2, n=2, resume=[pb.ResumedSample(), pb.ResumedSample()])
    with pytest.raises(InvalidRequest) as caught:
        check(beam_width=2, n=2, resume=[ended, pb.ResumedSample()])
    assert caught.value.field == "resume"
