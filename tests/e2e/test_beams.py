"""Beam searches of real prompts equal transformers', whatever happens to them on the way.

fp32, through scheduler and worker by token ids: sequences, how they ended, and scores within 1e-4, for every
combination of widths, stop ids, length penalties and ways to end. Near ties are excused, counted and listed.
All 40 prompts: `python -m benchmarks.beams`.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import grpc
import pytest

from pagoda.v1 import scheduler_pb2 as pb
from pagoda.v1 import scheduler_pb2_grpc as rpc
from scheduler_svc import record
from tests.support import figures
from tests.support.beam_reference import beam_search
from tests.support.beam_transformers import real
from tests.support.beams import (
    LENGTH_PENALTIES,
    WAYS_TO_END,
    Case,
    Wanted,
    check,
    equal,
    matrix,
    run,
    run_async,
    wanted,
)
from tests.support.cluster import cluster
from tests.support.data import model_folder
from tests.support.reference import EXCUSED_MARGIN
from tests.support.runs import complete, read_record, shorter_than
from tests.support.scale import scaled
from tests.support.session_client import Received, SessionClient, request
from tests.support.supervised import supervised

pytestmark = pytest.mark.timeout(scaled(300, 3600))

AT_ONCE = 8
MAX_TOKENS = scaled(12, 32)
Reference = tuple[list[Case], list[Wanted]]


@pytest.fixture(scope="module")
def reference() -> Reference:
    """Cases, and what transformers finds."""
    cases = matrix(shorter_than(60, scaled(1, 4)), MAX_TOKENS)
    return cases, list(wanted(cases))


@pytest.fixture(scope="module")
def widest(reference: Reference) -> Reference:
    """The cases of which each takes the most blocks, under different prompts where there are any."""
    chosen = [pair for pair in zip(*reference, strict=True) if pair[0].settings.width == 8][:: scaled(2, 1)]
    return [case for case, _ in chosen], [want for _, want in chosen]


def note(
    setting: str, cases: Sequence[Case], got: Sequence[Received], wants: Sequence[Wanted], **facts: int
) -> None:
    """Check what came and record the figures."""
    excused = [asdict(item) for item in check(cases, got, wants)]
    figures.record("beam exactness", setting=setting, searches=len(cases), excused=excused, **facts)


def test_searches_equal_transformers(reference: Reference, tmp_path: Path) -> None:
    cases, wants = reference
    recorded = tmp_path / "record"
    with cluster(
        model=str(model_folder()),
        scheduler_args=("--record", str(recorded)),
        worker_args=("--num-blocks", "1024"),
    ) as running:
        got = run(running.scheduler.address, cases, AT_ONCE)
        with grpc.insecure_channel(running.scheduler.address) as channel:
            direct = list(rpc.SchedulerServiceStub(channel).GenerateTokens(cases[0].request()))
    record.replay(recorded)
    note("roomy", cases, got, wants)
    assert [list(answer.token_ids) for answer in direct] == [got[0].tokens[i] for i in sorted(got[0].tokens)]
    assert [answer.score for answer in direct] == pytest.approx(list(got[0].scores.values()))
    assert direct[-1].usage.completion_tokens == sum(len(answer.token_ids) for answer in direct)


@pytest.mark.parametrize("mode", ["recompute", "swap"])
def test_searches_that_are_preempted(widest: Reference, mode: str) -> None:
    """The cache holds few searches, and eight are under way."""
    cases, wants = widest
    with cluster(
        model=str(model_folder()),
        scheduler_args=("--max-batched-tokens", "60", "--preemption-mode", mode),
        worker_args=("--num-blocks", scaled("28", "56")),
    ) as running:
        got = run(running.scheduler.address, cases, AT_ONCE)
        now = running.snapshot()
    assert now.num_preemptions > 0 and (now.swapped_tokens > 0) == (mode == "swap")
    facts = {"preemptions": now.num_preemptions, "swapped": now.swapped_tokens}
    note(f"preempted, {mode}", cases, got, wants, **facts)


def test_searches_whose_worker_dies(widest: Reference, tmp_path: Path) -> None:
    cases, wants = widest
    with supervised(tmp_path, worker_args=("--num-blocks", "512")) as running:

        async def killed() -> list[Received]:
            begun = asyncio.create_task(run_async(running.address, cases, AT_ONCE))
            deadline = asyncio.get_running_loop().time() + 100
            while not any(
                sample.output_tokens >= 3 for r in running.snapshot(True).requests for sample in r.samples
            ):
                assert not begun.done() and asyncio.get_running_loop().time() < deadline
                await asyncio.sleep(0.005)
            epochs = running.epochs()
            running.signal("worker-0", signal.SIGKILL)
            await asyncio.to_thread(running.wait_attached, epochs)
            return await begun

        got = asyncio.run(killed())
        replays = running.num_replayed()
    assert replays > 0
    record.replay(running.record)
    note("worker killed", cases, got, wants, replays=replays)
    assert read_record(running.record).num_epochs["worker-0"] == 2


def test_searches_beside_samples_report_logprobs_and_can_be_left(reference: Reference) -> None:
    """Searches, samples that run ahead, and a search that its caller leaves, in one session."""
    cases, wants = reference
    search = cases[0].request()
    search.sampling.logprobs = 2
    endless = request(cases[0].prompt.ids, beam_width=4, n=2, max_tokens=400, ignore_eos=True)
    sample = request(cases[0].prompt.ids, temperature=0, max_tokens=40, ignore_eos=True)

    async def together(address: str) -> tuple[Received, Received, Received]:
        async with SessionClient(address) as client:
            left, found, drawn = await client.submit(endless, search, sample)
            first = (await client.results([found]))[0]
            await client.stop(left)
            second = (await client.results([drawn]))[0]
            return first, second, client.received[left]

    with cluster(model=str(model_folder()), worker_args=("--num-blocks", "512")) as running:
        found, drawn, left = asyncio.run(together(running.scheduler.address))
    assert equal(found, wants[0].results)
    assert len(drawn.tokens[0]) == 40 and not left.tokens
    for index, score in found.scores.items():
        entries, tokens = found.logprobs[index], found.tokens[index]
        assert len(entries) == len(tokens)
        length = len(tokens) ** cases[0].settings.length_penalty
        assert sum(entry.logprob for entry in entries) / length == pytest.approx(score, abs=1e-3)
        for entry, token in zip(entries, tokens, strict=True):
            assert len(entry.top_ids) == 2 and list(entry.top_logprobs) == sorted(
                entry.top_logprobs, reverse=True
            )
            if token in entry.top_ids:
                place = list(entry.top_ids).index(token)
                assert entry.rank == place + 1 and entry.logprob == pytest.approx(
                    entry.top_logprobs[place], abs=1e-3
                )


def test_searches_that_await_verdicts(tmp_path: Path) -> None:
    """The session says which outputs end; the search is the one whose outputs end there by themselves."""
    prompt = shorter_than(60, 1)[0].ids
    said: dict[int, list[tuple[int, ...]]] = {}

    def halts(output: tuple[int, ...]) -> bool:
        return output[-1] % 5 == 0

    def judge(asked: pb.BeamCandidates) -> list[int]:
        before = [said[asked.handle][i] for i in asked.parents] if asked.step else [()] * len(asked.token_ids)
        said[asked.handle] = [(*b, token) for b, token in zip(before, asked.token_ids, strict=True)]
        return [i for i, output in enumerate(said[asked.handle]) if halts(output)]

    settings = [
        {"width": 4, "n": 4, "max_tokens": 8, "length_penalty": penalty, "early_stopping": way}
        for penalty in LENGTH_PENALTIES
        for way in WAYS_TO_END
    ]
    requests = [
        request(
            prompt, beam_width=s["width"], n=s["n"], max_tokens=s["max_tokens"], ignore_eos=True,
            length_penalty=s["length_penalty"], early_stopping=s["early_stopping"], await_verdicts=True,
        )
        for s in settings
    ]  # fmt: skip

    async def ask(address: str) -> list[Received]:
        async with SessionClient(address) as client:
            client.judge = judge
            return await client.results(await client.submit(*requests))

    recorded = tmp_path / "record"
    with cluster(
        model=str(model_folder()),
        scheduler_args=("--record", str(recorded)),
        worker_args=("--num-blocks", "512"),
    ) as running:
        got = asyncio.run(ask(running.scheduler.address))
        with (
            grpc.insecure_channel(running.scheduler.address) as channel,
            pytest.raises(grpc.RpcError, match="await_verdicts"),
        ):
            list(rpc.SchedulerServiceStub(channel).GenerateTokens(requests[0]))
    record.replay(recorded)
    assert said
    for s, received in zip(settings, got, strict=True):
        gaps: list[float] = []
        results = beam_search(real, prompt, halts=halts, gaps=gaps, **s)
        assert equal(complete(received), results) or min(gaps) <= EXCUSED_MARGIN, (s, min(gaps))
