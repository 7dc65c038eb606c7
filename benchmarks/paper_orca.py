"""The systems before paging, as the paper models them: Orca with memory reserved for a whole request.

Requests run in the order of arrival and join and leave at every step. Each reserves, when it starts, for

    Max     the longest request there is (2,048)
    Pow2    its prompt, and its output rounded up to a power of two
    Oracle  exactly what it will need, which no system can know

in one piece that a buddy allocator finds: sizes are rounded up to powers of two, a piece is halved until it
fits and joined with its other half when both are free.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from benchmarks.paper_lengths import Trace

LONGEST = 2048

Reserve = Callable[[int, int], int]
SYSTEMS: dict[str, Reserve] = {
    "Orca (Max)": lambda prompt, output: LONGEST,
    "Orca (Pow2)": lambda prompt, output: min(LONGEST, prompt + rounded(output)),
    "Orca (Oracle)": lambda prompt, output: prompt + output,
}


def rounded(size: int) -> int:
    """The least power of two that is not below `size`, which is above 0."""
    return 1 << (size - 1).bit_length()


class Buddy:
    """A buddy allocator over slots 0 to `size` - 1: a row of pools whose sizes are powers of two."""

    def __init__(self, size: int) -> None:
        if size <= 0:
            raise ValueError(f"size is {size}, must be above 0")
        self.size = size
        self._free: list[set[int]] = [set() for _ in range(size.bit_length())]
        self._taken: dict[int, int] = {}
        # From the largest pool down: each starts at a multiple of its size, so that a buddy is one bit away.
        start = 0
        for order in reversed(range(size.bit_length())):
            if size >> order & 1:
                self._free[order].add(start)
                start += 1 << order

    @property
    def num_taken(self) -> int:
        """Slots in pieces that are handed out."""
        return sum(1 << order for order in self._taken.values())

    def take(self, size: int) -> int | None:
        """The start of a piece for `size` slots; None when no piece is large enough."""
        order = rounded(size).bit_length() - 1
        found = next((o for o in range(order, len(self._free)) if self._free[o]), None)
        if found is None:
            return None
        start = min(self._free[found])
        self._free[found].remove(start)
        for halved in reversed(range(order, found)):
            self._free[halved].add(start + (1 << halved))
        self._taken[start] = order
        return start

    def give(self, start: int) -> None:
        """Take back the piece that begins at `start`. Raises KeyError when there is none."""
        order = self._taken.pop(start)
        while start ^ (1 << order) in self._free[order]:
            self._free[order].remove(start ^ (1 << order))
            start &= ~(1 << order)
            order += 1
        self._free[order].add(start)


def run(trace: Trace, reserve: Reserve, num_slots: int) -> tuple[list[int], list[int]]:
    """Requests that run at each step, and tokens whose KV they hold, until the queue is empty."""
    pool = Buddy(num_slots)
    queue = deque(zip(trace.prompts.tolist(), trace.outputs.tolist(), strict=True))
    ends: dict[int, list[tuple[int, int, int]]] = {}  # by step: start of the piece, prompt, output
    running = tokens = step = 0
    all_running, all_tokens = [], []
    while queue:
        for start, prompt, output in ends.pop(step, ()):
            pool.give(start)
            running -= 1
            tokens -= prompt + output
        while queue:
            prompt, output = queue[0]
            place = pool.take(reserve(prompt, output))
            if place is None:
                assert running, "a request is larger than the cache"
                break
            queue.popleft()
            ends.setdefault(step + output, []).append((place, prompt, output))
            running += 1
            tokens += prompt
        all_running.append(running)
        all_tokens.append(tokens)
        step += 1
        tokens += running
    return all_running, all_tokens
