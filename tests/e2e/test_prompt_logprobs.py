"""Logprobs of prompts from the real services and a real model: what transformers says, whatever happens.

The reference is the log-softmax of transformers' float32 logits over the whole prompt at once. Here a prompt
is computed in small chunks, beside others.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import openai
import pytest
import torch

import pagoda
from pagoda.models import EMBEDDED_MODEL as MODEL
from tests.support.cluster import Cluster, cluster
from tests.support.cluster_sched import follow, spawn, wait_until
from tests.support.data import prompts, tokenizer
from tests.support.reference import model
from tests.support.session_client import SessionClient, request

pytestmark = pytest.mark.timeout(600)

CHUNK = 48  # tokens of a step
CLOSE = 1e-3
# Two engines may order tokens either way whose logprobs lie closer than this.
TIE = 1e-4
TEXTS = [
    "The capital of France is Paris, and that of Italy is Rome.",
    "Grüße aus Köln! 世界 👋🏽",
    "def add(a, b):\n    return a + b\n",
    "a",
]


@dataclass(frozen=True)
class Entry:
    """What was said of one token."""

    logprob: float
    rank: int
    top_ids: list[int]
    top_logprobs: list[float]


@pytest.fixture(scope="module")
def running() -> Iterator[Cluster]:
    """All three services, in small chunks, with the prefix cache on as it is by default."""
    with cluster(
        dtype="float32",
        scheduler_args=("--max-batched-tokens", str(CHUNK)),
        worker_args=("--num-blocks", "512"),
        gateway_args=(),
    ) as services:
        yield services


@pytest.fixture(scope="module")
def sdk(running: Cluster) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0, timeout=300) as client:
        yield client


@torch.inference_mode()
def reference(ids: Sequence[int]) -> torch.Tensor:
    """float32[len(ids) - 1, vocabulary]: what transformers says of each token after the first."""
    return model()(torch.tensor([list(ids)])).logits[0, :-1].float().log_softmax(-1)


def check(ids: Sequence[int], entries: Sequence[Entry], num_top: int) -> None:
    """One entry for each token but the first, with transformers' logprob, rank and best tokens."""
    assert len(entries) == len(ids) - 1
    for token, entry, expected in zip(ids[1:], entries, reference(ids), strict=True):
        own = expected[token]
        assert entry.logprob == pytest.approx(own.item(), abs=CLOSE)
        better, perhaps = (int((expected > own + tie).sum()) for tie in (TIE, -TIE))
        assert better + 1 <= entry.rank <= max(perhaps, 1)
        best = expected.topk(num_top)
        assert len(entry.top_ids) == num_top
        assert expected[entry.top_ids].tolist() == pytest.approx(best.values.tolist(), abs=TIE)
        assert entry.top_logprobs == pytest.approx(best.values.tolist(), abs=CLOSE)
        if num_top and (best.values[:-1] - best.values[1:] > TIE).all():
            assert entry.top_ids[:-1] == best.indices[:-1].tolist()


def entries_of(logprobs: Sequence[Any]) -> list[Entry]:
    """From the wire's messages."""
    return [Entry(e.logprob, e.rank, list(e.top_ids), list(e.top_logprobs)) for e in logprobs]


def in_vllms_shape(
    told: Sequence[dict[str, dict[str, Any]] | None], ids: Sequence[int], num_top: int
) -> list[Entry]:
    """From `prompt_logprobs` over HTTP, which name each token's text, too."""
    entries: list[Entry] = []
    assert told[0] is None
    for token, choices in zip(ids[1:], told[1:], strict=True):
        assert choices is not None
        for i, choice in choices.items():
            assert choice["decoded_token"] == tokenizer().decode([int(i)], skip_special_tokens=False)
        best = sorted((c["rank"], int(i), c["logprob"]) for i, c in choices.items() if c["rank"] <= num_top)
        own = choices[str(token)]
        entries.append(Entry(own["logprob"], own["rank"], [i for _, i, _ in best], [v for *_, v in best]))
    return entries


def test_prompts_in_chunks_beside_others(running: Cluster) -> None:
    """With n of 3, with decodes and other prompts between, all at once over the wire."""
    chosen = [prompt.ids for prompt in prompts() if 30 < len(prompt.ids) < 260][:6]

    async def ask() -> None:
        async with SessionClient(running.scheduler.address) as client:
            batch = [
                request(ids, max_tokens=8, seed=i, n=1 + 2 * (i % 2), prompt_logprobs=i)
                for i, ids in enumerate(chosen)
            ]
            silent = [request(ids, max_tokens=20, seed=i) for i, ids in enumerate(chosen)]
            results = await client.results(await client.submit(*silent, *batch))
            for i, (ids, received) in enumerate(zip(chosen, results[len(silent) :], strict=True)):
                check(ids, entries_of(received.prompt_logprobs), i)
                assert received.usage is not None and received.usage.cached_tokens == 0
            assert not any(received.prompt_logprobs for received in results[: len(silent)])

    asyncio.run(ask())


