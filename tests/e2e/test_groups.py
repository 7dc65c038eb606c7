"""Several samples of a prompt by every door of the real services: n and best_of.

Sample i of a request is the single request with the seed + i, whatever else is asked for: by which door, as a
stream or not, with logprobs, stop strings, beside a sample that is aborted, after the scheduler was killed.
"""

from __future__ import annotations

import asyncio
import functools
import statistics
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import httpx
import openai
import pytest

import pagoda
import pagoda.swift
from pagoda.models import EMBEDDED_MODEL as MODEL
from pagoda.v1 import scheduler_pb2 as pb
from pagoda.v1 import scheduler_pb2_grpc as rpc
from tests.support.cluster import Cluster
from tests.support.cluster_sched import follow, spawn, wait_until
from tests.support.session_client import SessionClient, request

pytestmark = pytest.mark.timeout(600)

PROMPT = "Once upon a time"
LAST_SEED = 2**64 - 2  # of four samples, the last two draw with 0 and 1
MAX_TOKENS = 24
CLOSE = 1e-3


@pytest.fixture(scope="module")
def client(running: Cluster) -> Iterator[pagoda.Client]:
    """Our SDK."""
    with pagoda.Client(running.grpc, timeout=120) as client:
        yield client


@pytest.fixture(scope="module")
def single(client: pagoda.Client) -> Any:
    """Asks for the one sample that a seed draws."""

    @functools.cache
    def ask(seed: int, **options: Any) -> pagoda.types.Sample:
        drawn = {"max_tokens": MAX_TOKENS, "logprobs": 0, **options}
        return client.generate(PROMPT, seed=seed % 2**64, **drawn).samples[0]

    return ask


def logprobs_of(sample: pagoda.types.Sample) -> list[float]:
    """Of each token."""
    return [entry.logprob for entry in sample.logprobs]


def body(**options: Any) -> dict[str, Any]:
    """A completion's body."""
    return {"model": MODEL, "prompt": PROMPT, "max_tokens": MAX_TOKENS, **options}


# ---------------------------------------------------------------------------------------------------- n


@pytest.mark.parametrize("seed", [40, LAST_SEED])
@pytest.mark.parametrize("stop", [None, " a"])
@pytest.mark.parametrize("stream", [False, True])
def test_openai(sdk: openai.OpenAI, single: Any, stream: bool, stop: str | None, seed: int) -> None:
    asked: Any = body(n=4, seed=seed, logprobs=1, stop=stop, extra_body={"return_token_ids": True})
    if stream:
        texts, logprobs = [""] * 4, [[], [], [], []]  # type: ignore[var-annotated]
        reasons: dict[int, Any] = {}
        for chunk in sdk.completions.create(stream=True, **asked):
            for choice in chunk.choices:
                assert choice.index not in reasons, "nothing comes after a sample's end"
                texts[choice.index] += choice.text
                logprobs[choice.index] += (choice.logprobs and choice.logprobs.token_logprobs) or []
                if choice.finish_reason:
                    reasons[choice.index] = (choice.finish_reason, getattr(choice, "stop_reason", None))
        told = [(texts[i], logprobs[i], *reasons[i]) for i in range(4)]
    else:
        choices = sdk.completions.create(**asked).choices
        told = [
            (c.text, (c.logprobs and c.logprobs.token_logprobs) or [], c.finish_reason, c.stop_reason)  # type: ignore[attr-defined]
            for c in choices
        ]
    for i, (text, values, reason, stop_reason) in enumerate(told):
        alone = single(seed + i, stop=stop or ())
        assert (text, reason, stop_reason) == (alone.text, alone.finish_reason, alone.stop_reason)
        assert values == pytest.approx(logprobs_of(alone), abs=CLOSE)
    assert len({text for text, *_ in told}) > 1
    if stop:
        assert any(stop_reason for *_, stop_reason in told), "the stop string was met"


@pytest.mark.parametrize("stop", [(), " a"])
def test_sdk_streams_each_sample_under_its_index(client: pagoda.Client, single: Any, stop: Any) -> None:
    options: Any = {"n": 4, "seed": 7, "max_tokens": MAX_TOKENS, "stop": stop, "logprobs": 0}
    with client.stream(PROMPT, **options) as stream:
        chunks = list(stream)
        streamed = stream.completion.samples
    assert len({chunk.index for chunk in chunks[:8]}) > 1, "they come side by side"
    for i, (sample, whole) in enumerate(
        zip(streamed, client.generate(PROMPT, **options).samples, strict=True)
    ):
        alone = single(7 + i, stop=stop)
        for one in (sample, whole):
            assert (one.index, one.text, one.token_ids) == (i, alone.text, alone.token_ids)
            assert (one.finish_reason, one.stop_reason) == (alone.finish_reason, alone.stop_reason)
            assert logprobs_of(one) == pytest.approx(logprobs_of(alone), abs=CLOSE)


