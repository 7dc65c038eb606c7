"""A decode's matrix products on the GPU: which tile suits each best, and what a whole stack of layers takes.

    python benchmarks/gpu_linear.py [--out FILE]
    python benchmarks/gpu_linear.py --models 7b-tp2 --rows 16 32 64   # one of two ranks' products

Each product runs with what is fused to it, in a CUDA graph over more distinct weights than L2 holds, in
several tiles and beside cuBLAS (which is the bare product). Results are checked first. Printed are the best
tiles of each, microseconds a launch and TB/s of weights; then the winners as `kernels.cuda.linear.TILES`
wants them; then decode iterations of two models' shapes in those tiles, logits included, beside the time that
reading the weights takes at 3.0 TB/s; then a prompt of 512 tokens without a graph. A minute on an H100.
Of a rank's part of a model only the products are measured: its layers need the other ranks.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.gpu_linear_sizes import SHAPES, Shape, candidates, spread
from kernels.attention import Tiles, cache_shape, make_tiles
from kernels.cuda import layer as cuda_layer
from kernels.cuda import linear
from kernels.cuda.compile import Warmer, use_cache
from kernels.cuda.linear import Normed, Rotation, Tile
from kernels.cuda.norm import rms_norm
from kernels.layer import Layer, LayerStack, Step
from kernels.linear import PackedLinear

BF16, I32 = torch.bfloat16, torch.int32
EPS = 1e-6
READ_RATE = 3.0e12
# Distinct weights to go through, so that L2 (50 MB) holds none of them when their turn comes.
BYTES = 200 << 20
MAX_LAUNCHES = 40
ROWS = (1, 8, 16, 32, 64, 128)
CONTEXT = 600


class Product:
    """One product of a model: its weights, inputs, and how it runs fused, by cuBLAS and exactly."""

    def __init__(self, shape: Shape, name: str, pool: torch.Tensor) -> None:
        heads, kv_heads, dim, hidden = shape.heads, shape.kv_heads, shape.dim, shape.hidden
        self.shape, self.name = shape, name
        self.n, self.k = {
            "qkv": ((heads + 2 * kv_heads) * dim, hidden),
            "o": (hidden, heads * dim),
            "gate_up": (2 * shape.inner, hidden),
            "down": (hidden, shape.inner),
            "head": (shape.vocab, hidden),
        }[name]
        self.size = self.n * self.k
        count = min(MAX_LAUNCHES, max(1, BYTES // (2 * self.size)), pool.numel() // self.size)
        # What ranks sum is not fused with the sum.
        self.is_plain = name == "head" or (name in ("o", "down") and shape.ranks > 1)
        self.out_dtype = torch.float32 if self.is_plain else BF16
        bias = torch.randn(self.n, device="cuda") if name == "qkv" else None
        self.weights = [
            PackedLinear((self.n, self.k), BF16, self.out_dtype, w.view(self.n, self.k), bias, False)
            for w in pool[: count * self.size].split(self.size)
        ]
        caches = (
            torch.zeros(s, dtype=BF16, device="cuda")
            for s in cache_shape(16, kv_heads, 16, dim, BF16, "cuda")
        )
        rows = max(ROWS)
        cos_sin = torch.randn(1024, dim, device="cuda")
        positions = torch.arange(rows, dtype=I32, device="cuda")
        self.rotation = Rotation(cos_sin, positions, positions.long(), *caches, heads)

    def prepare(self, rows: int) -> None:
        """Inputs of so many rows."""
        bm = linear.padded_rows(rows)
        self.x = torch.randn(rows, self.k, device="cuda", dtype=BF16)
        # In as many parts as what comes before leaves; here the first holds everything.
        parts = 28 if self.shape.ranks == 1 else 1
        squares = torch.zeros(parts, bm, device="cuda")
        squares[0, :rows] = self.x.float().pow(2).sum(1)
        self.normed = Normed(self.x, squares, parts, EPS)
        self.hidden = torch.zeros(rows, self.n, device="cuda")
        self.norm = torch.ones(self.n, device="cuda", dtype=BF16)
        sums = torch.empty(-(-self.n // 16), bm, device="cuda")
        self.sums = Normed(self.hidden.to(BF16), sums, 0, EPS)
        self.out = torch.empty(rows, self.n, device="cuda", dtype=self.out_dtype)
        self.gated = torch.empty(rows, self.n // 2, device="cuda", dtype=BF16)

    def run(self, weight: PackedLinear, tile: Tile) -> torch.Tensor:
        """With what is fused to it."""
        if self.name == "qkv":
            return linear.rotated_linear(self.normed, weight, self.rotation, self.out, tile)
        if self.name == "gate_up":
            return linear.gated_linear(self.normed, weight, self.gated, tile)
        if self.is_plain:
            return linear.skinny_linear(self.x, weight, self.out, tile)
        linear.residual_linear(self.x, weight, self.hidden, self.norm, self.sums, tile)
        return self.hidden

    def exact(self, weight: PackedLinear) -> torch.Tensor:
        """What `run` gives from a zero `hidden`, in float32."""
        x = self.x.float()
        if self.name in ("qkv", "gate_up"):
            x = x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + EPS)
        result = x @ weight.data.float().t()
        if weight.bias is not None:
            result += weight.bias
        if self.name == "gate_up":
            gate, up = result.chunk(2, dim=1)
            return torch.nn.functional.silu(gate) * up
        if self.name == "qkv":
            heads = result.unflatten(1, (-1, self.shape.dim))
            turned = heads[:, : self.shape.heads + self.shape.kv_heads]
            cos, sin = self.rotation.cos_sin[self.rotation.positions[: len(x)]].unsqueeze(1).chunk(2, dim=2)
            a, b = turned.chunk(2, dim=2)
            turned.copy_(torch.cat((a * cos - b * sin, b * cos + a * sin), dim=2))
        return result


def seconds(run: Callable[[], Any], repeats: int = 7) -> float:
    """Median time of a CUDA graph's replay."""
    graph = torch.cuda.CUDAGraph()
    run()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def attempts(product: Product, rows: int) -> Iterator[Tile]:
    bm = linear.padded_rows(rows)
    tiles = candidates(product.n, product.k, bm)
    if product.shape.ranks > 1:
        tiles += spread(product.n, product.k, bm)
    seen = set()
    for tile in tiles:
        tile = linear.fitted(tile, product.n, product.k, bm, 2, product.x.device)
        if tile not in seen:
            seen.add(tile)
            yield tile


