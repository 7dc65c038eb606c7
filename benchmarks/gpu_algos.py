"""Which of cuBLASLt's algorithms suits a layer's products best once the chip is limited by its power.

    python -m benchmarks.gpu_algos [--rows 8192 1000 512 256] [--seconds 1.5] [--vary 0] [--out FILE]

In long prefills clocks fall to what the power limit leaves. Then the energy of a product counts, and what the
heuristic picks for a cold chip need not be best. For each product of a Qwen2.5-7B layer, as the engine has
torch run it, cuBLASLt's heuristic is asked for all algorithms that it knows. Each is checked against float32
and timed cold (single bursts, with pauses). The fastest, and the fastest of other tiles, are then timed hot:
blocks of 0.2 s, of torch's own choice and of the candidate in turn and without pauses, so that both see the
same temperature and limit. "ratio" is the candidate's time over torch's, each the median of its blocks: below
1 the candidate is better. MHz and W are means while it ran, of nvidia-smi. A minute for each number of rows.

`--vary N` also tries what differs from the N fastest in one attribute. Such algorithms passed the library's
check, but nobody proposed them: give them a run of their own, and a larger --budget.

Tiles and clusters are columns of W by rows of x, for cuBLAS sees everything transposed.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.gpu_algos_lt import MIB, Lt, LtError, Matmul, Proposal
from benchmarks.gpu_facts import facts
from benchmarks.gpu_watch import Watch
from kernels.cuda.cublaslt import TYPE_BF16, TYPE_F32

BF16, F32 = torch.bfloat16, torch.float32
# What torch gives cuBLAS on this chip, and more.
WORKSPACES = (32 * MIB, 128 * MIB)
# Distinct weights to go through, so that L2 (50 MB) holds none of them when their turn comes.
WEIGHT_BYTES = 200_000_000
# Products are launched from graphs, so that the host's time does not show.
GRAPH_SECONDS = 3e-3
MAX_REPLAYS = 500
# A pause of twice a burst leaves the chip far from its limit.
BURSTS = 5
PAUSE = 6e-3
# Behind the product before, until clocks are up again.
COOL_SECONDS = 0.3
BLOCK_SECONDS = 0.2
HEAT_SECONDS = 0.8
# Of a product's time, what the cold half may take.
COLD_SHARE = 0.25
BEST = 6
# Another tile is timed hot unless it is so much slower cold.
HOPELESS = 1.25
CHECKED_ROWS = 64
TOLERANCE = 0.01
SHOWN = 12


class Spec(NamedTuple):
    """D = x W^T (+ bias), or D += x W^T where it `adds`; x is [rows, K], W [N, K]."""

    name: str
    n: int
    k: int
    out: torch.dtype = BF16
    bias: bool = False
    adds: bool = False


# Rows and columns of the weights of one of two ranks, whose parts of o and down are added up elsewhere.
HALVES = {"qkv": (2304, 3584), "o": (3584, 1792), "gate_up": (18944, 3584), "down": (3584, 9472)}
SPECS = {
    spec.name: spec
    for spec in (
        Spec("qkv", 4608, 3584, bias=True),
        Spec("o", 3584, 3584, F32, adds=True),
        Spec("gate_up", 37888, 3584),
        Spec("down", 3584, 18944, F32, adds=True),
        Spec("o-bf16", 3584, 3584),
        Spec("down-bf16", 3584, 18944),
        *(Spec(f"{name}-half", n, k, bias=name == "qkv") for name, (n, k) in HALVES.items()),
    )
}
ENGINE = ("qkv", "o", "gate_up", "down")


class Hot(NamedTuple):
    """What alternating blocks gave; clocks in MHz, power in W, None where nvidia-smi said nothing."""

    us: float
    torch_us: float
    ratio: float
    blocks: int
    mhz: float | None
    torch_mhz: float | None
    watts: float | None


@dataclass
class Candidate:
    """An algorithm and what became of it; `deviation` is the largest error over the largest result."""

    proposal: Proposal
    error: str = "not timed"
    deviation: float | None = None
    cold_us: float = float("inf")
    hot: Hot | None = None


class Block(NamedTuple):
    """Seconds by the device's clock, and from when to when by the host's (since the epoch)."""

    seconds: float
    start: float
    end: float


def num_copies(spec: Spec, pool: int) -> int:
    """How many distinct weights to go through, of a pool of so many elements."""
    size = spec.n * spec.k
    return min(-(-WEIGHT_BYTES // (2 * size)), pool // size)


def num_launches(spec: Spec, rows: int, copies: int) -> int:
    """Products in a graph: whole rounds of the copies that take about GRAPH_SECONDS at an H100's best."""
    seconds = max(2 * rows * spec.n * spec.k / 800e12, 2 * spec.n * spec.k / 3e12)
    return copies * max(1, round(GRAPH_SECONDS / (copies * seconds)))


