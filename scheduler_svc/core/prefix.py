"""The prefix index: chains of hashes over full blocks of tokens.

A block's hash is blake2b-128 over its parent's hash and its tokens; the first parent is the hash of
the request's cache salt. So equal hashes mean equal prefixes, and a lookup walks the chain until the
first block that is not there.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b

from scheduler_svc.core.blocks import BlockAllocator


def root_hash(salt: str) -> bytes:
    """The parent of a chain's first block."""
    return blake2b(salt.encode(), digest_size=16).digest()


def extend_chain(hashes: list[bytes], tokens: array[int], block_size: int, root: bytes) -> None:
    """Append to `hashes` what is missing for the full blocks of `tokens`, in place."""
    for start in range(len(hashes) * block_size, len(tokens) - block_size + 1, block_size):
        parent = hashes[-1] if hashes else root
        content = tokens[start : start + block_size].tobytes()
        hashes.append(blake2b(parent + content, digest_size=16).digest())


class PrefixIndex:
    """Which block of one worker holds which full block of tokens."""

    def __init__(self, num_blocks: int) -> None:
        self._block_of: dict[bytes, int] = {}
        self._hash_of: list[bytes | None] = [None] * num_blocks

    def blocks(self) -> list[int]:
        """Ids of all blocks that can be hit."""
        return list(self._block_of.values())

    def match(self, hashes: Sequence[bytes], limit: int) -> list[int]:
        """The blocks of the longest indexed prefix of the chain, at most `limit`."""
        found = []
        for digest in hashes[:limit]:
            if (block := self._block_of.get(digest)) is None:
                break
            found.append(block)
        return found

    def insert(self, digest: bytes, block: int, allocator: BlockAllocator) -> None:
        """Index `block`, which is held, unless another block has this content or it has another."""
        if digest not in self._block_of and self._hash_of[block] is None:
            self._block_of[digest] = block
            self._hash_of[block] = digest
            allocator.keep(block)

    def forget(self, block: int) -> None:
        """`block` can be hit no longer; no error when it could not."""
        if (digest := self._hash_of[block]) is not None:
            del self._block_of[digest]
            self._hash_of[block] = None
