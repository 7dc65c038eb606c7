"""What ranks do together, on as many GPUs of one host: whether it is right, and how long it takes.

    python benchmarks/gpu_ranks.py [--ranks 2] [--rounds 1000] [--out FILE]

First, random rounds: sums, sums with what follows them, gathers and draws, of sizes that change from round to
round, some of them in CUDA graphs, while now one rank and then another is held up at random. Each rank knows
what all of them put in; sums must be exact bit for bit, and every result the same on all ranks. Then times,
in graphs: the sum fused with residual and norm beside PyTorch's symmetric-memory operations and NCCL, each
with a kernel for residual and norm behind it; gathers and draws of a vocabulary. Half a minute on two H100s.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.gpu_facts import facts
from kernels.cuda import ranks as module
from kernels.cuda.compile import use_cache
from kernels.cuda.linear import SKINNY_ROWS, skinny_linear
from kernels.cuda.norm import rms_norm
from kernels.cuda.ranks import DeviceRanks
from kernels.cuda.sample import sample
from kernels.linear import pack
from kernels.ranks import Place
from kernels.sample import Features, SamplingColumns

BF16, F32 = torch.bfloat16, torch.float32
EPS = 1e-6
WIDTH, MOST_ROWS = 3584, 8192
ROWS = (1, 8, 64, 256, 2048, 8192)
VOCAB = 152_064
REPLAYS = 7
PLACES = (Place.EMBEDDED, Place.ATTENDED, Place.FED)


class Rank:
    """One process's side of it."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.device = torch.device("cuda", rank)
        module.CARRIED_ROWS, module.PIECE_ROWS = 4, 1  # few rows, so that many rounds have some
        self.ranks = DeviceRanks(dist.group.WORLD, self.device, MOST_ROWS, WIDTH, BF16)
        self.group_name = dist.group.WORLD.group_name
        self.numbers = torch.Generator(self.device)
        self.weight = torch.ones(WIDTH, dtype=BF16, device=self.device)
        self.place = Place.FED

    def other_place(self) -> Place:
        """One that the exchange before did not use."""
        self.place = PLACES[(self.place + 1) % len(PLACES)]
        return self.place

    def randn(self, *shape: int, dtype: torch.dtype = F32) -> torch.Tensor:
        """Normal numbers, the same on all ranks."""
        return torch.randn(*shape, generator=self.numbers, device=self.device).to(dtype)

    def everyone_agrees(self, values: torch.Tensor) -> bool:
        """Whether int64 values are the same on all ranks."""
        all_values = [torch.empty_like(values) for _ in range(self.size)]
        dist.all_gather(all_values, values)
        return all(torch.equal(values, other) for other in all_values)


def bits(x: torch.Tensor) -> torch.Tensor:
    """One int64 that any changed bit most likely changes."""
    words = x.contiguous().view({4: torch.int32, 2: torch.int16, 1: torch.uint8}[x.element_size()])
    return (words.long().flatten() * (1 + torch.arange(words.numel(), device=x.device) % 1009)).sum()


