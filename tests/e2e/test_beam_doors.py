"""Beam search by every door of the real services, and stop strings, on which the gateway gives verdicts.

The reference for stop strings is a search in plain Python over transformers' float32 logits, which looks for
them in the text of each whole path as transformers' tokenizer decodes it. Searches without any are compared
with transformers' own elsewhere, by token ids.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import httpx
import openai
import pytest
import torch

import pagoda
import pagoda.swift
from pagoda.models import EMBEDDED_MODEL as MODEL
from pagoda.v1 import scheduler_pb2 as pb
from tests.support.cluster import Cluster
from tests.support.cluster_sched import wait_until
from tests.support.data import tokenizer
from tests.support.reference import EXCUSED_MARGIN, model
from tests.support.session_client import SessionClient, request

pytestmark = pytest.mark.timeout(600)

PROMPTS = ["Once upon a time", "The three largest cities are", "Q: Why is the sky blue?\nA:", "Dear Sir,\n"]
WIDTH, MAX_TOKENS, CLOSE = 4, 20, 1e-3
EOS = 2


@pytest.fixture(scope="module")
def client(running: Cluster) -> Iterator[pagoda.Client]:
    """Our SDK."""
    with pagoda.Client(running.grpc, timeout=120) as client:
        yield client


@dataclass
class Book:
    """The reference: its results as (score, tokens, whether they stopped), and its closest decision."""

    results: list[tuple[float, tuple[int, ...], bool]] = field(default_factory=list)
    closest: float = 1.0

    def choose(
        self, scored: list[tuple[float, tuple[int, ...]]], count: int
    ) -> list[tuple[float, tuple[int, ...]]]:
        """The best `count`, best first."""
        ranked = sorted(scored, key=lambda pair: -pair[0])[: count + 1]
        for one, next_one in itertools.pairwise(ranked):
            self.closest = min(self.closest, one[0] - next_one[0])
        return ranked[:count]


@torch.inference_mode()
def search(prompt: Sequence[int], stops: Sequence[str]) -> Book:
    """A search that ends when its best beam would not better the worst of its results."""
    book = Book()
    beams: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    for length in range(1, MAX_TOKENS + 1):
        logits = model()(torch.tensor([[*prompt, *tokens] for _, tokens in beams])).logits[:, -1].float()
        candidates = []
        for (score, tokens), row in zip(beams, logits.log_softmax(-1), strict=True):
            values, ids = row.topk(2 * WIDTH + 2)
            candidates += [
                (score + v, (*tokens, i)) for v, i in zip(values.tolist(), ids.tolist(), strict=True)
            ]
        going = book.choose([c for c in candidates if c[1][-1] != EOS], WIDTH)
        halted = {
            tokens
            for _, tokens in going
            if any(stop in tokenizer().decode(tokens, skip_special_tokens=True) for stop in stops)
        }
        for score, tokens in book.choose(candidates, WIDTH):
            stopped = tokens[-1] == EOS or tokens in halted
            if stopped or length == MAX_TOKENS:
                book.results.append((score / length, tokens, stopped))
        book.results = sorted(book.results, key=lambda result: -result[0])[:WIDTH]
        beams = [(score, tokens) for score, tokens in going if tokens not in halted]
        if not beams:
            break
        if len(book.results) == WIDTH:
            book.closest = min(book.closest, abs(beams[0][0] / length - book.results[-1][0]))
            if beams[0][0] / length <= book.results[-1][0]:
                break
    return book


def cut(tokens: Sequence[int], stops: Sequence[str], include: bool) -> tuple[str, str | None]:
    """A result's text up to the stop string that is complete first, and which it is."""
    text = tokenizer().decode(tokens, skip_special_tokens=True)
    ends = [(text.find(stop) + len(stop), -len(stop), stop) for stop in stops if stop in text]
    if not ends:
        return text, None
    end, _, stop = min(ends)
    return text[: end if include else end - len(stop)], stop


def body(prompt: str, **options: Any) -> dict[str, Any]:
    """A completion's body."""
    searched = {"use_beam_search": True, "best_of": WIDTH, "n": WIDTH, "return_token_ids": True}
    return {"model": MODEL, "prompt": prompt, "max_tokens": MAX_TOKENS, **searched, **options}


def ask(running: Cluster, **options: Any) -> dict[str, Any]:
    """A whole answer."""
    response = httpx.post(f"{running.url}/v1/completions", json=body(**options), timeout=120)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


