"""A step's batch as one block of int32 numbers, laid out by its shape alone.

A captured graph reads its inputs from fixed places. So a batch of a given `Shape` always looks the same: the
host packs it into one block, and `unpack` gives views of a block on the device, be it the staged one or the
one that a graph was captured with. Sizes are padded to what `Padding` says; what pads does no harm: rows in
the slot that is always done, tokens of no row, tiles of no row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kernels.attention import QUERY_TILE, Tiles

# Everything in a block starts at a multiple of 16 bytes: kernels are compiled once for such addresses, and
# again for others. It begins with the iteration, -1 before the first.
ALIGNMENT = 4
HEADER = ALIGNMENT


def _aligned(count: int) -> int:
    return -(-count // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class Shape:
    """Sizes of a batch as the device sees it.

    Attributes:
        rows: B.
        tokens: T that go through the forward; a batch that is not ragged has one of each row.
        samples: R rows that sample; all of them where the batch is not ragged.
        is_ragged: whether rows have chunks of different lengths.
        paged: tiles of chunks that read pages.
        fresh: tiles of chunks that start at position 0.
        has_decodes: whether rows of a ragged batch may have a single token.
    """

    rows: int
    tokens: int
    samples: int
    is_ragged: bool = False
    paged: int = 0
    fresh: int = 0
    has_decodes: bool = True

    @property
    def size(self) -> int:
        """Numbers in a block."""
        return HEADER + sum(_aligned(width * count) for _, width, count in self._parts())

    def _parts(self) -> list[tuple[str, int, int]]:
        """Name, 32-bit words of a number, and count, in the block's order."""
        if not self.is_ragged:
            return [("slots", 2, self.rows)]
        return [
            ("slots", 2, self.rows),
            ("sample_slots", 2, self.samples),
            ("sample_index", 2, self.samples),
            ("lengths", 1, self.rows),
            ("query_start", 1, self.rows + 1),
            ("row_of_token", 1, self.tokens),
            ("offsets", 1, self.tokens),
            ("paged", 1, 2 * self.paged),
            ("fresh", 1, 2 * self.fresh),
        ]

    def places(self) -> dict[str, tuple[int, int, int]]:
        """For each part: first and last place in the block, and the words of a number."""
        places, start = {}, HEADER
        for name, width, count in self._parts():
            places[name] = (start, start + width * count, width)
            start += _aligned(width * count)
        return places


@dataclass(frozen=True)
class Chunks:
    """The shape of a ragged batch.

    Attributes:
        lengths: int32[B].
        query_start: int32[B + 1].
        row_of_token: int32[T], indexes into the batch's rows; -1 pads.
        offsets: int32[T], the place of each token in its chunk.
        sample_index: int64[R], the token whose logits each sampling row draws from.
        tiles: how attention divides the chunks; None on a CPU.
    """

    lengths: torch.Tensor
    query_start: torch.Tensor
    row_of_token: torch.Tensor
    offsets: torch.Tensor
    sample_index: torch.Tensor
    tiles: Tiles | None


@dataclass(frozen=True)
class Inputs:
    """Views of a block.

    Attributes:
        iteration: int32[1], which the device counts up.
        slots: int64[B].
        sample_slots: int64[R].
        query_start: int32[B + 1].
        chunks: None when each row has one token, which it samples from.
    """

    iteration: torch.Tensor
    slots: torch.Tensor
    sample_slots: torch.Tensor
    query_start: torch.Tensor
    chunks: Chunks | None


def pack(shape: Shape, padding_slot: int, **parts: np.ndarray | Sequence[int]) -> np.ndarray:
    """int32[shape.size]: the block of a batch.

    Args:
        shape: at least as large as the parts.
        padding_slot: the slot that pads.
        parts: `slots`, and for a ragged shape `sample_slots`, `sample_index`, `lengths` and the tiles.
    """
    block = np.zeros(shape.size, dtype=np.int32)
    block[0] = -1
    places = shape.places()

    def part(name: str) -> np.ndarray:
        start, end, width = places[name]
        return block[start:end].view(np.int64) if width == 2 else block[start:end]

    def fill(name: str, padding: int) -> None:
        values = np.asarray(parts[name]).reshape(-1)
        part(name)[: len(values)] = values
        part(name)[len(values) :] = padding

    fill("slots", padding_slot)
    if not shape.is_ragged:
        return block
    fill("sample_slots", padding_slot)
    for name in ("sample_index", "lengths"):
        fill(name, 0)
    for name in ("paged", "fresh"):
        if name in parts:
            fill(name, -1)
    lengths = np.asarray(parts["lengths"], dtype=np.int32)
    ends = np.cumsum(lengths, dtype=np.int32)
    total = int(ends[-1]) if len(ends) else 0
    start = part("query_start")
    start[1 : len(ends) + 1] = ends
    start[len(ends) + 1 :] = total  # padding rows have no tokens
    row_of_token = part("row_of_token")
    row_of_token[:total] = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    row_of_token[total:] = -1
    part("offsets")[:total] = np.arange(total, dtype=np.int32) - np.repeat(ends - lengths, lengths)
    return block


def padding_alone(shape: Shape, padding_slot: int) -> np.ndarray:
    """The block of a batch without rows: its iteration changes nothing."""
    names = ("slots", "sample_slots", "sample_index", "lengths", "paged", "fresh")
    return pack(shape, padding_slot, **dict.fromkeys(names, ()))