class Problem:
    """A product of so many rows: its operands, torch's way to compute it and cuBLASLt's."""

    def __init__(self, lt: Lt, spec: Spec, rows: int, pool: torch.Tensor, workspace: torch.Tensor) -> None:
        n, k, copies = spec.n, spec.k, num_copies(spec, pool.numel())
        self.spec, self.rows, self.workspace = spec, rows, workspace
        self.weights = [w.view(n, k) for w in pool[: copies * n * k].split(n * k)]
        self.launches = num_launches(spec, rows, copies)
        self.flops = 2 * rows * n * k
        self.x = torch.randn(rows, k, device="cuda", dtype=BF16)
        self.bias = torch.randn(n, device="cuda", dtype=BF16) if spec.bias else None
        self.before = torch.randn(rows, n, device="cuda", dtype=spec.out) if spec.adds else None
        self.out = torch.zeros(rows, n, device="cuda", dtype=spec.out)
        self.sample = torch.linspace(0, rows - 1, min(rows, CHECKED_ROWS)).long().cuda()
        self.exact = torch.mm(self.x[self.sample].float(), self.weights[0].float().t())
        if self.bias is not None:
            self.exact += self.bias
        if self.before is not None:
            self.exact += self.before[self.sample]
        kind = TYPE_F32 if spec.out is F32 else TYPE_BF16
        address = 0 if self.bias is None else self.bias.data_ptr()
        self.matmul = Matmul(lt, rows, n, k, kind, address, spec.adds)

    def run_torch(self, i: int) -> None:
        """The product with the i-th weights, counted round, as the engine has torch compute it."""
        weight = self.weights[i % len(self.weights)].t()
        if self.spec.adds:
            torch.addmm(self.out, self.x, weight, out_dtype=F32, out=self.out)
        elif self.bias is not None:
            torch.addmm(self.bias, self.x, weight, out=self.out)
        else:
            torch.mm(self.x, weight, out=self.out)

    def run(self, proposal: Proposal, i: int) -> None:
        """The same by an algorithm."""
        self.matmul.run(
            proposal, self.weights[i % len(self.weights)].data_ptr(), self.x.data_ptr(), self.out.data_ptr(),
            self.workspace.data_ptr(), torch.cuda.current_stream().cuda_stream,
        )  # fmt: skip

    def deviation(self, run: Callable[[int], Any]) -> float:
        """Of the result: its largest error in a sample of rows over its largest number; inf with any NaN."""
        if self.before is None:
            self.out.fill_(float("nan"))
        else:
            self.out.copy_(self.before)
        run(0)
        if self.out.isnan().any().item():
            return float("inf")
        error = (self.out[self.sample].float() - self.exact).abs().max()
        return (error / self.exact.abs().max().clamp_min(1e-20)).item()

    def captured(self, run: Callable[[int], Any]) -> torch.cuda.CUDAGraph:
        """`launches` runs, going through the weights; what a first run sets up must be there already."""
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin()
        try:
            for i in range(self.launches):
                run(i)
        finally:
            graph.capture_end()
        return graph


