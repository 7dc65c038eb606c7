"""Beam searches over a real socket: results, verdicts, and what becomes of those that their callers leave."""

from __future__ import annotations

from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest

from pagoda.internal.v1 import worker_pb2 as wire
from pagoda.v1 import scheduler_pb2 as pb
from scheduler_svc import codec
from scheduler_svc.core.events import BeamCandidates, LogprobEntry, RequestArrived, Sampling, SessionOutput
from scheduler_svc.core.group import Group
from scheduler_svc.core.worker import Flight
from tests.support.beam_reference import NEVER, Result, beam_search
from tests.support.session_client import Received, request
from tests.support.sim_worker import ROOT, beam_logprobs, extend
from tests.unit.scheduler.conftest import VOCAB, LocalScheduler, until

PROMPT = [1, 5, 7]
STOPS = (2, *range(100, 180))
SEARCH: dict[str, Any] = {"beam_width": 4, "n": 3, "max_tokens": 20, "stop_token_ids": STOPS[1:15]}


def model(history: tuple[int, ...]) -> np.ndarray:
    prefix = ROOT
    for token in history:
        prefix = extend(prefix, token)
    return beam_logprobs(prefix, VOCAB)


def expected(max_tokens: int = 20, **options: Any) -> list[Result]:
    return beam_search(model, PROMPT, width=4, n=3, max_tokens=max_tokens, stops=STOPS[:15], **options)


def assert_found(received: Received, want: list[Result]) -> None:
    assert received.failure is None and received.usage is not None
    assert received.tokens == {i: list(result.tokens) for i, result in enumerate(want)}
    assert received.scores == pytest.approx({i: result.score for i, result in enumerate(want)}, abs=1e-3)
    stop, length = pb.FINISH_REASON_STOP, pb.FINISH_REASON_LENGTH
    assert received.reasons == {i: stop if result.stopped else length for i, result in enumerate(want)}
    assert received.usage.completion_tokens == sum(len(result.tokens) for result in want)


async def test_searches_of_a_session(serving: LocalScheduler) -> None:
    ways = [
        {"length_penalty": penalty, "early_stopping": way}
        for penalty in (-1.0, 0.0, 1.0)
        for way in (1, 2, 3)
    ]
    async with serving.session() as client:
        results = await client.results(
            await client.submit(*(request(PROMPT, **SEARCH, **way) for way in ways), request(PROMPT, seed=1))
        )
    for way, received in zip(ways, results, strict=False):
        assert_found(received, expected(**way))
    assert results[-1].tokens and not results[-1].scores
    serving.check_idle()


async def test_a_search_of_a_direct_client(serving: LocalScheduler) -> None:
    answers = [a async for a in serving.scheduler.GenerateTokens(request(PROMPT, **SEARCH, logprobs=2))]
    want = expected()
    assert [tuple(answer.token_ids) for answer in answers] == [result.tokens for result in want]
    assert [answer.score for answer in answers] == pytest.approx([r.score for r in want], abs=1e-3)
    for answer in answers:
        assert [len(entry.top_ids) for entry in answer.logprobs] == [2] * len(answer.token_ids)
    with pytest.raises(grpc.aio.AioRpcError, match="await_verdicts"):
        await serving.scheduler.GenerateTokens(request(PROMPT, beam_width=2, await_verdicts=True)).read()
    serving.check_idle()


async def test_verdicts_end_what_stop_strings_would(serving: LocalScheduler) -> None:
    said: list[tuple[int, ...]] = []

    def halts(output: tuple[int, ...]) -> bool:
        return output[-1] % 7 == 0

    def judge(asked: pb.BeamCandidates) -> list[int]:
        before = [said[i] for i in asked.parents] if asked.step else [()] * len(asked.token_ids)
        said[:] = [(*b, token) for b, token in zip(before, asked.token_ids, strict=True)]
        return [i for i, output in enumerate(said) if halts(output)]

    async with serving.session() as client:
        client.judge = judge
        handles = await client.submit(request(PROMPT, **SEARCH, early_stopping=NEVER, await_verdicts=True))
        (received,) = await client.results(handles)
    assert_found(received, expected(early_stopping=NEVER, halts=halts))
    serving.check_idle()


