"""Grammars on their way to the workers: the vocabulary first, the core none the wiser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import pytest

from pagoda.v1 import scheduler_pb2 as pb
from scheduler_svc.core.config import CoreConfig
from scheduler_svc.errors import InvalidRequest
from scheduler_svc.record import replay
from scheduler_svc.validation import MAX_GRAMMAR_BYTES
from tests.support.session_client import SessionClient, request
from tests.unit.scheduler.conftest import LocalScheduler, local_scheduler, until
from tests.unit.scheduler.test_validation import check

GRAMMAR = "start: /[a-z]+/"
VOCABULARY = pb.Vocabulary(tokens=[b"", b"<s>", b"</s>", b"a"], special_token_ids=[1, 2], eos_token_id=2)
PROMPT = [1, 5, 7]


async def tell(client: SessionClient, vocabulary: pb.Vocabulary = VOCABULARY) -> None:
    await client.call.write(pb.SessionRequest(vocabulary=vocabulary))


async def run(client: SessionClient, **sampling: Any) -> Any:
    (received,) = await client.results(await client.submit(request(PROMPT, **sampling)))
    return received


async def test_the_vocabulary_comes_before_the_first_row_with_a_grammar(serving: LocalScheduler) -> None:
    async with serving.session() as client:
        await run(client, max_tokens=3)
        executor = serving.workers[0].executor
        assert not executor.learned
        await tell(client)
        assert not (await run(client, max_tokens=3, grammar=GRAMMAR, n=2)).failure
        assert executor.learned == [VOCABULARY]
        assert [(row.sampling.grammar, known) for row, known in executor.constrained] == [(GRAMMAR, 1)] * 2
        await tell(client)
        await run(client, max_tokens=3, grammar=GRAMMAR)
        assert executor.learned == [VOCABULARY], "what is known is not told again"
        await serving.attach("w1")
        await until(lambda: len(serving.workers[1].executor.learned) == 1)
        changed = pb.Vocabulary(tokens=[b"b"], eos_token_id=0)
        await tell(client, changed)
        await until(lambda: all(worker.executor.learned[-1] == changed for worker in serving.workers))


async def test_another_sessions_vocabulary_counts(serving: LocalScheduler) -> None:
    async with serving.session() as first, serving.session() as second:
        await tell(first)
        await run(first, max_tokens=1)
        assert not (await run(second, max_tokens=3, grammar=GRAMMAR)).failure
    call = serving.scheduler.GenerateTokens(request(PROMPT, max_tokens=3, grammar=GRAMMAR))
    assert [response async for response in call]


async def test_without_a_vocabulary_a_grammar_is_refused(serving: LocalScheduler) -> None:
    async with serving.session() as client:
        failure = (await run(client, grammar=GRAMMAR)).failure
        assert failure.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
        assert failure.field == "sampling.grammar" and "vocabulary" in failure.message
    serving.check_idle()


def test_a_grammar_must_be_able_to_end() -> None:
    sampling = check(grammar=GRAMMAR, ignore_eos=True, min_tokens=5, stop_token_ids=[9]).sampling
    assert (sampling.grammar, sampling.min_tokens, sampling.stop_token_ids) == (GRAMMAR, 0, (2, 3, 9))
    assert check(ignore_eos=True, min_tokens=5).sampling.stop_token_ids == ()


def test_a_grammar_is_bounded() -> None:
    assert check(grammar="x" * MAX_GRAMMAR_BYTES).sampling.grammar
    with pytest.raises(InvalidRequest, match=f"sampling.grammar: is longer than {MAX_GRAMMAR_BYTES} bytes"):
        check(grammar="é" * (MAX_GRAMMAR_BYTES // 2 + 1))


async def test_a_record_with_grammars_replays(tmp_path: Path) -> None:
    path = tmp_path / "run.rec"
    async with local_scheduler(CoreConfig(), record=path) as local:
        await local.attach()
        async with local.session() as client:
            await tell(client)
            for seed in range(5):
                await run(client, max_tokens=20, grammar=GRAMMAR, seed=seed, n=2)
    report = replay(path)
    assert report.num_requests == 5 and report.num_plans > 10