@pytest.mark.parametrize("stream", [False, True])
def test_openai_echo(sdk: openai.OpenAI, stream: bool) -> None:
    """Texts and tokens; the logprobs are the model's, and the text is the prompt's, letter for letter."""
    options: dict[str, Any] = {"model": MODEL, "temperature": 0, "max_tokens": 4, "logprobs": 5}
    for prompt in (TEXTS, [tokenizer().encode(text) for text in TEXTS]):
        answer = sdk.completions.create(prompt=prompt, echo=True, stream=stream, **options)
        plain = sdk.completions.create(prompt=prompt, **options)
        whole: dict[int, list[Any]] = {i: [] for i in range(len(TEXTS))}
        for choice in [c for part in answer for c in part.choices] if stream else answer.choices:
            whole[choice.index].append(choice)
        for i, text in enumerate(TEXTS):
            ids = tokenizer().encode(text)
            assert "".join(choice.text for choice in whole[i]) == text + plain.choices[i].text
            told = [choice.logprobs for choice in whole[i] if choice.logprobs]
            values = [value for part in told for value in part.token_logprobs]
            after = plain.choices[i].logprobs
            assert after is not None and after.token_logprobs is not None
            assert values[0] is None and values[len(ids) :] == pytest.approx(after.token_logprobs, abs=CLOSE)
            own = reference(ids).gather(1, torch.tensor(ids[1:]).unsqueeze(1)).squeeze(1)
            assert values[1 : len(ids)] == pytest.approx(own.tolist(), abs=CLOSE)
            tops = [top for part in told for top in part.top_logprobs]
            names = [name for part in told for name in part.tokens]
            assert tops[0] is None and all(5 <= len(top) <= 6 for top in tops[1:])
            assert all(
                top[name] == value for top, name, value in zip(tops[1:], names[1:], values[1:], strict=True)
            )
            for top, expected in zip(tops[1:], reference(ids), strict=False):
                assert sorted(top.values())[-5:] == pytest.approx(
                    expected.topk(5).values.tolist()[::-1], abs=CLOSE
                )


def test_the_prompt_alone(sdk: openai.OpenAI) -> None:
    """max_tokens 0, as harnesses ask, is the prompt's part of an answer with more."""
    options: dict[str, Any] = {"model": MODEL, "prompt": TEXTS, "echo": True, "logprobs": 1, "temperature": 0}
    alone = sdk.completions.create(max_tokens=0, **options)
    more = sdk.completions.create(max_tokens=3, **options)
    assert alone.usage is not None and alone.usage.completion_tokens == 0
    for text, one, other in zip(TEXTS, alone.choices, more.choices, strict=True):
        assert one.text == text and one.finish_reason == "length"
        assert one.logprobs is not None and other.logprobs is not None
        count = len(tokenizer().encode(text))
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            assert getattr(one.logprobs, name) == getattr(other.logprobs, name)[:count]


def test_what_is_cached_is_told_all_the_same(running: Cluster, sdk: openai.OpenAI) -> None:
    ids = next(prompt.ids for prompt in prompts() if 150 < len(prompt.ids) < 250)
    options: dict[str, Any] = {"model": MODEL, "prompt": ids, "max_tokens": 1, "temperature": 0}
    extra = {"prompt_logprobs": 3}
    fresh = sdk.completions.create(extra_body=extra, **options)
    cached = sdk.completions.create(**options)
    assert cached.usage is not None and cached.usage.prompt_tokens_details is not None
    assert (cached.usage.prompt_tokens_details.cached_tokens or 0) > len(ids) - 32, "others hit its blocks"
    again = sdk.completions.create(extra_body=extra, **options)
    told = [answer.choices[0].model_extra or {} for answer in (fresh, again)]
    assert told[0]["prompt_logprobs"] == told[1]["prompt_logprobs"]
    check(ids, in_vllms_shape(told[1]["prompt_logprobs"], ids, 3), 3)


