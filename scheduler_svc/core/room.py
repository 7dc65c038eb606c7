"""Room for the rows that decode: blocks for their next tokens, taken from others where they lack."""

from __future__ import annotations

from collections import Counter

import numpy as np

from scheduler_svc.core.group import Group
from scheduler_svc.core.preempt import victims
from scheduler_svc.core.rows import Column
from scheduler_svc.core.stats import Stats
from scheduler_svc.core.swap import swap_out
from scheduler_svc.core.worker import Worker

# For so many steps there are to be blocks when requests are admitted, or have been preempted.
ROOM_STEPS = 8


def make_room(worker: Worker, stats: Stats, now: float) -> Column | None:
    """Slots that decode in this step, after preempting until the blocks suffice.

    None: blocks are short while steps are in flight. Their results may free some, so look-ahead ends
    here before anyone is preempted. As that costs the device its work ahead, room is made for some
    steps at once.
    """
    first: Group | None = None
    candidates = victims(worker)
    while True:
        decodes = worker.rows.decoding()
        need = int(lacking(worker, decodes, 1).sum()) if decodes.size else 0
        soon = soon_lacking(worker, decodes) - need if first is not None else 0
        need += _tail_copies(worker) if worker.shared_tails else 0
        if not decodes.size and not worker.inflight:
            # Prompts may hold all blocks between them: the oldest must be able to go on.
            if oldest := next(iter(worker.prefilling.values()), None):
                need += int(worker.rows.scheduled[oldest.slot] >= worker.rows.capacity[oldest.slot])
            elif group := next(iter(worker.gathering.values()), None):
                need += group.blocks_needed(worker.block_size, [len(group.followers[0].tokens)])
                need -= group.num_prompt // worker.block_size
        free = worker.allocator.num_free
        if need + soon <= free:
            return decodes
        if worker.inflight:
            return None
        victim = next(candidates, None)
        if need <= free and (victim is None or (first is not None and victim.priority < first.priority)):
            return decodes  # nobody more important gives way for what is only soon
        assert victim is not None, "the oldest request does not fit the cache that it was checked against"
        _preempt(worker, victim, stats, now)
        first = first or victim


def soon_lacking(worker: Worker, decodes: Column) -> int:
    """Blocks that decoding rows will lack in the next steps."""
    return int(lacking(worker, decodes, ROOM_STEPS).sum())


def lacking(worker: Worker, decodes: Column, iterations: int) -> Column:
    """Blocks that each decoding row lacks for so many iterations."""
    rows = worker.rows
    covered = np.minimum(rows.scheduled[decodes] + iterations, rows.last[decodes])
    return np.maximum(-((rows.capacity[decodes] - covered) // worker.block_size), 0)


def _tail_copies(worker: Worker) -> int:
    """Blocks that copy-on-write needs when every row with a shared tail writes: all but the last holder."""
    holders = Counter(s.blocks[-1] for s in worker.shared_tails.values())
    return sum(min(n, worker.allocator.ref_count(block) - 1) for block, n in holders.items())


def _preempt(worker: Worker, group: Group, stats: Stats, now: float) -> None:
    swap_out(worker, group, stats)
    # Not in the very plan that takes its blocks, which has room for some steps more.
    group.resume_after = max(worker.remove_group(group), worker.next_step)
    group.num_preemptions += 1
    group.pauses.append(("preempted", now))
    stats.num_preemptions += 1
    worker.queue.push(group)
