"""What the ranks of a tensor-parallel group do together in a forward, whatever carries their numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from typing import Protocol

import torch


class Place(IntEnum):
    """Where the parts of a sum lie; each place is a buffer of its own on every rank.

    A rank may write a place again only after an exchange at another one, which proves that the others have
    read it.
    """

    EMBEDDED = 0
    ATTENDED = 1
    FED = 2
    DRAWN = 3


class Ranks(Protocol):
    """A group of ranks as one of them sees it. All call the same things in the same order with the same
    shapes.

    Attributes:
        rank: of this process, from 0.
        size: how many ranks there are.
        quiet: while set nothing is exchanged: each rank rehearses at a time of its own.
    """

    rank: int
    size: int
    quiet: bool

    def part(self, place: Place, rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
        """Room [rows, width], contiguous, for this rank's part of a sum."""

    def summed(self, place: Place, part: torch.Tensor) -> torch.Tensor:
        """The sum over ranks of what `part` gave and the caller filled; shape and type are the same.

        It is added up in the order of ranks and equal bit for bit on all of them. It may be `part` itself.
        """

    def gathered(self, columns: torch.Tensor) -> torch.Tensor:
        """[R, n] of each rank side by side: [R, size * n], rank r's at columns r * n and on."""


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
