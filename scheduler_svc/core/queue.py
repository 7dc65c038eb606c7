"""The waiting queue of one worker: a heap by (priority, arrival), entries dropped lazily."""

from __future__ import annotations

import heapq
from collections.abc import Callable

from scheduler_svc.core.group import Group, State


class WaitingQueue:
    """Groups that wait. A group that stops waiting stays in the heap until it reaches the top."""

    def __init__(self, owner: str) -> None:
        self._owner = owner
        self._heap: list[tuple[tuple[int, int], Group]] = []
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def push(self, group: Group) -> None:
        """Let `group` wait here; it is ranked by priority, then arrival."""
        group.state = State.WAITING
        group.worker = self._owner
        self._size += 1
        heapq.heappush(self._heap, (group.rank, group))

    def peek(self) -> Group | None:
        """The group that is next, or None."""
        while self._heap and not self._waits(self._heap[0][1]):
            heapq.heappop(self._heap)
        return self._heap[0][1] if self._heap else None

    def pop(self) -> Group:
        """Take the group that `peek` shows."""
        self._size -= 1
        return heapq.heappop(self._heap)[1]

    def leave(self, group: Group) -> None:
        """`group`, which waits here, has ended; its state says so."""
        self._size -= 1
        if len(self._heap) > 64 and self._size < len(self._heap) // 2:
            self._heap = [entry for entry in self._heap if self._waits(entry[1]) and entry[1] is not group]
            heapq.heapify(self._heap)

    def take_all(self, where: Callable[[Group], bool] = lambda _: True) -> list[Group]:
        """Take every waiting group for which `where` holds, in order."""
        waiting = sorted(entry for entry in self._heap if self._waits(entry[1]))
        taken = [group for _, group in waiting if where(group)]
        self._heap = [entry for entry in waiting if not where(entry[1])]  # sorted, so a heap already
        self._size = len(self._heap)
        for group in taken:
            group.state = State.NEW
        return taken

    def _waits(self, group: Group) -> bool:
        return group.state is State.WAITING and group.worker == self._owner
