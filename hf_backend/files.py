"""Opens a model folder with transformers and says what the worker wants to know of it.

The weights are read here already: how many heads and dims a layer keeps is not something that configurations
agree on, so the loaded modules are asked, by running one token.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is looked for in the network; the import reads it

import structlog
import torch
import transformers
from transformers.cache_utils import DynamicCache

from gpu_worker.models.config import ModelConfig, ModelError, RopeConfig
from gpu_worker.models.loader import ModelFiles, model_digest, safetensors_files, tokenizer_vocab_size
from hf_backend.model import TransformersModel

# Under these names configurations say how long a sequence may be, those with position biases too.
LENGTHS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")
LENGTH_OF_NO_NAME = 2048
# Rotations that change for all tokens when a sequence passes the first length: keys in pages cannot follow.
LENGTHENING = ("dynamic", "longrope")


def open_model(path: Path, load_format: str, seed: int, dtype: torch.dtype) -> ModelFiles:
    """Read a Hugging Face folder.

    Args:
        path: the folder.
        load_format: "auto" reads the weights that lie there, "dummy" draws them at random.
        seed: of the random weights.
        dtype: of weights and KV.

    Raises:
        ModelError: transformers knows no such causal language model, a weight is missing, or a layer keeps
            something else than keys and values of each token.
    """
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with _named(path):
        config = transformers.AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(f"{path}: {config.model_type} is no causal language model of transformers")
    if getattr(config, "quantization_config", None):
        raise ModelError(f"{path}: quantization_config: quantized weights are not served")
    files = _weight_files(path) if load_format == "auto" else []
    module = _read(path, dtype) if files else _drawn(config, seed, dtype)
    module.eval().requires_grad_(False)
    shape = _shape(module, config, path)
    known = tokenizer_vocab_size(path) or shape.vocab_size
    digest = model_digest(shape, files)
    return ModelFiles(
        path,
        shape,
        digest if files else f"dummy-{seed}-{digest}",
        min(shape.vocab_size, known),
        weights=lambda report=None: module,
        build=TransformersModel,
    )


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Whatever transformers, or a model's own code in it, raises, in our words."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:  # each architecture has its own checks, which raise what they like
        raise ModelError(f"{path}: transformers cannot run it: {type(error).__name__}: {error}") from error


def _weight_files(path: Path) -> list[Path]:
    try:
        return safetensors_files(path)
    except ModelError:
        if files := sorted(path.glob("pytorch_model*.bin")):
            return files
        raise


def _read(path: Path, dtype: torch.dtype) -> Any:
    load: Any = transformers.AutoModelForCausalLM.from_pretrained
    with _named(path):
        module, found = load(
            path, dtype=dtype, local_files_only=True, trust_remote_code=False, output_loading_info=True
        )
    for kind in ("missing_keys", "mismatched_keys", "error_msgs"):
        if names := found.get(kind):
            raise ModelError(f"{path}: {kind.replace('_', ' ')}: {sorted(map(str, names))[:3]}")
    if names := found.get("unexpected_keys"):
        structlog.get_logger().bind(service="worker").warning(
            "tensors without a place", names=sorted(names)[:3]
        )
    return module


def _drawn(config: Any, seed: int, dtype: torch.dtype) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)


def _shape(module: Any, config: Any, path: Path) -> ModelConfig:
    """What the worker reads of a config; the numbers of single layers are the largest of any."""
    text = config.get_text_config(decoder=True)
    cache = DynamicCache(config=config)
    with _named(path), torch.inference_mode():
        names = inspect.signature(module.forward).parameters
        name = next((name for name in ("cache", "past_key_values") if name in names), None)
        if name is None:
            raise ModelError(f"{path}: {config.model_type} takes no cache of keys and values")
        logits = module(torch.zeros(1, 1, dtype=torch.int64), use_cache=True, **{name: cache}).logits
    kept: list[Any] = [(getattr(x, "keys", None), getattr(x, "values", None)) for x in cache.layers]
    if not kept or not all(_is_of_one_token(keys) and _is_of_one_token(values) for keys, values in kept):
        raise ModelError(
            f"{path}: layers of {config.model_type} keep something else than keys and values of each token "
            "(a recurrent state, or those of another layer), which pages cannot hold"
        )
    dims = max(x.shape[3] for pair in kept for x in pair)
    generation = module.generation_config
    ends = generation.eos_token_id if generation is not None else None
    ends = getattr(text, "eos_token_id", None) if ends is None else ends
    return ModelConfig(
        family=config.model_type,
        vocab_size=logits.shape[-1],
        hidden_size=text.hidden_size,
        intermediate_size=0,
        num_layers=len(kept),
        num_heads=text.num_attention_heads,
        num_kv_heads=max(keys.shape[1] for keys, _ in kept),
        head_dim=dims + dims % 2,
        rms_eps=0.0,
        max_position=_longest(text),
        rope=RopeConfig(),
        tie_embeddings=False,
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
        qk_norm=False,
        sliding_windows=(None,) * len(kept),
        eos_token_ids=() if ends is None else tuple([ends] if isinstance(ends, int) else ends),
        raw={"model_impl": "transformers", **json.loads((path / "config.json").read_bytes())},
    )


def _is_of_one_token(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.dim() == 4 and x.shape[0] == x.shape[2] == 1


def _longest(text: Any) -> int:
    """Tokens of a sequence."""
    length = next((int(v) for name in LENGTHS if (v := getattr(text, name, None))), LENGTH_OF_NO_NAME)
    ropes = getattr(text, "rope_parameters", None) or {}
    for rope in (ropes, *(value for value in ropes.values() if isinstance(value, dict))):
        if rope.get("rope_type") in LENGTHENING:
            first = rope.get("original_max_position_embeddings")
            first = first or getattr(text, "original_max_position_embeddings", None) or length
            length = min(length, int(first))
    return length
