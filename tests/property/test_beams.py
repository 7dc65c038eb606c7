"""Beam searches in the core against a model device: whatever happens, the results are those of the book."""

from __future__ import annotations

from typing import Any, Literal

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler_svc.core.config import CoreConfig
from scheduler_svc.core.events import (
    BeamCandidates,
    Finish,
    RequestArrived,
    Sampling,
    SessionOutput,
    VerdictGiven,
)
from tests.property.test_core import World, random_prompt
from tests.support.beam_reference import FIRST, HEURISTIC, NEVER, Result, beam_search
from tests.support.model_device import STOP_ID, VOCAB, logprobs_after

WIDTHS = (1, 2, 3, 4, 8)


class BeamWorld(World):
    """Searches beside samples."""

    def __init__(self, seed: int, config: CoreConfig, **sizes: int) -> None:
        super().__init__(seed, config, **sizes)
        self.scores: dict[tuple[int, int], float] = {}
        self.wanted: dict[int, list[Result]] = {}
        self.judged: dict[int, list[tuple[int, ...]]] = {}  # by key: the outputs of the last candidates
        self.asked: list[BeamCandidates] = []

    def search(self, prompt: list[int], max_tokens: int, width: int, n: int, **options: Any) -> int | None:
        """A search arrives; its key, or None where it could never run."""
        if self.core.refusal(len(prompt), width, max_tokens):
            return None
        key = len(self.requests) + 1
        sampling = Sampling(beam_width=width, **{"stop_token_ids": (STOP_ID,), **options})
        event = RequestArrived(
            key=key, session=key % 3, handle=key * 10, request_id=f"r{key}", prompt=tuple(prompt), n=n,
            max_tokens=max_tokens, sampling=sampling, priority=self.random.choice((0, 0, 1)),
        )  # fmt: skip
        self.requests[key], self.got[key], self.told[key] = event, {i: [] for i in range(n)}, []
        self.wanted[key] = beam_search(
            logprobs_after, prompt, width=width, n=n, max_tokens=min(max_tokens, 200 - len(prompt)),
            stops=sampling.stop_token_ids, min_tokens=sampling.min_tokens,
            length_penalty=sampling.length_penalty, early_stopping=sampling.early_stopping,
            halts=halts if sampling.await_verdicts else None,
        )  # fmt: skip
        self.apply(event)
        return key

    def expected(self, request: RequestArrived, index: int) -> list[int]:
        if request.key not in self.wanted:
            return super().expected(request, index)
        return list(self.wanted[request.key][index].tokens)

    def answer(self, name: str) -> bool:
        """A step's answer, or a verdict, if any is due."""
        if self.asked and (self.random.random() < 0.5 or not self.answers.get(name)):
            asked = self.asked.pop(0)
            key = asked.handle // 10
            stopped = [i for i, output in enumerate(self.judged[key]) if halts(output)]
            self.apply(VerdictGiven(key, asked.step + 1, (0,)))  # not awaited: no error, and no effect
            self.apply(VerdictGiven(key, asked.step, tuple(stopped)))
            return True
        return super().answer(name)

    def took(self, out: SessionOutput) -> None:
        for asked in out.candidates:
            key = asked.handle // 10
            assert bool(asked.parents) == (asked.step > 0), (
                "a first candidate has a parent, or a later one none"
            )
            before = (
                [self.judged[key][i] for i in asked.parents] if asked.step else [()] * len(asked.token_ids)
            )
            self.judged[key] = [(*b, t) for b, t in zip(before, asked.token_ids, strict=True)]
            assert {len(output) for output in self.judged[key]} == {asked.step + 1}
            self.asked.append(asked)
        indexes, counts = out.indexes or [0] * len(out.handles), out.num_tokens or [1] * len(out.handles)
        reasons = dict(zip(out.ended_rows, out.ended_reasons, strict=True))
        scores = dict(zip(out.score_rows, out.scores, strict=True))
        entries, start = iter(out.logprobs), 0
        for row, (handle, index, count) in enumerate(zip(out.handles, indexes, counts, strict=True)):
            key = handle // 10
            tokens = out.tokens[start : start + count]
            start += count
            logprobs = [next(entries) for _ in range(count)] if row in out.logprob_rows else []
            if key not in self.wanted:
                assert row not in scores
                continue
            want, request = self.wanted[key][index], self.requests[key]
            assert scores[row] == pytest.approx(want.score, abs=1e-9)
            assert reasons[row] == (Finish.STOP if want.stopped else Finish.LENGTH)
            num_top = request.sampling.num_logprobs
            assert len(logprobs) == (0 if num_top is None else count)
            for i, entry in enumerate(logprobs):
                raw = logprobs_after((*request.prompt, *tokens[:i]))
                best = np.argsort(-raw, kind="stable")[:num_top].tolist()
                assert entry.logprob == pytest.approx(raw[tokens[i]], abs=1e-9)
                assert entry.top_ids == tuple(best) and entry.top_logprobs == tuple(raw[best])
                assert entry.rank == (best.index(tokens[i]) + 1 if tokens[i] in best else 0)


