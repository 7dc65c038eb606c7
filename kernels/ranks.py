"""What the ranks of a tensor-parallel group do together in a forward: each holds a part of every layer."""

from __future__ import annotations

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
    """

    rank: int
    size: int

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
