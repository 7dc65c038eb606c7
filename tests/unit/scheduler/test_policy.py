"""The rules of order and progress (DESIGN section 2), one test each, on the pure core."""

from __future__ import annotations

import pytest

from scheduler_svc.core import preempt
from scheduler_svc.core.config import CoreConfig
from scheduler_svc.core.events import (
    Event,
    Finish,
    Outputs,
    Plan,
    RequestArrived,
    RequestStopped,
    RowEnd,
    Sampling,
    StepDone,
    WorkerAttached,
    WorkerLost,
)
from scheduler_svc.core.group import Group
from scheduler_svc.core.scheduler import Scheduler
from scheduler_svc.snapshot import snapshot_of


class Bench:
    """A core with one worker of small blocks, fed by hand."""

    def __init__(self, config: CoreConfig | None = None, **sizes: int) -> None:
        self.core = Scheduler(config or CoreConfig())
        self.sizes = {"num_blocks": 64, "block_size": 4, "max_slots": 8, "max_batched_tokens": 100} | sizes
        self.inflight: list[Plan] = []
        self.key = 0
        self.attach()

    def attach(self, worker: str = "w", epoch: int = 1) -> None:
        self.apply(
            WorkerAttached(
                worker=worker, epoch=epoch, max_model_len=400, max_horizon=8, max_inflight=4, **self.sizes
            )
        )

    def apply(self, *events: Event) -> Outputs:
        return self.core.apply(events, 0.0)

    def arrive(self, prompt: list[int], n: int = 1, max_tokens: int = 50, priority: int = 0) -> int:
        self.key += 1
        self.apply(
            RequestArrived(
                key=self.key, session=1, handle=self.key, request_id=str(self.key), prompt=tuple(prompt), n=n,
                max_tokens=max_tokens, sampling=Sampling(seed=9), priority=priority,
            )
        )  # fmt: skip
        return self.key

    def plan(self) -> Plan | None:
        plan = self.core.plan("w", 0.0)
        if plan:
            self.inflight.append(plan)
        return plan

    def must_plan(self) -> Plan:
        plan = self.plan()
        assert plan is not None
        return plan

    def answer(self, ended: dict[int, RowEnd] | None = None, device_us: int = 0) -> Outputs:
        """Answer the oldest plan in flight with the token 1 for every sampling row."""
        plan = self.inflight.pop(0)
        rows = len(self.core.workers["w"].inflight[0].sampling)
        ended = ended or {}
        counts = [0 if ended.get(r) is RowEnd.NAN else plan.num_iterations for r in range(rows)]
        return self.apply(
            StepDone(
                worker="w", epoch=plan.epoch, step_id=plan.step_id, tokens=[1] * sum(counts),
                num_sampled=counts, ended_rows=list(ended), ended_reasons=[int(e) for e in ended.values()],
                device_us=device_us,
            )
        )  # fmt: skip

    def slot(self, key: int, index: int = 0) -> int:
        return self.core.groups[key].samples[index].slot

    def blocks(self, key: int, index: int = 0) -> list[int]:
        return list(self.core.groups[key].samples[index].blocks)


def written_blocks(plan: Plan) -> set[int]:
    return set(plan.append_blocks) | set(plan.copy_dst_blocks) | set(plan.replace_blocks)


def test_runs_ahead_to_the_depth_and_no_further() -> None:
    for depth in (1, 2, 3):
        bench = Bench(CoreConfig(max_inflight=depth))
        bench.arrive([1, 2, 3])
        assert [bool(bench.plan()) for _ in range(5)] == [True] * depth + [False] * (5 - depth)
        bench.answer()
        assert bench.plan()


def test_max_tokens_is_never_overrun() -> None:
    bench = Bench(CoreConfig(max_inflight=4))
    bench.arrive([1, 2, 3], max_tokens=2)
    assert bench.plan() and bench.plan()
    assert bench.plan() is None


def test_late_write_of_a_discarded_row_comes_before_the_reuse_of_its_blocks() -> None:
    bench = Bench(CoreConfig(prefix_cache=False), num_blocks=2)
    first = bench.arrive([1, 2, 3], max_tokens=5)
    bench.must_plan()
    late = bench.must_plan()  # in flight with the row when the answer below ends it
    mine = set(bench.blocks(first))
    assert late.slots == [bench.slot(first)]
    slot = bench.slot(first)
    bench.arrive([5, 6, 7], max_tokens=5)
    bench.answer({0: RowEnd.STOP})
    reuse = bench.must_plan()
    assert reuse.step_id == late.step_id + 1
    assert reuse.released_slots == [slot] and reuse.new_rows[0].slot == slot
    assert written_blocks(reuse) <= mine