class Rounds:
    """Random exchanges, and what was wrong with them: counted on the device, so that nothing waits."""

    def __init__(self, rank: Rank, seed: int) -> None:
        self.my, self.dice = rank, random.Random(seed)
        self.wrong = torch.zeros(len(self.kinds), dtype=torch.int64, device=rank.device)
        self.checksums: list[torch.Tensor] = []
        columns = SamplingColumns.allocate(300, rank.device)
        columns.temperature[::2] = 0.8
        columns.seed.copy_(torch.arange(300))
        none = torch.zeros(300, dtype=torch.int32, device=rank.device)
        self.history = torch.zeros(300, 4, dtype=torch.int32, device=rank.device), none + 3, none
        self.columns, self.slots = columns, torch.arange(300, device=rank.device)
        self.identity = pack(torch.eye(WIDTH, dtype=BF16, device=rank.device))
        self.iteration = self.capture()

    @property
    def kinds(self) -> tuple[Callable[[], list[torch.Tensor]], ...]:
        kinds = self.plain, self.skinny, self.pushed, self.wide, self.gather, self.draw, self.graph
        return (*kinds, self.carried) if self.my.size == 2 else kinds

    def run(self, number: int) -> dict[str, Any]:
        """So many rounds."""
        for i in range(number):
            my = self.my
            my.numbers.manual_seed(i)
            late, cycles = self.dice.randrange(my.size), self.dice.choice((0, 0, 3_000, 30_000, 300_000))
            if late == my.rank and cycles:
                torch.cuda._sleep(cycles)
            kind = self.dice.randrange(len(self.kinds))
            *results, wrong = self.kinds[kind]()
            self.wrong[kind] += wrong
            self.checksums.append(torch.stack([bits(x) for x in results]).sum())
        torch.cuda.synchronize()
        names = [kind.__name__ for kind in self.kinds]
        return {
            "rounds": number,
            "wrong": {name: n for name, n in zip(names, self.wrong.tolist(), strict=True) if n},
            "equal on all ranks": self.my.everyone_agrees(torch.stack(self.checksums)),
        }

    def rows(self, most: int) -> int:
        """Often few."""
        return self.dice.randint(1, self.dice.choice((4, 64, most)))

    def parts(self, rows: int, width: int, dtype: torch.dtype) -> tuple[Place, torch.Tensor, torch.Tensor]:
        """A place, this rank's part in it, and the exact sum of all."""
        my = self.my
        every = my.randn(my.size, rows, width, dtype=dtype)
        total = torch.zeros(rows, width, device=my.device)
        for part in every:
            total += part.float()
        place = my.other_place()
        mine = my.ranks.part(place, rows, width, dtype).copy_(every[my.rank])
        return place, mine, total

    def plain(self) -> list[torch.Tensor]:
        width, dtype = self.dice.choice((WIDTH, 896, 576, 100)), self.dice.choice((BF16, F32))
        place, part, total = self.parts(self.rows(64 if dtype is F32 else 3000), width, dtype)
        result = self.my.ranks.summed(place, part)
        return [result, (result != total.to(dtype)).sum()]

    def skinny(self) -> list[torch.Tensor]:
        rows = self.dice.randint(1, SKINNY_ROWS)
        place, part, total = self.parts(rows, WIDTH, F32)
        hidden = self.my.randn(rows, WIDTH)
        exact, out = total + hidden, torch.empty(rows, WIDTH, dtype=BF16, device=self.my.device)
        squares = torch.empty(1, rows, device=self.my.device)
        self.my.ranks.add(place, part, hidden, self.my.weight, EPS, out, squares)
        wrong = (hidden != exact).sum() + (out != exact.to(BF16)).sum()
        wrong += ((squares[0] / exact.pow(2).sum(1) - 1).abs() > 1e-5).sum()
        return [hidden, out, squares, wrong]

    def pushed(self) -> list[torch.Tensor]:
        """Parts that a product by one writes to all ranks itself."""
        rows, my = self.dice.randint(1, SKINNY_ROWS), self.my
        place, part, total = self.parts(rows, WIDTH, BF16)
        slots = my.ranks.slots(place, rows, WIDTH, BF16)
        skinny_linear(part, self.identity, slots.own, remotes=slots.remotes)
        result = my.ranks.summed(place, slots.own, parts=slots.parts)
        return [result, (result != total.to(BF16)).sum()]

    def wide(self) -> list[torch.Tensor]:
        rows = self.rows(3000)
        place, part, total = self.parts(rows, WIDTH, BF16)
        hidden = self.my.randn(rows, WIDTH)
        exact, out = total + hidden, torch.empty(rows, WIDTH, dtype=BF16, device=self.my.device)
        self.my.ranks.add(place, part, hidden, self.my.weight, EPS, out)
        normed = exact * torch.rsqrt(exact.pow(2).mean(1, keepdim=True) + EPS)
        wrong = (hidden != exact).sum() + ((out - normed).abs() > 0.02 * normed.abs() + 1e-3).sum()
        return [hidden, out, wrong]

    def carried(self) -> list[torch.Tensor]:
        """Up to eight behind each other at two places, as in a stack, with products meanwhile; at times one
        with other exchanges between bringing and adding. A sum at a third place is the last."""
        rows, mixed = max(4, self.rows(3000)), self.dice.random() < 0.3
        hidden = self.my.randn(rows, WIDTH)
        exact, out = hidden.clone(), torch.empty(rows, WIDTH, dtype=BF16, device=self.my.device)
        square = torch.zeros(rows, rows, dtype=BF16, device=self.my.device)
        places = [self.my.other_place(), self.my.other_place()]
        for i in range(1 if mixed else self.dice.randint(1, 8)):
            every = self.my.randn(2, rows, WIDTH, dtype=BF16)
            mine, brought = self.my.ranks.part(places[i % 2], rows, WIDTH, BF16), []
            for piece in self.my.ranks.pieces(rows):
                mine[piece] = every[self.my.rank][piece]
                brought.append(self.my.ranks.bring(places[i % 2], mine, piece))
                torch.mm(square[piece], square)
                if mixed:
                    self.my.ranks.gathered(hidden[:2, :64])
            for one in brought:
                self.my.ranks.add_brought(one, hidden, self.my.weight, EPS, out)
            exact = (every[0].float() + every[1].float()) + exact
        self.my.place = places[1]
        normed = exact * torch.rsqrt(exact.pow(2).mean(1, keepdim=True) + EPS)
        wrong = (hidden != exact).sum() + ((out - normed).abs() > 0.02 * normed.abs() + 1e-3).sum()
        place, part, total = self.parts(1, 64, F32)
        result = self.my.ranks.summed(place, part)
        return [hidden, out, result, wrong + (result != total).sum()]

    def gather(self) -> list[torch.Tensor]:
        rows, width = self.rows(120), 64 * self.dice.randint(1, 1500)
        every = self.my.randn(self.my.size, rows, width)
        result = self.my.ranks.gathered(every[self.my.rank])
        return [result, (result != every.transpose(0, 1).reshape(rows, -1)).sum()]

    def draw(self) -> list[torch.Tensor]:
        rows, width = self.rows(300), 64 * self.dice.randint(1, 600)
        logits = (self.my.randn(rows, self.my.size * width) * 8).round() / 8
        vocab = logits.shape[1] - self.dice.randint(0, 63)
        features = Features(any_random=self.dice.random() < 0.7)
        arguments = self.slots[:rows], self.columns, *self.history, vocab, features
        mine = logits.chunk(self.my.size, dim=1)[self.my.rank]
        result = sample(mine, *arguments, self.my.ranks)
        expected = sample(logits, *arguments)
        wrong = (result.token_ids != expected.token_ids).sum() + (~result.finite).sum()
        return [result.token_ids, wrong]

    def capture(self) -> tuple[torch.cuda.CUDAGraph, torch.Tensor, list[torch.Tensor]]:
        """A graph like an iteration's: eight sums with what follows them, of two ranks two that are carried,
        then a draw."""
        my, rows = self.my, 24
        given = torch.zeros(my.size, rows, WIDTH, device=my.device)
        hidden, out = torch.zeros(rows, WIDTH, device=my.device), torch.empty_like(given[0], dtype=BF16)
        squares = torch.empty(1, 32, device=my.device)
        width = WIDTH // my.size // 64 * 64
        arguments = self.slots[:rows], self.columns, *self.history, width * my.size, Features(any_random=True)
        drawn: list[torch.Tensor] = []

        def iteration() -> None:
            hidden.zero_()
            for i in range(8):
                place = PLACES[1 + i % 2]
                part = my.ranks.part(place, rows, WIDTH, F32).copy_(given[my.rank])
                my.ranks.add(place, part, hidden, my.weight, EPS, out, squares)
            for place in (Place.EMBEDDED, Place.ATTENDED) if my.size == 2 else ():
                part = my.ranks.part(place, rows, WIDTH, BF16).copy_(given[my.rank])
                for one in [my.ranks.bring(place, part, piece) for piece in my.ranks.pieces(rows)]:
                    my.ranks.add_brought(one, hidden, my.weight, EPS, out)
            logits = hidden[:, my.rank * width : (my.rank + 1) * width]
            drawn[:] = [sample(logits, *arguments, my.ranks).token_ids]

        my.ranks.quiet = True
        iteration()
        torch.cuda.synchronize()
        my.ranks.quiet = False
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            iteration()
        return graph, given, [hidden, out, drawn[0]]

    def graph(self) -> list[torch.Tensor]:
        my, (graph, given, results) = self.my, self.iteration
        # The graph's first place must not be that of the exchange before.
        place, part, _ = self.parts(1, 64, F32)
        while place is not Place.EMBEDDED:
            my.ranks.summed(place, part)
            place, part, _ = self.parts(1, 64, F32)
        my.ranks.summed(place, part)
        given.copy_(my.randn(*given.shape))
        for _ in range(self.dice.randint(1, 3)):
            graph.replay()
        my.place = Place.FED
        total, exact = torch.zeros_like(given[0]), torch.zeros_like(given[0])
        for part in given:
            total += part
        for _ in range(8):
            exact = total + exact
        for _ in range(2 if my.size == 2 else 0):
            exact = (given[0].to(BF16).float() + given[1].to(BF16).float()) + exact
        return [*(result.clone() for result in results), (results[0] != exact).sum()]


