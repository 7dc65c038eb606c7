"""Ranks as processes: a decoder layer's kernels in Triton's interpreter and on the CPU, for real.

What one rank alone would give is computed beside it by the caller. Ranks meet in memory that all processes
map, and by gloo. `python -m tests.support.rank_group RANK SIZE FOLDER` is one of them.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

import tests.support.triton  # noqa: F401  # before anything imports triton
from kernels.attention import Tiles, cache_shape, make_tiles
from kernels.cuda import draw, layer
from kernels.cuda import ranks as device_ranks
from kernels.cuda import sample as cuda_sample
from kernels.cuda.ranks import DeviceRanks, Shared
from kernels.layer import Layer, LayerStack, Step
from kernels.linear import PackedLinear, pack
from kernels.ranks import Place
from kernels.sample import Features, SamplingColumns, sample

HIDDEN, HEADS, KV_HEADS, DIM, INNER, BLOCK, EPS = 48, 4, 2, 16, 64, 8, 1e-5
ROUNDS, VOCAB = 7, 300
CARRIED_ROWS = 4


class GlooRanks:
    """`kernels.ranks.Ranks` by gloo."""

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def part(self, place, rows, width, dtype):
        return torch.empty(rows, width, dtype=dtype)

    def summed(self, place, part):
        dist.all_reduce(part)
        return part

    def gathered(self, columns):
        pieces = [torch.empty_like(columns) for _ in range(self.size)]
        dist.all_gather(pieces, columns.contiguous())
        return torch.cat(pieces, dim=1)


def plain(weight, bias=None):
    """Packed as on CUDA: the plain matrix."""
    return PackedLinear(tuple(weight.shape), weight.dtype, weight.dtype, weight.contiguous(), bias, False)


def make_layers(rank: int, size: int, packs) -> list[Layer]:
    """Layers, or a rank's part of them: its heads, and its part of what the feed-forward block holds."""
    generator = torch.Generator().manual_seed(3)

    def rand(*shape):
        return torch.randn(*shape, generator=generator) * shape[-1] ** -0.5

    def mine(x, dim=0):
        return x.chunk(size, dim=dim)[rank]

    layers = []
    for _ in range(3):
        q, k, v = rand(HEADS * DIM, HIDDEN), rand(KV_HEADS * DIM, HIDDEN), rand(KV_HEADS * DIM, HIDDEN)
        o, down, bias = rand(HIDDEN, HEADS * DIM), rand(HIDDEN, INNER), rand(HIDDEN)
        gate, up = rand(INNER, HIDDEN), rand(INNER, HIDDEN)
        norms = 1 + rand(2, HIDDEN)
        shapes = cache_shape(6, KV_HEADS // size, BLOCK, DIM, torch.float32)
        caches = (torch.zeros(shape) for shape in shapes)
        layers.append(Layer(
            norms[0], packs(torch.cat([mine(q), mine(k), mine(v)])),
            packs(mine(o, 1), bias if rank == 0 else None), norms[1],
            packs(torch.cat([mine(gate), mine(up)])), packs(mine(down, 1)), *caches, HEADS // size, EPS,
            DIM**-0.5,
        ))  # fmt: skip
    return layers


def make_step(wanted: bool) -> Step:
    """A prompt of 5 tokens, the last of which is wanted or all."""
    angles = torch.outer(torch.arange(9), 100.0 ** -(torch.arange(0, DIM, 2) / DIM))
    i32, tiles = torch.int32, Tiles(*(torch.from_numpy(t) for t in make_tiles([5], [0])))
    step = Step(
        torch.cat((angles.cos(), angles.sin()), dim=1), torch.arange(5, dtype=i32), torch.arange(8, 13),
        torch.tensor([[1, 2, 3]], dtype=i32), torch.tensor([0, 5], dtype=i32), torch.tensor([5], dtype=i32),
        tiles=tiles,
    )  # fmt: skip
    return replace(step, wanted=torch.tensor([4])) if wanted else step


def embedded() -> torch.Tensor:
    return torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(4))


def states(rank: int, size: int, ranks, host) -> dict[str, torch.Tensor]:
    """The states of a stack by every path."""
    found = {}
    for wanted in (False, True):
        paths = {path.__name__: path for path in (layer.forward_skinny, layer.forward_wide)}
        if ranks is not None:
            assert len(ranks.pieces(5)) == 2
            paths["carried"] = layer.forward
        for name, path in paths.items():
            results = path(make_layers(rank, size, plain), embedded(), make_step(wanted), ranks)
            found[f"{name} {wanted}"] = sum(results)
        stack = LayerStack(make_layers(rank, size, pack), host)
        found[f"cpu {wanted}"] = sum(stack.forward(embedded(), make_step(wanted)))
    return found


