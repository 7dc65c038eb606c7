"""KV blocks in host memory, for requests that are swapped out."""

from __future__ import annotations

import time
import weakref
from typing import Any, TypeAlias

import torch

from gpu_worker.kv_cache import KVCache
from gpu_worker.staging import Pairs
from kernels.blocks import copy_blocks
from kernels.cpu.memory import pages

MAPPED = 2  # cudaHostRegisterMapped: kernels may read and write it

Moment: TypeAlias = Any
"""Of the clock of whoever copies: an event of CUDA, or what `time.perf_counter` says."""


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
        if self._on_cuda and memory.numel():
            unpin = torch.cuda.cudart().cudaHostUnregister
            weakref.finalize(self, unpin, memory.data_ptr()).atexit = False  # then the driver may be gone

    def out(self, pairs: Pairs | None) -> Moment:
        """Copy device blocks to host blocks, before anything else of a step; when its swaps began."""
        begun = self._now()
        if pairs is not None:
            copy_blocks(self._device, *pairs, self._host)
        return begun

    def back(self, pairs: Pairs | None) -> Moment:
        """Copy host blocks to device blocks, before a step's forward; when its swaps ended."""
        if pairs is not None:
            copy_blocks(self._host, *pairs, self._device)
        return self._now()

    def _now(self) -> Moment:
        if not self._on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def seconds_between(begun: Moment, ended: Moment) -> float:
    """How long it took, once it is over."""
    if isinstance(begun, torch.cuda.Event):
        return begun.elapsed_time(ended) / 1e3
    return ended - begun


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
        torch.cuda.check_error(pin(memory.data_ptr(), memory.nbytes, MAPPED))
    return memory