def test_a_prompt_can_be_hit_from_the_next_step_on_and_never_to_its_last_token() -> None:
    bench = Bench()
    prompt = list(range(8))  # two full blocks: the second holds the last token
    bench.arrive(prompt)
    bench.arrive(prompt)
    plan = bench.must_plan()
    assert [row.num_computed for row in plan.new_rows] == [0, 0]
    bench.arrive(prompt)
    bench.arrive([*prompt, 8])
    plan = bench.must_plan()
    assert [row.num_computed for row in plan.new_rows] == [4, 8]


def test_sampled_tokens_can_be_hit_once_the_step_that_took_them_is_confirmed() -> None:
    bench = Bench(CoreConfig(max_inflight=1))
    bench.arrive([1, 1, 1])
    index = bench.core.workers["w"].index
    indexed = []
    for _ in range(2):  # the prefill draws the 4th token; the step after it computes that token's KV
        bench.must_plan()
        indexed.append(len(index.blocks()))
        bench.answer()
        indexed.append(len(index.blocks()))
    assert indexed == [0, 0, 0, 1]
    bench.arrive([1, 1, 1, 1, 1])
    assert bench.must_plan().new_rows[0].num_computed == 4


def test_cache_salt_keeps_prefixes_apart() -> None:
    bench = Bench()
    bench.arrive(list(range(9)))
    bench.must_plan()
    bench.key += 1
    bench.apply(
        RequestArrived(
            key=bench.key, session=1, handle=1, request_id="x", prompt=tuple(range(9)), n=1, max_tokens=5,
            sampling=Sampling(), cache_salt="other",
        )
    )  # fmt: skip
    assert bench.must_plan().new_rows[0].num_computed == 0


def test_long_prompts_go_in_chunks_and_never_hold_up_decodes() -> None:
    bench = Bench(CoreConfig(max_batched_tokens=10))
    decode = bench.arrive([1, 2])
    bench.must_plan()
    bench.answer()
    long = bench.arrive(list(range(25)))
    taken = []
    for _ in range(3):
        plan = bench.must_plan()
        counts = dict(zip(plan.slots, plan.num_tokens, strict=True))
        assert counts[bench.slot(decode)] == 1
        taken.append(counts[bench.slot(long)])
        bench.answer()
    assert taken == [9, 9, 7]


def prompt_tokens(plan: Plan) -> int:
    return sum(plan.num_tokens or [1] * len(plan.slots)) - len([n for n in plan.num_tokens if n == 1])


def test_prompts_beside_decodes_take_no_longer_than_streams_may_wait() -> None:
    long = [1] * 5000
    sizes = {"num_blocks": 4000, "max_batched_tokens": 4000, "max_slots": 8}
    for stall_us, after in ((30_000, 1407), (1_000, 1023), (100_000, 3999), (0, 3999)):
        bench = Bench(CoreConfig(stall_us=stall_us, max_inflight=1, prefix_cache=False), **sizes)
        bench.core.workers["w"].max_model_len = 8000
        stream = bench.arrive([1] * 1900, max_tokens=90)
        assert prompt_tokens(bench.must_plan()) == 1900  # nobody decodes, nobody waits
        bench.answer(device_us=38_000)  # 20 us a token
        bench.arrive(long)
        plan = bench.must_plan()
        assert plan.slots[0] == bench.slot(stream) and prompt_tokens(plan) == after


def test_short_steps_do_not_tell_what_a_token_takes() -> None:
    config = CoreConfig(stall_us=20_000, max_inflight=1, prefix_cache=False)
    bench = Bench(config, num_blocks=4000, max_batched_tokens=2000)
    bench.core.workers["w"].max_model_len = 8000
    bench.arrive([1] * 1000, max_tokens=90)
    bench.must_plan()
    bench.answer(device_us=1_000_000)
    bench.arrive([1] * 3000)
    assert prompt_tokens(bench.must_plan()) == 1999


def test_samples_fork_from_one_prefill_and_copy_only_a_shared_partial_block() -> None:
    for length, copies in ((6, 2), (8, 0)):
        bench = Bench()
        key = bench.arrive(list(range(length)), n=3)
        plan = bench.must_plan()
        leader = bench.slot(key)
        assert plan.num_tokens == [length, 0, 0]
        assert [row.parent_slot for row in plan.new_rows] == [None, leader, leader]
        assert [row.sampling.seed for row in plan.new_rows] == [9, 10, 11]
        assert bench.blocks(key, 1) == bench.blocks(key, 2) == bench.blocks(key, 0)
        plan = bench.must_plan()
        assert len(plan.copy_src_blocks) == len(plan.copy_dst_blocks) == copies
        assert len({bench.blocks(key, i)[-1] for i in range(3)}) == 3
        bench.core.check_integrity()


