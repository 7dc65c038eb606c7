"""The decoder that all served architectures share; the config says where they differ."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gpu_worker.kv_cache import KVCache
from gpu_worker.models.config import ModelConfig, rotation_table
from gpu_worker.models.layers import LayerLoader, Placement
from gpu_worker.models.loader import WeightSource
from kernels.layer import LayerStack, Step
from kernels.linear import embedding, linear
from kernels.norm import rms_norm


@dataclass(frozen=True)
class ForwardInputs:
    """What one forward reads: T tokens of B rows, one after another."""

    token_ids: torch.Tensor
    """int32[T]."""
    positions: torch.Tensor
    """int32[T]."""
    slot_mapping: torch.Tensor
    """int64[T]: block * block_size + offset that takes the token's keys and values; -1 writes none."""
    block_tables: torch.Tensor
    """int32[B, MB]."""
    query_start: torch.Tensor
    """int32[B + 1]: where each row's tokens begin."""
    seq_lens: torch.Tensor
    """int32[B]: tokens of each row whose keys are in the cache after this forward."""


@dataclass(frozen=True)
class States:
    """Each token's state after the last layer, before the final norm: the sum of two [T, hidden_size]."""

    hidden: torch.Tensor
    delta: torch.Tensor


class Llama:
    """Weights in the kernels' layout, and the forward over paged keys and values."""

    def __init__(
        self,
        config: ModelConfig,
        weights: WeightSource,
        cache: KVCache,
        placement: Placement,
        *,
        vocab_size: int,
        max_len: int,
    ) -> None:
        """Take every tensor from `weights`, one layer at a time, so that no second copy of a model exists.

        Args:
            config: the shape.
            weights: where the tensors come from.
            cache: keys and values of every layer.
            placement: dtype and device of weights and activations; logits are float32.
            vocab_size: rows of the embedding to keep; what lies beyond is padding that nothing may sample.
            max_len: positions to prepare rotations for.

        Raises:
            ModelError: a tensor is missing, misshapen or left over.
        """
        self.config = config
        self.vocab_size = vocab_size
        self._rotations = rotation_table(config.rope, config.head_dim, max_len).to(placement.device)
        load = LayerLoader(config, weights, placement)
        table = config.vocab_size, config.hidden_size, vocab_size
        self._embed = load.matrix("model.embed_tokens.weight", *table)
        self._layers = LayerStack([load.layer(i, caches) for i, caches in enumerate(cache.layers)])
        self._norm = load.tensor("model.norm.weight", config.hidden_size)
        self._head = self._embed if config.tie_embeddings else load.matrix("lm_head.weight", *table)
        weights.finish()

    def forward(self, inputs: ForwardInputs) -> States:
        """Run T tokens and write their keys and values.

        On a CPU a token's state depends on its row's tokens alone, bit for bit, in float32 and in bfloat16:
        not on the rows beside it, on how its prompt was cut into chunks, or on the number of threads.
        """
        hidden = embedding(inputs.token_ids, self._embed)
        step = Step(
            cos_sin=self._rotations,
            positions=inputs.positions,
            slot_mapping=inputs.slot_mapping,
            block_tables=inputs.block_tables,
            query_start=inputs.query_start,
            seq_lens=inputs.seq_lens,
        )
        return States(hidden, self._layers.forward(hidden, step))

    def logits(self, states: States, index: torch.Tensor | None) -> torch.Tensor:
        """float32[R, vocab_size] of the tokens that `index` (int64[R]) names, of all where it is None. The
        states are used up."""
        hidden, delta = states.hidden, states.delta
        if index is not None:
            hidden, delta = hidden.index_select(0, index), delta.index_select(0, index)
        return linear(rms_norm(delta, self._norm, self.config.rms_eps, residual=hidden), self._head)
