"""What a rank of a tensor-parallel group holds of a model.

Projections into heads, into the feed-forward block and into the vocabulary are split by outputs (rows), those
out of them by inputs (columns), so that a rank's outputs are its own inputs and one sum over the ranks ends
each block. What does not divide is padded with zeros, which add nothing to that sum: all ranks have the same
shapes. KV heads that are fewer than ranks are held by several, which share their queries.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from gpu_worker.models.config import ModelConfig

# Feed-forward sizes and tables over the vocabulary are multiples of so many: whole tiles on CUDA.
TILE = 64


@dataclass(frozen=True)
class Part:
    """What a rank holds of a tensor along one dimension: a range, and zeros behind it."""

    dim: int
    """0 for rows, 1 for columns."""
    whole: int
    """The tensor's size along it."""
    first: int
    count: int
    size: int
    """The rank's size along it, at least `count`."""

    def whole_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Of the tensor of which a rank holds this shape."""
        return (*shape[: self.dim], self.whole, *shape[self.dim + 1 :])

    def cut(self, whole: torch.Tensor) -> torch.Tensor:
        """What a rank holds of a whole tensor; a view where there are no zeros."""
        values = whole.narrow(self.dim, self.first, self.count)
        if self.count == self.size:
            return values
        shape = [*whole.shape]
        shape[self.dim] = self.size
        out = whole.new_empty(shape)
        self.room(out).copy_(values)
        return out

    def room(self, out: torch.Tensor) -> torch.Tensor:
        """Where the range goes in a rank's tensor, a view; what lies behind it becomes zeros."""
        out.narrow(self.dim, self.count, self.size - self.count).zero_()
        return out.narrow(self.dim, 0, self.count)


@dataclass(frozen=True)
class Shard:
    """One rank's share of a model; made by `of`."""

    config: ModelConfig
    """The whole model."""
    rank: int
    size: int
    local: ModelConfig
    """This rank's numbers: num_heads, num_kv_heads, intermediate_size and vocab_size (rows of the tables)."""

    @classmethod
    def of(cls, config: ModelConfig, rank: int, size: int) -> Shard:
        """The share of `rank` among `size` ranks; a single one's is the model itself."""
        if size == 1:
            return cls(config, rank, size, config)
        kv_heads, queries = _ceil(config.num_kv_heads, size), config.num_heads // config.num_kv_heads
        local = replace(
            config,
            num_heads=_ceil(kv_heads * queries, _copies(config, size)),
            num_kv_heads=kv_heads,
            intermediate_size=_ceil(config.intermediate_size, size * TILE) * TILE,
            vocab_size=_ceil(config.vocab_size, size * TILE) * TILE,
        )
        return cls(config, rank, size, local)

    def part(self, name: str) -> Part | None:
        """What this rank holds of the tensor of that name (Llama's); None for all of it."""
        c, here, (module, kind) = self.config, self.local, ("", *name.split("."))[-2:]
        if self.size == 1:
            return None
        if kind == "bias" and module in ("o_proj", "down_proj"):  # added once, not by every rank
            return Part(0, c.hidden_size, 0, 0 if self.rank else c.hidden_size, c.hidden_size)
        dim = int(module in ("o_proj", "down_proj"))
        if module in ("q_proj", "o_proj", "k_proj", "v_proj"):
            copies, queries = _copies(c, self.size), c.num_heads // c.num_kv_heads
            first, count = _range(self.rank // copies, here.num_kv_heads, c.num_kv_heads)
            whole, size = c.num_kv_heads, here.num_kv_heads
            if module in ("q_proj", "o_proj"):
                skipped, count = _range(self.rank % copies, here.num_heads, count * queries)
                first, whole, size = first * queries + skipped, c.num_heads, here.num_heads
            return Part(dim, *(n * c.head_dim for n in (whole, first, count, size)))
        if module in ("gate_proj", "up_proj", "down_proj"):
            whole, size = c.intermediate_size, here.intermediate_size
        elif module in ("embed_tokens", "lm_head"):
            whole, size = c.vocab_size, here.vocab_size
        else:
            return None
        return Part(dim, whole, *_range(self.rank, size, whole), size)

    def describe(self) -> dict[str, int]:
        """What does not divide, for people: on how many ranks each KV head is, and how many of all ranks'
        heads, feed-forward units and rows of a table are zeros. Empty when everything divides."""
        c, here, copies = self.config, self.local, _copies(self.config, self.size)
        padding = {
            "zero_heads": self.size * here.num_heads - c.num_heads,
            "zero_kv_heads": self.size * here.num_kv_heads - copies * c.num_kv_heads,
            "zero_feed_forward": self.size * here.intermediate_size - c.intermediate_size,
            "zero_vocabulary": self.size * here.vocab_size - c.vocab_size,
        }
        said = {name: count for name, count in padding.items() if count}
        return {"ranks_of_a_kv_head": copies, **said} if copies > 1 else said


def _copies(config: ModelConfig, size: int) -> int:
    """Ranks that hold the same KV head."""
    return 1 if size % config.num_kv_heads else size // config.num_kv_heads


def _ceil(count: int, divisor: int) -> int:
    return -(-count // divisor)


def _range(index: int, share: int, whole: int) -> tuple[int, int]:
    """First and number of the `index`-th share of `whole` things."""
    first = min(index * share, whole)
    return first, min(share, whole - first)
