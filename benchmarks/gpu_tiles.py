"""Tiles of skinny products, tried where they run: in the graph of a whole decode iteration.

    python -m benchmarks.gpu_tiles --preset qwen2.5-0.5b --rows 1 64 [--seconds 60]

One product after the other, each with the candidates of its size; what is better stays. Alone, as
`gpu_linear.py` times them, other tiles win: here launches overlap, and kernels share what the chip has. It
prints the entries for `TILES` in kernels/cuda/linear.py.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from benchmarks.gpu_models import PRESETS
from benchmarks.gpu_profile import CONTEXT, ROOM, Bench
from kernels.cuda import linear
from kernels.cuda.compile import Warmer
from kernels.cuda.device import traits
from kernels.cuda.linear import Tile, padded_rows
from pagoda.internal.v1 import worker_pb2

REPLAYS = 8
REPEATS = 5


def candidates(bm: int, n: int, k: int, multiprocessors: int) -> list[Tile]:
    """Tiles worth trying for [bm, k] times [n, k]: mostly such that all multiprocessors end together."""
    deep = 128 if k % 128 == 0 else 64
    sizes = (
        [(16, 256, 5), (32, 128, 6), (64, 128, 4)] if bm <= 16 else [(64, 64, 5), (64, 128, 3), (128, 64, 4)]
    )
    tiles = []
    for rows, depth, stages in sizes:
        depth = min(depth, deep)
        count = -(-n // rows)
        splits = {1} | {multiprocessors * per_sm // count for per_sm in (1, 2, 3)}
        for split in sorted(s for s in splits if 1 <= s <= k // (4 * depth)):
            tiles.append(Tile(rows, depth, stages, split, swap=bm <= 16 and rows == 64))
    if bm > 16:
        tiles += [Tile(128, 64, 3, span=256), Tile(128, 64, 4, swap=True), Tile(256, 64, 4, warps=8)]
        tiles += [tile._replace(stages=3, warps=8) for tile in tiles if tile.rows == 128 and not tile.span]
    return tiles


def milliseconds(bench: Bench, rows: int) -> float:
    """One decode iteration of `rows` rows, from a graph captured now."""
    shape, graphs = bench.runner.padding.decodes(rows), bench.runner.graphs
    assert graphs is not None
    linear.choose_tile.cache_clear()
    graphs.capture(shape)
    bench.decoding(rows, CONTEXT, CONTEXT + ROOM)
    # As many iterations as a step may have: what is drawn has room for no more.
    step = worker_pb2.Step(epoch=1, num_iterations=REPLAYS, slots=range(rows))
    times = []
    for _ in range(REPEATS):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        bench.run(step)
        ended.record()
        torch.cuda.synchronize()
        times.append(began.elapsed_time(ended) / REPLAYS)
    return statistics.median(times)


def products(preset: str) -> list[tuple[int, int]]:
    """(N, K) of a layer's products, the largest first."""
    config = PRESETS[preset]
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    dim = hidden // config["num_attention_heads"]
    qkv = hidden + 2 * config["num_key_value_heads"] * dim
    return [(2 * inner, hidden), (hidden, inner), (qkv, hidden), (hidden, hidden)]


@contextmanager
def tried(key: tuple[int, int, int], tile: Tile) -> Iterator[None]:
    """Inside, products of this size take this tile."""
    kept = linear.TILES.get(key)
    linear.TILES[key] = tile
    linear.choose_tile.cache_clear()
    try:
        yield
    finally:
        linear.TILES.pop(key)
        if kept is not None:
            linear.TILES[key] = kept
        linear.choose_tile.cache_clear()


def compile_all(bench: Bench, preset: str, numbers: list[int], folder: Path) -> None:
    """Every candidate's kernels, side by side."""
    device = traits(bench.device)
    warmer = Warmer(device.capability, len(os.sched_getaffinity(0)), folder / "compiled")
    with warmer.rehearsal():
        for rows in numbers:
            shape, bm = bench.runner.padding.decodes(rows), padded_rows(rows)
            for n, k in products(preset):
                for tile in candidates(bm, n, k, device.multiprocessors):
                    with tried((n, k, bm), tile):
                        bench.runner.rehearse(shape)
    for line in warmer.finish(120):
        print(f"   {line[:200]}")


def tune(bench: Bench, preset: str, rows: int, deadline: float) -> None:
    """Try every product's candidates for this number of rows, the largest product first."""
    bm, best = padded_rows(rows), milliseconds(bench, rows)
    print(f"{preset}, {rows} rows: {best:.4f} ms with the tiles as they are", flush=True)
    for n, k in products(preset):
        kept = None
        for tile in candidates(bm, n, k, traits(bench.device).multiprocessors):
            if time.monotonic() > deadline:
                break
            try:
                with tried((n, k, bm), tile):
                    ms = milliseconds(bench, rows)
            except RuntimeError as error:  # too large for the device: the next one
                print(f"   {n} x {k}: {tile}: {str(error).splitlines()[0]}")
                continue
            print(f"   {n} x {k}: {ms:.4f} ms {tile}{' *' if ms < best else ''}", flush=True)
            if ms < best:
                best, kept = ms, tile
        if kept is not None:
            linear.TILES[n, k, bm] = kept
            print(f"    ({n}, {k}, {bm}): {kept},")
    print(f"{preset}, {rows} rows: {best:.4f} ms", flush=True)


def main() -> None:
    """Tune and print."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--preset", choices=PRESETS, default="qwen2.5-7b")
    p.add_argument("--rows", type=int, nargs="+", default=[1, 64])
    p.add_argument("--seconds", type=float, default=60, help="for all of it, start-up not counted")
    o = p.parse_args()
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        bench = Bench(o.preset, max(64, *o.rows), 2048, Path(folder))
        compile_all(bench, o.preset, o.rows, Path(folder))
        deadline = time.monotonic() + o.seconds
        for rows in o.rows:
            tune(bench, o.preset, rows, deadline)


if __name__ == "__main__":
    main()
