"""What gpu_linear.py measures: models' sizes, and which tiles are worth a try."""

from __future__ import annotations

from typing import NamedTuple

from kernels.cuda.linear import Tile


class Shape(NamedTuple):
    """A model's sizes, or those of the part that one of its ranks has."""

    name: str
    hidden: int
    heads: int
    kv_heads: int
    dim: int
    inner: int
    layers: int
    vocab: int
    ranks: int = 1


SHAPES = {
    "7b": Shape("7b", 3584, 28, 4, 128, 18944, 28, 152064),
    "0.5b": Shape("0.5b", 896, 14, 2, 64, 4864, 24, 151936),
    "7b-tp2": Shape("7b-tp2", 3584, 14, 2, 128, 9472, 28, 76032, ranks=2),
}
MULTIPROCESSORS = 132


def candidates(n: int, k: int, bm: int) -> list[Tile]:
    """Tiles worth a try."""
    if n * k < 8 << 20:
        few = [(16, 128, 6), (16, 128, 8), (16, 128, 4, 2), (32, 128, 6), (32, 64, 6, 2)]
        many = [(16, 128, 5), (32, 128, 4), (32, 128, 4, 2), (64, 64, 4, 3), (64, 64, 4, 3, True)]
        tiles = [Tile(*t, span=0 if len(t) > 4 else 512) for t in (few if bm < 64 else many)]
    elif n < 8192:
        few = [(32, 128, 6), (32, 256, 4), (16, 256, 5), (64, 128, 4, 2), (64, 128, 4, 2, True)]
        some = [(32, 128, 6), (32, 256, 4), (64, 128, 4, 2), (64, 128, 4, 2, True), (64, 64, 6, 2)]
        many = [
            (128, 64, 4, 4),
            (128, 64, 4, 4, True),
            (64, 64, 5, 2),
            (64, 128, 3, 2, True),
            (128, 64, 5, 5),
        ]
        tiles = [Tile(*t, span=512) for t in {16: few, 32: some}.get(bm, many)]
        tiles.append(tiles[0]._replace(span=0))
    else:
        few = [(64, 128, 4), (64, 64, 5), (128, 64, 4), (64, 128, 4, 1, True), (32, 256, 4)]
        many = [(128, 64, 4), (128, 64, 3), (128, 64, 4, 1, True), (64, 128, 3), (64, 64, 5)]
        tiles = [Tile(*t, span=256) for t in (few if bm < 64 else many)]
        tiles.append(tiles[0]._replace(span=0))
    return [t._replace(warps=8) if bm == 128 and t.rows >= 64 else t for t in tiles]


def spread(n: int, k: int, bm: int) -> list[Tile]:
    """More tiles, for sizes that nobody knows yet: all multiprocessors end at about the same time."""
    sizes = {
        16: [(16, 256, 5), (32, 128, 6), (32, 256, 4), (64, 128, 4)],
        32: [(32, 128, 6), (64, 128, 4), (64, 128, 3)],
    }.get(bm, [(32, 128, 4), (64, 64, 5), (64, 128, 3), (128, 64, 4)])
    tiles = []
    for rows, depth, stages in sizes:
        splits = {1} | {MULTIPROCESSORS * per_sm // -(-n // rows) for per_sm in (1, 2, 3)}
        for split in sorted(s for s in splits if 1 <= s <= k // (4 * depth)):
            tile = Tile(rows, depth, stages, split, span=256)
            tiles += [tile, tile._replace(swap=True)] if rows == 64 and bm < 64 else [tile]
    return tiles
