"""What carrying two ranks' large sums gains, on two GPUs of one host: a copy engine brings the peer's part.

    python -m benchmarks.gpu_carried [--out FILE]

Of 8,192 rows of Qwen2.5 7B's width, in CUDA graphs: the copy alone and with its meeting, both ranks at once;
the addition that is left, with several grids; the sum of `kernels.cuda.ranks` that they replace; the products
of a layer whole and in two pieces of several sizes. Then four layers whole, with and without, cut in several
ways, in a graph and handed over launch by launch; what they give must be the same on both ranks, bit for bit,
and the same with and without but for what products round. What counts are the graphs in turn, at the power
limit: products in their own loop differ from one run to the next by more than a cut gains. A minute on two.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.gpu_algos import HALVES
from benchmarks.gpu_facts import facts
from benchmarks.gpu_ranks import BF16, EPS, F32, PLACES, WIDTH, Rank, bits, seconds
from benchmarks.gpu_times import device_and_host_ms
from kernels.attention import Tiles, cache_shape, make_tiles
from kernels.cuda import layer as stack
from kernels.cuda import ranks as module
from kernels.cuda.compile import use_cache
from kernels.cuda.linear import wide_linear
from kernels.cuda.ranks import Brought
from kernels.layer import Layer, Step
from kernels.linear import PackedLinear
from kernels.ranks import Place

ROWS, PROMPT, BLOCK_SIZE, DIM, HEADS, KV_HEADS = 8192, 1024, 16, 128, 14, 2
LAYERS = 4
LOCAL_PROGRAMS = (264, 528, 1056, 2112, 8192)
FIRST_ROWS = (2048, 3072, 3328, 3584, 3840, 4096, 4608)
REPLAYS = 7
# Of a graph in a block, and blocks of each.
BLOCK, ROUNDS = 30, 6


class Bench:
    """One rank's tensors."""

    def __init__(self, my: Rank) -> None:
        self.my, self.ranks = my, my.ranks
        self.hidden = torch.zeros(ROWS, WIDTH, device=my.device)
        self.out = torch.zeros(ROWS, WIDTH, dtype=BF16, device=my.device)

    def weight(self, name: str) -> PackedLinear:
        """Of this rank alone."""
        rows, columns = HALVES[name]
        data = (torch.randn(rows, columns, device=self.my.device) * columns**-0.5).to(BF16)
        return PackedLinear((rows, columns), BF16, BF16, data, None, False)

    def part(self, i: int) -> tuple[Place, torch.Tensor]:
        place = PLACES[1 + i % 2]
        return place, self.ranks.part(place, ROWS, WIDTH, BF16)

    def bring(self, i: int) -> None:
        """With its meeting, and waited for."""
        place, part = self.part(i)
        event = self.ranks.bring(place, part, slice(0, ROWS)).event
        assert event is not None
        event.wait(torch.cuda.current_stream())

    def copy(self, i: int) -> None:
        _, part = self.part(i)
        theirs = self.ranks._shared.all[1 - self.my.rank]
        start = part.data_ptr() - self.ranks._shared.all[self.my.rank].data_ptr()
        self.out.view(torch.uint8).view(-1).copy_(theirs[start : start + part.nbytes])

    def add(self, i: int) -> None:
        place, part = self.part(i)
        self.ranks.add(place, part, self.hidden, self.my.weight, EPS, self.out)

    def add_brought(self, i: int) -> None:
        brought = Brought(*self.part(i), slice(0, ROWS), None)
        self.ranks.add_brought(brought, self.hidden, self.my.weight, EPS, self.out)

    def sums(self, say: Callable[[str], None]) -> dict[str, float]:
        """Microseconds of what sums are made of."""
        num_bytes = ROWS * WIDTH * 2
        found = {"sum, read by programs": seconds(self.add, 8)}
        found["copy engine"] = seconds(self.copy, 8)
        found["copy engine, second stream and meeting"] = seconds(self.bring, 8)
        usual = module.LOCAL_PROGRAMS
        for programs in LOCAL_PROGRAMS:
            module.LOCAL_PROGRAMS = programs
            found[f"local sum, {programs} programs"] = seconds(self.add_brought, 8)
        module.LOCAL_PROGRAMS = usual
        for name, time_s in found.items():
            speed = f", {num_bytes / time_s / 1e9:.0f} GB/s of the peer's" if "local" not in name else ""
            say(f"{name}, {num_bytes / 1e6:.1f} MB: {1e6 * time_s:.1f} us{speed}")
        return {name: 1e6 * time_s for name, time_s in found.items()}

    def products(self, say: Callable[[str], None]) -> dict[str, dict[str, float]]:
        """Microseconds of each product, whole and in two pieces, by the first one's rows."""
        results = {}
        for name, (rows, columns) in HALVES.items():
            weight, x = self.weight(name), torch.randn(ROWS, columns, device=self.my.device).to(BF16)
            out = torch.empty(ROWS, rows, dtype=BF16, device=self.my.device)

            def cut(_: int, first: int, x=x, weight=weight, out=out) -> None:
                for piece in (slice(0, first), slice(first, ROWS)) if first else (slice(0, ROWS),):
                    wide_linear(x[piece], weight, out[piece])

            timed = {first: 1e6 * seconds(partial(cut, first=first), 8) for first in (0, *FIRST_ROWS)}
            results[name] = {str(first or "whole"): us for first, us in timed.items()}
            say(f"{name}, us: " + ", ".join(f"{k} {v:.1f}" for k, v in results[name].items()))
        return results

    def layers(self, say: Callable[[str], None]) -> dict[str, Any]:
        """Microseconds of a layer, one of several with attention, and whether results are equal.

        Graphs are timed in turn, each for a third of a second and none after a pause: so all see the same
        temperature, and the power limit.
        """
        layers, step, start = [self.layer() for _ in range(LAYERS)], self.step(), self.my.randn(ROWS, WIDTH)
        usual, whole = module.FIRST_PIECE, torch.zeros_like(start)
        results: dict[str, Any] = {}
        graphs: dict[str, torch.cuda.CUDAGraph] = {}
        forms = {f"carried, {first} first": (stack.forward_carried, first) for first in FIRST_ROWS}
        for label, (form, first) in {"whole": (stack.forward_wide, 0), **forms}.items():
            module.FIRST_PIECE = first / ROWS

            def forward(form: Callable[..., Any] = form) -> torch.Tensor:
                return sum(form(layers, start.clone(), step, self.ranks))

            device, host = device_and_host_ms(forward, REPLAYS, dist.barrier)
            graphs[label] = graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                states = forward()
            graph.replay()
            torch.cuda.synchronize()
            if not first:
                whole = states.clone()
            results[label] = {
                "eager us": 1e3 * device / LAYERS, "host us": 1e3 * host / LAYERS, "us": [],
                "equal on both ranks": self.my.everyone_agrees(bits(states)),
                "furthest from the whole": (states - whole).abs().max().item(),
            }  # fmt: skip
        module.FIRST_PIECE = usual
        for _ in range(ROUNDS):
            for label, graph in graphs.items():
                dist.barrier()
                ms, _ = device_and_host_ms(lambda graph=graph: [graph.replay() for _ in range(BLOCK)], 1)
                results[label]["us"].append(1e3 * ms / BLOCK / LAYERS)
        for label, row in results.items():
            row["median us"] = statistics.median(row["us"][1:])  # the first heats
            say(
                f"a layer, {label}: {row['median us']:.1f} us in a graph, {row['eager us']:.1f} handed over "
                f"in {row['host us']:.1f}; equal on both ranks: {row['equal on both ranks']}, "
                f"furthest from the whole: {row['furthest from the whole']:.4f}"
            )
        return results

    def layer(self) -> Layer:
        shapes = cache_shape(ROWS // BLOCK_SIZE, KV_HEADS, BLOCK_SIZE, DIM, BF16, "cuda")
        caches = [torch.zeros(shape, dtype=BF16, device=self.my.device) for shape in shapes]
        qkv, o, gate_up, down = (self.weight(name) for name in HALVES)
        norm = self.my.weight
        return Layer(norm, qkv, o, norm, gate_up, down, *caches, HEADS, EPS, DIM**-0.5)

    def step(self) -> Step:
        """Whole prompts; their last tokens are wanted."""
        count, device, i32 = ROWS // PROMPT, self.my.device, torch.int32
        angles = torch.outer(torch.arange(PROMPT), 1e6 ** -(torch.arange(0, DIM, 2) / DIM))
        tiles = Tiles(*(torch.from_numpy(x).to(device) for x in make_tiles([PROMPT] * count, [0] * count)))
        tokens = torch.arange(ROWS, device=device)
        ends = torch.arange(0, ROWS + 1, PROMPT, dtype=i32, device=device)
        blocks = torch.arange(ROWS // BLOCK_SIZE, dtype=i32, device=device).view(count, -1)
        lengths = torch.full((count,), PROMPT, dtype=i32, device=device)
        cos_sin = torch.cat((angles.cos(), angles.sin()), dim=1).to(device, F32)
        positions = (tokens % PROMPT).to(i32)
        return Step(
            cos_sin, positions, tokens, blocks, ends, lengths, tiles=tiles, wanted=ends[1:].long() - 1
        )  # fmt: skip


def work(rank: int, store: str, options: argparse.Namespace) -> None:
    """One rank's process."""
    torch.cuda.set_device(rank)
    use_cache()
    device = torch.device("cuda", rank)
    dist.init_process_group("nccl", init_method=f"file://{store}", rank=rank, world_size=2, device_id=device)

    def say(line: str) -> None:
        if rank == 0:
            print(line, flush=True)

    with torch.inference_mode():
        bench = Bench(Rank(rank, 2))
        torch.manual_seed(rank)  # ranks hold different weights
        results: dict[str, Any] = {
            "sums": bench.sums(say), "products": bench.products(say), "layers": bench.layers(say)
        }  # fmt: skip
    if rank == 0 and options.out:
        results["facts"] = facts(("torch", "triton"))
        options.out.write_text(json.dumps(results, indent=1))
    dist.barrier()
    dist.destroy_process_group()
    if not all(row["equal on both ranks"] for row in results["layers"].values()):
        raise SystemExit("results are wrong")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="where to write everything as JSON")
    options = parser.parse_args()
    os.environ |= {"TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NCCL_NVLS_ENABLE": "0"}
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(work, (str(Path(folder, "store")), options), nprocs=2)


if __name__ == "__main__":
    main()
