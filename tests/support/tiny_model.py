"""A tiny random model in a Hugging Face folder, with a real tokenizer: any other model than the embedded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tests.support.data import model_folder


def tiny_model(folder: Path) -> Path:
    """Write a Qwen2-shaped model of random weights, without a chat template, to `folder`.

    Its tokenizer is the embedded model's. The end of a turn, which Qwen's template has, is a token of it, but
    not one that the model's configuration ends at.
    """
    import torch
    import transformers

    torch.manual_seed(7)
    config = transformers.Qwen2Config(
        vocab_size=49152,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=0,
    )
    transformers.Qwen2ForCausalLM(config).save_pretrained(folder)
    source = model_folder()
    shutil.copy(source / "tokenizer.json", folder)
    tokenizer = json.loads((source / "tokenizer_config.json").read_text())
    tokenizer.pop("chat_template")
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return folder