def test_lookahead_ends_before_anyone_is_preempted() -> None:
    bench = Bench(CoreConfig(max_inflight=2, prefix_cache=False), num_blocks=4)
    old = bench.arrive([1, 2, 3, 4, 5, 6], max_tokens=10)
    young = bench.arrive([1, 2, 3], max_tokens=10)
    assert bench.must_plan() and bench.must_plan()
    bench.answer()
    assert bench.must_plan()
    bench.answer()
    # Old needs its third block and young its second; one is left, and a step is still in flight.
    assert bench.plan() is None
    assert bench.core.stats.num_preemptions == 0
    bench.answer()
    plan = bench.must_plan()
    assert bench.core.stats.num_preemptions == 1
    assert bench.slot(young) == -1 and plan.slots == [bench.slot(old)]


def test_no_more_are_preempted_than_room_for_some_steps_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    weighed: list[Group] = []
    weigh = preempt.lost_work
    monkeypatch.setattr(
        preempt, "lost_work", lambda worker, group: weighed.append(group) or weigh(worker, group)
    )
    bench = Bench(CoreConfig(max_inflight=1, prefix_cache=False), num_blocks=64, max_slots=16)
    keys = [bench.arrive([k] * 8, max_tokens=40) for k in range(16)]
    while not bench.core.stats.num_preemptions:
        bench.must_plan()
        bench.answer()
    # All had four full blocks. Eight steps take two more of each, and ten times six are there.
    assert [bench.slot(k) >= 0 for k in keys] == [True] * 10 + [False] * 6
    assert len(weighed) == 15, "each is looked at once, however many go"
    for _ in range(7):
        bench.must_plan()
        bench.answer()
    assert bench.core.stats.num_preemptions == 6 and all(bench.slot(k) >= 0 for k in keys[:10])


def test_the_oldest_group_is_never_a_victim() -> None:
    bench = Bench(CoreConfig(max_inflight=1, prefix_cache=False), num_blocks=12, max_slots=4)
    keys = [bench.arrive([k, 2, 3, 4, 5], max_tokens=36) for k in range(3)]
    for _ in range(36):
        if bench.plan():
            assert bench.slot(keys[0]) >= 0
            bench.answer()
    assert bench.core.stats.num_preemptions > 0
    assert bench.core.groups[keys[0]].num_preemptions == 0


def test_victims_come_from_the_lowest_priority() -> None:
    bench = Bench(CoreConfig(max_inflight=1, prefix_cache=False), num_blocks=6)
    low = bench.arrive([1] * 7, max_tokens=15, priority=5)
    bench.must_plan()
    bench.answer()
    high = [bench.arrive([2] * 3, max_tokens=15) for _ in range(2)]
    while not bench.core.stats.num_preemptions:
        bench.must_plan()
        bench.answer()
    assert bench.slot(low) == -1 and all(bench.slot(k) >= 0 for k in high)


def test_priority_then_arrival_decides_who_is_admitted() -> None:
    bench = Bench(max_slots=1)
    bench.arrive([1])
    bench.must_plan()
    late = [bench.arrive([1], priority=p) for p in (1, 0, -1, 0)]
    order = []
    while len(order) < 4:
        bench.apply(RequestStopped(next(iter(bench.core.workers["w"].running)), None, Finish.CANCELLED))
        while bench.inflight:
            bench.answer()
        bench.must_plan()
        order.append(next(iter(bench.core.workers["w"].running)))
    assert order == [late[2], late[1], late[3], late[0]]


def test_horizon_covers_its_time_and_falls_to_one_for_prompts() -> None:
    bench = Bench(CoreConfig(max_inflight=1, horizon_us=8000))
    bench.arrive([1, 2, 3])
    bench.must_plan()
    bench.answer(device_us=9000)  # a prefill says nothing about decodes
    assert bench.must_plan().num_iterations == 1
    bench.answer(device_us=2000)
    assert bench.must_plan().num_iterations == 4
    bench.answer(device_us=8000)
    bench.arrive([4, 5, 6])
    assert bench.must_plan().num_iterations == 1


def test_horizon_of_zero_is_off() -> None:
    bench = Bench(CoreConfig(max_inflight=1, horizon_us=0))
    bench.arrive([1, 2, 3])
    for _ in range(5):
        assert bench.must_plan().num_iterations == 1
        bench.answer(device_us=100)


def test_horizon_shrinks_to_the_blocks_that_are_left() -> None:
    bench = Bench(CoreConfig(max_inflight=1, prefix_cache=False), num_blocks=4)
    keys = [bench.arrive([k, 2, 3], max_tokens=12) for k in range(2)]
    bench.must_plan()
    bench.answer()
    bench.must_plan()
    bench.answer(device_us=1000)
    plan = bench.must_plan()
    assert 1 < plan.num_iterations < 8
    assert bench.core.stats.num_preemptions == 0 and all(bench.slot(k) >= 0 for k in keys)


