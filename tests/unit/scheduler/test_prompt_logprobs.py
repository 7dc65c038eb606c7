"""Logprobs of prompts over the wire: each token's once and in order, whatever happens to its request.

The simulated worker's logprob of a token is -token / vocabulary, so that what comes tells which token it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from pagoda.v1 import scheduler_pb2 as pb
from scheduler_svc.core import room
from scheduler_svc.core.config import CoreConfig
from scheduler_svc.core.group import Group
from scheduler_svc.core.stats import Stats
from scheduler_svc.core.worker import Worker
from tests.support.session_client import Received, request
from tests.support.sim_worker import expected_output
from tests.unit.scheduler.conftest import VOCAB, LocalScheduler, local_scheduler, until


def prompt_of(length: int, first: int = 1) -> list[int]:
    """Tokens that differ, so that none is taken for another."""
    return [(first + 7 * i) % VOCAB for i in range(length)]


def tokens_of(logprobs: Sequence[pb.TokenLogprob], num_top: int) -> list[int]:
    """Of which tokens these logprobs are."""
    tokens = [round(entry.logprob * -VOCAB) for entry in logprobs]
    for token, entry in zip(tokens, logprobs, strict=True):
        assert list(entry.top_ids) == [(token + i) % VOCAB for i in range(num_top)]
    return tokens


def asking(prompt: Sequence[int], num_top: int = 2, **sampling: Any) -> pb.GenerateTokensRequest:
    return request(prompt, prompt_logprobs=num_top, ignore_eos=True, **sampling)


def check(received: Received, prompt: Sequence[int], num_top: int = 2) -> None:
    assert received.failure is None
    assert tokens_of(received.prompt_logprobs, num_top) == prompt[1:]


async def test_whoever_asks_is_told_once_for_all_samples(serving: LocalScheduler) -> None:
    prompts = [prompt_of(5 + i, first=i) for i in range(30)]
    batch = [asking(p, i % 3, max_tokens=4, seed=i, n=1 + i % 3) for i, p in enumerate(prompts)]
    quiet = request(prompts[9], max_tokens=4)
    async with serving.session() as client:
        *results, silent = await client.results(await client.submit(*batch, quiet))
    for i, (prompt, received) in enumerate(zip(prompts, results, strict=True)):
        check(received, prompt, i % 3)
        assert len(received.tokens) == 1 + i % 3
    assert not silent.prompt_logprobs
    serving.check_idle()


async def test_a_prompt_of_one_token_has_none(serving: LocalScheduler) -> None:
    async with serving.session() as client:
        (received,) = await client.results(await client.submit(asking([5], max_tokens=2)))
    assert not received.prompt_logprobs and len(received.tokens[0]) == 2


async def test_the_prefix_cache_hides_nothing(serving: LocalScheduler) -> None:
    """Such a request takes no hits, and others take hits from it."""
    prompt = prompt_of(64)
    async with serving.session() as client:
        await client.results(await client.submit(request(prompt, max_tokens=2)))
        (received,) = await client.results(await client.submit(asking(prompt, max_tokens=2)))
        check(received, prompt)
        assert received.usage is not None and received.usage.cached_tokens == 0
        (silent,) = await client.results(await client.submit(request(prompt, max_tokens=2)))
        assert silent.usage is not None and silent.usage.cached_tokens == 60
        fresh = prompt_of(64, first=2)
        await client.results(await client.submit(asking(fresh, max_tokens=2)))
        (silent,) = await client.results(await client.submit(request(fresh, max_tokens=2)))
        assert silent.usage is not None and silent.usage.cached_tokens == 60


async def test_chunks_between_decodes() -> None:
    async with local_scheduler(CoreConfig(max_batched_tokens=16)) as local:
        await local.attach(iteration_ms=0.2)
        prompts = [prompt_of(150, first=i) for i in range(3)]
        async with local.session() as client:
            streams = await client.submit(
                *(request([9, i], max_tokens=200, ignore_eos=True) for i in range(5))
            )
            handles = await client.submit(*(asking(p, max_tokens=3) for p in prompts))
            for prompt, received in zip(prompts, await client.results(handles), strict=True):
                check(received, prompt)
            await client.results(streams)
        local.check_idle()


async def test_preemption_in_the_middle_of_a_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams that grow take the blocks of prompts that are half computed."""
    half_told = []
    preempt = room._preempt

    def watched(worker: Worker, group: Group, stats: Stats, now: float) -> None:
        half_told.append(1 < group.next_logprob < group.num_prompt)
        preempt(worker, group, stats, now)

    monkeypatch.setattr(room, "_preempt", watched)
    async with local_scheduler(CoreConfig(max_batched_tokens=20)) as local:
        await local.attach(blocks=100, slots=20, iteration_ms=0.2)
        prompts = [prompt_of(180 + 5 * i, first=i) for i in range(4)]
        asked = [asking(p, max_tokens=20, seed=i, n=1 + i % 2) for i, p in enumerate(prompts)]
        for late in asked:
            late.priority = 1
        streams = [request([3, i], max_tokens=60, seed=i, ignore_eos=True) for i in range(14)]
        async with local.session() as client:
            before = await client.submit(*streams)
            results = await client.results(await client.submit(*asked))
            await client.results(before)
        assert any(half_told)
        for i, received in enumerate(results):
            check(received, prompts[i])
            assert received.tokens[0] == expected_output(prompts[i], i, 20, VOCAB)
        local.check_idle()


