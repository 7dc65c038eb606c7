"""n, best_of and beams through both doors: what is asked of the scheduler, and what is told of what comes."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from gateway_svc.generation import Best, Generation, GenerationSpec, Job
from gateway_svc.server import GatewayServer
from pagoda.v1 import inference_pb2 as pb
from pagoda.v1 import scheduler_pb2 as spb
from tests.unit.gateway.conftest import ids_of, model_tokenizer, until
from tests.unit.gateway.fake_scheduler import FakeScheduler, Result, Step
from tests.unit.gateway.test_generation import EOS, LENGTH, METRICS, STOP

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
USER = [{"role": "user", "content": "hi"}]


def searches(fake: FakeScheduler, steps: list[Step], results: list[Result]) -> None:
    """Let every beam search be this one."""
    fake.search = lambda request: (list(steps), results[: request.sampling.n])


def choices(response: httpx.Response) -> list[dict[str, Any]]:
    """The choices of an answer that is one."""
    assert response.status_code == 200, response.text
    return list(response.json()["choices"])


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """The choices of a stream's events, in their order."""
    assert response.status_code == 200
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
    assert lines[-1] == "[DONE]"
    return [choice for line in lines[:-1] for choice in json.loads(line)["choices"]]


# ---------------------------------------------------------------------------------------------- best_of


def test_the_best_are_those_of_the_best_mean_logprob() -> None:
    best = Best(2, hides_logprobs=False)
    spec = GenerationSpec("id", [5], spb.SamplingParams(n=4, seed=1), best=best)
    g = Generation(spec, model_tokenizer().visible, Job(METRICS, 0.0, False))
    g.job.add(g)

    def entries(*values: float) -> list[spb.TokenLogprob]:
        return [spb.TokenLogprob(logprob=value) for value in values]

    g.on_row(0, [7], entries(-1.0), 0, 1.0)
    g.on_row(1, [8, EOS], entries(-0.5, -0.25), STOP, 1.0)
    g.on_row(2, [6], entries(0.0), spb.FINISH_REASON_CANCELLED, 1.0)
    assert g.request().resume[1].finished and len(g.request().resume) == 4, "what was drawn is not lost"
    assert g.results == [] and not g.job.has_news
    g.on_row(0, [7, 7], entries(-0.125, 0.0), LENGTH, 2.0)
    g.on_row(3, [9], entries(-0.375), LENGTH, 2.0)
    g.on_usage(spb.Usage())
    # -0.375 is of the samples 0, 1 and 3; sample 2 is better, but was cut off.
    told = [(s.index, s.score, s.token_ids) for s in g.results]
    assert told == [(0, -0.375, [7, 7, 7]), (1, -0.375, [8, EOS])]
    assert g.num_output_tokens == 7, "all that was drawn"


@pytest.mark.parametrize("route", [CHAT, TEXT])
async def test_best_of_over_http(http: httpx.AsyncClient, fake: FakeScheduler, route: str) -> None:
    fake.script = lambda request, index: [*ids_of(f"sample {index}"), EOS]
    body: dict[str, Any] = {"messages": USER} if route == CHAT else {"prompt": ["a", "b"]}
    response = await http.post(route, json={**body, "n": 2, "best_of": 5, "seed": 40})
    told = choices(response)
    texts = [c["message"]["content"] if route == CHAT else c["text"] for c in told]
    # All are as good as another here, and then the first ones are told.
    assert texts == ["sample 0", "sample 1"] * (1 if route == CHAT else 2)
    assert [c["index"] for c in told] == list(range(len(texts)))
    assert all(c["score"] == -0.25 and c["logprobs"] is None for c in told)
    drawn = sum(len(ids_of(f"sample {i}")) + 1 for i in range(5))
    assert response.json()["usage"]["completion_tokens"] == drawn * len(fake.submitted)
    sampling = fake.submitted[0].sampling
    assert (sampling.n, sampling.seed, sampling.HasField("logprobs"), sampling.logprobs) == (5, 40, True, 0)
    assert not sampling.HasField("beam_width")


async def test_best_of_with_logprobs_echo_and_a_stop(http: httpx.AsyncClient, fake: FakeScheduler) -> None:
    fake.script = lambda request, index: ids_of("one two three" + " four" * 10_000)
    body = {"prompt": ["Say", "Tell"], "best_of": 3, "logprobs": 2, "echo": True, "stop": "three"}
    first, second = choices(await http.post(TEXT, json=body))
    assert (first["text"], second["text"]) == ("Sayone two ", "Tellone two ")
    assert first["finish_reason"] == "stop" and first["stop_reason"] == "three"
    assert first["logprobs"]["tokens"] == ["Say", "one", " two", " three"]
    await until(lambda: len(fake.stopped) == 6)  # the scheduler is told of every sample's end


