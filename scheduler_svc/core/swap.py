"""The KV of preempted groups in host memory, instead of being computed again.

A victim is swapped out by the plan that takes its rows, and its blocks are free in that very plan: a step's
swaps out come before everything else on the device. One plan brings it back: the blocks, the rows, and
their next tokens. Its host blocks are free from then on.
"""

from __future__ import annotations

from collections import Counter
from itertools import chain

from scheduler_svc.core.events import Plan
from scheduler_svc.core.group import Group
from scheduler_svc.core.preempt import prefers_swap
from scheduler_svc.core.request import Sequence
from scheduler_svc.core.stats import Stats
from scheduler_svc.core.worker import Worker

# Groups come back in one step as long as their swaps take no more device time than this.
SWAP_STEP_US = 10_000


def swap_out(worker: Worker, group: Group, stats: Stats) -> None:
    """Keep the KV of `group`, which is about to lose its rows, in host blocks, if it can be and is worth it.

    A group in prefill is not swapped, nor one for which host blocks are lacking. There is one host block
    for each distinct device block, so that what sequences share stays shared.
    """
    live = group.starters()
    if group.search is not None and group.search.awaiting is not None:
        return  # what its beams become may be said while it is away
    if group.followers or any(s.slot in worker.prefilling for s in live):
        return
    size, tables = worker.block_size, []
    fill: dict[int, int] = {}  # tokens by block, in the order of the tables
    for sequence in live:
        computed = int(worker.rows.scheduled[sequence.slot])
        tables.append(sequence.blocks[: -(-computed // size)])
        fill |= {block: min(size, computed - i * size) for i, block in enumerate(tables[-1])}
    holders = Counter(chain.from_iterable(tables))
    # Blocks that other groups hold as well would be found again.
    lost = sum(n for block, n in fill.items() if worker.allocator.ref_count(block) == holders[block])
    if len(fill) > worker.host.num_free or not prefers_swap(worker, len(fill), lost):
        return
    host_of = dict(zip(fill, worker.host.allocate(len(fill)), strict=True))
    for sequence, table in zip(live, tables, strict=True):
        sequence.host_blocks = [host_of[block] for block in table]
        worker.host.share(sequence.host_blocks)
    worker.host.release(list(host_of.values()))
    worker.swap_outs |= {host: block for block, host in host_of.items()}
    stats.num_swaps += 1
    stats.swapped_tokens += sum(fill.values())
    stats.swapped_blocks["out"] += len(fill)
    stats.swapped_bytes["out"] += len(fill) * worker.block_bytes


def most_blocks(worker: Worker) -> int:
    """How many blocks a step may swap; one group that has more goes alone."""
    return int(SWAP_STEP_US / worker.block_us) if worker.block_us else worker.host.num_blocks


def blocks_to_resume(worker: Worker, live: list[Sequence]) -> tuple[int, int]:
    """How many blocks a group that is swapped out needs for its next tokens, beside those that the prefix
    index still holds, and how many of these nobody holds.
    """
    full, hits = set(), set()
    for sequence in live:
        found = worker.hits(sequence)
        hits.update(found)
        full.update(sequence.host_blocks[len(found) : (len(sequence.tokens) - 1) // worker.block_size])
    idle = sum(1 for block in hits if not worker.allocator.ref_count(block))
    return len(full) + len(live), idle  # each writes into a last block of its own


def swap_in(worker: Worker, live: list[Sequence], plan: Plan, stats: Stats) -> None:
    """Give the sequences of a group blocks again, and have `plan` fill them.

    A full block comes back once for all that share it; the last one, into which each of them writes in this
    step, for each. Full blocks that the prefix index still holds are shared instead.
    """
    for sequence in live:  # all before anything is allocated, which may evict them
        sequence.blocks = worker.hits(sequence)
        worker.allocator.share(sequence.blocks)
    back: dict[int, int] = {}  # device blocks by host blocks, of full ones
    for sequence in live:
        num_full = (len(sequence.tokens) - 1) // worker.block_size
        for i in range(len(sequence.blocks), len(sequence.host_blocks)):
            host = sequence.host_blocks[i]
            if i < num_full and host in back:
                worker.allocator.share([back[host]])
                sequence.blocks.append(back[host])
                continue
            (block,) = worker.allocator.allocate(1)
            sequence.blocks.append(block)
            plan.swap_in_host_blocks.append(host)
            plan.swap_in_device_blocks.append(block)
            stats.swapped_blocks["in"] += 1
            stats.swapped_bytes["in"] += worker.block_bytes
            if i < num_full:
                back[host] = block
        drop_host(worker, sequence)


def drop_host(worker: Worker, sequence: Sequence) -> None:
    """Free the host blocks of `sequence`."""
    worker.host.release(sequence.host_blocks)
    sequence.host_blocks = []
