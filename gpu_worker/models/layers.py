"""From a model's named tensors to the layers that the kernels run."""

from __future__ import annotations

import torch

from gpu_worker.models.config import ModelConfig
from gpu_worker.models.loader import WeightSource
from kernels.layer import Layer
from kernels.linear import PackedLinear, pack


class LayerLoader:
    """Takes tensors from a source and puts them into the kernels' layout, one layer at a time."""

    def __init__(
        self, config: ModelConfig, weights: WeightSource, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._config, self._weights, self._dtype, self._device = config, weights, dtype, device

    def tensor(self, name: str, *shape: int) -> torch.Tensor:
        """A tensor in the model's dtype, on its device. Raises ModelError."""
        return self._weights.take(name, shape).to(self._device, self._dtype)

    def matrix(self, name: str, num_rows: int, num_columns: int, keep: int) -> PackedLinear:
        """The first `keep` rows of a matrix over the vocabulary; products with it are float32 logits."""
        return pack(self.tensor(name, num_rows, num_columns)[:keep], out_dtype=torch.float32)

    def layer(self, index: int, caches: tuple[torch.Tensor, torch.Tensor]) -> Layer:
        """One layer over its keys and values, q, k and v in one matrix, gate and up in another."""
        c, name = self._config, f"model.layers.{index}"
        attention, mlp, dim = f"{name}.self_attn", f"{name}.mlp", c.head_dim
        q_size, kv_size = c.num_heads * dim, c.num_kv_heads * dim
        qkv = {"q_proj": q_size, "k_proj": kv_size, "v_proj": kv_size}
        gate_up = dict.fromkeys(("gate_proj", "up_proj"), c.intermediate_size)
        return Layer(
            input_norm=self.tensor(f"{name}.input_layernorm.weight", c.hidden_size),
            qkv=self._linear(attention, qkv, c.hidden_size, c.qkv_bias),
            o=self._linear(attention, {"o_proj": c.hidden_size}, q_size, c.o_bias),
            post_norm=self.tensor(f"{name}.post_attention_layernorm.weight", c.hidden_size),
            gate_up=self._linear(mlp, gate_up, c.hidden_size, c.mlp_bias),
            down=self._linear(mlp, {"down_proj": c.hidden_size}, c.intermediate_size, c.mlp_bias),
            key_cache=caches[0],
            value_cache=caches[1],
            num_heads=c.num_heads,
            eps=c.rms_eps,
            scale=dim**-0.5,
            q_norm=self.tensor(f"{attention}.q_norm.weight", dim) if c.qk_norm else None,
            k_norm=self.tensor(f"{attention}.k_norm.weight", dim) if c.qk_norm else None,
            sliding_window=c.sliding_windows[index],
        )

    def _linear(self, place: str, parts: dict[str, int], num_inputs: int, has_bias: bool) -> PackedLinear:
        """Projections of one input, stacked: their names and numbers of outputs."""
        weights = [self.tensor(f"{place}.{name}.weight", rows, num_inputs) for name, rows in parts.items()]
        biases = [self.tensor(f"{place}.{name}.bias", rows) for name, rows in parts.items() if has_bias]
        return pack(
            torch.cat(weights) if len(weights) > 1 else weights[0], torch.cat(biases) if biases else None
        )
