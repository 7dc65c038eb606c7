"""Runs of real prompts through a scheduler by token ids, and what can be said of them afterwards.

A `Case` is one request and how transformers would answer it. `run` sends cases through one Session, so many
at a time; `check` compares what came with what was wanted; `read_record` says from the scheduler's record
what its plans were really like, so that a test of a setting can tell that the setting took effect.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from pagoda.v1 import scheduler_pb2 as pb
from scheduler_svc import record
from scheduler_svc.core.events import StepDone, WorkerAttached, WorkerLost
from tests.support.data import Prompt, prompts
from tests.support.reference import (
    EXCUSED_OF_100,
    GREEDY,
    SAMPLED,
    Difference,
    Params,
    agree,
    answers,
)
from tests.support.session_client import Received, SessionClient, request


@dataclass(frozen=True)
class Case:
    """One request of the reference set, for `n` samples."""

    prompt: Prompt
    params: Params = GREEDY
    n: int = 1

    def request(self) -> pb.GenerateTokensRequest:
        """The request as the scheduler takes it."""
        fields: dict[str, Any] = {
            "temperature": self.params.temperature,
            "max_tokens": self.params.max_tokens,
            "n": self.n,
        }
        if self.params.temperature:
            fields |= {"top_p": self.params.top_p, "seed": self.prompt.seed}
        return request(self.prompt.ids, **fields)

    def singles(self) -> list[Case]:
        """The single requests that the samples must equal: sample i draws with seed + i."""
        seeds = [(self.prompt.seed + i) % 2**64 for i in range(self.n)]
        return [Case(replace(self.prompt, seed=seed), self.params) for seed in seeds]


def greedy(chosen: Sequence[Prompt]) -> list[Case]:
    """The greedy requests of these prompts."""
    return [Case(prompt) for prompt in chosen]


def sampled(chosen: Sequence[Prompt]) -> list[Case]:
    """The seeded requests of these prompts."""
    return [Case(prompt, SAMPLED) for prompt in chosen]


def shorter_than(limit: int, n: int) -> list[Prompt]:
    """The first `n` prompts of the set that have fewer than `limit` tokens."""
    found = [prompt for prompt in prompts() if len(prompt.ids) < limit][:n]
    assert len(found) == n, f"the set has {len(found)} prompts below {limit} tokens, not {n}"
    return found


# ------------------------------------------------------------------------------------------- running


@dataclass
class Run:
    """What came for each request, in their order."""

    received: list[Received]

    @property
    def tokens(self) -> list[list[int]]:
        """The token ids of every sample of every request: one list for each of the requests' `singles`."""
        return [received.tokens[i] for received in self.received for i in sorted(received.tokens)]

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that the prefix cache held."""
        return sum(received.usage.cached_tokens for received in self.received if received.usage)


async def run_async(address: str, cases: Sequence[Case], at_once: int | None = None) -> Run:
    """Run all cases over one Session, so many at a time and in their order; all at once if None.

    Raises AssertionError where one fails or the session breaks.
    """
    gate = asyncio.Semaphore(at_once or len(cases))

    async def one(client: SessionClient, case: Case) -> Received:
        async with gate:
            return complete((await client.results(await client.submit(case.request())))[0])

    async with SessionClient(address) as client:
        return Run(await asyncio.gather(*(one(client, case) for case in cases)))


def run(address: str, cases: Sequence[Case], at_once: int | None = None) -> Run:
    """`run_async`, for tests that do nothing meanwhile."""
    return asyncio.run(run_async(address, cases, at_once))


def complete(received: Received) -> Received:
    """`received`, checked to be a whole answer: every sample ended by itself and the counts add up."""
    assert received.failure is None, received.failure
    assert received.usage is not None
    ended = {pb.FINISH_REASON_STOP, pb.FINISH_REASON_LENGTH}
    assert set(received.reasons.values()) <= ended, received.reasons
    assert sum(map(len, received.tokens.values())) == received.usage.completion_tokens
    return received


# ----------------------------------------------------------------------------------------- comparing


def allowed(num_cases: int) -> int:
    """How many of `num_cases` may differ at a near tie: 2 of 100, and one where there are fewer than 50."""
    return max(1, EXCUSED_OF_100 * num_cases // 100)


@dataclass
class Differences:
    """The excused ones of one comparison, by what was asked for; each an index and what differs there."""

    greedy: list[tuple[int, Difference]] = field(default_factory=list)
    sampled: list[tuple[int, Difference]] = field(default_factory=list)

    def figures(self) -> dict[str, Any]:
        """For the table."""
        listed = [{"case": i, **asdict(d)} for i, d in (*self.greedy, *self.sampled)]
        return {"greedy_differ": len(self.greedy), "sampled_differ": len(self.sampled), "excused": listed}


def check(
    singles: Sequence[Case], got: Sequence[Sequence[int]], wants: Sequence[Sequence[int]] | None = None
) -> Differences:
    """Assert that `got` holds the tokens of `wants`, but for near ties; `wants` are transformers' if None."""
    found = Differences()
    for params, into in ((GREEDY, found.greedy), (SAMPLED, found.sampled)):
        places = [i for i, case in enumerate(singles) if case.params == params]
        if not places:
            continue
        chosen = [singles[i].prompt for i in places]
        want = [a.tokens for a in answers(chosen, params)] if wants is None else [wants[i] for i in places]
        differences = agree(chosen, [got[i] for i in places], want, params, allowed(len(places)))
        into += [(places[i], difference) for i, difference in differences]
    return found


# ------------------------------------------------------------------------------------------- records


@dataclass
class Plans:
    """What a scheduler's record says of its plans."""

    num_plans: Counter[str] = field(default_factory=Counter)
    """By worker."""
    num_epochs: Counter[str] = field(default_factory=Counter)
    """Sessions that each worker had."""
    most_tokens: int = 0
    """Of one iteration."""
    most_rows: int = 0
    horizons: Counter[int] = field(default_factory=Counter)
    """Plans by their number of iterations."""
    most_inflight: int = 0


def read_record(path: Path) -> Plans:
    """What the plans of a record were like."""
    plans = Plans()
    inflight: Counter[str] = Counter()
    for frame in record.read_frames(path):
        if isinstance(frame, record.Planned) and frame.plan is not None:
            plan = frame.plan
            counts = plan.num_tokens or [1] * len(plan.slots)
            plans.num_plans[frame.worker] += 1
            plans.most_tokens = max(plans.most_tokens, sum(counts))
            plans.most_rows = max(plans.most_rows, len(counts))
            plans.horizons[plan.num_iterations] += 1
            inflight[frame.worker] += 1
            plans.most_inflight = max(plans.most_inflight, inflight[frame.worker])
        elif isinstance(frame, record.Applied):
            for event in frame.events:
                match event:
                    case StepDone(worker=worker):
                        inflight[worker] -= 1
                    case WorkerAttached(worker=worker):
                        plans.num_epochs[worker] += 1
                        inflight[worker] = 0
                    case WorkerLost(worker=worker):
                        inflight[worker] = 0
    return plans
