"""Paged attention on a GPU: checked against the reference, then timed in CUDA graphs beside FlashAttention 3.

Decode is timed over batches and contexts of three models' shapes, prefill over whole prompts and a chunk
behind a long context. Calls of one graph take different blocks, so that none finds its inputs in L2 cache.
FlashAttention 3 runs on the same shapes where vLLM can be imported.

    python benchmarks/gpu_attention.py [--configs all] [--only decode] [--out FILE.json]
    python benchmarks/gpu_attention.py --prefill-candidates   # ways to cut long prompts, as a table
"""

import argparse
import json
import statistics
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from kernels.attention import Tiles, cache_shape, make_tiles, paged_attention, paged_attention_reference
from kernels.cuda import attention, prefill
from kernels.cuda.attention import DecodeConfig
from kernels.cuda.prefill import PrefillConfig

BLOCK = 16
L2_BYTES = 50 << 20
SHAPES = ((28, 4, 128), (32, 8, 128), (14, 2, 64))
DECODE = (
    (1, 512), (1, 4096), (8, 512), (8, 2048), (64, 512), (64, 1024), (64, 4096), (256, 1024), (512, 512),
    (16, 16384), (128, 400), (256, 400), (1000, 400), (512, 1088),
)  # fmt: skip
# (rows, new tokens of each, tokens of each)
PREFILL = ((1, 512, 512), (16, 1024, 1024), (4, 4096, 4096), (1, 16384, 16384), (1, 2048, 16384))
# The longest fill a multiple of 16 blocks, as the timed ones do: Triton compiles other strides anew.
CHECKED = [(1, n) for n in (1, 15, 17, 64, 700, 2048, 333, 4096, 100)]
CHECKED_LONG = [(1, 16384), (1, 5000), (1, 7)]
CHECKED_MANY = [(1, 1 + 7 * i % 256) for i in range(150)]
CHECKED_CHUNKS = [(300, 300), (129, 129), (2, 2), (200, 1536), (1000, 1000), (129, 140), (0, 7), (1, 900)]

DECODE_CONFIGS = {
    "64x4 deep": DecodeConfig(16, 64, 4, 5, per_sm=2),
    "64x4 deep, 2 waves": DecodeConfig(16, 64, 4, 5, per_sm=4),
    "64x4 deeper": DecodeConfig(16, 64, 4, 7, per_sm=2),
    "64x4 shallow": DecodeConfig(16, 64, 4, 3, per_sm=3),
    "128x4": DecodeConfig(16, 128, 4, 3, per_sm=2, min_tiles=1),
    "32x2": DecodeConfig(16, 32, 2, 5, per_sm=4, min_tiles=4),
    "64x4 wgmma": DecodeConfig(64, 64, 4, 3, per_sm=2),
}
FRESH_CONFIGS = {
    "128x128x8": PrefillConfig(128, 128, 8, 2, descriptors=True),
    "128x64x8": PrefillConfig(128, 64, 8, 3, descriptors=True),
    "128x64x4": PrefillConfig(128, 64, 4, 2, descriptors=True),
    "64x64x4": PrefillConfig(64, 64, 4, 2, descriptors=True),
    "128x128x8 pointers": PrefillConfig(128, 128, 8, 2),
}
PAGED_CONFIGS = {
    "128x128x8": PrefillConfig(128, 128, 8, 3),
    "128x64x8": PrefillConfig(128, 64, 8, 3),
    "128x64x8 deep": PrefillConfig(128, 64, 8, 5),
    "128x64x4": PrefillConfig(128, 64, 4, 3),
}
PEER = "FlashAttention 3"
# What --prefill-candidates compares, and where (name: tile, warps, stages).
LONG = ((1, 16384, 16384), (4, 4096, 4096), (16, 1024, 1024), (1, 2048, 16384))
FRESH_CANDIDATES = {
    "current": None,
    "128x128x8 2": PrefillConfig(128, 128, 8, 2, descriptors=True),
    "128x64x4 2": PrefillConfig(128, 64, 4, 2, descriptors=True),
    "64x128x4 2": PrefillConfig(64, 128, 4, 2, descriptors=True),
    "64x64x4 2": PrefillConfig(64, 64, 4, 2, descriptors=True),
}
PAGED_CANDIDATES = {
    "current": None,
    "128x128x8 2": PrefillConfig(128, 128, 8, 2),
    "128x64x8 3": PrefillConfig(128, 64, 8, 3),
    "64x128x4 3": PrefillConfig(64, 128, 4, 3),
    "64x64x4 3": PrefillConfig(64, 64, 4, 3),
}


