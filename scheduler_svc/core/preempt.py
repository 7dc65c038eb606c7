"""Who gives way when blocks run out, the least lost work first, and what becomes of its KV.

A victim loses its rows and blocks, keeps its tokens, and waits at the place of its arrival. Its KV is
swapped to host memory, or computed again, but for blocks that the prefix cache still holds.
"""

from __future__ import annotations

from collections.abc import Iterator

from scheduler_svc.core.group import Group
from scheduler_svc.core.request import NO_SLOT
from scheduler_svc.core.worker import Worker


def prefers_swap(worker: Worker, num_blocks: int, num_tokens: int) -> bool:
    """Whether a victim's `num_blocks` should go to host memory and come back, rather than that the
    `num_tokens` which would be lost are computed again: whichever takes the device less time, by what was
    measured, unless told.
    """
    if worker.preemption_mode != "auto":
        return worker.preemption_mode == "swap"
    token_us = worker.token_us or worker.least_token_us
    return not token_us or 2 * num_blocks * worker.block_us <= num_tokens * token_us


def lost_work(worker: Worker, group: Group) -> int:
    """Tokens whose KV would have to be computed again."""
    scheduled = worker.rows.scheduled
    return sum(int(scheduled[s.slot]) for s in group.samples if s.slot != NO_SLOT)


def victims(worker: Worker) -> Iterator[Group]:
    """The groups to preempt, one after the other: of the lowest priority, with the least lost work, the
    youngest. They are ordered once, for many may have to go in one step.

    The oldest group of the highest priority is never among them, so that someone always gets on.
    """
    protected = min(worker.running.values(), key=lambda g: g.rank, default=None)
    candidates = (g for g in worker.running.values() if g is not protected)
    yield from sorted(candidates, key=lambda g: (-g.priority, lost_work(worker, g), -g.order))