async def test_a_search_that_waits_for_a_verdict_can_be_left(serving: LocalScheduler) -> None:
    async with serving.session() as client:
        asked: list[pb.BeamCandidates] = []
        client.judge = lambda one: asked.append(one) or []
        client._write = lambda message: _nothing()  # type: ignore[method-assign]
        batch = pb.SubmitBatch(handles=[1], requests=[request(PROMPT, **SEARCH, await_verdicts=True)])
        await client.call.write(pb.SessionRequest(submit=batch))
        await until(lambda: bool(asked))
        snapshot = (await serving.control.Snapshot(pb.SnapshotRequest(include_requests=True))).snapshot
        assert snapshot.num_running == 1 and len(snapshot.requests[0].samples) == 4
    await until(lambda: not serving.engine.core.groups)
    serving.check_idle()


async def _nothing() -> None:
    """A session that never answers."""


@pytest.mark.parametrize(
    "batch",
    [
        pb.VerdictBatch(handles=[1], steps=[0, 1], num_stopped=[0]),
        pb.VerdictBatch(handles=[1], steps=[0], num_stopped=[2], stopped=[1]),
    ],
)
async def test_verdicts_that_contradict_themselves_end_the_session(
    serving: LocalScheduler, batch: pb.VerdictBatch
) -> None:
    async with serving.session() as client:
        await client.call.write(
            pb.SessionRequest(verdicts=pb.VerdictBatch(handles=[9], steps=[0], num_stopped=[0]))
        )
        await client.call.write(pb.SessionRequest(verdicts=batch))
        assert await client.ended_with() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_result_that_nobody_wants_is_not_sent(serving: LocalScheduler) -> None:
    """The session wants the second result alone; then none of another search."""
    long = {**SEARCH, "max_tokens": 200, "stop_token_ids": [], "ignore_eos": True}
    async with serving.session() as client:
        first, second = await client.submit(request(PROMPT, **long), request(PROMPT, **long))
        for index in (0, 2):
            await client.stop(first, index)
        for index in range(3):
            await client.stop(second, index)
        await until(lambda: len(serving.engine.core.groups) == 1)
        (received,) = await client.results([first])
        assert sorted(received.tokens) == [1] and len(received.tokens[1]) == 200
        assert received.usage is not None and received.usage.completion_tokens == 200
        assert not client.received[second].tokens
    serving.check_idle()


# ---------------------------------------------------------------------------------------------- codec


def test_outputs_that_wait_keep_scores_and_candidates() -> None:
    asked = BeamCandidates(8, 2, [0, 1], [5, 6])
    outputs = [
        SessionOutput([7], [], [], [3], candidates=[asked]),
        SessionOutput(
            [9, 9], [0, 1], [2, 1], [1, 2, 3], [0, 1], [1, 2], score_rows=[0, 1], scores=[-0.5, -1.0]
        ),
    ]
    merged = codec.merge_outputs(outputs)
    assert merged.candidates == [asked]
    assert (merged.score_rows, merged.scores) == ([1, 2], [-0.5, -1.0])
    message = pb.SessionResponse.FromString(codec.encode_output(outputs, [], [])).output
    assert list(message.score_rows) == [1, 2] and list(message.scores) == [-0.5, -1.0]
    (sent,) = message.candidates
    assert (sent.handle, sent.step, list(sent.parents), list(sent.token_ids)) == (8, 2, [0, 1], [5, 6])


def flight() -> Flight:
    sampling = Sampling(beam_width=2, num_logprobs=1)
    arrived = RequestArrived(1, 1, 1, "r", (1, 2, 3), 1, 9, sampling)
    return Flight(0, 1, [], searches=[Group(arrived, 0, 100, 0.0)])


def result(**changes: Any) -> wire.StepResult:
    columns = {"beam_parents": [0] * 4, "beam_tokens": [4, 5, 4, 6], "beam_scores": [-1.0, -2.0, -1.0, -3.0]}
    made = wire.StepResult(**{**columns, **changes})
    made.beam_logprobs.num_top.append(1)
    made.beam_logprobs.top_ids.append(4)
    made.beam_logprobs.top_logprobs.append(-1.0)
    return made


def test_candidates_arrive() -> None:
    event = codec.decode_result("w", result(), flight(), VOCAB)
    assert (event.beam_parents, event.beam_tokens) == ([0] * 4, [4, 5, 4, 6])
    assert event.beam_scores == [-1.0, -2.0, -1.0, -3.0]
    assert event.beam_tops == (LogprobEntry(0.0, 0, (4,), (-1.0,)),)


@pytest.mark.parametrize(
    "changes",
    [
        {"beam_parents": [0, 1, 0, 0]},
        {"beam_tokens": [4, 5, 4, VOCAB]},
        {"beam_scores": [-1.0]},
        {"beam_parents": [], "beam_tokens": [], "beam_scores": []},
    ],
)
def test_candidates_that_cannot_be_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(codec.BadResult):
        codec.decode_result("w", result(**changes), flight(), VOCAB)
