"""The scheduler's picture of a worker's rows: columns by slot, so that a decode costs no Python loop."""

from __future__ import annotations

import heapq

import numpy as np
import numpy.typing as npt

from scheduler_svc.core.request import NEVER, NO_SLOT, Sequence

Column = npt.NDArray[np.int64]
_NO_SLOTS: Column = np.zeros(0, np.int64)


class Rows:
    """Columns over the slots of one worker. All counts are tokens.

    scheduled  have gone into a forward, dispatched or done: KV exists for them in stream order
    known      at the row's start; below that a row is in prefill, from there on it decodes
    last       the most that can be scheduled: the token at last_position is never computed
    capacity   that its blocks can hold
    last_step  the last step that has the row in its batch
    is_beam    whether it is a search's: `known` is then 0 while it may decode, else beyond any count
    """

    def __init__(self, max_slots: int) -> None:
        self.max_slots = max_slots
        columns: list[Column] = [np.zeros(max_slots, np.int64) for _ in range(4)]
        self.scheduled, self.known, self.last, self.capacity = columns
        self.last_step: Column = np.full(max_slots, -1, np.int64)
        self.is_beam = np.zeros(max_slots, np.bool_)
        self.sequences: list[Sequence | None] = [None] * max_slots
        self._free = list(range(max_slots))

    @property
    def num_free(self) -> int:
        """Slots without a row."""
        return len(self._free)

    def take(self, sequence: Sequence) -> None:
        """Give `sequence` the lowest free slot; its row takes no part in batches until `start`."""
        sequence.slot = slot = heapq.heappop(self._free)
        self.sequences[slot] = sequence
        self.scheduled[slot] = self.known[slot] = self.last[slot] = self.capacity[slot] = 0
        self.last_step[slot] = -1
        self.is_beam[slot] = sequence.group.search is not None

    def start(self, sequence: Sequence, num_computed: int, capacity: int) -> None:
        """Let the row of `sequence` take part, with KV for its first `num_computed` tokens."""
        slot = sequence.slot
        self.scheduled[slot] = num_computed
        self.known[slot] = NEVER if self.is_beam[slot] else len(sequence.tokens)
        self.last[slot] = sequence.last_position - 1
        self.capacity[slot] = capacity

    def free(self, sequence: Sequence) -> None:
        """Empty the row of `sequence`."""
        slot = sequence.slot
        self.sequences[slot] = None
        self.scheduled[slot] = self.known[slot] = self.last[slot] = 0
        sequence.slot = NO_SLOT
        heapq.heappush(self._free, slot)

    def decoding(self) -> Column:
        """Slots of the rows that can decode now, in order."""
        if len(self._free) == self.max_slots:  # what waits for a first token waits for no search, either
            return _NO_SLOTS
        return np.flatnonzero((self.scheduled >= self.known) & (self.scheduled < self.last))