def test_command_line(running: Cluster, single: Any) -> None:
    told = cli(running, "--n", "3", "--seed", "40")
    assert told == "".join(f"[{i}]\n{single(40 + i).text}\n" for i in range(3))


def cli(running: Cluster, *options: str) -> str:
    """What `pagoda generate` prints."""
    command = [sys.executable, "-m", "pagoda.cli.main", "generate", PROMPT, "--url", running.grpc]
    command += ["--max-tokens", str(MAX_TOKENS), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_ms_swifts_calls(running: Cluster, client: pagoda.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAGODA_URL", running.grpc)
    config = pagoda.swift.VllmGenerationConfig(max_new_tokens=MAX_TOKENS, n=3, seed=9)
    template, requests = pagoda.swift.get_template("default"), [{"query": "Tell me a story."}]
    engine = pagoda.swift.get_vllm_engine(MODEL)
    try:
        (whole,) = pagoda.swift.inference_vllm(engine, template, requests, generation_config=config)
        stream = pagoda.swift.inference_stream_vllm(engine, template, requests, generation_config=config)
        streamed = [responses[0] for responses in stream][-1]
    finally:
        engine.close()
    messages = [{"role": "user", "content": "Tell me a story."}]
    texts = [client.chat(messages, seed=9 + i, top_k=50, max_tokens=MAX_TOKENS).text for i in range(3)]
    assert whole == {"response": texts[0], "history": [[requests[0]["query"], texts[0]]], "responses": texts}
    assert streamed == whole


def test_one_sample_is_aborted_and_the_others_go_on(running: Cluster, client: pagoda.Client) -> None:
    options: dict[str, Any] = {"max_tokens": 400, "ignore_eos": True}
    with client.stream(PROMPT, n=3, seed=5, request_id="three", **options) as stream:
        for chunk in stream:
            if chunk.index == 1:
                assert abort(running, "three", 1)
                break
        for _ in stream:
            pass
        samples = stream.completion.samples
    assert [sample.finish_reason for sample in samples] == ["length", "cancelled", "length"]
    alone = [client.generate(PROMPT, seed=5 + i, **options).samples[0] for i in range(3)]
    assert [samples[i].token_ids for i in (0, 2)] == [alone[i].token_ids for i in (0, 2)]
    cut = samples[1].token_ids
    assert 0 < len(cut) < 400 and cut == alone[1].token_ids[: len(cut)]
    assert alone[1].text.startswith(samples[1].text.rstrip("\ufffd"))


def abort(running: Cluster, request_id: str, index: int) -> bool:
    """Abort one sample."""
    with grpc.insecure_channel(running.scheduler.address) as channel:
        asked = pb.AbortRequest(request_id=request_id, index=index)
        return rpc.ControlServiceStub(channel).Abort(asked, timeout=10).found


def test_samples_are_resumed_each_where_it_was(running: Cluster, client: pagoda.Client, single: Any) -> None:
    """As a gateway does that has tokens of a group: one sample has some, one has ended, one has none."""
    ids = client.tokenize(PROMPT)
    wanted = [single(40 + i).token_ids for i in range(3)]

    async def resume() -> dict[int, list[int]]:
        async with SessionClient(running.scheduler.address) as session:
            asked = request(ids, n=3, seed=40, max_tokens=MAX_TOKENS)
            asked.resume.add(token_ids=wanted[0][:5])
            asked.resume.add(token_ids=wanted[1], finished=True)
            asked.resume.add()
            (received,) = await session.results(await session.submit(asked))
            return received.tokens

    came = asyncio.run(resume())
    assert [came.get(i, []) for i in range(3)] == [list(wanted[0][5:]), [], list(wanted[2])]


# ---------------------------------------------------------------------------------------------- best_of


@pytest.fixture(scope="module")
def ranked(client: pagoda.Client) -> Any:
    """The samples of best_of as they should be: all of them, ranked by what is said of each token."""

    def rank(drawn: int, stop: Any = ()) -> list[tuple[float, pagoda.types.Sample]]:
        samples = client.generate(
            PROMPT, n=drawn, seed=40, max_tokens=MAX_TOKENS, logprobs=0, stop=stop
        ).samples
        means = [statistics.fmean(logprobs_of(sample)) for sample in samples]
        return sorted(zip(means, samples, strict=True), key=lambda pair: -pair[0])

    return rank


@pytest.mark.parametrize("stop", [(), (" a", ".")])
def test_best_of_is_the_best_of_n(
    running: Cluster, sdk: openai.OpenAI, client: pagoda.Client, ranked: Any, stop: Any
) -> None:
    wanted = ranked(6, stop)
    used = sum(len(sample.token_ids) for _, sample in wanted)
    done = client.generate(PROMPT, n=2, best_of=6, seed=40, max_tokens=MAX_TOKENS, stop=stop)
    assert [sample.index for sample in done.samples] == [0, 1]
    assert not any(sample.logprobs for sample in done.samples), "nobody asked for them"
    assert done.usage is not None and done.usage.completion_tokens == used
    answer = sdk.completions.create(**body(n=2, best_of=6, seed=40, stop=list(stop) or None, logprobs=1))
    for (score, best), sample, choice in zip(wanted, done.samples, answer.choices, strict=False):
        assert (sample.text, sample.token_ids) == (best.text, best.token_ids)
        assert (sample.finish_reason, sample.stop_reason) == (best.finish_reason, best.stop_reason)
        assert sample.score == pytest.approx(score, abs=CLOSE)
        assert choice.text == best.text
        assert choice.score == pytest.approx(score, abs=CLOSE)  # type: ignore[attr-defined]
        assert choice.logprobs is not None and choice.logprobs.token_logprobs is not None
        assert choice.logprobs.token_logprobs == pytest.approx(logprobs_of(best), abs=CLOSE)
    assert answer.usage is not None and answer.usage.completion_tokens == used
    if not stop:
        told = cli(running, "--n", "2", "--best-of", "6", "--seed", "40")
        assert [line for line in told.splitlines() if line.startswith("[")] == [
            f"[{i}] score {sample.score:.4f}" for i, sample in enumerate(done.samples)
        ]
        assert all(sample.text in told for sample in done.samples)


def test_best_of_of_a_chat_beside_a_sample_that_is_aborted(running: Cluster) -> None:
    asked = {
        "messages": [{"role": "user", "content": "Tell me a story."}],
        "n": 2,
        "best_of": 3,
        "max_tokens": 300,
        "ignore_eos": True,
        "request_id": "story",
    }
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(httpx.post, f"{running.url}/v1/chat/completions", json=asked, timeout=120)
        wait_until(lambda: abort_begun(running, "story", 1), 60, "sample 1 runs and is aborted")
        choices = answer.result().json()["choices"]
    assert [choice["finish_reason"] for choice in choices] == ["length", "length"], "whole ones come first"
    assert choices[0]["score"] >= choices[1]["score"]


def abort_begun(running: Cluster, request_id: str, index: int) -> bool:
    """Abort a sample once it has a token; whether that was so."""
    for state in running.snapshot(requests=True).requests:
        if state.request_id == request_id and state.samples[index].output_tokens:
            return abort(running, request_id, index)
    return False


def test_the_scheduler_is_killed_while_the_best_are_drawn(running: Cluster, ranked: Any) -> None:
    """Nothing has been told yet, so all is drawn again: the same."""
    with ThreadPoolExecutor(1) as pool, pagoda.Client(running.grpc, max_retries=100, backoff_s=0.1) as client:
        options: Any = {"max_tokens": 300, "ignore_eos": True, "seed": 3}
        undisturbed = client.generate(PROMPT, n=2, best_of=4, **options)
        asked = pool.submit(client.generate, PROMPT, n=2, best_of=4, **options)
        wait_until(lambda: has_begun(running), 60, "tokens are drawn")
        running.scheduler.popen.kill()
        running.scheduler.popen.wait()
        where = ["--listen", running.scheduler.address, "--metrics-port", "0"]
        running.scheduler.popen = spawn(["-m", "scheduler_svc", *where])
        follow(running.scheduler)
        done = asked.result(200)
    assert [s.token_ids for s in done.samples] == [s.token_ids for s in undisturbed.samples]
    assert done.usage is not None and done.usage.completion_tokens == 4 * 300


def has_begun(running: Cluster) -> bool:
    """Whether something that runs has output."""
    states = running.snapshot(requests=True).requests
    return any(sample.output_tokens for state in states for sample in state.samples)
