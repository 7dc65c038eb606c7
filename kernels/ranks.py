"""What the ranks of a tensor-parallel group do together in a forward: each holds a part of every layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from typing import Protocol

import torch


class Place(IntEnum):
    """A buffer each. One is used again only after another one's exchange, which proves that the peers have
    read it."""

    EMBEDDED = 0
    ATTENDED = 1
    FED = 2
    DRAWN = 3


class Ranks(Protocol):
    """What the ranks of a group do together in a forward.

    All ranks call the same things in the same order with the same shapes.

    Attributes:
        rank: of this process, from 0.
        size: how many there are.
        quiet: while set nothing is exchanged: each rank rehearses at a time of its own.
    """

    rank: int
    size: int
    quiet: bool

    def part(self, place: Place, rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
        """Room [rows, width], contiguous, for this rank's part of a sum."""
        ...

    def summed(self, place: Place, part: torch.Tensor) -> torch.Tensor:
        """The sum over ranks of what `part` gave and the caller filled, of its shape and type, equal bit for
        bit on all ranks (added in the order of ranks). May be `part` itself."""
        ...

    def gathered(self, columns: torch.Tensor) -> torch.Tensor:
        """[R, n] of each rank -> [R, size * n]: rank r's at columns r * n and on."""
        ...


@contextmanager
def alone(ranks: Ranks | None) -> Iterator[None]:
    """What runs meanwhile is for the sake of running: nobody is waited for, and results mean nothing."""
    if ranks is not None:
        ranks.quiet = True
    try:
        yield
    finally:
        if ranks is not None:
            ranks.quiet = False
