"""The decoder that all served architectures share; the config says where they differ."""

from __future__ import annotations

import torch

from gpu_worker.kv_cache import KVCache
from gpu_worker.models.config import ModelConfig, rotation_table
from gpu_worker.models.layers import Activations, ForwardInputs, Layer
from gpu_worker.models.loader import WeightSource
from kernels.linear import embedding, linear, pack
from kernels.norm import rms_norm


class Llama:
    """Weights in the kernels' layout, and the forward over paged keys and values."""

    def __init__(
        self,
        config: ModelConfig,
        weights: WeightSource,
        *,
        dtype: torch.dtype,
        device: torch.device,
        vocab_size: int,
        max_len: int,
        max_tokens: int,
    ) -> None:
        """Take every tensor from `weights`, one layer at a time, so that no second copy of a model exists.

        Args:
            config: the shape.
            weights: where the tensors come from.
            dtype: of weights, activations and logits' inputs; logits are float32.
            device: where to run.
            vocab_size: rows of the embedding to keep; what lies beyond is padding that nothing may sample.
            max_len: positions to prepare rotations for.
            max_tokens: the most tokens of one forward.

        Raises:
            ModelError: a tensor is missing, misshapen or left over.
        """
        self.config = config
        self.vocab_size = vocab_size
        self._dtype, self._device, self._weights = dtype, device, weights
        self._rotations = rotation_table(config.rope, config.head_dim, max_len).to(device)
        self._activations = Activations(config, max_tokens, dtype, device)
        table = self._take("model.embed_tokens.weight", config.vocab_size, config.hidden_size)[:vocab_size]
        self._embed = pack(table, out_dtype=torch.float32)
        self._layers = [self._layer(i) for i in range(config.num_layers)]
        self._norm = self._take("model.norm.weight", config.hidden_size)
        if config.tie_embeddings:
            self._head = self._embed
        else:
            head = self._take("lm_head.weight", config.vocab_size, config.hidden_size)[:vocab_size]
            self._head = pack(head, out_dtype=torch.float32)
        weights.finish()
        del self._weights

    def forward(self, inputs: ForwardInputs, cache: KVCache) -> torch.Tensor:
        """Run T tokens and write their keys and values.

        Returns:
            [T, hidden_size]: each token's state before the final norm, in a buffer that the next call reuses.
        """
        residual = embedding(inputs.token_ids, self._embed)
        views = self._activations.views(inputs.token_ids.shape[0])
        eps, rotations, layers = self.config.rms_eps, self._rotations, cache.layers
        for i, layer in enumerate(self._layers):
            layer.forward(residual, views, inputs, rotations, layers[i], eps, first=i == 0)
        return residual.add_(views.hidden)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """float32[R, vocab_size] of R states that `forward` returned."""
        return linear(rms_norm(hidden, self._norm, self.config.rms_eps), self._head)

    def _take(self, name: str, *shape: int) -> torch.Tensor:
        return self._weights.take(name, shape).to(device=self._device, dtype=self._dtype)

    def _linear(self, *parts: tuple[str, int], inputs: int, bias: bool) -> object:
        """Projections of one input, stacked into one matrix."""
        weight = [self._take(f"{name}.weight", rows, inputs) for name, rows in parts]
        offset = [self._take(f"{name}.bias", rows) for name, rows in parts] if bias else None
        if len(parts) == 1:
            return pack(weight[0], offset[0] if offset else None)
        return pack(torch.cat(weight), torch.cat(offset) if offset else None)

    def _layer(self, index: int) -> Layer:
        c, name = self.config, f"model.layers.{index}"
        attention, mlp = f"{name}.self_attn", f"{name}.mlp"
        q_size, kv_size = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        qkv = ((f"{attention}.q_proj", q_size), (f"{attention}.k_proj", kv_size), (f"{attention}.v_proj", kv_size))
        gate_up = ((f"{mlp}.gate_proj", c.intermediate_size), (f"{mlp}.up_proj", c.intermediate_size))
        return Layer(
            input_norm=self._take(f"{name}.input_layernorm.weight", c.hidden_size),
            qkv=self._linear(*qkv, inputs=c.hidden_size, bias=c.qkv_bias),
            q_norm=self._take(f"{attention}.q_norm.weight", c.head_dim) if c.qk_norm else None,
            k_norm=self._take(f"{attention}.k_norm.weight", c.head_dim) if c.qk_norm else None,
            o=self._linear((f"{attention}.o_proj", c.hidden_size), inputs=q_size, bias=c.o_bias),
            post_norm=self._take(f"{name}.post_attention_layernorm.weight", c.hidden_size),
            gate_up=self._linear(*gate_up, inputs=c.hidden_size, bias=c.mlp_bias),
            down=self._linear((f"{mlp}.down_proj", c.hidden_size), inputs=c.intermediate_size, bias=c.mlp_bias),
            sliding_window=c.sliding_windows[index],
        )
