"""Blocks of groups, on the device and in host memory: grown, forked, dropped, copied and swapped at random.

The allocators, the prefix index and the swaps are the core's own; what moves blocks' contents is a model.
Every cell holds a digest of the tokens up to its own, so that a block that is lost, shared by mistake or used
too early is noticed by whoever holds it. After each operation every count is compared with the tables.
"""

from __future__ import annotations

import random
from collections import Counter

from scheduler_svc.core.config import CoreConfig
from scheduler_svc.core.events import Finish, Plan, RequestArrived, Sampling, WorkerAttached
from scheduler_svc.core.group import Group, State
from scheduler_svc.core.request import NO_SLOT, Sequence
from scheduler_svc.core.stats import Stats
from scheduler_svc.core.swap import blocks_to_resume, drop_host, swap_in, swap_out
from scheduler_svc.core.worker import Worker
from tests.support import figures

NUM_OPERATIONS = 500_000
DEVICE_BLOCKS, HOST_BLOCKS, SIZE, SLOTS = 40, 24, 3, 12
VOCAB = 4
MOST_TOKENS = 8 * SIZE

Cells = list[list[int]]


class Groups:
    """A worker's blocks and the groups that hold them."""

    def __init__(self, seed: int) -> None:
        self.choose = random.Random(seed)
        event = WorkerAttached("w", 1, DEVICE_BLOCKS, SIZE, SLOTS, 1000, 100, 1, 1, HOST_BLOCKS, 1)
        self.worker = Worker(event, CoreConfig(preemption_mode="swap"))
        self.stats = Stats()
        self.device: Cells = [[0] * SIZE for _ in range(DEVICE_BLOCKS)]
        self.host: Cells = [[0] * SIZE for _ in range(HOST_BLOCKS)]
        self.prefixes: dict[Sequence, list[int]] = {}  # digests of the computed tokens
        self.groups: list[Group] = []
        self.num_groups = 0
        self.did = Counter[str]()

    # ------------------------------------------------------------------------------ the operations

    def start(self) -> bool:
        """A group computes its prompt, on what the prefix index has, and forks: all blocks are shared."""
        n = self.choose.choice((1, 1, 2, 3, 5))
        prompt = [self.choose.randrange(VOCAB) for _ in range(self.choose.randrange(1, 4 * SIZE))]
        group = Group(
            RequestArrived(self.num_groups, 1, 1, "", tuple(prompt), n, 900, Sampling()), 0, 1000, 0.0
        )
        leader = group.samples[0]
        hits = self.worker.hits(leader)
        idle = sum(not self.worker.allocator.ref_count(b) for b in hits)
        lacking = -(-len(prompt) // SIZE) - len(hits)
        if n > self.worker.rows.num_free or lacking > self.worker.allocator.num_free - idle:
            return False
        self.num_groups += 1
        self.groups.append(group)
        group.state = State.RUNNING
        self.worker.running[group.key] = group
        self.worker.allocator.share(hits)
        blocks = hits + self.worker.allocator.allocate(lacking)
        self._place(leader, blocks)
        for position in range(len(hits) * SIZE, len(prompt)):
            self._write(leader, position)
        for sequence in group.samples[1:]:
            self.worker.allocator.share(blocks)
            self._place(sequence, list(blocks))
        for sequence in group.samples:
            self._draw(sequence)
        self.worker.index_blocks(leader, len(prompt))
        return True

    def grow(self) -> bool:
        """A row takes its next token: a new block, or its own copy of a shared last one, where it must."""
        sequence = self._some_sequence(swapped=False)
        if sequence is None or len(sequence.tokens) > MOST_TOKENS:
            return False
        allocator, position = self.worker.allocator, len(sequence.tokens) - 1
        index = position // SIZE
        if index == len(sequence.blocks):
            if not allocator.num_free:
                return False
            self.worker.append_blocks(sequence, 1)
        elif allocator.ref_count(shared := sequence.blocks[index]) > 1:
            if not allocator.num_free:
                return False
            (own,) = allocator.allocate(1)
            allocator.release([shared])
            self.device[own] = list(self.device[shared])
            sequence.blocks[index] = own
            self.did["copied"] += 1
        self._write(sequence, position)
        self._draw(sequence)
        self.worker.index_blocks(sequence, position + 1)
        return True

    def fork(self) -> bool:
        """A beam goes on from another: it drops its blocks and shares the other's, the last one too."""
        group = self._some_group(swapped=False)
        if group is None or len(live := group.live()) < 2:
            return False
        parent, child = self.choose.sample(live, 2)
        self.worker.allocator.share(parent.blocks)
        self.worker.allocator.release(child.blocks)
        child.tokens, child.hashes = parent.tokens[:], list(parent.hashes)
        self.prefixes[child] = list(self.prefixes[parent])
        self._place(child, list(parent.blocks))
        return True

    def drop(self) -> bool:
        """A sequence ends, wherever it is; with the last one its group does."""
        sequence = self._some_sequence(swapped=self.choose.random() < 0.3)
        if sequence is None:
            return False
        group = sequence.group
        sequence.finish = Finish.STOP
        if sequence.host_blocks:
            drop_host(self.worker, sequence)
        else:
            self.worker.remove(sequence)
        del self.prefixes[sequence]
        if not group.live():
            self.groups.remove(group)
            self.worker.running.pop(group.key, None)
        return True

    def swap_out(self) -> bool:
        """A group is preempted; the next plan's swaps come before anything is written."""
        group = self._some_group(swapped=False)
        if group is None:
            return False
        swap_out(self.worker, group, self.stats)
        self.worker.remove_group(group)
        for host, block in self.worker.swap_outs.items():
            self.host[host] = list(self.device[block])
        self.worker.swap_outs.clear()
        self.worker.released.clear()
        group.state = State.WAITING
        if not group.swapped:  # no room: it would be computed again
            for sequence in group.live():
                del self.prefixes[sequence]
            self.groups.remove(group)
            self.did["without room"] += 1
        return True

    def swap_in(self) -> bool:
        """A group comes back, if its blocks and its next tokens' fit."""
        group = self._some_group(swapped=True)
        if group is None:
            return False
        live = group.live()
        need, idle = blocks_to_resume(self.worker, live)
        free = self.worker.allocator.num_free
        if len(live) > self.worker.rows.num_free or need > free - idle:
            return False
        plan = Plan("w", 1, 0, 1, [], [], [], [], [], [], [], [], [], [], [])
        swap_in(self.worker, live, plan, self.stats)
        assert free - self.worker.allocator.num_free <= need + idle
        for host, block in zip(plan.swap_in_host_blocks, plan.swap_in_device_blocks, strict=True):
            self.device[block] = list(self.host[host])
        for host in plan.swap_in_host_blocks:
            if not self.worker.host.ref_count(host):
                self.host[host] = [0] * SIZE
        group.state = State.RUNNING
        self.worker.running[group.key] = group
        for sequence in live:
            self._place(sequence, sequence.blocks)
            sequence.index_at = SIZE
            self.worker.index_blocks(sequence, len(sequence.tokens) - 1)
        return True

    # --------------------------------------------------------------------------------- their parts

    def _some_group(self, swapped: bool) -> Group | None:
        fitting = [g for g in self.groups if g.swapped is swapped]
        return self.choose.choice(fitting) if fitting else None

    def _some_sequence(self, swapped: bool) -> Sequence | None:
        group = self._some_group(swapped)
        return self.choose.choice(group.live()) if group else None

    def _place(self, sequence: Sequence, blocks: list[int]) -> None:
        """A row on these blocks, which it holds already."""
        if sequence.slot == NO_SLOT:
            self.worker.rows.take(sequence)
        num_computed = len(self.prefixes.setdefault(sequence, self._digests(sequence)))
        index_at = sequence.index_at
        self.worker.place(sequence, blocks, num_computed)
        sequence.index_at = min(sequence.index_at, max(SIZE, index_at))
        self.worker.prefilling.pop(sequence.slot, None)

    def _digests(self, sequence: Sequence) -> list[int]:
        tokens = tuple(sequence.tokens)
        return [hash(tokens[: i + 1]) for i in range(len(tokens))]

    def _draw(self, sequence: Sequence) -> None:
        sequence.tokens.append(self.choose.randrange(VOCAB))

    def _write(self, sequence: Sequence, position: int) -> None:
        digests, block = self.prefixes[sequence], sequence.blocks[position // SIZE]
        assert self.worker.allocator.ref_count(block) == 1, "a block that others hold is written"
        if position == len(digests):
            digests.append(hash(tuple(sequence.tokens[: position + 1])))
            self.worker.rows.scheduled[sequence.slot] = position + 1
        self.device[block][position % SIZE] = digests[position]

    # ---------------------------------------------------------------------------------- the checks

    def check(self) -> None:
        """Every sequence finds its tokens where its table says, and nothing is lost."""
        worker = self.worker
        for group in self.groups:
            for sequence in group.live():
                digests = self.prefixes[sequence]
                cells, table = self.device, sequence.blocks
                if sequence.host_blocks:
                    cells, table = self.host, sequence.host_blocks
                    assert not sequence.blocks
                found = [cell for block in table for cell in cells[block]]
                assert found[: len(digests)] == digests, "a block has lost its content"
                assert len(digests) == len(sequence.tokens) - 1
        worker.check_integrity()
        worker.check_host(s.host_blocks for g in self.groups for s in g.samples)


WEIGHTS = {"start": 8, "grow": 50, "fork": 12, "drop": 8, "swap_out": 8, "swap_in": 14}


def test_nothing_is_lost_whatever_groups_do() -> None:
    groups = Groups(seed=5)
    names, weights = list(WEIGHTS), list(WEIGHTS.values())
    done = 0
    while done < NUM_OPERATIONS:
        for name in groups.choose.choices(names, weights, k=1000):
            if getattr(groups, name)():
                done += 1
                groups.did[name] += 1
                groups.check()
    for name in (*names, "copied", "without room"):
        assert groups.did[name] > NUM_OPERATIONS // 200, groups.did
    assert groups.stats.swapped_blocks["in"] < groups.stats.swapped_blocks["out"]
    assert groups.worker.allocator.num_cached, "the prefix index had its part"
    while groups.groups:
        groups.drop()
    assert groups.worker.allocator.num_free == DEVICE_BLOCKS
    assert groups.worker.host.num_free == HOST_BLOCKS
    figures.record("allocator", operations=done, **groups.did)
