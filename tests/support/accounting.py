"""A worker's blocks counted the long way, from the block tables alone: what `Worker.memory` must equal."""

from __future__ import annotations

from collections import Counter

from scheduler_svc.core.worker import Memory, Worker


def recount(worker: Worker) -> tuple[Memory, int]:
    """What the tables of all rows hold, slot by slot, and how many blocks are in several of them.

    A slot is used when some holder of its block has a known token there whose KV is computed, or will be
    by a step in flight.
    """
    size = worker.block_size
    tables: Counter[int] = Counter()
    used: set[tuple[int, int]] = set()
    for sequence in worker.rows.sequences:
        if sequence is not None:
            tables.update(sequence.blocks)
            for position in range(min(int(worker.rows.scheduled[sequence.slot]), len(sequence.tokens))):
                used.add((sequence.blocks[position // size], position % size))
    held_for_nothing = set(tables) - {block for block, _ in used}
    memory = Memory(tables.total(), len(tables), len(held_for_nothing), len(tables) * size - len(used))
    return memory, sum(1 for count in tables.values() if count > 1)


def tokens_ahead(worker: Worker) -> list[int]:
    """Of every row that decodes: tokens that steps in flight are still to draw for it."""
    rows = worker.rows
    held = (s for s in rows.sequences if s is not None and s.blocks)
    return [max(0, int(rows.scheduled[s.slot]) - len(s.tokens)) for s in held]
