"""What the runner asks of a model, whoever wrote its layers."""

from __future__ import annotations

from typing import Protocol

import torch

from gpu_worker.kv_cache import KVCache
from kernels.layer import Step
from kernels.ranks import Ranks


class Decoder(Protocol):
    """`gpu_worker.models.llama.Llama` says what each of these is.

    Attributes:
        vocab_size: ids that there are.
        num_logits: of a token, at least `vocab_size`; with `ranks`, this rank's share.
        rotations: goes into each forward's `Step`.
        ranks: the others that hold parts of it; None for a whole model.
    """

    vocab_size: int
    rotations: torch.Tensor
    ranks: Ranks | None

    @property
    def num_logits(self) -> int: ...
    def use(self, cache: KVCache) -> None: ...
    def forward(self, token_ids: torch.Tensor, step: Step) -> tuple[torch.Tensor, torch.Tensor]: ...
    def logits(
        self, hidden: torch.Tensor, delta: torch.Tensor, out: torch.Tensor | None = None
    ) -> torch.Tensor: ...


def whole(model: Decoder, logits: torch.Tensor) -> torch.Tensor:
    """Logits of all ids, from what `Decoder.logits` returned."""
    return logits if model.ranks is None else model.ranks.gathered(logits)