def timed(graph: torch.cuda.CUDAGraph, replays: int) -> Block:
    """Replay a graph so often, and wait."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start = time.time()
    torch.cuda._sleep(100_000)  # the device waits until the host is ahead
    begin.record()
    for _ in range(replays):
        graph.replay()
    end.record()
    end.synchronize()
    return Block(max(begin.elapsed_time(end), 1e-3) / 1e3, start, time.time())


def cold_seconds(graph: torch.cuda.CUDAGraph) -> float:
    """Median of single replays with pauses; the first one, which uploads the graph, does not count."""
    timed(graph, 1)
    times = []
    for _ in range(BURSTS):
        time.sleep(PAUSE)
        times.append(timed(graph, 1).seconds)
    return statistics.median(times)


def compared(
    candidate: Sequence[tuple[Block, int]], baseline: Sequence[tuple[Block, int]], watch: Watch
) -> Hot:
    """From blocks, each with its number of products."""
    us, torch_us = (
        1e6 * statistics.median(block.seconds / products for block, products in blocks)
        for blocks in (candidate, baseline)
    )
    mhz, watts = watch.means([(block.start, block.end) for block, _ in candidate])
    torch_mhz, _ = watch.means([(block.start, block.end) for block, _ in baseline])
    return Hot(us, torch_us, us / torch_us, len(candidate), mhz, torch_mhz, watts)


def finalists(candidates: Iterable[Candidate]) -> list[Candidate]:
    """Whom to time hot: the BEST cold, and the fastest of other tiles unless HOPELESS.

    Each tile's fastest come first, so that a run out of time has seen what differs most.
    """
    right = sorted((c for c in candidates if not c.error), key=lambda c: c.cold_us)
    of_tile: dict[int | None, Candidate] = {}
    for candidate in right:
        of_tile.setdefault(candidate.proposal.config["tile"], candidate)
    first = [c for c in of_tile.values() if c.cold_us <= HOPELESS * right[0].cold_us]
    return first + [c for c in right[:BEST] if all(c is not other for other in first)]


class Contest:
    """A product's algorithms, timed until a deadline (time.monotonic)."""

    def __init__(self, problem: Problem, watch: Watch, seconds: float, budget: float) -> None:
        self.problem, self.watch, self.seconds = problem, watch, seconds
        now = time.monotonic()
        self.cold_until, self.until = now + COLD_SHARE * budget, now + budget
        time.sleep(COOL_SECONDS)
        self.torch_deviation = problem.deviation(problem.run_torch)
        self.torch_graph = problem.captured(problem.run_torch)
        self.torch_seconds = cold_seconds(self.torch_graph)
        self.candidates: list[Candidate] = []
        self.left_out = 0

    def run(self, vary: int) -> None:
        """Everything."""
        try:
            self._cold(self.problem.matmul.proposals(WORKSPACES))
        except LtError as error:  # a product that the library knows nothing for; the next one shall run
            print(f"{self.problem.spec.name}: {error}")
        fastest = sorted((c for c in self.candidates if not c.error), key=lambda c: c.cold_us)
        for candidate in fastest[:vary]:
            self._cold(self.problem.matmul.neighbours(candidate.proposal, max(WORKSPACES)))
        self._hot()

    def _cold(self, proposals: Iterable[Proposal]) -> None:
        known = {c.proposal.key for c in self.candidates}
        for proposal in proposals:
            if proposal.key in known:
                continue
            known.add(proposal.key)
            candidate = Candidate(proposal)
            self.candidates.append(candidate)
            if time.monotonic() < self.cold_until:
                self._try(candidate)

    def _try(self, candidate: Candidate) -> None:
        run = partial(self.problem.run, candidate.proposal)
        try:
            candidate.deviation = self.problem.deviation(run)
            if candidate.deviation < TOLERANCE:
                seconds = cold_seconds(self.problem.captured(run))
                candidate.cold_us, candidate.error = 1e6 * seconds / self.problem.launches, ""
            else:
                candidate.error = f"off by {candidate.deviation:.3f} of the largest"
        except LtError as error:
            candidate.error = str(error)

    def _block(self, graph: torch.cuda.CUDAGraph, seconds: float) -> tuple[Block, int]:
        """A block of a graph that takes so long, and how many products it ran."""
        replays = min(MAX_REPLAYS, max(1, round(BLOCK_SECONDS / seconds)))
        return timed(graph, replays), replays * self.problem.launches

    def _hot(self) -> None:
        chosen = finalists(self.candidates)
        graphs = [self.problem.captured(partial(self.problem.run, c.proposal)) for c in chosen]
        heated = time.monotonic() + HEAT_SECONDS
        while time.monotonic() < heated:
            self._block(self.torch_graph, self.torch_seconds)
        for i, (candidate, graph) in enumerate(zip(chosen, graphs, strict=True)):
            if i and time.monotonic() + self.seconds > self.until:
                self.left_out = len(chosen) - i
                break
            seconds = candidate.cold_us * self.problem.launches / 1e6
            baseline: list[tuple[Block, int]] = []
            own: list[tuple[Block, int]] = []
            until = time.monotonic() + self.seconds
            while time.monotonic() < until or len(own) < 2:
                baseline.append(self._block(self.torch_graph, self.torch_seconds))
                own.append(self._block(graph, seconds))
            candidate.hot = compared(own, baseline, self.watch)


def cell(value: float | None, digits: int = 0) -> str:
    """A number, or "-" for None."""
    return "-" if value is None else f"{value:.{digits}f}"


def line(candidate: Candidate, lt: Lt, flops: int) -> str:
    """A row of the table."""
    proposal, config, hot = candidate.proposal, candidate.proposal.config, candidate.hot
    kinds = [lt.name(kind, config[kind]) for kind in ("tile", "stages", "cluster", "inner")]
    rest = [cell(config[name]) for name in ("split_k", "reduction", "swizzle", "custom")]
    text = "{:>4} {:>9} {:>8} {:>7} {:>8}".format(cell(config["id"]), *kinds)
    text += " {:>5} {:>3} {:>3} {:>4}".format(*rest) + f" {proposal.workspace / MIB:6.1f}"
    text += f" {candidate.cold_us:8.1f} {flops / candidate.cold_us / 1e6:5.0f}"
    if hot is None:
        return f"{text} {'':41} {proposal.origin}"
    return (
        f"{text} {hot.us:8.1f} {flops / hot.us / 1e6:5.0f} {hot.ratio:6.3f} {cell(hot.mhz):>5}"
        f" {cell(hot.torch_mhz):>7} {cell(hot.watts):>5} {proposal.origin}"
    )


