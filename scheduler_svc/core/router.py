"""Which worker a request goes to: where most of its prefix is cached, weighed against load."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from scheduler_svc.core.group import Group
from scheduler_svc.core.worker import Worker

REMEMBERED_BLOCKS = 1 << 16
LOAD_TOKENS = 64  # a group on a worker weighs as much as this many tokens of prefill


def fits(worker: Worker, num_prompt: int, n: int, limit: int) -> str:
    """Why n samples of at most `limit` tokens can never run on `worker`; empty when they can.

    The last token of a sequence is never computed, so its KV needs `limit - 1` tokens.
    """
    if n > worker.rows.max_slots:
        return f"n is {n}, but a worker runs at most {worker.rows.max_slots} sequences"
    if limit <= num_prompt:
        return f"the prompt has {num_prompt} tokens, the model's context is {limit}"
    size = worker.block_size
    shared = num_prompt // size
    need = shared + n * (-(-(limit - 1) // size) - shared)
    if need > worker.allocator.num_blocks:
        return (
            f"prompt and max_tokens need up to {need} blocks of {size} tokens, but the KV cache has "
            f"{worker.allocator.num_blocks}; ask for fewer max_tokens or samples"
        )
    return ""


class Router:
    """Remembers where prefixes were sent, so that requests meet before the first has been computed."""

    def __init__(self) -> None:
        self._sent: OrderedDict[bytes, str] = OrderedDict()

    def choose(self, workers: Iterable[Worker], group: Group) -> Worker | None:
        """The worker with the least uncached prompt and load for `group`; None when it fits none."""
        leader, n = group.samples[0], len(group.live())
        able = [w for w in workers if not fits(w, group.num_prompt, n, leader.last_position)]
        if len(able) < 2:
            return able[0] if able else None
        best = min(able, key=lambda w: (self._cost(w, group), w.name))
        for digest in best.hashes(leader)[: group.num_prompt // best.block_size]:
            self._sent[digest] = best.name
            self._sent.move_to_end(digest)
        while len(self._sent) > REMEMBERED_BLOCKS:
            self._sent.popitem(last=False)
        return best

    def _cost(self, worker: Worker, group: Group) -> int:
        load = LOAD_TOKENS * (len(worker.queue) + len(worker.running))
        if not worker.use_prefix:
            return load
        leader = group.samples[0]
        hashes = worker.hashes(leader)
        hits = len(worker.hits(leader))
        while hits < len(hashes) and self._sent.get(hashes[hits]) == worker.name:
            hits += 1
        return load + len(leader.tokens) - hits * worker.block_size
