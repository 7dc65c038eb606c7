"""The paged memory of keys and values."""

from __future__ import annotations

import math
import mmap

import torch

from gpu_worker.models.config import ModelConfig
from kernels.attention import cache_shape


class KVCache:
    """One key and one value tensor a layer; a block id means the same block in each of them.

    Attributes:
        layers: for each layer its keys and values.
        tensors: the same, one after another.
    """

    def __init__(
        self, config: ModelConfig, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shapes = cache_shape(num_blocks, config.num_kv_heads, block_size, config.head_dim, dtype)
        self.tensors = [_zeros(shape, dtype, device) for _ in range(config.num_layers) for shape in shapes]
        self.layers = list(zip(self.tensors[::2], self.tensors[1::2], strict=True))


def block_bytes(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
    """Size of one block over all layers, keys and values."""
    return 2 * config.num_layers * block_size * config.num_kv_heads * config.head_dim * dtype.itemsize


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros, because a masked row may read a block that was never written, and NaN would spread.

    On a CPU they are pages that the system hands out zeroed when they are first touched: `torch.zeros` would
    write gigabytes at start.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    pages = mmap.mmap(-1, math.prod(shape) * dtype.itemsize)
    pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype).view(shape)