def text(tile: Tile) -> str:
    """As 32x256x4, and then split, swap, span and warps where they are not the usual ones."""
    return (
        f"{tile.rows}x{tile.depth}x{tile.stages}" + (f"/{tile.split}" if tile.split > 1 else "")
        + ("s" if tile.swap else "") + (f"p{tile.span}" if tile.span else "")
        + (f"w{tile.warps}" if tile.warps != 4 else "")
    )  # fmt: skip


def wrong(product: Product, tile: Tile, exact: torch.Tensor) -> str:
    """What is wrong with a tile's result; nothing when it is right."""
    product.hidden.zero_()
    product.out.fill_(float("nan"))
    result = product.run(product.weights[0], tile).float()
    error = ((result - exact).abs().max() / exact.abs().max()).item()
    return "" if error < 0.01 else f"off by {error:.3f} of the largest"


def measure(product: Product, rows: int) -> list[dict[str, Any]]:
    """Every tile's time and cuBLAS's, best first."""
    product.prepare(rows)
    exact, results = product.exact(product.weights[0]), []
    for tile in attempts(product, rows):
        row: dict[str, Any] = {"tile": tile._asdict(), "text": text(tile)}
        try:
            row["error"] = wrong(product, tile, exact)
            row["us"] = 1e6 * seconds(lambda tile=tile: [product.run(w, tile) for w in product.weights])
            row["us"] /= len(product.weights)
        except Exception as error:  # the others shall still be measured
            row["error"] = f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
        results.append(row)
    cublas = seconds(lambda: [linear.wide_linear(product.x, w, product.out) for w in product.weights])
    results.append({"text": "cuBLAS", "us": 1e6 * cublas / len(product.weights), "error": ""})
    for row in results:
        row["tbs"] = 2e-6 * product.size / row["us"] if "us" in row else 0.0
    return sorted(results, key=lambda row: row.get("us", 1e9))


def report(product: Product, rows: int, results: list[dict[str, Any]]) -> None:
    cells = []
    for i, row in enumerate(results):
        if row["error"]:
            cells.append(f"{row['text']} WRONG {row['error']}")
        elif i < 3 or row["text"] == "cuBLAS":
            cells.append(f"{row['text']} {row['us']:.1f} {row['tbs']:.2f}")
    print(f"{product.shape.name:>4} {product.name:7} {rows:3}: " + " | ".join(cells), flush=True)


