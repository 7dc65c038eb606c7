"""The measured model shapes as folders: a config alone for random weights, or a whole checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SHARD_BYTES = 4 << 30

_QWEN25: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "torch_dtype": "bfloat16",
    "hidden_act": "silu",
    "use_cache": True,
    "initializer_range": 0.02,
    "attention_dropout": 0.0,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32768,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "use_sliding_window": False,
    "transformers_version": "4.43.1",
}
PRESETS: dict[str, dict[str, Any]] = {
    "qwen2.5-7b": _QWEN25
    | {
        "hidden_size": 3584,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "intermediate_size": 18944,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
    },
    "qwen2.5-0.5b": _QWEN25
    | {
        "hidden_size": 896,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "intermediate_size": 4864,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
}


def config_folder(preset: str, base: Path, tokenizer: Path | None = None) -> Path:
    """A folder named after the preset with its `config.json`, and the files of `tokenizer` where given."""
    folder = base / ("text" if tokenizer else "ids") / preset
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(PRESETS[preset], indent=1))
    for file in sorted(tokenizer.glob("tokenizer*.json")) if tokenizer else ():
        shutil.copy(file, folder)
    return folder


def tensor_shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a Qwen2 checkpoint's tensors, in the order of the layers."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    keys = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        for name, size in (("q", hidden), ("k", keys), ("v", keys)):
            yield f"{layer}self_attn.{name}_proj.weight", (size, hidden)
            yield f"{layer}self_attn.{name}_proj.bias", (size,)
        yield f"{layer}self_attn.o_proj.weight", (hidden, hidden)
        yield f"{layer}mlp.gate_proj.weight", (inner, hidden)
        yield f"{layer}mlp.up_proj.weight", (inner, hidden)
        yield f"{layer}mlp.down_proj.weight", (hidden, inner)
        yield f"{layer}input_layernorm.weight", (hidden,)
        yield f"{layer}post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (config["vocab_size"], hidden)


def write_checkpoint(preset: str, folder: Path, device: str) -> int:
    """Write random bfloat16 weights as safetensors shards with an index; their size in bytes.

    They are drawn on `device`; what was just written lies in the system's page cache.
    """
    import torch
    from safetensors.torch import save_file

    config = PRESETS[preset]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    weight_map: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    total = 0

    def flush() -> None:
        name = f"model-{len(set(weight_map.values())) + 1:05}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, name))
        shard.clear()

    for name, shape in tensor_shapes(config):
        if name.endswith("norm.weight"):
            tensor = torch.ones(shape, dtype=torch.bfloat16)
        else:
            drawn = torch.empty(shape, dtype=torch.bfloat16, device=device)
            tensor = drawn.normal_(0, config["initializer_range"]).cpu()
        shard[name] = tensor
        total += tensor.nbytes
        if sum(t.nbytes for t in shard.values()) >= SHARD_BYTES:
            flush()
    flush()
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total
