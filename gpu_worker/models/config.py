"""What shape a model has: read from a Hugging Face `config.json`, checked, and free of any file format."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "QWenLMHeadModel": "qwen",
}
# <|endoftext|> and <|im_end|>: chats of Qwen's first models end with either, their files name at most one.
QWEN_ENDS = (151643, 151645)
ROPE_TYPES = ("default", "linear", "llama3")


class ModelError(Exception):
    """A model that cannot be served; the message names the file, and the tensor or key in it."""


@dataclass(frozen=True)
class RopeConfig:
    """How positions become rotations."""

    theta: float = 10_000.0
    type: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 0
    divisors: tuple[float, ...] | None = None
    """What each inverse frequency is divided by, where a file gives that instead of a rule."""


@dataclass(frozen=True)
class ModelConfig:
    """The shape of one decoder and the ids that end its sequences."""

    family: str
    """llama, mistral, qwen (the first), qwen2 or qwen3."""
    vocab_size: int
    """Rows of the embedding, padding included."""
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_eps: float
    max_position: int
    rope: RopeConfig
    tie_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    sliding_windows: tuple[int | None, ...]
    """For each layer: how many tokens it looks back, itself included; None is all."""
    initializer_range: float = 0.02
    eos_token_ids: tuple[int, ...] = ()
    raw: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """The config as it was read; it goes into the model's digest."""


def read_config(folder: Path) -> ModelConfig:
    """The config of a Hugging Face folder: `config.json`, with the EOS ids of `generation_config.json`.

    Raises:
        ModelError: a file is missing or no JSON, a key is missing, or the architecture is not served.
    """
    path = folder / "config.json"
    raw = _read_json(path)
    generation_path = folder / "generation_config.json"
    generation = _read_json(generation_path) if generation_path.exists() else {}
    try:
        return _from_huggingface(raw, generation, path)
    except KeyError as error:
        raise ModelError(f"{path}: {error.args[0]} is missing") from None
    except (TypeError, ValueError) as error:
        raise ModelError(f"{path}: {error}") from None


def is_native(folder: Path) -> bool:
    """Whether the folder's architecture is one of ours. Raises ModelError."""
    return _architecture(_read_json(folder / "config.json")) in ARCHITECTURES


def _architecture(raw: dict[str, Any]) -> str:
    return str(next(iter(raw.get("architectures") or ["(none)"])))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ModelError(f"{path} does not exist: {path.parent} is no model folder") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from None
    if not isinstance(document, dict):
        raise ModelError(f"{path} holds no JSON object")
    return document


