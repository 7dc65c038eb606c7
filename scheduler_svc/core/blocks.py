"""The block allocator: free list, reference counts, and an LRU of cached blocks that nobody holds.

A block is in exactly one state: *held* (reference count above 0), *cached* (count 0, its content may
be hit by a prefix) or *free*. All operations are O(1) a block, and check before they change anything.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence


class OutOfBlocks(Exception):
    """More blocks were asked for than are free or cached."""


class BlockAllocator:
    """Hands out block ids 0 to `num_blocks - 1`.

    Cached blocks are evicted least recently used first, and only when the free list is empty;
    `on_evict(block)` tells the owner of the cache.
    """

    def __init__(self, num_blocks: int, on_evict: Callable[[int], None]) -> None:
        if num_blocks < 0:
            raise ValueError(f"num_blocks is {num_blocks}, must not be negative")
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._refs = [0] * num_blocks
        self._keep = [False] * num_blocks  # becomes cached, not free, when its count falls to 0
        self._on_evict = on_evict

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` could hand out: free ones and cached ones."""
        return len(self._free) + len(self._cached)

    @property
    def num_cached(self) -> int:
        """Blocks that nobody holds but whose content may be hit."""
        return len(self._cached)

    @property
    def num_shared(self) -> int:
        """Blocks that several block tables hold; O(blocks), for those who look at the state."""
        return sum(1 for count in self._refs if count > 1)

    def ref_count(self, block: int) -> int:
        """How many block tables hold `block`."""
        return self._refs[block]

    def allocate(self, count: int) -> list[int]:
        """`count` blocks with reference count 1.

        Raises:
            OutOfBlocks: fewer are available; nothing has changed.
        """
        if count > self.num_free:
            raise OutOfBlocks(f"{count} blocks asked for, {self.num_free} of {self.num_blocks} available")
        blocks = []
        for _ in range(count):
            if self._free:
                block = self._free.pop()
            else:
                block, _ = self._cached.popitem(last=False)
                self._keep[block] = False
                self._on_evict(block)
            self._refs[block] = 1
            blocks.append(block)
        return blocks

    def share(self, blocks: Sequence[int]) -> None:
        """Add one reference to each block, reviving cached ones.

        Raises:
            ValueError: a block is free; nothing has changed.
        """
        for block in blocks:
            if not self._refs[block] and block not in self._cached:
                raise ValueError(f"block {block} is free and cannot be shared")
        for block in blocks:
            if not self._refs[block]:
                del self._cached[block]
            self._refs[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Drop one reference from each block; the last reference makes it cached or free.

        Raises:
            ValueError: a block would be released more often than it is held; nothing has changed.
        """
        if len(set(blocks)) != len(blocks):
            raise ValueError("a block table holds a block twice")
        for block in blocks:
            if not self._refs[block]:
                raise ValueError(f"block {block} is not held and cannot be released")
        # From the end, so that a chain's tail is evicted before the head that it needs.
        for block in reversed(blocks):
            self._refs[block] -= 1
            if not self._refs[block]:
                if self._keep[block]:
                    self._cached[block] = None
                else:
                    self._free.append(block)

    def keep(self, block: int) -> None:
        """Let `block`, which is held, become cached when its last holder lets go."""
        if not self._refs[block]:
            raise ValueError(f"block {block} is not held and cannot be kept")
        self._keep[block] = True

    def drop(self, block: int) -> None:
        """Undo `keep`: the content of `block` is worthless."""
        self._keep[block] = False
        if block in self._cached:
            del self._cached[block]
            self._free.append(block)

    def check_integrity(self, expected_refs: Sequence[int]) -> None:
        """Raises AssertionError unless every count equals `expected_refs` and no block is lost."""
        assert list(expected_refs) == self._refs, "reference counts differ from the block tables"
        held = sum(1 for count in self._refs if count)
        assert held + len(self._free) + len(self._cached) == self.num_blocks, "blocks were lost"
        states = set(self._free) | set(self._cached)
        assert len(states) == self.num_blocks - held, "a block is free and cached, or free twice"
        assert all(not self._refs[b] for b in states), "a held block is free"
        assert all(self._keep[b] for b in self._cached), "a cached block is not kept"
        assert not any(self._keep[b] for b in self._free), "a free block is kept"