def draws(rank: int, size: int, turn: int, form, ranks) -> torch.Tensor:
    """What a random batch draws: greedy, random and filtered."""
    generator = torch.Generator().manual_seed(turn)
    rows = 1 + turn % 5
    columns = SamplingColumns.allocate(rows, "cpu")
    columns.temperature.copy_(torch.rand(rows, generator=generator).round())
    columns.seed.copy_(torch.randint(2**40, (rows,), generator=generator))
    columns.top_k.fill_(9)
    logits = torch.full((rows, 2 * 192), float("nan"))
    logits[:, :VOCAB] = (torch.randn(rows, VOCAB, generator=generator) * 4).round() / 4
    logits = logits.chunk(size, dim=1)[rank]
    slots, none = torch.arange(rows), torch.zeros(rows, dtype=torch.int32)
    history = torch.zeros(rows, 4, dtype=torch.int32), none + turn, none
    features = Features(any_random=turn % 3 > 0, any_filter=turn % 3 == 2)
    return form(logits, slots, columns, *history, VOCAB, features, ranks).token_ids


def carried(place: Place, part: torch.Tensor, ranks: DeviceRanks) -> torch.Tensor:
    """The sum of parts that are brought while something else is exchanged."""
    part = ranks.part(place, *part.shape, part.dtype).copy_(part)
    hidden, weight = torch.zeros_like(part), torch.ones(HIDDEN)
    brought = []
    for piece in ranks.pieces(len(part)):
        brought.append(ranks.bring(place, part, piece))
        ranks.gathered(part[:1, :4])
    for piece in brought:
        ranks.add_brought(piece, hidden, weight, EPS, torch.empty_like(part))
    return hidden


def rounds(rank: int, size: int, ranks: DeviceRanks) -> dict[str, torch.Tensor]:
    """Sums of sizes that change, with draws and gathers between."""
    found = {}
    for turn in range(ROUNDS):
        rows, place = 1 + (turn * 7) % 10, Place(turn % 3)
        part = ranks.part(place, rows, HIDDEN, torch.float32)
        part.copy_(torch.randn(size, rows, HIDDEN, generator=torch.Generator().manual_seed(turn))[rank])
        found[f"sum {turn}"] = ranks.summed(place, part)
        if ranks.pieces(rows):
            found[f"carried {turn}"] = carried(Place((turn + 2) % 3), 2 * part, ranks)
        for again in range(turn % 3):  # one behind the other, as nothing in a forward is
            found[f"draw {turn} {again}"] = draws(rank, size, turn, cuda_sample.sample, ranks)
            found[f"gather {turn} {again}"] = ranks.gathered(
                torch.arange(rows * 8.0).view(rows, 8) + 100 * rank + 1000 * again
            )
    return found


def main(rank: int, size: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)

    maps = []

    def shared(group, num_bytes, device):
        for r in range(size):
            path = f"{folder}/{r}"
            maps.append(torch.from_file(path, shared=True, size=num_bytes, dtype=torch.uint8))
        dist.barrier()
        return Shared(maps)

    # So few programs that each takes several rows, and so little room that gathers go in pieces.
    device_ranks.PROGRAMS = draw.RANK_PROGRAMS = 4
    device_ranks.GATHER_BYTES = 2 * 192 * 4
    device_ranks.ONE_SHOT_BYTES = 4 * HIDDEN * 4  # more than two ranks sum five rows otherwise
    device_ranks.CARRIED_ROWS, device_ranks.PIECE_ROWS, device_ranks.LOCAL_PROGRAMS = CARRIED_ROWS, 1, 2
    ranks = DeviceRanks(dist.group.WORLD, torch.device("cpu"), 16, HIDDEN, torch.float32, shared)
    host = GlooRanks()
    found = rounds(rank, size, ranks)
    if HEADS % size == 0:
        found |= states(rank, size, ranks, host)
    found |= {f"host draw {turn}": draws(rank, size, turn, sample, host) for turn in range(ROUNDS)}
    torch.save(found, folder / f"found-{rank}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
