"""Tensors of Qwen's first models (QWenLMHeadModel) under the names of the decoder that all families share.

Their queries, keys and values lie in one tensor, one above the other; each third is a tensor here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial

import torch

from gpu_worker.models.loader import Stored

FUSED = ("q_proj", "k_proj", "v_proj")
NAMES = {
    "transformer.wte": "model.embed_tokens",
    "transformer.ln_f": "model.norm",
    "transformer.h.": "model.layers.",
    ".ln_1": ".input_layernorm",
    ".ln_2": ".post_attention_layernorm",
    ".attn.c_attn": ".self_attn.c_attn",
    ".attn.c_proj": ".self_attn.o_proj",
    ".mlp.w1": ".mlp.up_proj",
    ".mlp.w2": ".mlp.gate_proj",
    ".mlp.c_proj": ".mlp.down_proj",
}


def llama_names(tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    """The same tensors by Llama's names; one whose name is unknown keeps it."""
    renamed: dict[str, Stored] = {}
    for name, stored in tensors.items():
        for theirs, llamas in NAMES.items():
            name = name.replace(theirs, llamas)
        renamed.update(_thirds(name, stored) if "c_attn" in name else {name: stored})
    return renamed


def _thirds(name: str, stored: Stored) -> Iterator[tuple[str, Stored]]:
    rows, num_bytes = stored.shape[0] // len(FUSED), stored.num_bytes // len(FUSED)
    for i, part in enumerate(FUSED):
        span = stored.span and replace(stored.span, offset=stored.span.offset + i * num_bytes)
        read, shape = partial(_rows, stored.read, i * rows, rows), (rows, *stored.shape[1:])
        yield name.replace("c_attn", part), Stored(stored.file, shape, read, num_bytes, span)


def _rows(read: Callable[[], torch.Tensor], first: int, count: int) -> torch.Tensor:
    return read().narrow(0, first, count)
