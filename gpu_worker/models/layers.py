"""From a model's named tensors to the layers that the kernels run."""

from __future__ import annotations

import torch

from gpu_worker.models.config import ModelConfig
from gpu_worker.models.loader import WeightSource
from kernels.layer import Layer
from kernels.linear import PackedLinear, pack

# A matrix over the vocabulary has a multiple of so many rows on CUDA.
WHOLE_ROWS = 64


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
        """The first `keep` rows of a matrix over the vocabulary; products with it are float32 logits.

        On CUDA there are rows behind them, the table's and zeros, that make whole tiles: an odd number of
        outputs costs the vendor's library several times as long.
        """
        table = self._stacked({name: num_rows}, num_columns, multiple_of=WHOLE_ROWS)
        return _packed(table[:keep] if self._device.type == "cpu" else table, None, torch.float32)

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
        weight = self._stacked({f"{place}.{name}.weight": rows for name, rows in parts.items()}, num_inputs)
        biases = [self.tensor(f"{place}.{name}.bias", rows) for name, rows in parts.items() if has_bias]
        return _packed(weight, torch.cat(biases) if biases else None)

    def _stacked(self, parts: dict[str, int], num_columns: int, multiple_of: int = 1) -> torch.Tensor:
        """Matrices one above the other: their names and numbers of rows.

        A device's are filled in the background, each in its place, and must not be read before the source's
        `finish`: there is never a second copy, and the next ones are asked for meanwhile. Zeros behind them
        make the number of rows a multiple of `multiple_of`.
        """
        if self._device.type == "cpu":
            matrices = [self.tensor(name, rows, num_columns) for name, rows in parts.items()]
            return torch.cat(matrices) if len(matrices) > 1 else matrices[0]
        rows = sum(parts.values())
        shape = -(-rows // multiple_of) * multiple_of, num_columns
        out = torch.empty(shape, dtype=self._dtype, device=self._device)
        for name, part in zip(parts, out[:rows].split(list(parts.values())), strict=True):
            self._weights.fill(name, part)
        out[rows:].zero_()
        return out


def _packed(
    weight: torch.Tensor, bias: torch.Tensor | None, out_dtype: torch.dtype | None = None
) -> PackedLinear:
    packed = pack(weight, bias, out_dtype)
    if weight.device.type != "cpu" and packed.data.data_ptr() != weight.data_ptr():
        raise AssertionError("pack must keep a device's matrix: its numbers are still on their way")
    return packed