async def test_as_many_as_are_wanted_are_no_choice(http: httpx.AsyncClient, fake: FakeScheduler) -> None:
    body = {"prompt": "x", "n": 2, "best_of": 2}
    assert not any("score" in choice for choice in choices(await http.post(TEXT, json=body)))
    assert {choice["index"] for choice in events(await http.post(TEXT, json=body | {"stream": True}))} == {
        0,
        1,
    }
    assert not fake.submitted[0].sampling.HasField("logprobs")


async def test_what_the_scheduler_says_of_n_is_said_of_best_of(
    http: httpx.AsyncClient, fake: FakeScheduler
) -> None:
    said = "sampling.n: is 100; must be from 1 to 64"
    fake.refuse = lambda request: spb.RequestFailure(code=3, message=said, field="sampling.n")
    response = await http.post(TEXT, json={"prompt": "x", "best_of": 100})
    error = response.json()["error"]
    assert response.status_code == 400
    assert (error["param"], error["message"]) == ("best_of", "best_of: is 100; must be from 1 to 64")


async def test_best_of_over_grpc(stub: Any, fake: FakeScheduler) -> None:
    fake.script = lambda request, index: [*ids_of(f"sample {index}"), EOS]
    request = pb.GenerateRequest(text="x", best_of=4, sampling=spb.SamplingParams(n=2, logprobs=1))
    responses = [r async for r in stub.Generate(request)]
    assert [(r.index, r.text, r.score) for r in responses] == [(0, "sample 0", -0.25), (1, "sample 1", -0.25)]
    assert all(len(r.logprobs) == len(r.token_ids) for r in responses)
    assert responses[-1].usage.completion_tokens == sum(len(ids_of(f"sample {i}")) + 1 for i in range(4))
    request.sampling.ClearField("logprobs")
    assert not any(r.logprobs for r in [r async for r in stub.Generate(request)])


# ------------------------------------------------------------------------------------------------ beams

ONE, TWO, THREE = (ids_of(text)[0] for text in (" one", " two", " three"))
# Two beams: " one two" meets the stop string at step 1, " two two" does not; then the search begins anew, and
# at step 2 it is met by a path whose parents have crossed.
STEPS: list[Step] = [
    (0, [], [ONE, TWO, THREE, EOS]),
    (1, [0, 1, 1, 0], [TWO, TWO, ONE, THREE]),
    (0, [], [ONE, TWO]),
    (1, [1, 0], [ONE, ONE]),
    (2, [1, 0, 0], [TWO, THREE, TWO]),
]
RESULTS: list[Result] = [
    ([TWO, ONE, TWO], STOP, -0.5),
    ([THREE, ONE, EOS], STOP, -0.75),
    ([ONE, ONE, ONE], LENGTH, -1.5),
]


async def test_verdicts_and_what_is_told_of_the_results(http: httpx.AsyncClient, fake: FakeScheduler) -> None:
    searches(fake, STEPS, RESULTS)
    body = {"prompt": "x", "use_beam_search": True, "n": 3, "best_of": 4, "stop": "one two", "temperature": 1}
    response = await http.post(TEXT, json=body | {"length_penalty": 0.5, "early_stopping": "never"})
    assert fake.judged == [(0, []), (1, [0]), (0, []), (1, []), (2, [0, 2])]
    told = [(c["text"], c["finish_reason"], c["stop_reason"], c["score"]) for c in choices(response)]
    assert told == [
        (" two ", "stop", "one two", -0.5),
        (" three one", "stop", None, -0.75),
        (" one one one", "length", None, -1.5),
    ]
    assert response.json()["usage"]["completion_tokens"] == 9
    sampling = fake.submitted[0].sampling
    assert (sampling.beam_width, sampling.n, sampling.await_verdicts) == (4, 3, True)
    assert (sampling.length_penalty, sampling.early_stopping) == (0.5, spb.EARLY_STOPPING_NEVER)


async def test_a_stop_string_may_stay_in_the_text(http: httpx.AsyncClient, fake: FakeScheduler) -> None:
    searches(fake, STEPS, RESULTS)
    body = {"prompt": "x", "beam_width": 4, "stop": ["one two"], "include_stop_str_in_output": True}
    (choice,) = choices(await http.post(TEXT, json=body))
    assert (choice["text"], choice["stop_reason"]) == (" two one two", "one two")


