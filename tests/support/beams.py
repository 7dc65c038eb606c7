"""Beam searches of real prompts through a scheduler, and what transformers makes of the same.

A `Case` is one search. `wanted` asks transformers; `check` compares what came. A difference is excused where
the search of the reference itself was a near tie: two candidates, or a bound and a score, closer than
`EXCUSED_MARGIN` somewhere along the way, so that rounding may have gone either way.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pagoda.v1 import scheduler_pb2 as pb
from tests.support.beam_reference import FIRST, HEURISTIC, NEVER, Result, beam_search
from tests.support.beam_transformers import Recorded, Settings, over
from tests.support.data import Prompt, tokenizer
from tests.support.reference import EXCUSED_MARGIN
from tests.support.runs import complete
from tests.support.session_client import Received, SessionClient, request

WIDTHS = (2, 4, 8)
LENGTH_PENALTIES = (0.0, 1.0, 2.0)
WAYS_TO_END = (HEURISTIC, FIRST, NEVER)
SCORES_WITHIN = 1e-4


@dataclass(frozen=True)
class Case:
    """One search, and how near it came to another outcome."""

    prompt: Prompt
    settings: Settings

    def request(self) -> pb.GenerateTokensRequest:
        """The request as the scheduler takes it; EOS is none of its own."""
        s = self.settings
        return request(
            self.prompt.ids, beam_width=s.width, n=s.n, max_tokens=s.max_tokens, stop_token_ids=s.stops,
            ignore_eos=True, length_penalty=s.length_penalty, early_stopping=s.early_stopping,
        )  # fmt: skip


def stop_sets() -> tuple[tuple[int, ...], ...]:
    """One stop id and two, such as outputs hold: a full stop, and a line's end."""
    stop, line = tokenizer().convert_tokens_to_ids([".", "Ċ"])
    return (stop,), (stop, line)


def matrix(prompts: Sequence[Prompt], max_tokens: int, widths: Sequence[int] = WIDTHS) -> list[Case]:
    """Every combination of width, stop ids, length penalty and way to end, for each prompt."""
    ways = itertools.product(prompts, widths, stop_sets(), LENGTH_PENALTIES, WAYS_TO_END)
    return [
        Case(prompt, Settings(width, width, max_tokens, stops, 0, penalty, way))
        for prompt, width, stops, penalty, way in ways
    ]


@dataclass(frozen=True)
class Wanted:
    """Transformers' results of one case, and the smallest gap at which its search was decided."""

    results: list[Result]
    closest: float


def wanted(cases: Sequence[Case]) -> Iterator[Wanted]:
    """What transformers finds for each case, in order; cases of one path belong together."""
    for (prompt, width, stops, max_tokens), same in itertools.groupby(
        cases, lambda c: (c.prompt, c.settings.width, c.settings.stops, c.settings.max_tokens)
    ):
        recorded = Recorded(prompt.ids, width, stops, max_tokens)
        vocab_size = len(next(iter(recorded.known.values())))
        for case in same:
            gaps: list[float] = []
            results = over(recorded.model, vocab_size, prompt.ids, case.settings)
            book = beam_search(recorded.model, prompt.ids, gaps=gaps, **asdict(case.settings))
            closest = min(gaps)
            same_as_book = [r.tokens for r in book] == [r.tokens for r in results]
            assert same_as_book or closest < EXCUSED_MARGIN, "the book is wrong"
            yield Wanted(results, closest)


async def run_async(address: str, cases: Sequence[Case], at_once: int) -> list[Received]:
    """Run all cases over one Session, so many at a time.

    Raises AssertionError where one fails or the session breaks.
    """
    gate = asyncio.Semaphore(at_once)

    async def one(client: SessionClient, case: Case) -> Received:
        async with gate:
            return complete((await client.results(await client.submit(case.request())))[0])

    async with SessionClient(address) as client:
        return await asyncio.gather(*(one(client, case) for case in cases))


def run(address: str, cases: Sequence[Case], at_once: int) -> list[Received]:
    """`run_async`, for callers that do nothing meanwhile."""
    return asyncio.run(run_async(address, cases, at_once))


@dataclass(frozen=True)
class Excused:
    """A case whose results differ at a near tie."""

    case: int
    closest: float


def check(cases: Sequence[Case], got: Sequence[Received], wants: Sequence[Wanted]) -> list[Excused]:
    """Assert that `got` equals `wants`, scores within `SCORES_WITHIN`; the excused differences.

    Raises AssertionError, with all differences listed, where a difference is not excused.
    """
    excused, wrong = [], []
    for i, (case, received, want) in enumerate(zip(cases, got, wants, strict=True)):
        if equal(received, want.results):
            continue
        if want.closest <= EXCUSED_MARGIN:
            excused.append(Excused(i, want.closest))
        else:
            what = f"  {i}: {case.settings}, decided by {want.closest:.1e}"
            wrong.append(f"{what}\n{listed(received, want.results)}")
    assert not wrong, f"{len(wrong)} of {len(cases)} searches differ:\n" + "\n".join(wrong)
    return excused


def equal(received: Received, results: Sequence[Result]) -> bool:
    """Whether tokens, ends and scores are those of `results`, in their order."""
    stop, length = pb.FINISH_REASON_STOP, pb.FINISH_REASON_LENGTH
    return len(received.tokens) == len(results) and all(
        tuple(received.tokens[i]) == result.tokens
        and received.reasons[i] == (stop if result.stopped else length)
        and abs(received.scores[i] - result.score) <= SCORES_WITHIN
        for i, result in enumerate(results)
    )


def listed(received: Received, results: Sequence[Result]) -> str:
    """Both, for people."""
    lines: list[Any] = [(received.tokens[i], received.scores.get(i)) for i in sorted(received.tokens)]
    return "\n".join([*(f"    got  {line}" for line in lines), *(f"    want {result}" for result in results)])