async def test_the_death_of_a_worker_in_the_middle_of_a_prompt() -> None:
    """What the caller has of a prompt is not sent again, and nothing is left out."""
    async with local_scheduler(CoreConfig(max_batched_tokens=16)) as local:
        worker = await local.attach(iteration_ms=2)
        prompt = prompt_of(400)
        async with local.session() as client:
            (handle,) = await client.submit(asking(prompt, max_tokens=5, n=2))
            for part in (60, 200):
                await until(lambda part=part: len(client.received[handle].prompt_logprobs) > part)
                await worker.stop()
                assert not client.received[handle].tokens
                worker = await local.attach(iteration_ms=2)
            (received,) = await client.results([handle])
        check(received, prompt)
        assert local.engine.core.stats.replayed_requests == 2
        local.check_idle()


async def test_a_sample_that_is_stopped_leaves_the_rest_to_another() -> None:
    async with local_scheduler(CoreConfig(max_batched_tokens=16)) as local:
        await local.attach(iteration_ms=2)
        prompt = prompt_of(300)
        async with local.session() as client:
            (handle,) = await client.submit(asking(prompt, max_tokens=5, n=3))
            for index in range(2):
                await until(lambda i=index: len(client.received[handle].prompt_logprobs) > 50 + 80 * i)
                await client.stop(handle, index)
            (received,) = await client.results([handle])
        check(received, prompt)
        assert list(received.tokens) == [2]
        local.check_idle()


async def test_generate_tokens_says_the_prompts_first(serving: LocalScheduler) -> None:
    prompt = prompt_of(40)
    call = serving.scheduler.GenerateTokens(asking(prompt, max_tokens=6, n=2))
    responses = [response async for response in call]
    told = [i for i, response in enumerate(responses) if response.prompt_logprobs]
    assert told == list(range(len(told))) and not any(responses[i].token_ids for i in told)
    assert tokens_of([e for response in responses for e in response.prompt_logprobs], 2) == prompt[1:]
    assert sum(len(response.token_ids) for response in responses) == 12


async def test_a_caller_that_has_output_has_been_told(serving: LocalScheduler) -> None:
    prompt = prompt_of(20)
    whole = expected_output(prompt, 9, 12, VOCAB)
    resumed = asking(prompt, max_tokens=12, seed=9)
    resumed.resume.add(token_ids=whole[:5])
    responses = [response async for response in serving.scheduler.GenerateTokens(resumed)]
    assert [token for response in responses for token in response.token_ids] == whole[5:]
    assert not any(response.prompt_logprobs for response in responses)
