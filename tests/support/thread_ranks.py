"""Ranks of one model in one process, a thread each: what they exchange is real, where they run is not."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

import torch

from kernels.ranks import Place

Result = TypeVar("Result")
PATIENCE_S = 60.0


class Meeting:
    """Where the ranks of a group meet. One of them computes at a time: the C kernels' threads are shared."""

    def __init__(self, size: int) -> None:
        self.size, self.turn = size, threading.Lock()
        self._barrier, self._brought = threading.Barrier(size), [("", torch.empty(0))] * size

    def exchanged(self, rank: int, what: str, mine: torch.Tensor) -> list[torch.Tensor]:
        """What all ranks bring, in their order. Fails where they do not meet for the same thing."""
        self._brought[rank] = what, mine
        self.turn.release()
        try:
            self._barrier.wait(PATIENCE_S)
            brought = list(self._brought)
            self._barrier.wait(PATIENCE_S)
        finally:
            self.turn.acquire()
        kinds = {(name, tensor.shape, tensor.dtype) for name, tensor in brought}
        assert len(kinds) == 1, f"the ranks do different things: {kinds}"
        return [tensor for _, tensor in brought]

    def leave(self) -> None:
        """Let nobody wait for a rank that has failed."""
        self._barrier.abort()


class ThreadRanks:
    """`kernels.ranks.Ranks` for one of a meeting's threads."""

    def __init__(self, meeting: Meeting, rank: int) -> None:
        self.rank, self.size = rank, meeting.size
        self._meeting, self._last = meeting, -1

    def part(self, place: Place, rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.full((rows, width), torch.nan, dtype=dtype)

    def summed(self, place: Place, part: torch.Tensor) -> torch.Tensor:
        assert place != self._last, "a buffer is used again while peers may still read it"
        self._last = place
        parts = self._meeting.exchanged(self.rank, place.name, part)
        total = parts[0].clone()
        for other in parts[1:]:
            total += other
        return total

    def gathered(self, columns: torch.Tensor) -> torch.Tensor:
        return torch.cat(self._meeting.exchanged(self.rank, "gathered", columns), dim=1)


def on_ranks(size: int, work: Callable[[ThreadRanks], Result]) -> list[Result]:
    """What `work` returns on each of `size` ranks; raises what the first rank that failed raised."""
    meeting, results, errors = Meeting(size), {}, []

    def run(rank: int) -> None:
        with meeting.turn, torch.inference_mode():
            try:
                results[rank] = work(ThreadRanks(meeting, rank))
            except BaseException as error:  # raised again below
                errors.append(error)
                meeting.leave()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return [results[rank] for rank in range(size)]