def seconds(run: Callable[[int], Any], repeats: int) -> float:
    """Median time of one of `repeats` runs in a graph; run i is told its number."""
    for i in range(2):
        run(i)
    torch.cuda.synchronize()
    dist.barrier()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for i in range(repeats):
            run(i)
    times = []
    for i in range(REPLAYS + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        dist.barrier()
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        if i >= 2:
            times.append(start.elapsed_time(end) / 1e3 / repeats)
    slowest = torch.tensor(statistics.median(times), device="cuda")
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return slowest.item()


class Times:
    """The same sum, residual and norm in several ways."""

    def __init__(self, rank: Rank) -> None:
        self.my = rank
        self.common = symmetric_memory.empty(MOST_ROWS, WIDTH, dtype=BF16, device=rank.device).zero_()
        symmetric_memory.rendezvous(self.common, rank.group_name)
        self.hidden = torch.zeros(MOST_ROWS, WIDTH, device=rank.device)
        self.residual, self.out = (torch.zeros_like(self.common) for _ in range(2))
        self.squares = torch.zeros(1, SKINNY_ROWS, device=rank.device)
        self.o = pack(torch.zeros(WIDTH, WIDTH // 2, dtype=BF16, device=rank.device))
        self.attended = torch.zeros(SKINNY_ROWS, WIDTH // 2, dtype=BF16, device=rank.device)

    def fused(self, rows: int, dtype: torch.dtype) -> Callable[[int], None]:
        my, squares = self.my, self.squares if rows <= SKINNY_ROWS else None

        def run(i: int) -> None:
            place = PLACES[1 + i % 2]
            part = my.ranks.part(place, rows, WIDTH, dtype)
            my.ranks.add(place, part, self.hidden[:rows], my.weight, EPS, self.out[:rows], squares)

        return run

    def product(self, rows: int, is_pushed: bool) -> Callable[[int], None]:
        """A product of few rows in front, whose part is read from afar or pushed."""
        my, ranks = self.my, self.my.ranks

        def run(i: int) -> None:
            place = PLACES[1 + i % 2]
            slots = ranks.slots(place, rows, WIDTH, BF16) if is_pushed else None
            own = slots.own if slots else ranks.part(place, rows, WIDTH, BF16)
            remotes, parts = (slots.remotes, slots.parts) if slots else (None, None)
            part = skinny_linear(self.attended[:rows], self.o, own, remotes=remotes)
            hidden, out = self.hidden[:rows], self.out[:rows]
            ranks.add(place, part, hidden, my.weight, EPS, out, self.squares, parts)

        return run

    def norm(self, x: torch.Tensor) -> None:
        rms_norm(x, self.my.weight, EPS, self.residual[: len(x)], self.out[: len(x)])

    def one_shot(self, rows: int) -> Callable[[int], None]:
        operation = torch.ops.symm_mem.one_shot_all_reduce
        return lambda _: self.norm(operation(self.common[:rows], "sum", self.my.group_name))

    def two_shot(self, rows: int) -> Callable[[int], None]:
        operation = torch.ops.symm_mem.two_shot_all_reduce_
        return lambda _: self.norm(operation(self.common[:rows], "sum", self.my.group_name))

    def nccl(self, rows: int) -> Callable[[int], None]:
        def run(_: int) -> None:
            dist.all_reduce(self.residual[:rows])
            self.norm(self.residual[:rows])

        return run

    def ways(self, rows: int) -> dict[str, Callable[[int], None]]:
        found = {"fused bf16": self.fused(rows, BF16)}
        if rows <= SKINNY_ROWS:
            found["fused fp32"] = self.fused(rows, F32)
            found["product, fused"] = self.product(rows, is_pushed=False)
            found["product that pushes, fused"] = self.product(rows, is_pushed=True)
        found["one-shot"], found["two-shot"] = self.one_shot(rows), self.two_shot(rows)
        return found | {"NCCL": self.nccl(rows)}

    def sums(self, say: Callable[[str], None]) -> list[dict[str, Any]]:
        """Of each number of rows and way, microseconds."""
        results = []
        for rows in ROWS:
            row: dict[str, Any] = {"rows": rows}
            for name, run in self.ways(rows).items():
                try:
                    row[name] = 1e6 * seconds(run, 40 if rows <= 256 else 8)
                except RuntimeError as error:  # an operation that this build lacks: all ranks alike
                    row[name] = None
                    say(f"{name}, {rows} rows: {str(error).splitlines()[0]}")
            results.append(row)
            figures = ", ".join(f"{k} {v:.1f}" for k, v in row.items() if k != "rows" and v is not None)
            say(f"{rows:5} rows, us: {figures}")
        return results

    def vocabulary(self, say: Callable[[str], None]) -> list[dict[str, Any]]:
        """Gathers and draws, beside one rank's draw of the whole."""
        my, results = self.my, []
        for rows in (1, 8, 64):
            logits = torch.randn(rows, VOCAB, device=my.device)
            mine = logits.chunk(my.size, dim=1)[my.rank].contiguous()
            columns = SamplingColumns.allocate(rows, my.device)
            columns.temperature.fill_(0.8)
            none = torch.zeros(rows, dtype=torch.int32, device=my.device)
            slots = torch.arange(rows, device=my.device)
            history = torch.zeros(rows, 4, dtype=torch.int32, device=my.device), none, none
            rest = slots, columns, *history, VOCAB, Features(any_random=True)
            row = {
                "rows": rows,
                "gather": 1e6 * seconds(lambda _, x=mine: my.ranks.gathered(x), 10),
                "draw": 1e6 * seconds(lambda _, x=mine, a=rest: sample(x, *a, my.ranks), 20),
                "draw of one rank": 1e6 * seconds(lambda _, x=logits, a=rest: sample(x, *a), 20),
            }
            results.append(row)
            say(f"{rows:5} rows, us: " + ", ".join(f"{k} {v:.1f}" for k, v in row.items() if k != "rows"))
        return results


def work(rank: int, size: int, store: str, options: argparse.Namespace) -> None:
    """One rank's process."""
    torch.cuda.set_device(rank)
    use_cache()
    device = torch.device("cuda", rank)
    dist.init_process_group(
        "nccl", init_method=f"file://{store}", rank=rank, world_size=size, device_id=device
    )

    def say(line: str) -> None:
        if rank == 0:
            print(line, flush=True)

    my = Rank(rank, size)
    checked = Rounds(my, options.seed).run(options.rounds)
    everything: list[Any] = [None] * size
    dist.all_gather_object(everything, checked)
    say("\n".join(f"rank {r}: {found}" for r, found in enumerate(everything)))
    times = Times(my)
    results = {"checked": everything, "sums": times.sums(say), "vocabulary": times.vocabulary(say)}
    if rank == 0 and options.out:
        results["facts"] = facts(("torch", "triton"))
        options.out.write_text(json.dumps(results, indent=1))
    dist.barrier()
    dist.destroy_process_group()
    if any(found["wrong"] or not found["equal on all ranks"] for found in everything):
        raise SystemExit("results are wrong")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="where to write everything as JSON")
    options = parser.parse_args()
    os.environ |= {"TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NCCL_NVLS_ENABLE": "0"}
    with tempfile.TemporaryDirectory() as folder:
        arguments = options.ranks, str(Path(folder, "store")), options
        torch.multiprocessing.spawn(work, arguments, nprocs=options.ranks)


if __name__ == "__main__":
    main()
