"""The measured model shapes as folders: a config alone for random weights, or a whole checkpoint."""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

SHARD_BYTES = 1 << 30
WRITERS = 8
NUM_DRAWN = 8 << 20  # random numbers, 16 MiB: more than a tensor's row, little enough to be drawn in no time
IN_MEMORY = Path("/dev/shm")
BFLOAT16_ONE = 0x3F80

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


def checkpoint_bytes(preset: str) -> int:
    """The size of a preset's bfloat16 weights."""
    return sum(2 * math.prod(shape) for _, shape in tensor_shapes(PRESETS[preset]))


def room_for(preset: str, base: Path) -> Path:
    """Where to write a checkpoint: a file system in memory where it has room, else `base`.

    Files there are pages of the page cache by definition, and no disk writes them back during a timed start.
    """
    try:
        in_memory = os.statvfs(IN_MEMORY)
    except OSError:
        return base
    return IN_MEMORY if in_memory.f_bavail * in_memory.f_frsize > 1.2 * checkpoint_bytes(preset) else base


def write_checkpoint(preset: str, folder: Path) -> int:
    """Write random bfloat16 weights as safetensors shards with an index; their size in bytes.

    All weights are cut from one short run of normal numbers, each tensor from another place: to a loader they
    are as good as any, and only the memory's speed limits the writing. What was just written lies in the
    system's page cache.
    """
    config = PRESETS[preset]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    filled = 0
    for name, shape in tensor_shapes(config):
        if filled >= SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append((name, shape))
        filled += 2 * math.prod(shape)
    drawn = np.random.default_rng(0).normal(0, config["initializer_range"], NUM_DRAWN).astype(np.float32)
    numbers = (drawn.view(np.uint32) >> 16).astype(np.uint16)  # bfloat16 is the upper half of a float32
    files = [folder / f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    with ThreadPoolExecutor(WRITERS) as pool:  # a file takes one writer at a time, so each has its own
        total = sum(pool.map(_write_shard, files, shards, repeat(numbers)))
    weight_map = {name: file.name for file, shard in zip(files, shards, strict=True) for name, _ in shard}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def _write_shard(
    file: Path, shard: list[tuple[str, tuple[int, ...]]], numbers: npt.NDArray[np.uint16]
) -> int:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shard:
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb", buffering=0) as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shard:
            left = math.prod(shape)
            ones = np.full(left, BFLOAT16_ONE, np.uint16) if name.endswith("norm.weight") else None
            source = numbers if ones is None else ones
            first = zlib.crc32(name.encode()) % len(source) if ones is None else 0
            while left:
                piece = source[first : first + left]
                _write_all(stream, piece.data.cast("B"))
                left, first = left - len(piece), 0
    return end


def _write_all(stream: io.FileIO, data: memoryview) -> None:
    while data:
        data = data[stream.write(data) :]
