"""Tiles of skinny products, tried where they run: in the graph of a whole decode iteration.

    python -m benchmarks.gpu_tiles --preset qwen2.5-0.5b --rows 1 64 [--seconds 60]

One product after the other, each with the candidates of its size; what is better stays. Alone, as
`gpu_linear.py` times them, other tiles win: here launches overlap, and kernels share what the chip has. It
prints the entries for `TILES` in kernels/cuda/linear.py.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.gpu_models import PRESETS
from benchmarks.gpu_profile import CONTEXT, Bench
from kernels.cuda import linear
from kernels.cuda.linear import Tile, padded_rows
from pagoda.internal.v1 import worker_pb2

REPLAYS = 8
REPEATS = 5


def candidates(bm: int, n: int, k: int) -> Iterator[Tile]:
    """Tiles worth trying for [bm, k] times [n, k]."""
    deep = 128 if k % 128 == 0 else 64
    few = n * k < 16 << 20 or k > 4 * n  # not enough tiles for every multiprocessor without a split
    for split in (1, 2, 4) if few else (1,):
        yield Tile(64, deep if bm <= 16 else 64, 4, split=split, swap=True)
        yield Tile(32, deep, 6 if bm <= 16 else 4, split=split)
        yield Tile(64, 64, 5, split=split)
    yield Tile(64, deep, 4 if bm <= 16 else 3)
    if bm <= 16 and k % 256 == 0:
        yield from (Tile(32, 256, 4), Tile(16, 256, 5))
    if bm > 16:
        yield Tile(128, 64, 3, span=256)


def milliseconds(bench: Bench, rows: int) -> float:
    """One decode iteration of `rows` rows, from a graph captured now."""
    shape, graphs = bench.runner.padding.decodes(rows), bench.runner.graphs
    assert graphs is not None
    graphs.forget(shape)
    linear.choose_tile.cache_clear()
    bench.clear()
    for first in range(0, rows, 8):
        bench.run(bench.prompts(first, min(8, rows - first), CONTEXT))
        torch.cuda.synchronize()
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


def tune(bench: Bench, preset: str, rows: int, deadline: float) -> None:
    """Try every product's candidates for this number of rows, the largest product first."""
    config = PRESETS[preset]
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    dim = hidden // config["num_attention_heads"]
    qkv = hidden + 2 * config["num_key_value_heads"] * dim
    bm, best = padded_rows(rows), milliseconds(bench, rows)
    print(f"{preset}, {rows} rows: {best:.4f} ms with the tiles as they are", flush=True)
    for n, k in ((2 * inner, hidden), (hidden, inner), (qkv, hidden), (hidden, hidden)):
        kept = linear.TILES.get((n, k, bm))
        for tile in candidates(bm, n, k):
            if time.monotonic() > deadline:
                break
            linear.TILES[n, k, bm] = tile
            try:
                ms = milliseconds(bench, rows)
            except RuntimeError as error:  # too large for the device: the next one
                print(f"   {n} x {k}: {tile}: {str(error).splitlines()[0]}")
                continue
            print(f"   {n} x {k}: {ms:.4f} ms {tile}{' *' if ms < best else ''}", flush=True)
            if ms < best:
                best, kept = ms, tile
        if kept is None:
            linear.TILES.pop((n, k, bm), None)
        else:
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
        deadline = time.monotonic() + o.seconds
        for rows in o.rows:
            tune(bench, o.preset, rows, deadline)


if __name__ == "__main__":
    main()