@pytest.mark.parametrize(
    ("given", "width", "n"),
    [
        ({"use_beam_search": True, "n": 3}, 3, 3),
        ({"use_beam_search": True, "n": 2, "best_of": 4}, 4, 2),
        ({"use_beam_search": True, "best_of": 4}, 4, 1),
        ({"use_beam_search": True, "beam_width": 4, "n": 2}, 4, 2),
        ({"use_beam_search": True}, 1, 1),
        ({"beam_width": 16}, 16, 1),
        ({"beam_width": 4, "best_of": 4, "early_stopping": True}, 4, 1),
        ({"beam_width": 4, "best_of": 4, "stream": True}, 4, 1),
    ],
)
async def test_how_many_beams(
    http: httpx.AsyncClient, fake: FakeScheduler, given: dict[str, Any], width: int, n: int
) -> None:
    searches(fake, [], RESULTS)
    assert (await http.post(CHAT, json={"messages": USER, **given})).status_code == 200
    sampling = fake.submitted[0].sampling
    assert (sampling.beam_width, sampling.n, sampling.await_verdicts) == (width, n, False)
    assert not sampling.HasField("logprobs")


@pytest.mark.parametrize("route", [CHAT, TEXT])
async def test_a_stream_tells_the_results_when_they_are_there(
    http: httpx.AsyncClient, fake: FakeScheduler, route: str
) -> None:
    searches(fake, [], [([TWO, ONE, EOS], STOP, -0.5), ([THREE, TWO], LENGTH, -0.75)])
    body: dict[str, Any] = {"messages": USER} if route == CHAT else {"prompt": "x"}
    body |= {"beam_width": 4, "n": 2, "stream": True}
    told = events(await http.post(route, json=body))
    ends = [c for c in told if c["finish_reason"]]
    texts = [c["delta"]["content"] if route == CHAT else c["text"] for c in ends]
    assert [(c["index"], c["score"]) for c in ends] == [(0, -0.5), (1, -0.75)]
    assert texts == [" two one", " three two"]
    assert not any("score" in choice for choice in told if not choice["finish_reason"])


async def test_beams_over_grpc(stub: Any, fake: FakeScheduler) -> None:
    searches(fake, STEPS, RESULTS)
    # A client cannot wait for verdicts: they are the gateway's.
    sampling = spb.SamplingParams(n=2, beam_width=4, await_verdicts=True)
    request = pb.GenerateRequest(text="x", sampling=sampling, stop=["one two"])
    responses = [r async for r in stub.Generate(request)]
    assert [(r.index, r.text, r.score) for r in responses] == [(0, " two ", -0.5), (1, " three one", -0.75)]
    assert [r.stop_reason for r in responses] == ["one two", ""]
    assert len(fake.judged) == len(STEPS)
    searches(fake, [], RESULTS)
    del request.stop[:]
    assert len([r async for r in stub.Generate(request)]) == 2
    assert not fake.submitted[1].sampling.await_verdicts


def test_stop_ids_are_not_text_and_last_tokens_of_stop_strings_are() -> None:
    """What ended a result is known by its last token: the scheduler says STOP for both."""
    for last, text, reason in ((TWO, " one ", "two"), (EOS, " one", None), (THREE, " one", THREE)):
        sampling = spb.SamplingParams(n=1, seed=1, beam_width=2, stop_token_ids=[THREE])
        spec = GenerationSpec("id", [5], sampling, ("two",))
        g = Generation(spec, model_tokenizer().visible, Job(METRICS, 0.0, False), [EOS])
        g.on_row(0, [ONE, last], [], STOP, 1.0, -1.0)
        assert (g.samples[0].take().text, g.samples[0].stop_reason) == (text, reason)


async def test_a_client_that_leaves_is_waited_for_no_more(
    http: httpx.AsyncClient, server: GatewayServer, fake: FakeScheduler
) -> None:
    endless: list[Step] = [(0, [], [ONE]), *((i, [0], [ONE]) for i in range(1, 100_000))]
    searches(fake, endless, RESULTS)
    asking = asyncio.create_task(http.post(TEXT, json={"prompt": "x", "beam_width": 2, "stop": "never"}))
    await until(lambda: len(fake.judged) > 10)
    asking.cancel()
    await until(lambda: bool(fake.stopped))
    assert server.gateway.link.num_open == 0
    searches(fake, [], RESULTS)
    assert choices(await http.post(TEXT, json={"prompt": "x", "beam_width": 2}))