def unpack(block: torch.Tensor, shape: Shape, iota: torch.Tensor) -> Inputs:
    """Views of a block.

    Args:
        block: int32[shape.size] on the device, at a 16-byte boundary.
        shape: of the batch.
        iota: int32, 0 and up: where the queries of rows of one token start.
    """
    views = {
        name: block[start:end].view(torch.int64) if width == 2 else block[start:end]
        for name, (start, end, width) in shape.places().items()
    }
    iteration, slots = block[:1], views["slots"]
    if not shape.is_ragged:
        return Inputs(iteration, slots, slots, iota[: shape.rows + 1], None)
    tiles = None
    if block.is_cuda:
        paged, fresh = views["paged"].view(-1, 2), views["fresh"].view(-1, 2)
        tiles = Tiles(paged=paged, fresh=fresh, has_decodes=shape.has_decodes)
    names = ("lengths", "query_start", "row_of_token", "offsets", "sample_index")
    chunks = Chunks(**{name: views[name] for name in names}, tiles=tiles)
    return Inputs(iteration, slots, views["sample_slots"], chunks.query_start, chunks)


@dataclass(frozen=True)
class Padding:
    """To what sizes batches are padded, so that few graphs serve all of them.

    Attributes:
        rows: sizes for batches of single tokens, ascending; a larger batch is not padded.
        chunk_rows: sizes of B and R for ragged batches.
        chunk_tokens: sizes of T for ragged batches; both kinds of tiles get `spare_tiles` beyond T's share.
        lean_rows: size of B and R for whole prompts and nothing else: their first tokens are what people
            wait for, so they have shapes of their own.
    """

    rows: tuple[int, ...] = ()
    chunk_rows: tuple[int, ...] = ()
    chunk_tokens: tuple[int, ...] = ()
    lean_rows: int = 0
    spare_tiles: int = 16

    @classmethod
    def for_graphs(cls, max_slots: int, max_tokens: int) -> Padding:
        """Sizes whose graphs waste little, for batches of up to `max_tokens`: fine steps where a product's
        time still depends on them. Above 384 rows odd multiples of 64 gain nothing: cuBLAS picks poor tiles,
        and 448 rows of a 7B shape take a third longer than 512."""
        steps = ((8, 64, 8), (64, 128, 16), (128, 256, 32), (256, 384, 64), (384, 4096, 128))
        rows = [1, 2, 4, *_sizes(*steps)]
        # A token that pads costs what any other does.
        tokens = _sizes((64, 512, 64), (512, 2048, 128), (2048, max_tokens, 512))
        return cls(
            rows=(*(size for size in rows if size < max_slots), max_slots),
            chunk_rows=tuple(sorted({min(size, max_slots) for size in (64, 256, 512, max_slots)})),
            chunk_tokens=(*(size for size in tokens if size < max_tokens), max_tokens),
            lean_rows=min(16, max_slots),
        )

    def decodes(self, num_rows: int) -> Shape:
        """The shape of a batch of single tokens."""
        size = (_least(self.rows, num_rows) if num_rows else 0) or num_rows
        return Shape(size, size, size)

    def chunks(
        self, rows: int, tokens: int, samples: int, paged: int, fresh: int, has_decodes: bool = True
    ) -> Shape:
        """The shape of a ragged batch: padded where every part fits, else exact."""
        total = _least(self.chunk_tokens, tokens)
        if total is not None and max(paged, fresh) <= self._most_tiles(total):
            most = max(rows, samples)  # forks make more samples than there are rows
            if most <= self.lean_rows and not paged and not has_decodes:
                return self._lean(total)
            if (size := _least(self.chunk_rows, most)) is not None:
                return self._mixed(size, total)
        return Shape(rows, tokens, samples, True, paged, fresh, has_decodes)

    def shapes(self) -> list[Shape]:
        """Every padded shape: single tokens, then ragged ones, each from small to large."""
        mixed = [self._mixed(size, t) for t in self.chunk_tokens for size in self.chunk_rows if size <= t]
        lean = [self._lean(t) for t in self.chunk_tokens]
        ragged = sorted(lean + mixed, key=lambda shape: shape.tokens)
        return [self.decodes(size) for size in self.rows] + ragged

    def largest(self, rows: int, tokens: int) -> int:
        """No fewer numbers than any block of so many rows and tokens holds."""
        exact = Shape(rows, tokens, rows, True, tokens, tokens)
        return max(exact.size, self.decodes(rows).size, self.chunks(rows, tokens, rows, 0, 0).size)

    def _lean(self, tokens: int) -> Shape:
        tiles = self._most_tiles(tokens)
        return Shape(self.lean_rows, tokens, self.lean_rows, True, 0, tiles, has_decodes=False)

    def _mixed(self, rows: int, tokens: int) -> Shape:
        tiles = self._most_tiles(tokens)
        return Shape(rows, tokens, rows, True, tiles, tiles)

    def _most_tiles(self, tokens: int) -> int:
        return tokens // QUERY_TILE + self.spare_tiles


def _sizes(*steps: tuple[int, int, int]) -> list[int]:
    return [size for low, high, step in steps for size in range(low, high, step)]


def _least(sizes: tuple[int, ...], wanted: int) -> int | None:
    return next((size for size in sizes if size >= wanted), None)
