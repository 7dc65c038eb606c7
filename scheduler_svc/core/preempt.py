"""Who gives way when blocks run out: recompute, the least lost work first.

A victim loses its rows and blocks, keeps its tokens, and waits at the place of its arrival. What it
computed is computed again, but for blocks that the prefix cache still holds.
"""

from __future__ import annotations

from scheduler_svc.core.group import Group
from scheduler_svc.core.request import NO_SLOT
from scheduler_svc.core.worker import Worker


def lost_work(worker: Worker, group: Group) -> int:
    """Tokens whose KV would have to be computed again."""
    scheduled = worker.rows.scheduled
    return sum(int(scheduled[s.slot]) for s in group.samples if s.slot != NO_SLOT)


def choose_victim(worker: Worker) -> Group | None:
    """The group to preempt: of the lowest priority, with the least lost work, the youngest.

    The oldest group of the highest priority is never chosen, so that someone always gets on.
    """
    protected = min(worker.running.values(), key=lambda g: g.rank, default=None)
    candidates = (g for g in worker.running.values() if g is not protected)
    return max(candidates, key=lambda g: (g.priority, -lost_work(worker, g), g.order), default=None)
