"""A sequence: one sample of a request. Its tokens are the truth; its blocks are a cache of them."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

from scheduler_svc.core.events import Finish

if TYPE_CHECKING:
    from scheduler_svc.core.group import Group

NO_SLOT = -1
NEVER = 1 << 62  # an `index_at` that no length reaches


class Sequence:
    """One sample: prompt and output tokens, and where it runs.

    Tokens are an array, not a list: 4 bytes each and no objects, which is what 4,096 rows ask of a cache.
    `blocks` is its block table while it runs, `host_blocks` while it is swapped out. `index_at` is the
    length beyond which its next full block is both computed and confirmed, so that it can be indexed.
    `hashes` is its chain so far.
    """

    __slots__ = (
        "blocks", "finish", "group", "handle", "hashes", "host_blocks", "index", "index_at", "last_position",
        "num_prompt", "session", "slot", "tokens",
    )  # fmt: skip

    def __init__(self, group: Group, index: int, tokens: array[int], num_prompt: int, limit: int) -> None:
        self.group = group
        self.index = index
        self.handle = group.handle
        self.session = group.session
        self.tokens = tokens
        self.num_prompt = num_prompt
        self.last_position = limit
        self.finish: Finish | None = None
        self.slot = NO_SLOT
        self.blocks: list[int] = []
        self.host_blocks: list[int] = []
        self.index_at = NEVER
        self.hashes: list[bytes] = []

    @property
    def num_output(self) -> int:
        """Output tokens confirmed so far."""
        return len(self.tokens) - self.num_prompt