def halts(output: tuple[int, ...]) -> bool:
    """Stands for a stop string, such as two tokens may make."""
    return len(output) > 1 and sum(output[-2:]) % 9 == 0


def random_search(world: BeamWorld, shared: list[list[int]]) -> None:
    choose = world.random
    width = choose.choice(WIDTHS)
    world.search(
        random_prompt(world, shared),
        choose.choice((1, 2, 5, 20, 40)),
        width,
        choose.randrange(1, width + 1),
        length_penalty=choose.choice((-1.0, 0.0, 0.7, 1.0, 2.0)),
        early_stopping=choose.choice((HEURISTIC, FIRST, NEVER)),
        min_tokens=choose.choice((0, 0, 1)),
        num_logprobs=choose.choice((None, None, 0, 3)),
        await_verdicts=choose.random() < 0.3,
        num_prompt_logprobs=choose.choice((None, None, 3)),
        stop_token_ids=choose.choice(((), (STOP_ID,), (STOP_ID, 3), (STOP_ID, 1, 2, 3))),
    )


def run_world(seed: int, steps: int, config: CoreConfig, **sizes: int) -> BeamWorld:
    world = BeamWorld(seed, config, **sizes)
    choose = world.random
    shared = [[choose.randrange(VOCAB) for _ in range(40)] for _ in range(3)]
    world.attach("w")
    for _ in range(steps):
        action = choose.random()
        if action < 0.05:
            random_search(world, shared)
        elif action < 0.08:
            world.arrive(random_prompt(world, shared), choose.choice((1, 1, 3)), choose.choice((2, 5, 30)))
        elif action < 0.09 and world.requests:
            key = choose.choice(list(world.requests))
            world.stop(key, choose.choice((None, 0, world.requests[key].n - 1)))
        elif action < 0.094 and world.devices:
            world.lose("w")
        elif not world.devices:
            world.attach("w")
        elif action < 0.6:
            world.plan("w")
        else:
            world.answer("w")
        if choose.random() < 0.2:
            world.core.check_integrity()
    if not world.devices:
        world.attach("w")
    world.drain()
    world.check()
    return world


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1 << 30),
    depth=st.integers(1, 3),
    horizon=st.sampled_from((0, 4000)),
    prefix=st.booleans(),
    blocks=st.sampled_from((24, 60, 200)),
    block_size=st.sampled_from((4, 8, 16)),
    slots=st.sampled_from((8, 20)),
    budget=st.sampled_from((21, 60, 500)),
    host=st.sampled_from((0, 12, 100)),
    mode=st.sampled_from(("auto", "swap", "recompute")),
)
def test_searches_find_what_the_book_finds(
    seed: int, depth: int, horizon: int, prefix: bool, blocks: int, block_size: int, slots: int, budget: int,
    host: int, mode: Literal["auto", "swap", "recompute"],
) -> None:  # fmt: skip
    config = CoreConfig(
        max_inflight=depth, horizon_us=horizon, prefix_cache=prefix, max_batched_tokens=budget,
        preemption_mode=mode,
    )  # fmt: skip
    sizes = {"blocks": blocks, "block_size": block_size, "slots": slots, "budget": budget, "host": host}
    run_world(seed, 500, config, **sizes)