# --------------------------------------------------------------------------------------------- stop strings


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("stops", [[" the"], [".", ", a", "s a"], ["never to be met"]])
def test_stop_strings_end_the_same_beams_as_by_the_book(
    running: Cluster, stops: list[str], include: bool
) -> None:
    excused = 0
    for prompt in PROMPTS:
        book = search(tokenizer().encode(prompt), stops)
        answer = ask(running, prompt=prompt, stop=stops, include_stop_str_in_output=include)
        told = [(tuple(c["token_ids"]), c["text"], c["stop_reason"]) for c in answer["choices"]]
        wanted = [(tokens, *cut(tokens, stops, include)) for _, tokens, _ in book.results]
        if told != wanted:
            assert book.closest < EXCUSED_MARGIN, f"{prompt!r}:\n{told}\n{wanted}"
            excused += 1
            continue
        for choice, (score, tokens, stopped) in zip(answer["choices"], book.results, strict=True):
            assert choice["score"] == pytest.approx(score, abs=CLOSE)
            assert choice["finish_reason"] == ("stop" if stopped else "length")
            assert not stopped or len(tokens) <= MAX_TOKENS
        assert answer["usage"]["completion_tokens"] == sum(len(tokens) for _, tokens, _ in book.results)
    assert excused <= 1


def test_a_worker_that_dies_changes_no_verdict(running: Cluster) -> None:
    options: dict[str, Any] = {"prompt": PROMPTS[0], "stop": [" forest", "\n\n"], "max_tokens": 200}
    undisturbed = ask(running, **options)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask, running, **options)
        wait_until(lambda: running.snapshot().num_running > 0, 60, "the search runs")
        assert not asked.done()
        running.workers["w0"].popen.kill()
        running.workers["w0"].popen.wait()
        running.start_worker("w0")
        disturbed = asked.result(120)
    assert disturbed["choices"] == undisturbed["choices"]
    assert disturbed["usage"]["completion_tokens"] == undisturbed["usage"]["completion_tokens"]


def test_searches_with_and_without_stop_strings_beside_samples(
    running: Cluster, client: pagoda.Client
) -> None:
    """None waits for another's verdict, and none is changed by others."""
    asked: list[dict[str, Any]] = [
        {"prompt": prompt, **options}
        for prompt in PROMPTS
        for options in (
            {"beam_width": 4, "n": 2, "stop": [" the"]},
            {"beam_width": 3, "n": 3, "early_stopping": True, "length_penalty": 2.0},
            {"n": 2, "seed": 5},
        )
    ]
    together = client.batch(asked, max_tokens=MAX_TOKENS)
    for item, done in zip(asked, together, strict=True):
        prompt, options = item["prompt"], {k: v for k, v in item.items() if k != "prompt"}
        alone = client.generate(prompt, max_tokens=MAX_TOKENS, **options)
        assert [s.text for s in done.samples] == [s.text for s in alone.samples]


def test_a_client_that_leaves_a_search_that_awaits_verdicts(running: Cluster) -> None:
    """The services must be idle at the module's end, too, with every block free or cached."""
    asked = body(PROMPTS[0], stop=["never to be met"], max_tokens=1000, ignore_eos=True)

    async def leave() -> None:
        async with httpx.AsyncClient(timeout=120) as http:
            asking = asyncio.create_task(http.post(f"{running.url}/v1/completions", json=asked))
            await asyncio.to_thread(wait_until, lambda: running.snapshot().num_running > 0, 60, "it runs")
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)

    asyncio.run(leave())
    running.assert_idle()


# ---------------------------------------------------------------------------------------------------- doors


