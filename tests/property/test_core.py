"""The core against a model device: whatever happens in whatever order, every request gets its tokens."""

from __future__ import annotations

import random
from collections import deque
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler_svc.core.config import CoreConfig
from scheduler_svc.core.events import (
    Finish,
    LogprobEntry,
    RequestArrived,
    RequestStopped,
    Resumed,
    Sampling,
    SessionOutput,
    StepDone,
    WorkerAttached,
    WorkerLost,
)
from scheduler_svc.core.scheduler import Scheduler
from tests.support.model_device import STOP_ID, VOCAB, ModelDevice, expected_output, prompt_logprobs


class World:
    """A core, its devices and its callers, driven by a seeded random choice of what happens next."""

    def __init__(self, seed: int, config: CoreConfig, holds: bool = False, **sizes: int) -> None:
        self.random = random.Random(seed)
        self.holds = random.Random(seed) if holds else None
        self.core = Scheduler(config)
        self.sizes = sizes
        self.devices: dict[str, ModelDevice] = {}
        self.answers: dict[str, deque[StepDone]] = {}
        self.requests: dict[int, RequestArrived] = {}
        self.got: dict[int, dict[int, list[int]]] = {}
        self.told: dict[int, list[LogprobEntry]] = {}
        self.ended: dict[int, Finish] = {}
        self.stopped: set[tuple[int, int]] = set()
        self.now = 0.0
        self.epochs = 0

    def attach(self, name: str) -> None:
        self.epochs += 1
        event = WorkerAttached(
            worker=name, epoch=self.epochs, num_blocks=self.sizes["blocks"],
            block_size=self.sizes["block_size"], max_slots=self.sizes["slots"],
            max_model_len=self.sizes.get("context", 200),
            max_batched_tokens=self.sizes["budget"], max_horizon=self.sizes.get("horizon", 4), max_inflight=3,
            num_host_blocks=self.sizes.get("host", 0), block_bytes=self.sizes.get("block_bytes", 1),
        )  # fmt: skip
        self.devices[name], self.answers[name] = ModelDevice(event, holds=self.holds), deque()
        self.apply(event)

    def lose(self, name: str) -> None:
        del self.devices[name], self.answers[name]
        self.apply(WorkerLost(name))

    def arrive(
        self,
        prompt: list[int],
        n: int,
        max_tokens: int,
        resume: tuple[Resumed, ...] = (),
        num_prompt_logprobs: int | None = None,
    ) -> None:
        if self.core.refusal(len(prompt), n, max_tokens):
            return
        key = len(self.requests) + 1
        seed = self.random.randrange(1 << 30)
        sampling = Sampling(seed=seed, stop_token_ids=(STOP_ID,), num_prompt_logprobs=num_prompt_logprobs)
        event = RequestArrived(
            key=key, session=key % 3, handle=key * 10, request_id=f"r{key}", prompt=tuple(prompt), n=n,
            max_tokens=max_tokens, sampling=sampling, priority=self.random.choice((0, 0, 0, 1)),
            resume=resume,
        )  # fmt: skip
        self.requests[key], self.got[key], self.told[key] = event, {i: [] for i in range(n)}, []
        for i, sample in enumerate(resume):
            self.got[key][i] = list(sample.tokens)
        self.apply(event)

    def apply(self, event: object) -> None:
        self.now += 0.001
        for out in self.core.apply([event], self.now).sessions.values():  # type: ignore[list-item]
            self.took(out)
            for part in out.prompts:
                assert part.of // 10 not in self.ended and part.entries
                self.told[part.of // 10] += part.entries
            start = 0
            indexes = out.indexes or [0] * len(out.handles)
            counts = out.num_tokens or [1] * len(out.handles)
            for handle, index, count in zip(out.handles, indexes, counts, strict=True):
                assert (handle // 10, index) not in self.stopped, "tokens after a stop"
                assert len(self.told[handle // 10]) == self.num_due(handle // 10), (
                    "tokens before the prompt's"
                )
                self.got[handle // 10][index] += out.tokens[start : start + count]
                start += count
            for end in out.ended:
                assert end.key not in self.ended, "a request ended twice"
                self.ended[end.key] = end.reason

    def num_due(self, key: int) -> int:
        """How many logprobs of its prompt a request is to get."""
        request = self.requests[key]
        begun = any(sample.tokens for sample in request.resume)
        return 0 if begun or request.sampling.num_prompt_logprobs is None else len(request.prompt) - 1

    def plan(self, name: str) -> bool:
        plan = self.core.plan(name, self.now)
        if plan is None:
            return False
        self.answers[name].append(self.devices[name].run(plan))
        return True

    def answer(self, name: str) -> bool:
        if not self.answers.get(name):
            return False
        self.apply(self.answers[name].popleft())
        return True

    def stop(self, key: int, index: int | None) -> None:
        samples = range(self.requests[key].n) if index is None else [index]
        self.stopped |= {(key, i) for i in samples}
        self.apply(RequestStopped(key, index, Finish.CANCELLED))

    def drain(self) -> None:
        for _ in range(200_000):
            busy = [n for n in list(self.devices) if self.plan(n) or self.answer(n)]
            if not busy:
                break
        self.core.check_integrity()

    def took(self, out: SessionOutput) -> None:
        """What a session was told; more of it than tokens is for others to look at."""

    def expected(self, request: RequestArrived, index: int) -> list[int]:
        """What a sample must yield."""
        return expected_output(
            list(request.prompt), request.sampling.seed + index, request.max_tokens,
            request.sampling.stop_token_ids,
        )  # fmt: skip

    def check(self) -> None:
        assert set(self.ended) == set(self.requests), "a request never ended"
        for key, request in self.requests.items():
            told = prompt_logprobs(list(request.prompt))[: self.num_due(key)]
            whole = self.ended[key] in (Finish.STOP, Finish.LENGTH)
            assert self.told[key] == (told if whole else told[: len(self.told[key])]), "a prompt's logprobs"
            for i in range(request.n):
                want = self.expected(request, i)
                got = self.got[key][i]
                if (key, i) in self.stopped or self.ended[key] is Finish.ERROR:  # a suspected poison
                    assert got == want[: len(got)]
                else:
                    assert got == want, f"request {key} sample {i}"
        for worker in self.core.workers.values():
            assert worker.allocator.num_free == worker.allocator.num_blocks, "blocks leaked"
            assert worker.rows.num_free == worker.rows.max_slots, "slots leaked"
            assert worker.host.num_free == worker.host.num_blocks, "host blocks leaked"


def random_prompt(world: World, shared: list[list[int]]) -> list[int]:
    choose = world.random
    head = choose.choice(shared)
    tail = [choose.randrange(VOCAB) for _ in range(choose.randrange(0, 25))]
    return (head[: choose.randrange(len(head) + 1)] + tail) or [1]


def run_world(
    seed: int, steps: int, config: CoreConfig, workers: int = 1, deaths: bool = True, holds: bool = False,
    **sizes: int,
) -> World:  # fmt: skip
    world = World(seed, config, holds, **sizes)
    choose = world.random
    shared = [[choose.randrange(VOCAB) for _ in range(40)] for _ in range(3)]
    names = [f"w{i}" for i in range(workers)]
    for name in names:
        world.attach(name)
    for _ in range(steps):
        name, action = choose.choice(names), choose.random()
        if action < 0.10:
            n = choose.choice((1, 1, 1, 2, 4))
            wanted = choose.choice((None, None, 3))
            prompt = random_prompt(world, shared)
            world.arrive(prompt, n, choose.choice((1, 2, 5, 20, 60)), num_prompt_logprobs=wanted)
        elif action < 0.12 and world.requests:
            key = choose.choice(list(world.requests))
            world.stop(key, choose.choice((None, 0, world.requests[key].n - 1)))
        elif action < 0.124 and deaths and name in world.devices:
            world.lose(name)
        elif name not in world.devices:
            world.attach(name)
        elif action < 0.6:
            world.plan(name)
        else:
            world.answer(name)
        if choose.random() < 0.05:
            world.core.check_integrity()
    for name in names:
        if name not in world.devices:
            world.attach(name)
    world.drain()
    world.check()
    return world


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1 << 30),
    depth=st.integers(1, 3),
    horizon=st.sampled_from((0, 1000, 4000)),
    prefix=st.booleans(),
    blocks=st.sampled_from((24, 40, 200)),
    block_size=st.sampled_from((4, 8, 16)),
    slots=st.sampled_from((4, 16)),
    budget=st.sampled_from((17, 60, 500)),
    workers=st.sampled_from((1, 1, 2)),
    holds=st.booleans(),
    host=st.sampled_from((0, 5, 12, 100)),
    block_bytes=st.sampled_from((1, 1 << 20, 1 << 30)),
    mode=st.sampled_from(("auto", "swap", "recompute")),
)
def test_every_request_gets_its_tokens(
    seed: int, depth: int, horizon: int, prefix: bool, blocks: int, block_size: int, slots: int, budget: int,
    workers: int, holds: bool, host: int, block_bytes: int, mode: Literal["auto", "swap", "recompute"],
) -> None:  # fmt: skip
    config = CoreConfig(
        max_inflight=depth, horizon_us=horizon, prefix_cache=prefix, max_batched_tokens=budget,
        preemption_mode=mode,
    )  # fmt: skip
    sizes = {"blocks": blocks, "block_size": block_size, "slots": slots, "budget": budget}
    sizes |= {"host": host, "block_bytes": block_bytes}
    run_world(seed, 600, config, workers, holds=holds, **sizes)


def test_small_cache_preempts() -> None:
    """The property above is only worth something if preemptions happen in it."""
    total = 0
    for seed in range(10):
        world = run_world(seed, 800, CoreConfig(), deaths=False, blocks=24, block_size=4, slots=8, budget=60)
        total += world.core.stats.num_preemptions
    assert total > 20


def test_small_cache_swaps() -> None:
    """Nor without swaps, of groups of samples too, and with workers that die while they are out."""
    num_swaps = num_back = 0
    for seed in range(20):
        config = CoreConfig(preemption_mode="swap", prefix_cache=seed % 4 > 0)
        world = run_world(
            seed, 800, config, deaths=seed % 2 == 0, blocks=24, block_size=4, slots=8, budget=60, host=40
        )
        num_swaps += world.core.stats.num_swaps
        num_back += world.core.stats.swapped_blocks["in"]
    assert num_swaps > 60 and num_back > 300


def test_resume_continues_where_the_caller_was() -> None:
    world = World(1, CoreConfig(), blocks=100, block_size=4, slots=8, budget=100)
    world.attach("w")
    sampling_seed = random.Random(1)
    prompt = [1, 2, 3, 4, 5]
    seed = sampling_seed.randrange(1 << 30)  # the seed that `arrive` will draw
    have = expected_output(prompt, seed, 6, (STOP_ID,))[:3]
    world.arrive(prompt, 2, 12, resume=(Resumed(tuple(have)), Resumed(())))
    world.drain()
    world.check()


@pytest.mark.parametrize("depth", [1, 2])
def test_poison_request_fails_alone(depth: int) -> None:
    """A request that kills its worker three times fails; the others complete."""
    world = World(3, CoreConfig(max_inflight=depth), blocks=100, block_size=4, slots=8, budget=100)
    world.attach("w")
    for i in range(4):
        world.arrive([i + 1] * 9, 1, 10)
    poison = 2
    for _ in range(200):
        if poison in world.ended:
            break
        planned = world.plan("w")
        if poison in world.core.workers["w"].running:
            world.lose("w")
            world.attach("w")
        elif not planned:
            world.answer("w")
    assert world.ended.pop(poison) is Finish.ERROR
    del world.requests[poison]
    world.drain()
    world.check()
