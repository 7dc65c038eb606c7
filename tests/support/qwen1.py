"""A model of Qwen's first architecture, made from a random Qwen2 model: the same numbers, other names.

The release's own code is not needed: what it computes below `seq_length` is Qwen2 with as many KV heads as
heads, q, k and v in one matrix, and the MLP's gate and up projections by the names of w2 and w1.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "eos_token_id": [151643, 151645],
    "pad_token_id": 0,
}


def qwen2_twin(folder: Path, **shape: Any) -> transformers.PreTrainedModel:
    """A Qwen2 model with a head of keys for each of queries, every weight random, saved to `folder`."""
    torch.manual_seed(11)
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**{**SHAPE, **shape})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


def as_qwen1(twin: Path, folder: Path) -> Path:
    """Write the Qwen2 model in `twin` to `folder` as a release of Qwen's first architecture has it."""
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads((twin / "config.json").read_text())
    tensors = load_file(twin / "model.safetensors")
    renamed = {
        "transformer.wte.weight": tensors["model.embed_tokens.weight"],
        "transformer.ln_f.weight": tensors["model.norm.weight"],
        "lm_head.weight": tensors["lm_head.weight"],
    }
    for i in range(config["num_hidden_layers"]):
        theirs, ours = f"model.layers.{i}", f"transformer.h.{i}"
        for kind in ("weight", "bias"):
            parts = [tensors[f"{theirs}.self_attn.{name}_proj.{kind}"] for name in "qkv"]
            renamed[f"{ours}.attn.c_attn.{kind}"] = torch.cat(parts)
        for name, of in {
            "attn.c_proj": "self_attn.o_proj",
            "ln_1": "input_layernorm",
            "ln_2": "post_attention_layernorm",
            "mlp.w1": "mlp.up_proj",
            "mlp.w2": "mlp.gate_proj",
            "mlp.c_proj": "mlp.down_proj",
        }.items():
            renamed[f"{ours}.{name}.weight"] = tensors[f"{theirs}.{of}.weight"]
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(_config(config), indent=2))
    generation = {"chat_format": "chatml", "eos_token_id": 151643, "pad_token_id": 151643}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def _config(qwen2: dict[str, Any]) -> dict[str, Any]:
    """The keys of Qwen-7B-Chat's configuration, and their values where they are not sizes."""
    return {
        "architectures": ["QWenLMHeadModel"],
        "auto_map": {"AutoConfig": "configuration_qwen.QWenConfig"},
        "attn_dropout_prob": 0.0,
        "bf16": False,
        "emb_dropout_prob": 0.0,
        "hidden_size": qwen2["hidden_size"],
        "initializer_range": 0.02,
        "intermediate_size": 2 * qwen2["intermediate_size"],
        "kv_channels": qwen2["hidden_size"] // qwen2["num_attention_heads"],
        "layer_norm_epsilon": 1e-6,
        "max_position_embeddings": 32768,
        "model_type": "qwen",
        "no_bias": True,
        "num_attention_heads": qwen2["num_attention_heads"],
        "num_hidden_layers": qwen2["num_hidden_layers"],
        "rotary_emb_base": 10000,
        "rotary_pct": 1.0,
        "scale_attn_weights": True,
        "seq_length": qwen2["max_position_embeddings"],
        "tie_word_embeddings": False,
        "tokenizer_class": "QWenTokenizer",
        "use_cache": True,
        "use_dynamic_ntk": True,
        "use_flash_attn": "auto",
        "use_logn_attn": True,
        "vocab_size": qwen2["vocab_size"],
    }
