"""Models in GGUF files: metadata becomes a config, tensors are dequantized as they are taken.

llama.cpp stores the rows of the `llama` architecture's q and k projections in another order, so that its
rotation works on neighbours; that is undone here. Llama 3's rope scaling comes as a tensor of divisors.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from gpu_worker.models.config import ModelConfig, ModelError, RopeConfig, check
from gpu_worker.models.loader import Stored

FAMILIES = ("llama", "qwen2", "qwen3")
TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ROPE_DIVISORS = "rope_freqs.weight"


@dataclass(frozen=True)
class GgufModel:
    """A GGUF file, opened: `tensors` by Hugging Face's names, none of them read yet."""

    config: ModelConfig
    vocab_size: int
    metadata: dict[str, Any]
    tensors: dict[str, Stored]


def open_gguf(path: Path) -> GgufModel:
    """Read a file's metadata and list its tensors.

    Raises:
        ModelError: the file is truncated or no GGUF file, or holds an architecture that is not served.
    """
    try:
        reader = gguf.GGUFReader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, OSError, IndexError, KeyError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} is truncated or no GGUF file: {error}") from error
    stored = {tensor.name: tensor for tensor in reader.tensors}
    try:
        config = _config(metadata, stored, path)
    except KeyError as error:
        raise ModelError(f"{path}: metadata {error.args[0]} is missing") from None
    stored.pop(ROPE_DIVISORS, None)  # a part of the config
    tensors = {}
    for name, tensor in stored.items():
        shape = tuple(int(n) for n in reversed(tensor.shape))
        tensors[_name(name, path)] = Stored(path, shape, partial(_read, tensor, config), int(tensor.n_bytes))
    return GgufModel(config, len(metadata["tokenizer.ggml.tokens"]), metadata, tensors)


def _config(metadata: dict[str, Any], stored: dict[str, Any], path: Path) -> ModelConfig:
    family = metadata["general.architecture"]
    if family not in FAMILIES:
        raise ModelError(f"{path}: architecture {family} is not served; {', '.join(FAMILIES)} are")
    if metadata.get(f"{family}.expert_count"):
        raise ModelError(f"{path}: {family}.expert_count: mixtures of experts are not served")

    def number(key: str) -> int:
        return int(metadata[f"{family}.{key}"])

    hidden_size, num_heads = number("embedding_length"), number("attention.head_count")
    num_layers, max_position = number("block_count"), number("context_length")
    head_dim = int(metadata.get(f"{family}.attention.key_length", hidden_size // num_heads))
    if (rotated := int(metadata.get(f"{family}.rope.dimension_count", head_dim))) != head_dim:
        raise ModelError(f"{path}: {family}.rope.dimension_count {rotated} is not the head's {head_dim}")
    if "token_embd.weight" not in stored:
        raise ModelError(f"{path}: tensor token_embd.weight is missing")
    window = metadata.get(f"{family}.attention.sliding_window")
    ends = (metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot"))
    config = ModelConfig(
        family=family,
        vocab_size=int(stored["token_embd.weight"].shape[1]),
        hidden_size=hidden_size,
        intermediate_size=number("feed_forward_length"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=int(metadata.get(f"{family}.attention.head_count_kv", num_heads)),
        head_dim=head_dim,
        rms_eps=float(metadata[f"{family}.attention.layer_norm_rms_epsilon"]),
        max_position=max_position,
        rope=_rope(metadata, stored, family, max_position, path),
        tie_embeddings="output.weight" not in stored,
        qkv_bias="blk.0.attn_q.bias" in stored,
        o_bias="blk.0.attn_output.bias" in stored,
        mlp_bias="blk.0.ffn_gate.bias" in stored,
        qk_norm="blk.0.attn_q_norm.weight" in stored,
        sliding_windows=(int(window) if window else None,) * num_layers,
        eos_token_ids=tuple(sorted({int(i) for i in ends if i is not None})),
        raw={k: v for k, v in metadata.items() if not k.startswith("tokenizer.")},
    )
    return check(config, path)


def _rope(
    metadata: dict[str, Any], stored: dict[str, Any], family: str, max_position: int, path: Path
) -> RopeConfig:
    kind = metadata.get(f"{family}.rope.scaling.type", "none")
    if kind not in ("none", "linear"):
        raise ModelError(f"{path}: {family}.rope.scaling.type {kind!r} is not served")
    return RopeConfig(
        theta=float(metadata.get(f"{family}.rope.freq_base", 10_000.0)),
        type="default" if kind == "none" else kind,
        factor=float(metadata.get(f"{family}.rope.scaling.factor", 1.0)),
        original_max_position=max_position,
        divisors=tuple(stored[ROPE_DIVISORS].data.tolist()) if ROPE_DIVISORS in stored else None,
    )


def _name(name: str, path: Path) -> str:
    """Hugging Face's name of a tensor."""
    stem, _, suffix = name.rpartition(".")
    if stem in TOP_NAMES:
        return f"{TOP_NAMES[stem]}.{suffix}"
    block, _, rest = stem.partition(".")
    layer, _, part = rest.partition(".")
    if block != "blk" or part not in LAYER_NAMES:
        raise ModelError(f"{path}: tensor {name} has no place in the architectures that are served")
    return f"model.layers.{layer}.{LAYER_NAMES[part]}.{suffix}"


def _read(tensor: Any, config: ModelConfig) -> torch.Tensor:
    """float32, in the order that the config's other source would have."""
    values = gguf.dequantize(tensor.data, tensor.tensor_type)
    values = np.require(values, np.float32, ["C", "W"])
    heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads}.get(tensor.name.split(".")[-2])
    if config.family == "llama" and heads is not None:
        pairs = values.reshape(heads, values.shape[0] // heads // 2, 2, *values.shape[1:])
        values = pairs.swapaxes(1, 2).reshape(values.shape)
    return torch.from_numpy(values)
