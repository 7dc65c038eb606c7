"""KV blocks in host memory, for requests that are swapped out."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from gpu_worker.kv_cache import KVCache
from gpu_worker.staging import Pairs
from kernels.blocks import copy_blocks
from kernels.cpu.memory import pages


@dataclass
class Moment:
    """What a `torch.cuda.Event` is on a CPU."""

    at: float = 0.0

    def record(self) -> None:
        """It is now."""
        self.at = time.perf_counter()

    def elapsed_time(self, end: Moment) -> float:
        """Milliseconds until `end`."""
        return (end.at - self.at) * 1e3


# Two `Moment`s, or events of CUDA.
Window = tuple[Any, Any]


class HostPool:
    """As many blocks as `memory` has, beside a cache whose blocks go there and come back.

    On CUDA one kernel a direction reads or writes host memory in place: nothing is staged, and the host
    neither waits nor copies.
    """

    def __init__(self, cache: KVCache, memory: torch.Tensor) -> None:
        """`memory` is uint8[2 * layers, blocks, bytes of a block in one tensor]; see `host_memory`."""
        self._device = list(cache.pool)
        self._host = list(memory)
        self._on_cuda = cache.pool.is_cuda

    def out(self, pairs: Pairs | None) -> Window:
        """Copy device blocks to host blocks, before anything else of a step; when its swaps began, and will
        have ended."""
        kind = partial(torch.cuda.Event, enable_timing=True) if self._on_cuda else Moment
        window = kind(), kind()
        window[0].record()
        if pairs is not None:
            copy_blocks(self._device, *pairs, self._host)
        return window

    def back(self, pairs: Pairs | None, window: Window) -> None:
        """Copy host blocks to device blocks, before a step's forward; what `out` said of it is true then."""
        if pairs is not None:
            copy_blocks(self._host, *pairs, self._device)
        window[1].record()


def host_memory(num_tensors: int, size: int, num_blocks: int, device: torch.device) -> torch.Tensor:
    """Zeros for a `HostPool` of `num_blocks` blocks, of which each tensor has `size` bytes.

    For a CUDA device they are pinned, so that its kernels reach them.

    Raises:
        RuntimeError: the driver does not pin so much.
    """
    memory = pages(num_tensors * num_blocks * size).view(num_tensors, num_blocks, size)
    if device.type == "cuda" and num_blocks:
        memory.zero_()  # touched here, by this thread: the driver would touch it page by page, under its lock
        pin = torch.cuda.cudart().cudaHostRegister
        torch.cuda.check_error(pin(memory.data_ptr(), memory.nbytes, 0))
    return memory
