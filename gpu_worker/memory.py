"""How much of a CUDA device's memory the KV blocks get: what nothing else needs, by measurement."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

GIB = 1 << 30


@dataclass(frozen=True)
class Budget:
    """Where the bytes of a device go."""

    total: int
    """What the device has."""
    utilization: float
    """The share of it that this worker may fill, other processes' bytes included."""
    in_use: int
    """With the weights loaded, and nothing that could be given back."""
    forward: int
    """What the largest forward takes beyond that, while it runs."""
    graphs: int
    """Set aside for captured graphs."""

    @property
    def for_blocks(self) -> int:
        """What is left; negative when the rest does not fit."""
        return int(self.total * self.utilization) - self.in_use - self.forward - self.graphs


def num_blocks(budget: Budget, block_bytes: int, wanted: int, least: int, asked: int = 0) -> int:
    """How many KV blocks to make.

    Args:
        budget: where the bytes go.
        block_bytes: of one block, over all layers.
        wanted: blocks that all slots could fill: more would never be used.
        least: blocks that one sequence of the greatest length needs.
        asked: what --num-blocks says; 0 takes what fits.

    Raises:
        ValueError: they do not fit; the message says what is needed and which option helps.
    """
    fitting = max(0, budget.for_blocks) // block_bytes
    needed = asked or least
    if needed <= fitting:
        return asked or min(fitting, wanted)
    missing = needed * block_bytes - budget.for_blocks
    percent = math.ceil(100 * (budget.utilization + missing / budget.total))
    advice = [f"raise --gpu-memory-utilization to {percent / 100}"] if percent <= 98 else []
    advice += [f"set --num-blocks to at most {fitting}"] if asked and fitting >= least else []
    advice += ["lower --max-model-len"] if not asked else []
    advice += ["lower --max-batched-tokens", "use a device with more memory or one that nobody else uses"]
    share_bytes = budget.total * budget.utilization
    raise ValueError(
        f"{needed} KV blocks of {block_bytes >> 10} KiB do not fit: of {budget.total / GIB:.1f} GiB "
        f"--gpu-memory-utilization {budget.utilization:.2f} gives {share_bytes / GIB:.1f}; "
        f"{budget.in_use / GIB:.1f} are in use with the weights loaded, a forward takes "
        f"{budget.forward / GIB:.1f} and graphs {budget.graphs / GIB:.1f}, so "
        f"{max(0, budget.for_blocks) / GIB:.1f} are left and {needed * block_bytes / GIB:.1f} needed. "
        f"Either {', or '.join(advice)}."
    )


def used_bytes(device: torch.device) -> tuple[int, int]:
    """Bytes in use on a CUDA device, by whomever, and how many it has. Frees what torch keeps in reserve."""
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return total - free, total


class Peak:
    """What a piece of work took at its height; `bytes` is there when it is over."""

    bytes: int = 0


@contextmanager
def measured(device: torch.device) -> Iterator[Peak]:
    """Measures how far the work inside raises a CUDA device's use.

    Counted are what torch reserves at the height, fragments included, and what the driver keeps afterwards
    (loaded kernels, libraries' workspaces). The work's results must be dropped inside.

    Raises:
        ValueError: the work does not fit; the message names the options that make it smaller.
    """
    peak = Peak()
    before, _ = used_bytes(device)
    reserved = torch.cuda.memory_reserved(device)
    torch.cuda.reset_peak_memory_stats(device)
    try:
        yield peak
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"the largest forward does not fit beside the weights, {before / GIB:.1f} GiB in use: lower "
            f"--max-batched-tokens or --max-slots, or use a device with more memory ({error})"
        ) from error
    torch.cuda.synchronize(device)
    inside = torch.cuda.max_memory_reserved(device) - reserved
    after, _ = used_bytes(device)
    kept = torch.cuda.memory_reserved(device) - reserved
    peak.bytes = inside + max(0, after - before - kept)