def test_chat_and_our_sdk(running: Cluster, sdk: openai.OpenAI) -> None:
    """The same prompt through each door says the same."""
    chat: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer().apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    answer = sdk.chat.completions.create(
        model=MODEL, messages=chat, max_tokens=4, temperature=0, extra_body={"prompt_logprobs": 3}
    )
    entries = in_vllms_shape((answer.model_extra or {})["prompt_logprobs"], ids, 3)
    check(ids, entries, 3)
    with pagoda.Client(running.grpc) as client:
        done = client.chat(chat, max_tokens=4, temperature=0, prompt_logprobs=3)
        assert [one.token_id for one in done.prompt_logprobs] == ids[1:]
        assert [one.logprob for one in done.prompt_logprobs] == pytest.approx([e.logprob for e in entries])
        assert [[i for i, _ in one.top] for one in done.prompt_logprobs] == [e.top_ids for e in entries]
        with client.stream(ids, max_tokens=4, temperature=0, n=2, prompt_logprobs=0) as stream:
            chunks = list(stream)
        first = next(i for i, chunk in enumerate(chunks) if chunk.token_ids)
        told = [one for chunk in chunks[:first] for one in chunk.prompt_logprobs]
        assert [(one.token_id, one.top) for one in told] == [(i, ()) for i in ids[1:]]
        assert not any(chunk.prompt_logprobs for chunk in chunks[first:])


def test_a_worker_is_killed_while_it_computes_the_prompt(running: Cluster) -> None:
    """kill -9 in the middle: what came before is not sent again, the rest comes from the next worker."""
    ids = [token for prompt in prompts()[:9] for token in prompt.ids][:900]

    async def ask() -> None:
        async with SessionClient(running.scheduler.address) as client:
            (handle,) = await client.submit(request(ids, max_tokens=4, n=3, prompt_logprobs=2))
            received = client.received[handle]
            await asyncio.to_thread(wait_until, lambda: bool(received.prompt_logprobs), 60)
            running.workers["w0"].popen.kill()
            await asyncio.to_thread(running.workers["w0"].popen.wait)
            before = len(received.prompt_logprobs)
            assert 0 < before < len(ids) - 1 and not received.tokens
            await asyncio.to_thread(running.start_worker, "w0")
            await client.results([handle])
            check(ids, entries_of(received.prompt_logprobs), 2)
            assert sorted(received.tokens) == [0, 1, 2]

    asyncio.run(ask())


def test_many_askers_at_once(running: Cluster, sdk: openai.OpenAI) -> None:
    """Whoever leaves in the middle takes nothing from the others."""
    chosen = [prompt.ids for prompt in prompts() if 60 < len(prompt.ids) < 200][:8]

    def one(number: int) -> None:
        ids = chosen[number % len(chosen)]
        options: dict[str, Any] = {
            "model": MODEL,
            "prompt": ids,
            "max_tokens": 2,
            "echo": True,
            "logprobs": 0,
        }
        if number % 4 == 3:
            with sdk.completions.create(stream=True, **options) as stream:
                next(iter(stream))
            return
        (choice,) = sdk.completions.create(**options).choices
        assert choice.logprobs is not None and choice.logprobs.token_logprobs is not None
        own = reference(ids).gather(1, torch.tensor(ids[1:]).unsqueeze(1)).squeeze(1)
        assert choice.logprobs.token_logprobs[1 : len(ids)] == pytest.approx(own.tolist(), abs=CLOSE)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(one, range(12)))
    wait_until(lambda: not running.snapshot().num_running, 60, "nothing runs any more")


def test_the_scheduler_is_killed_while_the_prompt_is_computed(running: Cluster) -> None:
    """The gateway knows nothing of the rest then; our client asks again, and hands on each token once."""
    ids = [token for prompt in prompts()[:9] for token in prompt.ids][:900]

    def computing() -> bool:
        (state,) = running.snapshot(requests=True).requests or [None]
        return state is not None and 0 < state.samples[0].num_computed < len(ids)

    with ThreadPoolExecutor(1) as pool, pagoda.Client(running.grpc, max_retries=100, backoff_s=0.1) as client:
        asked = pool.submit(client.generate, ids, max_tokens=4, prompt_logprobs=2)
        wait_until(computing, 60, "the prompt is being computed")
        running.scheduler.popen.kill()
        running.scheduler.popen.wait()
        where = ["--listen", running.scheduler.address, "--metrics-port", "0"]
        running.scheduler.popen = spawn(["-m", "scheduler_svc", *where, "--max-batched-tokens", str(CHUNK)])
        follow(running.scheduler)
        done = asked.result(200)
    assert [one.token_id for one in done.prompt_logprobs] == ids[1:]
    entries = [
        Entry(one.logprob, one.rank, [i for i, _ in one.top], [value for _, value in one.top])
        for one in done.prompt_logprobs
    ]
    check(ids, entries, 2)
    assert len(done.token_ids) == 4