def test_horizon_does_not_run_past_the_first_end_while_others_wait() -> None:
    bench = Bench(CoreConfig(max_inflight=1), max_slots=2)
    bench.arrive([1, 2], max_tokens=5)
    bench.arrive([1, 2], max_tokens=40)
    bench.arrive([1, 2], max_tokens=40)
    bench.must_plan()
    bench.answer()
    bench.must_plan()
    bench.answer(device_us=500)
    assert bench.must_plan().num_iterations == 3


def test_a_cancelled_request_frees_slot_and_blocks_with_the_next_plan() -> None:
    bench = Bench(CoreConfig(prefix_cache=False))
    other = bench.arrive([1, 2, 3])
    key = bench.arrive([1, 2, 3, 4, 5])
    bench.must_plan()
    slot = bench.slot(key)
    bench.apply(RequestStopped(key, None, Finish.CANCELLED))
    worker = bench.core.workers["w"]
    assert worker.allocator.num_free == 64 - len(bench.blocks(other))
    assert bench.must_plan().released_slots == [slot]


def test_results_of_a_stopped_row_are_discarded() -> None:
    bench = Bench()
    key = bench.arrive([1, 2, 3])
    bench.must_plan()
    end = bench.apply(RequestStopped(key, None, Finish.STOP)).sessions[1].ended[0]
    assert end.reason is Finish.STOP and end.completion_tokens == 0
    assert bench.answer().sessions == {}


def test_not_finite_logits_fail_one_request_and_its_blocks_are_never_hit() -> None:
    bench = Bench()
    prompt = list(range(9))
    bad, good = bench.arrive(prompt), bench.arrive([7, 7])
    bench.must_plan()
    (end,) = bench.answer({0: RowEnd.NAN}).sessions[1].ended
    assert end.key == bad and end.reason is Finish.ERROR and end.failure.endswith("were not finite")
    bench.arrive(prompt)
    assert bench.must_plan().new_rows[0].num_computed == 0
    assert bench.slot(good) >= 0


def test_what_can_never_fit_is_refused_with_its_reason() -> None:
    bench = Bench(num_blocks=4)
    assert bench.core.refusal(8, 1, 8) is None
    assert "blocks" in (bench.core.refusal(8, 1, 20) or "")
    assert "sequences" in (bench.core.refusal(1, 9, 1) or "")
    assert "context" in (bench.core.refusal(400, 1, 1) or "")


def test_a_lost_worker_returns_its_requests_to_the_front_with_their_tokens() -> None:
    bench = Bench(max_slots=1)
    first = bench.arrive([1, 2, 3])
    waiting = bench.arrive([4, 5, 6])
    bench.must_plan()
    bench.answer()
    bench.must_plan()
    bench.apply(WorkerLost("w"))
    bench.inflight.clear()
    assert bench.core.num_waiting == 2
    bench.attach(epoch=2)
    row = bench.must_plan().new_rows[0]
    assert row.tokens == (1, 2, 3, 1) and row.num_prompt_tokens == 3
    assert bench.core.groups[waiting].worker == "w" and bench.core.groups[first].num_deaths == 0
    assert bench.core.stats.replayed_requests == 1 and bench.core.stats.replayed_tokens == 1


def test_answers_of_an_ended_session_are_ignored() -> None:
    bench = Bench()
    key = bench.arrive([1, 2, 3])
    stale = bench.must_plan()
    bench.apply(WorkerLost("w"))
    bench.attach(epoch=2)
    bench.apply(StepDone("w", stale.epoch, stale.step_id, [1], [], [], []))
    assert bench.core.groups[key].num_output == 0


def test_requests_with_a_shared_prefix_meet_on_one_worker_until_load_outweighs_it() -> None:
    bench = Bench(num_blocks=400, max_slots=64)
    bench.attach("v")
    prefix = list(range(80))
    keys = [bench.arrive([*prefix, k]) for k in range(2)]
    assert len({bench.core.groups[k].worker for k in keys}) == 1
    keys += [bench.arrive([*prefix, k]) for k in range(2, 10)]
    assert len({bench.core.groups[k].worker for k in keys}) == 2


def test_snapshot_says_why_a_request_is_not_running() -> None:
    bench = Bench(max_slots=1)
    for _ in range(3):
        bench.arrive([1, 2, 3])
    bench.must_plan()
    view = snapshot_of(bench.core, 1.0, True, True, 100)
    assert [r.why_not_running for r in view.requests] == [
        "",
        "it needs 1 slots, 0 are free",
        "1 requests are ahead of it in the queue of w",
    ]
    bench.apply(WorkerLost("w"))
    view = snapshot_of(bench.core, 1.0, True, True, 100)
    assert {r.why_not_running for r in view.requests} == {"no worker is attached"}