@pytest.mark.parametrize("mode", ["recompute", "swap"])
def test_small_cache_preempts_searches(mode: Literal["swap", "recompute"]) -> None:
    """The property above is only worth something if searches are preempted in it."""
    total = swaps = 0
    for seed in range(10):
        config = CoreConfig(preemption_mode=mode)
        world = run_world(seed, 600, config, blocks=40, block_size=4, slots=20, budget=60, host=60)
        total += world.core.stats.num_preemptions
        swaps += world.core.stats.num_swaps
    assert total > 20 and (swaps > 10) == (mode == "swap")


def roomy(**config: Any) -> BeamWorld:
    world = BeamWorld(5, CoreConfig(**config), blocks=200, block_size=4, slots=16, budget=100)
    world.attach("w")
    return world


def test_beams_share_what_they_have_in_common() -> None:
    """A prompt of two and a half blocks: the full ones stand once, three tails are copied at once."""
    world = roomy()
    world.search(list(range(10)), 8, width=4, n=4, stop_token_ids=())
    worker = world.core.workers["w"]
    world.plan("w")
    assert worker.allocator.num_blocks - worker.allocator.num_free == 3, "beams that are to come hold nothing"
    world.answer("w")
    plan = world.core.plan("w", world.now)
    assert plan is not None
    assert plan.beam_parent_slots == [0] * 4 and len(plan.new_rows) == 3 and not plan.append_blocks
    assert len(plan.copy_src_blocks) == 3 and len(set(plan.copy_src_blocks)) == 1
    assert worker.allocator.num_blocks - worker.allocator.num_free == 2 + 4
    world.answers["w"].append(world.devices["w"].run(plan))
    world.drain()
    world.check()


def test_nobody_waits_for_a_search() -> None:
    """Samples run ahead of a search's answer, and searches that wait for their answers share steps."""
    world = roomy(horizon_us=0, max_inflight=2)
    first = world.search([1, 2, 3], 6, width=2, n=1, stop_token_ids=())
    world.arrive([4, 5, 6], 1, 60)
    world.plan("w")
    with_search, without = world.core.plan("w", world.now), world.core.workers["w"]
    assert with_search is not None and not with_search.beam_rows and len(with_search.slots) == 1
    assert [len(flight.searches) for flight in without.inflight] == [1, 0]
    world.answers["w"].append(world.devices["w"].run(with_search))
    world.drain()
    assert first in world.ended

    world = roomy(max_inflight=2)
    world.search([1, 2, 3], 6, width=2, n=1, stop_token_ids=())
    world.plan("w")
    world.search([4, 5, 6], 6, width=2, n=1, stop_token_ids=())
    world.plan("w")
    assert len(world.core.workers["w"].inflight) == 2
    world.answer("w")
    assert not world.plan("w"), "the first one waits for the second"
    world.answer("w")
    plan = world.core.plan("w", world.now)
    assert plan is not None and plan.beam_counts == [2, 2]
    world.answers["w"].append(world.devices["w"].run(plan))
    world.drain()
    world.check()


def test_logits_that_are_not_finite_fail_a_search_alone() -> None:
    world = roomy()
    world.search([1] * 9, 6, width=2, n=1)
    world.search([2] * 9, 6, width=2, n=1)
    world.plan("w")
    answer = world.answers["w"].popleft()
    scores = [float("nan"), *answer.beam_scores[1:]]
    world.apply(msgspec.structs.replace(answer, beam_scores=scores))
    assert list(world.ended.values()) == [Finish.ERROR]
    assert len(world.core.workers["w"].index.blocks()) == 2, "only the other's full blocks may be hit"
    world.drain()
    world.check()
