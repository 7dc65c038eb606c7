"""What becomes of a preempted group's KV: host memory or nothing, and how it comes back, on the pure core."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pagoda.v1 import scheduler_pb2 as pb
from scheduler_svc.core.config import CoreConfig
from scheduler_svc.core.events import (
    Event,
    Finish,
    Plan,
    RequestArrived,
    RequestStopped,
    Sampling,
    WorkerAttached,
    WorkerLost,
)
from scheduler_svc.core.preempt import prefers_swap
from scheduler_svc.core.scheduler import Scheduler
from scheduler_svc.core.swap import most_blocks
from scheduler_svc.snapshot import snapshot_of
from tests.support.model_device import ModelDevice, expected_output

SIZE = 4


class Bench:
    """A core and a device that notices foreign KV, one step at a time."""

    def __init__(self, config: CoreConfig | None = None, **sizes: int) -> None:
        self.core = Scheduler(config or CoreConfig(preemption_mode="swap", max_inflight=1, horizon_us=0))
        self.sizes = {"num_blocks": 12, "num_host_blocks": 20, "max_slots": 8, "block_bytes": 1} | sizes
        self.got: dict[tuple[int, int], list[int]] = {}
        self.wanted: dict[tuple[int, int], list[int]] = {}
        self.plans: list[Plan] = []
        self.epoch = 0
        self.attach()

    def attach(self) -> None:
        self.epoch += 1
        event = WorkerAttached(
            worker="w", epoch=self.epoch, block_size=SIZE, max_model_len=200, max_horizon=4, max_inflight=2,
            max_batched_tokens=100, **self.sizes,
        )  # fmt: skip
        self.device = ModelDevice(event)
        self.apply(event)
        self.worker = self.core.workers["w"]

    def apply(self, *events: Event) -> None:
        for out in self.core.apply(events, 0.0).sessions.values():
            start, indexes = 0, out.indexes or [0] * len(out.handles)
            counts = out.num_tokens or [1] * len(out.handles)
            for handle, index, count in zip(out.handles, indexes, counts, strict=True):
                self.got.setdefault((handle, index), []).extend(out.tokens[start : start + count])
                start += count
        self.core.check_integrity()

    def arrive(self, prompt: list[int], n: int = 1, max_tokens: int = 12) -> int:
        key = len({key for key, _ in self.wanted}) + 1
        for i in range(n):
            self.wanted[key, i] = expected_output(prompt, 9 + i, max_tokens, ())
        self.apply(
            RequestArrived(
                key=key, session=1, handle=key, request_id=str(key), prompt=tuple(prompt), n=n,
                max_tokens=max_tokens, sampling=Sampling(seed=9),
            )
        )  # fmt: skip
        return key

    def step(self) -> Plan:
        """Plan a step, run it and take its answer in."""
        plan = self.core.plan("w", 0.0)
        assert plan is not None
        self.plans.append(plan)
        self.apply(self.device.run(plan))
        return plan

    def until(self, holds: Callable[[Plan], object]) -> Plan:
        for _ in range(200):
            plan = self.step()
            if holds(plan):
                return plan
        raise AssertionError("it never came to that")

    def finish(self) -> None:
        """Run to the end: every token came, and every block is back."""
        while self.core.groups:
            self.step()
        assert self.got == self.wanted
        assert self.worker.allocator.num_free == self.worker.allocator.num_blocks
        assert self.worker.host.num_free == self.worker.host.num_blocks

    def state(self, key: int) -> int:
        taken = snapshot_of(self.core, 0.0, True, False, 100)
        return next(r.state for r in taken.requests if r.request_id == str(key))


def swaps_out(plan: Plan) -> bool:
    return bool(plan.swap_out_host_blocks)


def swaps_in(plan: Plan) -> bool:
    return bool(plan.swap_in_host_blocks)


def two_that_do_not_fit(bench: Bench) -> tuple[int, int]:
    """Each fits alone; both together run out of blocks while they decode."""
    return bench.arrive(list(range(8)), max_tokens=24), bench.arrive(list(range(20, 28)), max_tokens=24)


def test_a_victim_goes_out_as_its_blocks_are_taken_and_decodes_in_the_step_that_brings_it_back() -> None:
    bench = Bench()
    first, second = two_that_do_not_fit(bench)
    out = bench.until(swaps_out)
    assert (out.released_slots, out.slots) == ([1], [0])
    assert bench.state(second) == pb.REQUEST_STATE_SWAPPED and bench.core.groups[second].swapped
    assert set(out.append_blocks) & set(out.swap_out_device_blocks), "they are used again at once"
    host = bench.core.groups[second].samples[0].host_blocks
    assert out.swap_out_host_blocks == host
    taken = snapshot_of(bench.core, 0.0, False, False, 0)
    assert taken.workers[0].num_host_blocks_used == len(host) and taken.workers[0].num_host_blocks == 20
    assert taken.swapped_tokens == len(bench.core.groups[second].samples[0].tokens) - 1
    known = len(bench.core.groups[second].samples[0].tokens)
    back = bench.until(swaps_in)
    (row,) = back.new_rows
    assert (len(row.tokens), row.num_computed) == (known, known - 1)
    assert back.slots[-1] == row.slot and not swaps_out(back)
    assert bench.worker.host.num_free == 20 and first not in bench.core.groups
    bench.finish()
    assert bench.core.stats.num_swaps == bench.core.stats.num_preemptions == 1
    assert bench.core.stats.recomputed_tokens == 0


def test_what_the_prefix_index_still_holds_is_shared_and_not_copied_back() -> None:
    bench = Bench(num_blocks=16, max_slots=2)
    bench.arrive(list(range(8)), max_tokens=30)
    bench.step()
    second = bench.arrive([*range(8), 40, 41, 42, 43], max_tokens=30)
    out = bench.until(swaps_out)
    num_blocks = len(bench.core.groups[second].samples[0].host_blocks)
    assert num_blocks == len(out.swap_out_host_blocks)
    back = bench.until(swaps_in)
    shared = back.new_rows[0].blocks[: num_blocks - len(back.swap_in_host_blocks)]
    assert len(shared) >= 2, "the prompt's blocks are the first request's, too"
    assert set(back.swap_in_device_blocks) == set(back.new_rows[0].blocks[len(shared) :])
    bench.finish()


def test_samples_share_in_host_memory_and_afterwards_what_they_shared_before() -> None:
    bench = Bench(CoreConfig(preemption_mode="swap", prefix_cache=False, max_inflight=1), num_blocks=16)
    bench.arrive(list(range(30, 38)), max_tokens=40)
    group = bench.core.groups[bench.arrive(list(range(9)), n=3, max_tokens=16)]
    bench.until(swaps_out)
    tables = [s.host_blocks for s in group.samples]
    assert all(table[:2] == tables[0][:2] for table in tables), "the prompt's full blocks"
    assert len({table[2] for table in tables}) == 3, "each wrote into its own copy of the third"
    assert bench.worker.host.ref_count(tables[0][0]) == 3
    back = bench.until(swaps_in)
    assert len(back.new_rows) == 3 and not group.followers
    rows = [row.blocks for row in back.new_rows]
    assert all(blocks[:2] == rows[0][:2] for blocks in rows)
    assert len(back.swap_in_host_blocks) == len({b for table in tables for b in table})
    bench.finish()


def test_a_shared_last_block_comes_back_once_for_each_that_writes_into_it() -> None:
    """Preempted right after the fork: the partial block of the prompt is still one."""
    bench = Bench(num_blocks=8)
    first = bench.arrive(list(range(40, 48)), n=2, max_tokens=10)
    group = bench.core.groups[bench.arrive(list(range(9)), n=3, max_tokens=4)]
    bench.step()  # computes both prompts and forks
    out = bench.step()  # two for the first request's next blocks, two for copies of the third
    assert swaps_out(out) and len(out.swap_out_host_blocks) == 3
    (tail,) = {s.host_blocks[2] for s in group.samples}
    back = bench.until(swaps_in)
    assert back.swap_in_host_blocks.count(tail) == 3 and first not in bench.core.groups
    assert len({row.blocks[2] for row in back.new_rows}) == 3 and not back.copy_src_blocks
    bench.finish()


def test_a_group_in_prefill_and_one_without_room_in_host_memory_are_recomputed() -> None:
    bench = Bench(num_host_blocks=2)
    _, second = two_that_do_not_fit(bench)
    bench.until(lambda plan: plan.released_slots)
    assert bench.state(second) == pb.REQUEST_STATE_PREEMPTED and not any(map(swaps_out, bench.plans))
    bench.finish()
    assert bench.core.stats.recomputed_tokens > 0 and bench.core.stats.num_swaps == 0


def test_a_group_that_is_cancelled_while_it_is_swapped_out_leaves_its_host_blocks() -> None:
    bench = Bench(num_blocks=16)
    bench.arrive(list(range(30, 38)), max_tokens=40)
    key = bench.arrive(list(range(9)), n=3, max_tokens=16)
    bench.until(swaps_out)
    used = 20 - bench.worker.host.num_free
    bench.apply(RequestStopped(key, 1, Finish.CANCELLED))  # one sample: what the others share stays
    left = 20 - bench.worker.host.num_free
    assert 0 < left < used
    bench.apply(RequestStopped(key, None, Finish.CANCELLED))
    assert bench.worker.host.num_free == 20 and key not in bench.core.groups
    while bench.core.groups:
        bench.step()


def test_a_lost_worker_has_lost_its_host_blocks() -> None:
    bench = Bench()
    _, second = two_that_do_not_fit(bench)
    bench.until(swaps_out)
    bench.apply(WorkerLost("w"))
    assert not bench.core.groups[second].swapped
    bench.attach()
    assert bench.worker.host.num_free == 20
    bench.until(lambda plan: any(len(row.tokens) > 8 for row in plan.new_rows))
    assert not any(map(swaps_in, bench.plans)), "what it had is computed again from its tokens"
    bench.finish()


def test_swaps_of_a_step_are_bounded_and_a_larger_group_goes_alone() -> None:
    """At 10 GB/s a step moves 100 MB: here 7 blocks."""
    config = CoreConfig(preemption_mode="swap", max_inflight=1, horizon_us=0, prefix_cache=False)
    bench = Bench(config, num_blocks=24, block_bytes=100_000_000 // 7)
    bench.device.swap_block_us = 1428
    assert most_blocks(bench.worker) == 7
    bench.arrive(list(range(8)), max_tokens=88)
    for i in range(4):
        bench.arrive(list(range(20 + 10 * i, 28 + 10 * i)), max_tokens=30)
    bench.step()
    while bench.core.groups:
        plan = bench.step()
        groups = len(plan.new_rows)
        assert groups == 1 or len(plan.swap_in_host_blocks) <= 7 or not swaps_in(plan)
    assert bench.core.stats.num_swaps >= 3
    assert bench.got == bench.wanted


@pytest.mark.parametrize("mode", ["auto", "swap", "recompute"])
def test_auto_takes_what_the_device_is_faster_at_and_both_can_be_forced(mode: str) -> None:
    bench = Bench(CoreConfig(preemption_mode=mode), block_bytes=100_000)  # type: ignore[arg-type]
    worker = bench.worker
    assert worker.block_us == 10, "nothing was measured: 10 GB/s"
    worker.token_us = 5.5
    assert prefers_swap(worker, 10, 40) is (mode != "recompute")
    worker.token_us = 4.5
    assert prefers_swap(worker, 10, 40) is (mode == "swap")
    worker.token_us, worker.least_token_us = 0.0, 5.5
    assert prefers_swap(worker, 10, 40) is (mode != "recompute"), (
        "no long step was measured: the best of others"
    )
    assert prefers_swap(worker, 10, 36) is (mode == "swap"), "blocks of others are not lost"
    worker.least_token_us = 0.0
    assert prefers_swap(worker, 10, 1) is (mode != "recompute"), "nothing was measured"


def test_rates_are_learnt_from_steps_that_swap_and_their_time_is_not_the_forwards() -> None:
    bench = Bench(CoreConfig(max_inflight=1, horizon_us=0), block_bytes=1000)
    two_that_do_not_fit(bench)
    plan = bench.until(swaps_out)
    assert bench.worker.block_us == pytest.approx(0.1 + 0.2 * (10 - 0.1)), "the device model's 10 us a block"
    swap_us = 10 * len(plan.swap_out_host_blocks)
    assert bench.worker.iteration_us == pytest.approx(1000 - 0.2 * swap_us)
    assert bench.core.stats.swap_us == swap_us
    assert bench.worker.least_token_us == pytest.approx(1000 / 16), "of the step that computed both prompts"
    bench.finish()
