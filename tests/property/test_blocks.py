"""The block allocator against a plain model: counts, states, evictions, and errors that change nothing."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from scheduler_svc.core.blocks import BlockAllocator, OutOfBlocks
from tests.support.scale import scaled

operations = Counter[str]()


class AllocatorMachine(RuleBasedStateMachine):
    """Block tables come and go; the model is a Counter of holders and a list in order of release."""

    @initialize(num_blocks=st.integers(1, 24))
    def start(self, num_blocks: int) -> None:
        self.evicted: list[int] = []
        self.allocator = BlockAllocator(num_blocks, self.evicted.append)
        self.tables: list[list[int]] = []
        self.kept: set[int] = set()
        self.cached: list[int] = []  # least recently used first

    def held(self) -> Counter[int]:
        return Counter(block for table in self.tables for block in table)

    @rule(count=st.integers(0, 10))
    def allocate(self, count: int) -> None:
        available = self.allocator.num_blocks - len(self.held())
        free = available - len(self.cached)
        self.evicted.clear()
        if count > available:
            with pytest.raises(OutOfBlocks):
                self.allocator.allocate(count)
            return
        table = self.allocator.allocate(count)
        expected = self.cached[: max(0, count - free)]
        assert self.evicted == expected, "eviction is not least recently used first"
        self.cached = self.cached[len(expected) :]
        self.kept -= set(expected)
        assert len(set(table)) == count and not set(table) & set(self.held())
        if table:
            self.tables.append(table)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        table = data.draw(st.sampled_from(self.tables))
        shared = table[: data.draw(st.integers(1, len(table)))]
        self.allocator.share(shared)
        self.tables.append(list(shared))

    @precondition(lambda self: self.cached)
    @rule(data=st.data())
    def revive(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(self.cached))
        self.allocator.share([block])
        self.cached.remove(block)
        self.tables.append([block])

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        table = self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1)))
        self.allocator.release(table)
        held = self.held()
        self.cached += [b for b in reversed(table) if not held[b] and b in self.kept]

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def keep(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(data.draw(st.sampled_from(self.tables))))
        self.allocator.keep(block)
        self.kept.add(block)

    @precondition(lambda self: self.kept)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(sorted(self.kept)))
        self.allocator.drop(block)
        self.kept.remove(block)
        if block in self.cached:
            self.cached.remove(block)

    @rule(data=st.data())
    def refuse_free_blocks(self, data: st.DataObject) -> None:
        held = self.held()
        unheld = [b for b in range(self.allocator.num_blocks) if not held[b]]
        if unheld:
            block = data.draw(st.sampled_from(unheld))
            with pytest.raises(ValueError):
                self.allocator.release([*held, block])
            with pytest.raises(ValueError):
                self.allocator.keep(block)
            if block not in self.cached:
                with pytest.raises(ValueError):
                    self.allocator.share([*held, block])

    @invariant()
    def equals_the_model(self) -> None:
        operations["checked"] += 1
        if not hasattr(self, "allocator"):
            return
        held = self.held()
        refs = [held[b] for b in range(self.allocator.num_blocks)]
        self.allocator.check_integrity(refs)
        assert self.allocator.num_cached == len(self.cached)
        assert self.allocator.num_free == self.allocator.num_blocks - len(held)

    def teardown(self) -> None:
        if hasattr(self, "allocator"):
            for table in self.tables:
                self.allocator.release(table)
            assert self.allocator.num_free == self.allocator.num_blocks, "blocks leaked"


TestAllocator = AllocatorMachine.TestCase
TestAllocator.settings = settings(
    max_examples=scaled(100, 3000), stateful_step_count=100, deadline=None, derandomize=True
)


def test_enough_operations_were_checked() -> None:
    """Hypothesis may end an example early, so what ran is counted."""
    assert operations["checked"] >= scaled(5_000, 200_000)