HEADER = (
    "  id      tile   stages cluster    inner split red swz cust ws MiB"
    "  cold us  TF/s   hot us  TF/s  ratio   MHz (torch)     W proposed"
)


def report(contest: Contest, lt: Lt) -> None:
    """Print the table: whoever was timed hot, by ratio, then the others, by their cold times."""
    problem, spec, candidates = contest.problem, contest.problem.spec, contest.candidates
    right = [c for c in candidates if not c.error]
    order = sorted(right, key=lambda c: (c.hot is None, c.hot.ratio if c.hot else c.cold_us))
    untimed = sum(c.error == "not timed" for c in candidates)
    us = 1e6 * contest.torch_seconds / problem.launches
    hot = [c.hot.torch_us for c in right if c.hot]
    kind = "+= float32" if spec.adds else "bias" if spec.bias else "bfloat16"
    print(
        f"\n{spec.name}: {problem.rows} x {spec.n} x {spec.k}, {kind}. {len(candidates)} algorithms,"
        f" {len(candidates) - len(right) - untimed} refused or wrong; no time for {untimed} cold,"
        f" {contest.left_out} hot."
    )
    print(f"torch: cold {us:.1f} us, {problem.flops / us / 1e6:.0f} TFLOP/s", end="")
    if hot:
        middle = statistics.median(hot)
        print(f"; hot {middle:.1f} us, {problem.flops / middle / 1e6:.0f} TFLOP/s", end="")
    print(f"\n{HEADER}")
    for i, candidate in enumerate(order):
        if candidate.hot or i < SHOWN:
            print(line(candidate, lt, problem.flops))
    for error in sorted({c.error for c in candidates} - {"", "not timed"})[:5]:
        print(f"     {error}")
    sys.stdout.flush()


def finite(value: float | None) -> float | None:
    """None where JSON has no number."""
    return value if value is not None and math.isfinite(value) else None


def as_json(contest: Contest, lt: Lt) -> dict[str, Any]:
    """Everything of a product; `algo` is what cuBLASLt of this version takes as it is."""
    problem, spec = contest.problem, contest.problem.spec
    rows = []
    for c in contest.candidates:
        p = c.proposal
        names = {kind: lt.name(kind, p.config[kind]) for kind in ("tile", "stages", "cluster", "inner")}
        rows.append({
            "config": p.config, "names": names, "workspace": p.workspace, "waves": p.waves,
            "origin": p.origin, "algo": p.key.hex(), "error": c.error, "deviation": finite(c.deviation),
            "cold_us": finite(c.cold_us), "hot": c.hot and c.hot._asdict(),
        })  # fmt: skip
    return {
        "name": spec.name, "rows": problem.rows, "n": spec.n, "k": spec.k, "out": str(spec.out),
        "torch_cold_us": 1e6 * contest.torch_seconds / problem.launches,
        "torch_deviation": finite(contest.torch_deviation), "left_out": contest.left_out, "algorithms": rows,
    }  # fmt: skip


def main() -> None:
    """Measure and print."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--rows", type=int, nargs="+", default=[8192, 1000, 512, 256])
    p.add_argument("--products", nargs="+", choices=SPECS, default=ENGINE)
    p.add_argument("--seconds", type=float, default=1.5, help="for each algorithm that is timed hot")
    p.add_argument("--budget", type=float, default=56, help="seconds for each number of rows")
    p.add_argument("--vary", type=int, default=0, help="try what is beside the so many fastest")
    p.add_argument("--out", type=Path, help="where to write everything as JSON")
    o = p.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(0)
    result: dict[str, Any] = {"facts": facts(("torch", "nvidia-cublas")), "products": []}
    # On a stream of its own: the default one cannot be captured.
    with torch.inference_mode(), torch.cuda.stream(torch.cuda.Stream()), closing(Watch()) as watch:
        pool = torch.empty(max(s.n * s.k for s in SPECS.values()), dtype=BF16, device="cuda").normal_(0, 0.02)
        workspace = torch.empty(max(WORKSPACES), dtype=torch.uint8, device="cuda")
        lt = Lt()
        result |= {"library": str(lt.path), "version": lt.version}
        print(f"{torch.cuda.get_device_name()}, cuBLASLt {lt.version}, {lt.path}")
        for rows in o.rows:
            for name in o.products:
                problem = Problem(lt, SPECS[name], rows, pool, workspace)
                contest = Contest(problem, watch, o.seconds, o.budget / len(o.products))
                contest.run(o.vary)
                report(contest, lt)
                problem.matmul.close()
                result["products"].append(as_json(contest, lt))
                if o.out:  # now, lest a later product's failure take it along
                    o.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