def _from_huggingface(raw: dict[str, Any], generation: dict[str, Any], path: Path) -> ModelConfig:
    architecture = _architecture(raw)
    if architecture not in ARCHITECTURES:
        raise ModelError(f"{path}: architecture {architecture} is not served; {', '.join(ARCHITECTURES)} are")
    family = ARCHITECTURES[architecture]
    if family == "qwen":
        raw = _renamed(raw, path)
    if raw.get("quantization_config"):
        raise ModelError(f"{path}: quantization_config: quantized safetensors are not served")
    if (activation := raw.get("hidden_act", "silu")) != "silu":
        raise ModelError(f"{path}: hidden_act {activation!r} is not served, silu is")
    num_layers, num_heads = int(raw["num_hidden_layers"]), int(raw["num_attention_heads"])
    attention_bias = bool(raw.get("attention_bias", False))
    eos = generation.get("eos_token_id", raw.get("eos_token_id"))
    config = ModelConfig(
        family=family,
        vocab_size=int(raw["vocab_size"]),
        hidden_size=int(raw["hidden_size"]),
        intermediate_size=int(raw["intermediate_size"]),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=int(raw.get("num_key_value_heads") or num_heads),
        head_dim=int(raw.get("head_dim") or int(raw["hidden_size"]) // num_heads),
        rms_eps=float(raw.get("rms_norm_eps", 1e-6)),
        max_position=int(raw["max_position_embeddings"]),
        rope=_rope(raw, path),
        tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
        qkv_bias=attention_bias or family in ("qwen", "qwen2"),
        o_bias=attention_bias and family != "qwen2",
        mlp_bias=bool(raw.get("mlp_bias", False)),
        qk_norm=family == "qwen3",
        sliding_windows=_sliding_windows(raw, family, num_layers),
        initializer_range=float(raw.get("initializer_range", 0.02)),
        eos_token_ids=QWEN_ENDS if family == "qwen" else _ids(eos),
        raw=raw,
    )
    return check(config, path)


def _renamed(raw: dict[str, Any], path: Path) -> dict[str, Any]:
    """The config of Qwen's first models with the keys that the other families have.

    Beyond `seq_length` their attention changes (`use_dynamic_ntk`, `use_logn_attn`), which is not served:
    it is the greatest length.
    """
    if raw.get("rotary_pct", 1.0) != 1.0 or not raw.get("scale_attn_weights", True):
        raise ModelError(f"{path}: rotary_pct other than 1 and unscaled attention are not served")
    return {
        **raw,
        **dict.fromkeys(("attention_bias", "mlp_bias"), not raw.get("no_bias", True)),
        "intermediate_size": raw["intermediate_size"] // 2,
        "head_dim": raw["kv_channels"],
        "rms_norm_eps": raw["layer_norm_epsilon"],
        "max_position_embeddings": raw["seq_length"],
        "rope_theta": raw.get("rotary_emb_base", 10_000.0),
    }


def check(config: ModelConfig, path: Path) -> ModelConfig:
    """`config` itself, when its numbers fit each other.

    Raises:
        ModelError: they do not; `path` is named in it.
    """
    positive = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads")
    for name in (*positive, "head_dim", "max_position"):
        if getattr(config, name) < 1:
            raise ModelError(f"{path}: {name} must be at least 1, not {getattr(config, name)}")
    if config.num_heads % config.num_kv_heads:
        raise ModelError(
            f"{path}: {config.num_heads} heads do not share {config.num_kv_heads} KV heads evenly"
        )
    if config.head_dim % 2:
        raise ModelError(f"{path}: head_dim {config.head_dim} is odd")
    return config


def _rope(raw: dict[str, Any], path: Path) -> RopeConfig:
    """Transformers 5 writes `rope_parameters`; older files `rope_theta` and `rope_scaling`."""
    values = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    kind = values.get("rope_type", values.get("type", "default"))
    if kind not in ROPE_TYPES:
        raise ModelError(f"{path}: rope scaling {kind!r} is not served; {', '.join(ROPE_TYPES)} are")
    if raw.get("partial_rotary_factor", 1.0) != 1.0:
        raise ModelError(f"{path}: partial_rotary_factor is not served")
    return RopeConfig(
        theta=float(values.get("rope_theta", raw.get("rope_theta", 10_000.0))),
        type=kind,
        factor=float(values.get("factor", 1.0)),
        low_freq_factor=float(values.get("low_freq_factor", 1.0)),
        high_freq_factor=float(values.get("high_freq_factor", 4.0)),
        original_max_position=int(
            values.get("original_max_position_embeddings", raw["max_position_embeddings"])
        ),
    )


def _sliding_windows(raw: dict[str, Any], family: str, num_layers: int) -> tuple[int | None, ...]:
    window = raw.get("sliding_window", 4096 if family == "mistral" else None)
    # Qwen's configs carry a window that counts only where it is switched on; Llama's have none.
    if not window or family == "llama" or not raw.get("use_sliding_window", family == "mistral"):
        return (None,) * num_layers
    kinds = raw.get("layer_types")
    if kinds is None:
        first = min(int(raw.get("max_window_layers", 28)), num_layers) if family.startswith("qwen") else 0
        kinds = ["full_attention"] * first + ["sliding_attention"] * (num_layers - first)
    if len(kinds) < num_layers:
        raise ValueError(f"layer_types has {len(kinds)} entries for {num_layers} layers")
    return tuple(int(window) if kind == "sliding_attention" else None for kind in kinds[:num_layers])


def _ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(int(v) for v in value) if isinstance(value, list) else (int(value),)


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> torch.Tensor:
    """float32[head_dim / 2], after the scaling that the config asks for (Llama 3's rule included)."""
    frequencies = 1.0 / rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)
    if rope.divisors is not None:
        return frequencies / torch.tensor(rope.divisors, dtype=torch.float32)
    if rope.type == "linear":
        return frequencies / rope.factor
    if rope.type == "llama3":
        return _llama3_scaled(frequencies, rope)
    return frequencies


def _llama3_scaled(frequencies: torch.Tensor, rope: RopeConfig) -> torch.Tensor:
    """Long waves are stretched by `factor`, short ones kept, those between blended."""
    wavelengths = 2 * math.pi / frequencies
    turns = rope.original_max_position / wavelengths
    smooth = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blended = (1 - smooth) * frequencies / rope.factor + smooth * frequencies
    scaled = torch.where(turns < rope.low_freq_factor, frequencies / rope.factor, blended)
    return torch.where(turns > rope.high_freq_factor, frequencies, scaled)


def rotation_table(rope: RopeConfig, head_dim: int, max_len: int) -> torch.Tensor:
    """float32[max_len, head_dim]: the cosines of each position, then its sines."""
    angles = torch.outer(torch.arange(max_len).float(), inverse_frequencies(rope, head_dim))
    return torch.cat((angles.cos(), angles.sin()), dim=-1)