def winners(measured: dict[tuple[Product, int], list[dict[str, Any]]]) -> dict[tuple[int, int, int], Tile]:
    """Of each (N, K, padded rows) the tile whose times, each relative to the best, have the smallest sum."""
    sums: dict[tuple[int, int, int], dict[Tile, float]] = {}
    for (product, rows), results in measured.items():
        right = [row for row in results if "tile" in row and not row["error"]]
        place = sums.setdefault((product.n, product.k, linear.padded_rows(rows)), {})
        for row in right:
            tile = Tile(**row["tile"])
            place[tile] = place.get(tile, 0.0) + row["us"] / right[0]["us"]
    return {key: min(tiles, key=lambda t, tiles=tiles: tiles[t]) for key, tiles in sums.items() if tiles}


class Model:
    """A stack of a shape's layers, of which only so many are distinct as L2 does not hold."""

    def __init__(self, shape: Shape, pool: torch.Tensor) -> None:
        self.shape, self.pool, self.used = shape, pool, 0
        width = (shape.heads + 2 * shape.kv_heads) * shape.dim
        blocks = 64 * -(-CONTEXT // 16) + 40
        per_layer = shape.hidden * (width + shape.heads * shape.dim + 3 * shape.inner)
        distinct = min(shape.layers, -(-(160 << 20) // (2 * per_layer)) + 1)
        norm = torch.ones(shape.hidden, dtype=BF16, device="cuda")
        layers = []
        for _ in range(distinct):
            keys, values = cache_shape(blocks, shape.kv_heads, 16, shape.dim, BF16, "cuda")
            caches = (torch.zeros(s, dtype=BF16, device="cuda") for s in (keys, values))
            layers.append(Layer(
                norm, self.matrix(width, shape.hidden, bias=True),
                self.matrix(shape.hidden, shape.heads * shape.dim), norm,
                self.matrix(2 * shape.inner, shape.hidden), self.matrix(shape.hidden, shape.inner),
                *caches, shape.heads, EPS, shape.dim**-0.5,
            ))  # fmt: skip
        self.stack = LayerStack((layers * shape.layers)[: shape.layers])
        self.norm, self.used = norm, 0
        self.head = self.matrix(shape.vocab, shape.hidden, dtype=torch.float32)
        self.bytes = 2 * (per_layer * shape.layers + self.head.data.numel())

    def matrix(self, n: int, k: int, bias: bool = False, dtype: torch.dtype = BF16) -> PackedLinear:
        if self.used + n * k > self.pool.numel():
            self.used = 0
        data = self.pool[self.used : self.used + n * k].view(n, k)
        self.used += n * k
        return PackedLinear((n, k), BF16, dtype, data, torch.zeros(n, device="cuda") if bias else None, False)

    def step(self, lengths: list[int], starts: list[int]) -> Step:
        """Rows with so many new tokens behind so many old ones, each with blocks of its own."""
        rows, per_row = len(lengths), -(-max(s + n for s, n in zip(starts, lengths, strict=True)) // 16)
        tables = torch.arange(rows * per_row, dtype=I32).view(rows, per_row)
        at = [torch.arange(s, s + n) for s, n in zip(starts, lengths, strict=True)]
        slots = [tables[r, a // 16] * 16 + a % 16 for r, a in enumerate(at)]
        tiles = None
        if max(lengths) > 1:
            tiles = Tiles(*(torch.from_numpy(t).cuda() for t in make_tiles(lengths, starts)), False)
        ends = torch.tensor([0, *lengths]).cumsum(0)
        return Step(
            torch.randn(2048, self.shape.dim, device="cuda"), torch.cat(at).to(I32).cuda(),
            torch.cat(slots).long().cuda(), tables.cuda(), ends.to(I32).cuda(),
            torch.tensor([s + n for s, n in zip(starts, lengths, strict=True)], dtype=I32).cuda(),
            torch.arange(rows).cuda(), tiles,
        )  # fmt: skip

    def iteration(self, hidden: torch.Tensor, step: Step, out_rows: int) -> torch.Tensor:
        state, delta = self.stack.forward(hidden, step)
        normed = torch.empty(out_rows, self.shape.hidden, dtype=BF16, device="cuda")
        rms_norm(delta[:out_rows], self.norm, EPS, state[:out_rows], normed)
        logits = torch.empty(out_rows, self.shape.vocab, device="cuda")
        return linear.linear(normed, self.head, logits)

    def prompt(self) -> Callable[[], Any]:
        """The iteration of one prompt of 512 tokens."""
        hidden = torch.zeros(512, self.shape.hidden, device="cuda")
        step = replace(self.step([512], [0]), wanted=torch.tensor([511], device="cuda"))
        return lambda: self.iteration(hidden, step, 1)


def no_attention(q: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return q


def each_iteration(models: list[Model]) -> Iterator[tuple[Model, int, bool, Callable[[], Any]]]:
    """Model, rows, whether with attention, and one decode iteration."""
    attention = cuda_layer.paged_attention
    for model in models:
        for rows in (1, 8, 64):
            step = model.step([1] * rows, [CONTEXT - 1] * rows)
            hidden = torch.zeros(rows, model.shape.hidden, device="cuda")
            for attends in (False, True):
                cuda_layer.paged_attention = attention if attends else no_attention
                yield model, rows, attends, lambda m=model, h=hidden, s=step, r=rows: m.iteration(h, s, r)
    cuda_layer.paged_attention = attention


def stacks(models: list[Model]) -> list[dict[str, Any]]:
    """Decode iterations in a graph, then a prompt launched one by one."""
    results: list[dict[str, Any]] = []
    for model, rows, attends, run in each_iteration(models):
        name = "with" if attends else "without"
        try:
            ms = 1e3 * seconds(run)
        except Exception as error:
            print(f"{model.shape.name} decode {rows} {name} attention: {type(error).__name__}: {error}"[:300])
            continue
        floor = 1e3 * model.bytes / READ_RATE
        results.append(
            {"model": model.shape.name, "rows": rows, "attention": attends, "ms": ms, "floor": floor}
        )
        print(f"{model.shape.name:>4} decode {rows:2}, {name} attention: {ms:.3f} ms, weights {floor:.3f}")
    for model in models:
        run, times = model.prompt(), []
        for _ in range(4):
            torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            launched = time.perf_counter() - start
            torch.cuda.synchronize()
            times.append((1e3 * (time.perf_counter() - start), 1e3 * launched))
        ms, host = min(times)
        results.append({"model": model.shape.name, "prompt": 512, "ms": ms, "host_ms": host})
        print(f"{model.shape.name:>4} prompt of 512: {ms:.2f} ms, launched within {host:.2f}")
    return results


def rehearse(warmer: Warmer, runs: Iterator[Callable[[], Any]]) -> None:
    """Compiles side by side what the runs need."""
    start, noted = time.perf_counter(), 0
    with warmer.rehearsal():
        for run in runs:
            try:
                run()
            except Exception as error:
                print(f"rehearsal: {type(error).__name__}: {error}"[:200])
            noted += 1
    errors = warmer.finish(240)
    print(
        f"compiled for {noted} runs in {time.perf_counter() - start:.0f} s",
        *errors[:8],
        sep="\n  ",
        flush=True,
    )


def product_runs(products: list[Product], numbers: list[int]) -> Iterator[Callable[[], Any]]:
    for product in products:
        for rows in numbers:
            product.prepare(rows)
            for tile in attempts(product, rows):
                yield lambda p=product, t=tile: p.run(p.weights[0], t)


def stack_runs(models: list[Model]) -> Iterator[Callable[[], Any]]:
    for *_, run in each_iteration(models):
        yield run
    for model in models:
        yield model.prompt()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="where to write everything as JSON")
    parser.add_argument("--processes", type=int, default=16, help="compile so many kernels at once")
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=["7b", "0.5b"])
    parser.add_argument("--rows", type=int, nargs="+", choices=ROWS, default=list(ROWS))
    args = parser.parse_args()
    shapes = [SHAPES[name] for name in args.models]
    use_cache()
    capability = torch.cuda.get_device_capability()
    arch = 10 * capability[0] + capability[1]
    folder = Path(tempfile.mkdtemp())
    warmers = [Warmer(arch, args.processes, folder / str(i)) for i in range(2)]
    torch.manual_seed(0)
    pool = torch.empty(1200 << 20, dtype=BF16, device="cuda").normal_(0, 0.02)
    products = [Product(s, name, pool) for s in shapes for name in ("qkv", "o", "gate_up", "down", "head")]
    rehearse(warmers[0], product_runs(products, args.rows))
    measured = {}
    for product in products:
        for rows in args.rows:
            measured[product, rows] = measure(product, rows)
            report(product, rows, measured[product, rows])
    best = winners(measured)
    print("TILES = {")
    for key, tile in best.items():
        print(f"    {key}: {tile},")
    print("}")
    linear.TILES.update(best)
    linear.choose_tile.cache_clear()
    models = [Model(shape, pool) for shape in shapes if shape.ranks == 1]
    rehearse(warmers[1], stack_runs(models))
    results = {
        "device": torch.cuda.get_device_name(),
        "products": [
            {"model": p.shape.name, "product": p.name, "n": p.n, "k": p.k, "rows": rows, "results": results}
            for (p, rows), results in measured.items()
        ],
        "stacks": stacks(models),
    }
    if args.out:
        args.out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
