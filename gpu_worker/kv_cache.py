"""The paged memory of keys and values."""

from __future__ import annotations

import math

import torch

from gpu_worker.models.config import ModelConfig
from kernels.attention import cache_shape
from kernels.cpu.memory import pages


class KVCache:
    """One key and one value tensor a layer; a block id means the same block in each of them.

    Attributes:
        pool: uint8[2 * layers, blocks, bytes of a block in one tensor]: all of it, one allocation. A block is
            copied or swapped as `pool[:, block]`, whatever the layout within.
        layers: for each layer its keys and values, in the layout of `kernels.attention.cache_shape`.
        tensors: the same, one after another; tensors[i] is pool[i].
    """

    def __init__(
        self, config: ModelConfig, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shapes = cache_shape(num_blocks, config.num_kv_heads, block_size, config.head_dim, dtype, device.type)
        num_tensors = 2 * config.num_layers
        size = block_bytes(config, block_size, dtype) // num_tensors
        self.pool = _zeros((num_tensors, num_blocks, size), device)
        self.tensors = [part.view(dtype).view(shapes[i % 2]) for i, part in enumerate(self.pool)]
        self.layers = list(zip(self.tensors[::2], self.tensors[1::2], strict=True))


def block_bytes(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
    """Size of one block over all layers, keys and values."""
    return 2 * config.num_layers * block_size * config.num_kv_heads * config.head_dim * dtype.itemsize


def _zeros(shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """uint8 zeros, because a masked row may read a block that was never written, and NaN would spread.

    On a CPU they are pages that nobody has touched: `torch.zeros` would write gigabytes at start.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=torch.uint8, device=device)
    return pages(math.prod(shape)).view(shape)
