"""The decoder that all served architectures share; the config says where they differ."""

from __future__ import annotations

from dataclasses import replace

import torch

from gpu_worker.kv_cache import KVCache
from gpu_worker.models.config import ModelConfig, rotation_table
from gpu_worker.models.layers import LayerLoader
from gpu_worker.models.loader import WeightSource
from gpu_worker.models.shard import Shard
from kernels.layer import LayerStack, Step
from kernels.linear import embedding, linear
from kernels.norm import rms_norm
from kernels.ranks import Place, Ranks


class Llama:
    """Weights in the kernels' layout, and the forward over paged keys and values."""

    def __init__(
        self,
        config: ModelConfig,
        weights: WeightSource,
        cache: KVCache,
        *,
        dtype: torch.dtype,
        device: torch.device,
        vocab_size: int,
        max_len: int,
        ranks: Ranks | None = None,
    ) -> None:
        """Take every tensor from `weights`, one layer at a time, so that no second copy of a model exists.

        Args:
            config: the whole model's shape.
            weights: where the tensors come from.
            cache: keys and values of every layer, with `ranks` of this rank's heads.
            dtype: of weights and activations; logits are float32.
            device: where to run.
            vocab_size: ids that there are; what the tables hold beyond is padding that nothing may sample.
            max_len: positions to prepare rotations for.
            ranks: the others that hold parts of the model, if there are any.

        Raises:
            ModelError: a tensor is missing, misshapen or left over.
        """
        self.config = config
        self.vocab_size = vocab_size
        self.ranks = ranks
        local, rows = config, vocab_size
        if ranks is not None:
            shard = Shard.of(config, ranks.rank, ranks.size)
            weights.split(shard)
            local, rows = shard.local, shard.local.vocab_size
        self.rotations = rotation_table(config.rope, config.head_dim, max_len).to(device)
        load = LayerLoader(local, weights, dtype, device)
        table = local.vocab_size, config.hidden_size, rows
        self._embed = load.matrix("model.embed_tokens.weight", *table)
        self._layers = LayerStack([load.layer(i, caches) for i, caches in enumerate(cache.layers)], ranks)
        self._norm = load.tensor("model.norm.weight", config.hidden_size)
        self._head = self._embed if config.tie_embeddings else load.matrix("lm_head.weight", *table)
        self._nothing = torch.zeros((), dtype=dtype, device=device)
        weights.finish()

    def use(self, cache: KVCache) -> None:
        """Read and write another cache from now on."""
        layers = zip(self._layers.layers, cache.layers, strict=True)
        self._layers = LayerStack(
            [replace(layer, key_cache=keys, value_cache=values) for layer, (keys, values) in layers],
            self.ranks,
        )

    def forward(self, token_ids: torch.Tensor, step: Step) -> tuple[torch.Tensor, torch.Tensor]:
        """Run T tokens (int32[T]) and write their keys and values.

        On a CPU a token's state depends on its row's tokens alone, bit for bit, in float32 and in bfloat16:
        not on the rows beside it, on how its prompt was cut into chunks, or on the number of threads.

        Returns:
            Two [R, hidden_size], whose sum is each wanted token's state before the final norm.
        """
        hidden = self._embedded(token_ids).to(self._layers.residual_dtype)
        return self._layers.forward(hidden, step)

    def _embedded(self, token_ids: torch.Tensor) -> torch.Tensor:
        """[T, hidden_size]; each row of the table is on one of the ranks."""
        table, ranks = self._embed, self.ranks
        if ranks is None:
            return embedding(token_ids, table)
        here = token_ids - ranks.rank * table.out_features
        row = here.clamp(0, table.out_features - 1)
        part = ranks.part(Place.EMBEDDED, len(token_ids), table.in_features, table.dtype)
        torch.where((here == row).unsqueeze(1), embedding(row, table), self._nothing, out=part)
        return ranks.summed(Place.EMBEDDED, part)

    @property
    def num_logits(self) -> int:
        """Of a token: at least vocab_size. With `ranks` its share, for the ids from rank * num_logits on."""
        return self._head.out_features

    def logits(
        self, hidden: torch.Tensor, delta: torch.Tensor, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """float32[R, num_logits] of R tokens' states as `forward` returns them; `hidden` is used up. Written
        to `out` where given."""
        return linear(rms_norm(delta, self._norm, self.config.rms_eps, residual=hidden), self._head, out)