@dataclass
class Inputs:
    """A batch in a pool of blocks. `run` of the benchmarks takes one; a graph rotates over several."""

    heads: tuple[int, int, int]
    rows: list[tuple[int, int]]
    q: torch.Tensor
    new_keys: torch.Tensor
    new_values: torch.Tensor
    key_cache: torch.Tensor
    value_cache: torch.Tensor
    block_tables: torch.Tensor
    query_start: torch.Tensor
    seq_lens: torch.Tensor
    out: torch.Tensor

    @property
    def scale(self) -> float:
        return self.heads[2] ** -0.5

    def tiles(self, as_pages: bool = False) -> Tiles:
        """As the worker would cut the chunks; `as_pages`: fresh ones, too, read pages."""
        starts = [length - new for new, length in self.rows]
        paged, fresh = make_tiles([new for new, _ in self.rows], starts)
        if as_pages:
            paged, fresh = (fresh, paged) if len(fresh) else (paged, fresh)
        return Tiles(torch.from_numpy(paged).cuda(), torch.from_numpy(fresh).cuda())


class Pool:
    """One layer's caches, full of noise, and batches whose blocks lie in them in random order."""

    def __init__(self, heads: tuple[int, int, int], tokens: int, dtype: torch.dtype = torch.bfloat16) -> None:
        self.heads, self.dtype, self.blocks = heads, dtype, tokens // BLOCK
        shapes = cache_shape(self.blocks, heads[1], BLOCK, heads[2], dtype, "cuda")
        self.key_cache, self.value_cache = (torch.randn(s, dtype=dtype, device="cuda") for s in shapes)
        self.order = torch.randperm(self.blocks, device="cuda").int()
        self.next = 0

    def take(self, rows: list[tuple[int, int]]) -> Inputs:
        hq, hk, dim = self.heads
        width = max(-(-length // BLOCK) for _, length in rows)
        if self.next + width * len(rows) > self.blocks:
            self.next = 0
        tables = self.order[self.next : self.next + width * len(rows)].view(len(rows), width)
        self.next += width * len(rows)
        tokens = sum(new for new, _ in rows)
        qkv = torch.randn(tokens, hq + 2 * hk, dim, dtype=self.dtype, device="cuda")
        q, new_keys, new_values = qkv.split([hq, hk, hk], dim=1)
        starts = torch.tensor([0, *torch.tensor([new for new, _ in rows]).cumsum(0)], dtype=torch.int32)
        lengths = torch.tensor([length for _, length in rows], dtype=torch.int32)
        return Inputs(
            self.heads, rows, q, new_keys, new_values, self.key_cache, self.value_cache, tables.contiguous(),
            starts.cuda(), lengths.cuda(), torch.full_like(q, float("nan")).contiguous(),
        )  # fmt: skip

    def write_new(self, x: Inputs) -> None:
        """The new keys and values into their pages, so that both ways to read them agree."""
        for row, (new, length) in enumerate(x.rows):
            token = torch.arange(length - new, length, device="cuda")
            block, offset = x.block_tables[row, token // BLOCK].long(), token % BLOCK
            mine = slice(*x.query_start[row : row + 2].tolist())
            self.key_cache[block, :, 0, offset] = x.new_keys[mine]
            self.value_cache[block, :, offset] = x.new_values[mine]


def decode(x: Inputs, config: DecodeConfig | None) -> None:
    rows = (x.block_tables, x.query_start, x.seq_lens, None)
    attention.decode(x.q, x.key_cache, x.value_cache, *rows, x.scale, x.out, config=config)


def fresh(x: Inputs, config: PrefillConfig | None, tiles: Tiles) -> None:
    prefill.fresh(x.q, x.new_keys, x.new_values, x.query_start, tiles.fresh, x.scale, x.out, config=config)


def paged(x: Inputs, config: PrefillConfig | None, tiles: Tiles) -> None:
    rows = (x.block_tables, x.query_start, x.seq_lens, None)
    prefill.paged(x.q, x.key_cache, x.value_cache, *rows, tiles.paged, x.scale, x.out, config=config)


def error(x: Inputs, window: int | None = None) -> float:
    """The largest difference from the reference in float32, over the reference's root mean square."""
    exact = paged_attention_reference(
        x.q.float(), x.key_cache.float(), x.value_cache.float(), x.block_tables, x.query_start, x.seq_lens,
        x.scale, sliding_window=window,
    )  # fmt: skip
    difference = (x.out.float() - exact).abs().max() / exact.square().mean().sqrt()
    return float("inf") if x.out.isnan().any() else difference.item()


def check_public(heads: tuple[int, int, int], dtype: torch.dtype, window: int | None) -> float:
    """A mixed batch by the way that the worker takes."""
    pool = Pool(heads, 40_000, dtype)
    x = pool.take(CHECKED_CHUNKS)
    pool.write_new(x)
    rows = (x.block_tables, x.query_start, x.seq_lens, x.scale, x.out, window)
    new = {"new_keys": x.new_keys, "new_values": x.new_values}
    paged_attention(x.q, x.key_cache, x.value_cache, *rows, tiles=x.tiles(), **new)
    return error(x, window)


def check_decode(heads: tuple[int, int, int], config: DecodeConfig | None) -> float:
    """Also that every run gives the same bits, whichever program adds up a head that several share."""
    errors = []
    for rows in (CHECKED, CHECKED_MANY, CHECKED_LONG):
        x = Pool(heads, 50_000).take(rows)
        decode(x, config)
        errors.append(error(x))
        first = x.out.clone()
        for _ in range(20):
            decode(x, config)
            errors.append(0.0 if torch.equal(x.out, first) else float("inf"))
    return max(errors)


def check_prefill(config: PrefillConfig | None, as_pages: bool) -> float:
    pool = Pool(SHAPES[0], 40_000)
    x = pool.take([row for row in CHECKED_CHUNKS if row[0] > 1 and (as_pages or row[0] == row[1])])
    pool.write_new(x)
    if as_pages:
        tiles = x.tiles()
        paged(x, config, Tiles(torch.cat((tiles.fresh, tiles.paged)), tiles.fresh[:0]))
    else:
        fresh(x, config, x.tiles())
    return error(x)


def median_us(call, inputs: list, repeats: int = 12) -> float:
    """Time of one call in a graph that makes one with each of the inputs."""
    for x in inputs[:2]:
        call(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for x in inputs:
            call(x)
    times = []
    for _ in range(repeats + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times[3:])[repeats // 2] * 1e3 / len(inputs)


def fa3():
    """FlashAttention 3 as vLLM builds it, as a call on `Inputs`; None where vLLM is not there."""
    try:
        from vllm.vllm_flash_attn import flash_attn_varlen_func
    except Exception as problem:
        print(f"no FlashAttention 3: {type(problem).__name__}: {problem}")
        return None

    def run(x: Inputs) -> None:
        # Its pages are [blocks, tokens, heads, D]; noise is noise in either order.
        shape = (x.value_cache.shape[0], BLOCK, *x.heads[1:])
        flash_attn_varlen_func(
            x.q, x.key_cache.view(shape), x.value_cache.view(shape), max_seqlen_q=max(n for n, _ in x.rows),
            cu_seqlens_q=x.query_start, max_seqlen_k=max(n for _, n in x.rows), seqused_k=x.seq_lens,
            block_table=x.block_tables, causal=True, fa_version=3,
        )  # fmt: skip

    return run


class Report:
    """Collects results, prints a line for each, and survives whatever fails."""

    def __init__(self) -> None:
        self.results: list[dict] = []

    def add(self, measure, unit: str, **what) -> None:
        try:
            value = measure()
        except Exception as problem:
            traceback.print_exc(limit=-3)
            value, unit = f"{type(problem).__name__}: {problem}".splitlines()[0], "failed"
        self.results.append(what | {unit: value})
        shown = value if isinstance(value, str) else f"{value:.4g}"
        print("  ".join(str(v) for v in what.values()), f": {shown} {unit}", flush=True)


def time_decode(report: Report, configs: dict, peer) -> None:
    for heads in SHAPES:
        pool = Pool(heads, 1_200_000 if heads[1] < 8 else 600_000)
        for rows, context in DECODE:
            size = 2 * 2 * rows * context * heads[1] * heads[2]
            inputs = [pool.take([(1, context)] * rows) for _ in range(max(2, min(24, 3 * L2_BYTES // size)))]
            what = {"kind": "decode", "heads": heads, "rows": rows, "context": context}

            def speed(call, inputs=inputs, size=size):
                return size / median_us(call, inputs) / 1e6

            for name, config in configs.items():
                report.add(lambda c=config: speed(lambda x: decode(x, c)), "TB/s", **what, config=name)
            if peer is not None:
                report.add(lambda: speed(peer), "TB/s", **what, config=PEER)


def time_prefill(
    report: Report, fresh_configs: dict, paged_configs: dict, peer, rounds: int, cases=PREFILL
) -> None:
    """All ways to compute a case take turns, `rounds` times over: the device's clock goes up and down."""
    heads = SHAPES[0]
    pool = Pool(heads, 70_000)
    for rows, new, context in cases:
        flops = 4 * rows * heads[0] * heads[2] * (new * (context - new) + new * new / 2)
        inputs = [pool.take([(new, context)] * rows) for _ in range(2)]
        what = {"kind": "prefill", "heads": heads, "rows": rows, "new": new, "context": context}
        as_fresh, as_pages = inputs[0].tiles(), inputs[0].tiles(as_pages=True)
        calls = {}
        for name, config in fresh_configs.items() if new == context else ():
            calls[f"fresh {name}"] = lambda x, c=config, t=as_fresh: fresh(x, c, t)
        for name, config in paged_configs.items():
            calls[f"pages {name}"] = lambda x, c=config, t=as_pages: paged(x, c, t)
        if peer is not None:
            calls[PEER] = peer
        speeds: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(rounds):
            for name, call in calls.items():
                speeds[name].append(flops / median_us(call, inputs) / 1e6)
        for name, values in speeds.items():
            shares = [ours / theirs for ours, theirs in zip(values, speeds.get(PEER, ()), strict=False)]
            more = {"share": round(statistics.median(shares), 4)} if shares else {}
            report.add(lambda v=values: statistics.median(v), "TFLOP/s", **what, config=name, **more)


def tabulate(report: Report) -> None:
    """The candidates' TFLOP/s, and what share of FlashAttention 3's that is."""
    timed = {
        ((r["rows"], r["new"], r["context"]), r["config"]): (r["TFLOP/s"], r.get("share"))
        for r in report.results
        if r.get("kind") == "prefill"
    }
    print(f"\n{'':24}", *(f"{rows}x{new}/{context}".rjust(18) for rows, new, context in LONG))
    for config in dict.fromkeys(config for _, config in timed):
        cells = []
        for case in LONG:
            speed, share = timed.get((case, config), (None, None))
            shown = f" ({share:.3f})" if share else ""
            cells.append((f"{speed:.0f}{shown}" if speed else "-").rjust(18))
        print(f"{config:24}", *cells)


def check(
    report: Report, decodes: dict, fresh_configs: dict, paged_configs: dict, mixed: bool = True
) -> None:
    """All checks; the kernels are compiled side by side first."""
    batches = (
        *((h, torch.bfloat16, None) for h in SHAPES), (SHAPES[0], torch.bfloat16, 100),
        ((9, 3, 64), torch.float32, None),
    ) if mixed else ()  # fmt: skip
    todo = [
        *(({"check": "mixed", "heads": h, "dtype": str(t), "window": w}, lambda a=(h, t, w): check_public(*a))
          for h, t, w in batches),
        *(({"check": "decode", "heads": h, "config": n}, lambda a=(h, c): check_decode(*a))
          for h in SHAPES for n, c in decodes.items()),
        *(({"check": "fresh", "config": n}, lambda a=(c, False): check_prefill(*a))
          for n, c in fresh_configs.items()),
        *(({"check": "pages", "config": n}, lambda a=(c, True): check_prefill(*a))
          for n, c in paged_configs.items()),
    ]  # fmt: skip
    start = time.perf_counter()
    with ThreadPoolExecutor(16) as pool:
        for _, run in todo:
            pool.submit(run)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    print(f"compiled in {seconds:.1f} s; errors over the root mean square (an ulp of bfloat16 is 0.0078):")
    for what, run in todo:
        report.add(run, "error", **what)


def run(report: Report, configs: str, only: str | None, rounds: int) -> None:
    chosen = [DECODE_CONFIGS, FRESH_CONFIGS, PAGED_CONFIGS]
    if configs == "default":
        chosen = [{"default": None}] * 3
    decodes, fresh_configs, paged_configs = chosen
    if only == "decode":
        fresh_configs = paged_configs = {}
    if only == "prefill":
        decodes = {}
    check(report, decodes, fresh_configs, paged_configs)
    peer = fa3()
    if only != "prefill":
        time_decode(report, decodes, peer)
    if only != "decode":
        time_prefill(report, fresh_configs, paged_configs, peer, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--configs", choices=["default", "all"], default="default")
    parser.add_argument("--only", choices=["decode", "prefill"])
    parser.add_argument("--prefill-candidates", action="store_true")
    parser.add_argument("--rounds", type=int, default=1, help="of prefill, all ways in turn; medians")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    report = Report()
    if arguments.prefill_candidates:
        check(report, {}, FRESH_CANDIDATES, PAGED_CANDIDATES, mixed=False)
        time_prefill(report, FRESH_CANDIDATES, PAGED_CANDIDATES, fa3(), arguments.rounds, LONG)
        tabulate(report)
    else:
        run(report, arguments.configs, arguments.only, arguments.rounds)
    if arguments.out:
        device = torch.cuda.get_device_name()
        versions = {"torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}
        document = {"device": device, **versions, "results": report.results}
        arguments.out.write_text(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
