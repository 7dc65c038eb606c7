"""Tiny random models of architectures that Pagoda has no layers of its own for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

VOCAB = 200
COMMON: dict[str, Any] = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LLAMA_LIKE = {
    **COMMON,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}
FALCON = {
    **COMMON,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
    "short_factor": [1.0, 1.5, 2.0, 2.5],
    "long_factor": [2.0, 4.0, 8.0, 16.0],
}
# Kind: the configuration's class, its values, and whether rows go through flat batches.
KINDS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "gpt2": (
        "GPT2",
        {**COMMON, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 256, "initializer_range": 0.2},
        True,
    ),
    "gpt2_scaled": (
        "GPT2",
        {
            **COMMON,
            **{"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 256, "initializer_range": 0.2},
            **{"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True},
        },
        True,
    ),
    "opt": (
        "OPT",
        {
            **COMMON,
            **{"hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 3, "num_attention_heads": 4},
            **{"max_position_embeddings": 256, "word_embed_proj_dim": 32, "init_std": 0.2},
        },
        True,
    ),
    "gemma3": (
        "Gemma3Text",
        {
            **LLAMA_LIKE,
            **{"head_dim": 32, "query_pre_attn_scalar": 24, "sliding_window": 9, "num_hidden_layers": 4},
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
            **{"final_logit_softcapping": 20.0, "tie_word_embeddings": False},
        },
        True,
    ),
    "gemma2": (
        "Gemma2",
        {
            **LLAMA_LIKE,
            **{"head_dim": 16, "sliding_window": 9, "attn_logit_softcapping": 3.0},
            **{"final_logit_softcapping": 20.0, "tie_word_embeddings": False},
        },
        True,
    ),
    "phi3": ("Phi3", {**LLAMA_LIKE, "sliding_window": None}, True),
    "phi3_window": ("Phi3", {**LLAMA_LIKE, "sliding_window": 11}, True),
    "phi3_longrope": (
        "Phi3",
        {
            **LLAMA_LIKE,
            **{"sliding_window": None, "rope_parameters": LONGROPE, "max_position_embeddings": 1024},
            "original_max_position_embeddings": 160,
        },
        True,
    ),
    "falcon": (
        "Falcon",
        {**FALCON, "multi_query": True, "new_decoder_architecture": False, "alibi": False},
        False,
    ),
    "falcon_new": (
        "Falcon",
        {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False},
        False,
    ),
    "falcon_alibi": (
        "Falcon",
        {**FALCON, "multi_query": False, "new_decoder_architecture": False, "alibi": True, "bias": True},
        False,
    ),
    "bloom": (
        "Bloom",
        {**COMMON, "hidden_size": 64, "n_layer": 3, "n_head": 4, "initializer_range": 0.2},
        False,
    ),
    "mixtral": (
        "Mixtral",
        {**LLAMA_LIKE, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
        True,
    ),
    "gpt_oss": (
        "GptOss",
        {
            **LLAMA_LIKE,
            **{"head_dim": 16, "sliding_window": 9, "num_local_experts": 4, "num_experts_per_tok": 2},
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        True,
    ),
}


def other_model(kind: str, folder: Path, **changes: Any) -> Any:
    """The model, float32, every weight random (biases, norms and sinks too), saved to `folder`; `changes` are
    of its configuration."""
    name, values, _ = KINDS[kind]
    torch.manual_seed(sorted(KINDS).index(kind))
    config = getattr(transformers, f"{name}Config")(**{**values, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model
