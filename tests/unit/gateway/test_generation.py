"""A sample's text, tokens and end, whatever pieces its tokens come in."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from gateway_svc.generation import Generation, GenerationSpec, Job, Sample
from gateway_svc.metrics import Metrics
from pagoda.v1 import scheduler_pb2 as pb
from tests.unit.gateway.conftest import ids_of, model_tokenizer

STOP, LENGTH, EOS = pb.FINISH_REASON_STOP, pb.FINISH_REASON_LENGTH, 2
METRICS = Metrics("m", CollectorRegistry())


def generation(
    *stops: str, include_stop: bool = False, n: int = 1, stop_ids: tuple[int, ...] = ()
) -> Generation:
    sampling = pb.SamplingParams(n=n, seed=1, stop_token_ids=stop_ids)
    spec = GenerationSpec("id", [5, 6], sampling, stops, include_stop)
    return Generation(spec, model_tokenizer().visible, Job(METRICS, 0.0, True))


def sample(*stops: str, include_stop: bool = False, stop_ids: tuple[int, ...] = ()) -> Sample:
    return generation(*stops, include_stop=include_stop, stop_ids=stop_ids).samples[0]


def test_eos_counts_and_is_not_text() -> None:
    s = sample()
    assert s.feed([*ids_of("hi"), EOS], [], STOP) is False
    delta = s.take()
    assert (delta.text, delta.token_ids, s.finish_reason) == ("hi", [*ids_of("hi"), EOS], STOP)
    assert s.stop_reason is None


def test_a_stop_id_is_text_only_if_stops_are_included() -> None:
    word = ids_of(" end")
    for include, text in ((False, "the"), (True, "the end")):
        s = sample(include_stop=include, stop_ids=tuple(word))
        s.feed([*ids_of("the"), *word], [], STOP)
        assert s.take().text == text and s.stop_reason == word[0]


def test_tokens_after_the_one_that_completes_a_stop_string_do_not_count() -> None:
    s = sample("two")
    ids = ids_of("one two three four")
    logprobs = [pb.TokenLogprob(rank=i) for i in range(len(ids))]
    assert s.feed(ids, logprobs, 0) is True, "the scheduler must be told"
    delta = s.take()
    assert delta.text == "one " and delta.token_ids == ids[:2]
    assert [entry.rank for entry in delta.logprobs] == [0, 1]
    assert (s.finish_reason, s.stop_reason) == (STOP, "two")
    assert s.feed(ids, logprobs, 0) is False and s.take().token_ids == []


def test_the_scheduler_is_not_told_what_it_knows() -> None:
    s = sample("two")
    assert s.feed(ids_of("one two three"), [], LENGTH) is False
    assert (s.finish_reason, s.stop_reason) == (STOP, "two")


def test_what_is_held_back_comes_at_the_end() -> None:
    s = sample("twofold")
    s.feed(ids_of("one two"), [], 0)
    assert s.take().text == "one "
    s.feed([], [], LENGTH)
    assert s.take().text == "two" and s.stop_reason is None


def test_an_unfinished_character_is_flushed_at_the_end() -> None:
    ids = ids_of("👋🏽")[:-1]
    s = sample("zzz")
    s.feed(ids, [], 0)
    assert "\ufffd" not in s.take().text
    s.feed([], [], LENGTH)
    assert s.take().text.endswith("\ufffd")


@settings(max_examples=150, deadline=None)
@given(
    text=st.text(alphabet="ab 中é👋🏽\n", max_size=40),
    stops=st.lists(st.text(alphabet="ab 中é👋\n", min_size=1, max_size=3), max_size=3),
    cuts=st.lists(st.integers(1, 4), min_size=60, max_size=60),
)
def test_pieces_make_no_difference(text: str, stops: list[str], cuts: list[int]) -> None:
    ids = ids_of(text)
    whole = sample(*stops)
    whole.feed(ids, [], LENGTH)
    pieces = sample(*stops)
    at, shown = 0, ""
    for cut in cuts:
        if at < len(ids) and not pieces.finish_reason:
            pieces.feed(ids[at : at + cut], [], LENGTH if at + cut >= len(ids) else 0)
            shown += pieces.take().text
        at += cut
    if not ids:
        pieces.feed([], [], LENGTH)
    expected = whole.take()
    assert (shown, pieces.token_ids, pieces.stop_reason) == (
        expected.text,
        expected.token_ids,
        whole.stop_reason,
    )


def test_a_request_can_be_submitted_again_with_what_it_has() -> None:
    g = generation(n=2)
    assert not g.request().resume, "nothing yet"
    g.job.add(g)
    g.on_row(0, [7, EOS], [], STOP, 1.0)
    g.on_row(1, [8, 9], [], 0, 1.0)
    again = g.request()
    assert [list(s.token_ids) for s in again.resume] == [[7, EOS], [8, 9]]
    assert [s.finished for s in again.resume] == [True, False]
    assert again.sampling.seed == 1 and list(again.prompt_token_ids) == [5, 6]


async def test_a_job_wakes_for_news_and_for_the_end() -> None:
    g = generation()
    job = g.job
    job.add(g)
    g.on_row(0, [7], [], 0, 1.0)
    g.on_row(0, [8], [], 0, 2.0)
    news = await job.next()
    assert news == [g.samples[0]] and news[0].take().token_ids == [7, 8], "what gathered is one piece of news"
    g.on_usage(pb.Usage(cached_tokens=1))
    assert await job.next() == [] and job.ended


@pytest.mark.parametrize("streams", [True, False])
async def test_an_error_reaches_who_waits(streams: bool) -> None:
    from gateway_svc.errors import Unavailable

    g = generation()
    g.job.streams = streams
    g.job.add(g)
    g.on_failure(Unavailable("gone"))
    with pytest.raises(Unavailable):
        await g.job.next()
