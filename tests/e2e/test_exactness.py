"""The tokens of real prompts equal transformers', whatever the scheduler does with them on the way.

fp32, greedy and sampled with seeds, through scheduler and worker by token ids. Every setting below changes
the order of the work, the batches, the chunks or what has to be computed twice, and none may change a token.
A difference is excused only at a near tie (see `reference.Difference`): counted, listed, at most 2 of 100.
The plans that the scheduler recorded must show that each setting took effect.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pytest

from scheduler_svc import record
from tests.support import figures
from tests.support.cluster import cluster
from tests.support.data import Prompt, model_folder, prompts
from tests.support.runs import (
    check,
    greedy,
    read_record,
    run,
    sampled,
    shorter_than,
)
from tests.support.scale import scaled

pytestmark = pytest.mark.timeout(scaled(300, 3600))

AT_ONCE = scaled(6, 32)
NUM_SAMPLES = 3
ROOMY = ("--num-blocks", "4096")  # holds the whole set: sampled requests find the greedy ones' prompts
TIGHT = ("--num-blocks", scaled("28", "160"))  # the longest request needs 98 blocks, the quick slice's 17


@dataclass(frozen=True)
class Facts:
    """What a run was really like."""

    cached_tokens: int
    preemptions: int
    swapped_tokens: int
    most_tokens: int
    """Of one iteration."""
    most_inflight: int
    most_iterations: int


@dataclass(frozen=True)
class Setting:
    """Flags, and what must be true of a run with them."""

    name: str
    took_effect: Callable[[Facts], bool]
    scheduler: tuple[str, ...] = ()
    worker: tuple[str, ...] = ROOMY


CHUNKS = ("--max-batched-tokens", "60")
FAR = ("--horizon-ms", "100000")
FOUR = ("--max-horizon", "4", *ROOMY)
SWAP, RECOMPUTE = ("--preemption-mode", "swap"), ("--preemption-mode", "recompute")
EACH_ALONE = [
    Setting("prefix cache on", lambda facts: facts.cached_tokens > 0),
    Setting("prefix cache off", lambda facts: facts.cached_tokens == 0, ("--no-prefix-cache",)),
    Setting("60-token chunks", lambda facts: facts.most_tokens == 60, CHUNKS),
    Setting("swaps", lambda facts: facts.preemptions > 20 and facts.swapped_tokens > 0, SWAP, worker=TIGHT),
    Setting(
        "recomputation",
        lambda facts: facts.preemptions > 20 and not facts.swapped_tokens,
        RECOMPUTE,
        worker=TIGHT,
    ),
    Setting("D = 1", lambda facts: facts.most_inflight == 1, ("--max-inflight", "1")),
    Setting("D = 2", lambda facts: facts.most_inflight == 2, ("--max-inflight", "2")),
    Setting("D = 3", lambda facts: facts.most_inflight == 3, ("--max-inflight", "3")),
    Setting("m = 1", lambda facts: facts.most_iterations == 1, ("--horizon-ms", "0")),
    Setting("m = 4", lambda facts: facts.most_iterations == 4, FAR, FOUR),
]
IN_FEW_RUNS = [
    Setting("prefix cache on, D = 2", lambda f: f.cached_tokens > 0 and f.most_inflight == 2),
    Setting(
        "prefix cache off, D = 3, m = 1",
        lambda f: not f.cached_tokens and f.most_inflight == 3 and f.most_iterations == 1,
        ("--no-prefix-cache", "--max-inflight", "3", "--horizon-ms", "0"),
    ),
    Setting(
        "60-token chunks, D = 1",
        lambda f: f.most_tokens == 60 and f.most_inflight == 1,
        (*CHUNKS, "--max-inflight", "1"),
    ),
    Setting("preemptions", lambda f: f.preemptions > 0 and not f.swapped_tokens, RECOMPUTE, worker=TIGHT),
    Setting("m = 4", lambda f: f.most_iterations == 4, FAR, FOUR),
]


def chosen() -> list[Prompt]:
    """All prompts, or a quick slice of those that take little time."""
    return prompts() if scaled(False, True) else shorter_than(300, 8)


def test_one_by_one() -> None:
    cases = greedy(prompts() if scaled(False, True) else shorter_than(700, 7)[-3:])
    with cluster(model=str(model_folder()), worker_args=("--num-blocks", "512")) as running:
        got = run(running.scheduler.address, cases, at_once=1)
    differences = check(cases, got.tokens)
    figures.record("exactness", setting="one by one", prompts=len(cases), **differences.figures())


@pytest.mark.parametrize("setting", scaled(IN_FEW_RUNS, EACH_ALONE), ids=lambda setting: setting.name)
def test_no_setting_changes_a_token(setting: Setting, tmp_path: Path) -> None:
    cases = greedy(chosen()) + sampled(chosen())
    recorded = tmp_path / "record"
    with cluster(
        model=str(model_folder()),
        scheduler_args=("--record", str(recorded), *setting.scheduler),
        worker_args=setting.worker,
    ) as running:
        got = run(running.scheduler.address, cases, AT_ONCE)
        now = running.snapshot()
    plans = read_record(recorded)
    facts = Facts(
        cached_tokens=got.cached_tokens,
        preemptions=now.num_preemptions,
        swapped_tokens=now.swapped_tokens,
        most_tokens=plans.most_tokens,
        most_inflight=plans.most_inflight,
        most_iterations=max(plans.horizons),
    )
    assert setting.took_effect(facts), facts
    record.replay(recorded)
    differences = check(cases, got.tokens)
    figures.record(
        "exactness",
        setting=setting.name,
        prompts=len(chosen()),
        at_once=AT_ONCE,
        **asdict(facts),
        **differences.figures(),
    )


@pytest.mark.parametrize(
    ("name", "scheduler_args", "worker_args"),
    [
        ("roomy", FAR, FOUR),
        ("no prefix cache", (*FAR, "--no-prefix-cache"), FOUR),
        ("preempted", CHUNKS, ("--num-blocks", scaled("20", "56"))),
    ],
    ids=["roomy", "no prefix cache", "preempted"],
)
def test_each_sample_of_a_group_is_the_single_request_with_its_seed(
    name: str, scheduler_args: tuple[str, ...], worker_args: tuple[str, ...]
) -> None:
    prompts_of_groups = shorter_than(scaled(100, 700), scaled(3, 12))
    past_the_end = replace(prompts_of_groups[-1], seed=2**64 - 2)  # the seeds of its samples pass 2^64
    groups = [replace(case, n=NUM_SAMPLES) for case in sampled([*prompts_of_groups, past_the_end])]
    singles = [single for group in groups for single in group.singles()]
    with cluster(
        model=str(model_folder()), scheduler_args=scheduler_args, worker_args=worker_args
    ) as running:
        address = running.scheduler.address
        together = run(address, groups)
        num_preemptions = running.snapshot().num_preemptions
        alone = run(address, singles, AT_ONCE)
    assert bool(num_preemptions) == (name == "preempted"), num_preemptions
    assert bool(alone.cached_tokens) == (name != "no prefix cache"), "the prompts had been there before"
    differences = check(singles, together.tokens, alone.tokens)
    references = check(
        sampled(prompts_of_groups), alone.tokens[: NUM_SAMPLES * len(prompts_of_groups) : NUM_SAMPLES]
    )
    figures.record(
        "exactness",
        setting=f"n = {NUM_SAMPLES}, {name}",
        groups=len(groups),
        preemptions=num_preemptions,
        **differences.figures(),
        differ_from_reference=len(references.sampled),
    )