def test_every_door_tells_what_the_scheduler_found(
    running: Cluster, client: pagoda.Client, sdk: openai.OpenAI
) -> None:
    ids = tokenizer().encode(PROMPTS[0])
    options: dict[str, Any] = {"n": 3, "beam_width": 4, "length_penalty": 0.5, "max_tokens": MAX_TOKENS}

    async def directly() -> Any:
        async with SessionClient(running.scheduler.address) as session:
            asked = request(ids, early_stopping=pb.EARLY_STOPPING_NEVER, **options)
            return (await session.results(await session.submit(asked)))[0]

    found = asyncio.run(directly())
    tokens = [tuple(found.tokens[i]) for i in range(3)]
    texts = [tokenizer().decode(one, skip_special_tokens=True) for one in tokens]
    by_sdk = client.generate(PROMPTS[0], early_stopping="never", logprobs=1, **options)
    assert [(s.token_ids, s.text) for s in by_sdk.samples] == list(zip(tokens, texts, strict=True))
    scores = [s.score for s in by_sdk.samples]
    for sample, score in zip(by_sdk.samples, scores, strict=True):
        total = sum(entry.logprob for entry in sample.logprobs)
        assert score == pytest.approx(total / len(sample.token_ids) ** 0.5, abs=CLOSE)
    assert scores == sorted(scores, key=lambda s: -(s or 0.0))
    del options["beam_width"], options["length_penalty"]
    extra = {"use_beam_search": True, "best_of": 4, "length_penalty": 0.5, "early_stopping": "never"}
    whole = sdk.completions.create(
        model=MODEL, prompt=PROMPTS[0], temperature=1.0, extra_body=extra, **options
    )
    assert [choice.text for choice in whole.choices] == texts
    assert [choice.score for choice in whole.choices] == pytest.approx(scores, abs=1e-5)  # type: ignore[attr-defined]
    del extra["best_of"]
    asked = {"prompt": PROMPTS[0], "stream": True, "beam_width": 4, **extra, **options}
    assert streamed(f"{running.url}/v1/completions", asked) == dict(enumerate(texts))
    told = cli(
        running, "--n", "3", "--beam-width", "4", "--length-penalty", "0.5", "--early-stopping", "never"
    )
    lines = [
        f"[{i}] score {score:.4f}\n{text}\n"
        for i, (score, text) in enumerate(zip(scores, texts, strict=True))
    ]
    assert told == "".join(lines)


def streamed(url: str, asked: dict[str, Any]) -> dict[int, str]:
    """The text of each choice: one event each, with its score."""
    texts: dict[int, str] = {}
    with httpx.stream("POST", url, json=asked, timeout=120) as response:
        for line in response.iter_lines():
            if line and line != "data: [DONE]":
                (choice,) = json.loads(line.removeprefix("data: "))["choices"]
                assert choice["index"] not in texts and choice["finish_reason"] and "score" in choice
                texts[choice["index"]] = choice["text"]
    return texts


def cli(running: Cluster, *options: str) -> str:
    """What `pagoda generate` prints."""
    command = [sys.executable, "-m", "pagoda.cli.main", "generate", PROMPTS[0], "--url", running.grpc]
    command += ["--max-tokens", str(MAX_TOKENS), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_chat_and_several_prompts(running: Cluster, client: pagoda.Client) -> None:
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    best = client.chat(messages, beam_width=3, max_tokens=MAX_TOKENS)
    assert best.text == "The capital of France is Paris." and best.finish_reason == "stop"
    answer = ask(running, prompt=PROMPTS, n=2, stop=["."], echo=True)
    assert [choice["index"] for choice in answer["choices"]] == list(range(2 * len(PROMPTS)))
    for place, prompt in enumerate(PROMPTS):
        alone = ask(running, prompt=prompt, n=2, stop=["."])["choices"]
        both = answer["choices"][2 * place : 2 * place + 2]
        assert [choice["text"] for choice in both] == [prompt + choice["text"] for choice in alone]


def test_ms_swifts_num_beams(
    running: Cluster, client: pagoda.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PAGODA_URL", running.grpc)
    query = "Name a city."
    found = client.chat(
        [{"role": "user", "content": query}], beam_width=3, n=2, max_tokens=MAX_TOKENS, length_penalty=0.0
    )
    engine = pagoda.swift.get_vllm_engine(MODEL)
    config = engine.generation_config
    config.max_new_tokens, config.num_beams, config.n, config.length_penalty = MAX_TOKENS, 3, 2, 0.0
    try:
        (whole,) = pagoda.swift.inference_vllm(
            engine, pagoda.swift.get_template("default"), [{"query": query}]
        )
    finally:
        engine.close()
    assert whole["responses"] == [sample.text for sample in found.samples]
    assert whole["response"] == found.text


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"beam_width": 17}, "sampling.beam_width"),
        ({"beam_width": 2, "n": 3}, "sampling.n"),
        ({"beam_width": 2, "length_penalty": 1e30}, "sampling.length_penalty"),
        ({"length_penalty": 2.0}, "sampling.length_penalty"),
        ({"early_stopping": True}, "sampling.early_stopping"),
        ({"beam_width": 2, "best_of": 2}, "best_of"),
        ({"beam_width": 2, "structured_output": {"regex": "a"}}, "structured_output.regex"),
    ],
)
def test_what_does_not_go_together_is_named(client: pagoda.Client, options: Any, field: str) -> None:
    with pytest.raises(pagoda.InvalidRequest) as wrong:
        client.generate("x", max_tokens=2, **options)
    assert wrong.value.field == field and field.rpartition(".")[2] in wrong.value.message
