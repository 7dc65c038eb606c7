"""Random weights of the right shapes, for measuring without a checkpoint."""

from __future__ import annotations

import zlib

import torch

from gpu_worker.models.config import ModelConfig


class DummyWeights:
    """A `WeightSource` that draws each tensor from its name and a seed, whatever the order of taking."""

    def __init__(self, config: ModelConfig, seed: int) -> None:
        self._std = config.initializer_range
        self._seed = seed

    def take(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Ones for norms, else normal numbers, float32."""
        if name.endswith("norm.weight"):
            return torch.ones(shape)
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self._seed} {name}".encode()))
        return torch.empty(shape).normal_(0.0, self._std, generator=generator)

    def finish(self) -> None:
        """Nothing can be left over."""
