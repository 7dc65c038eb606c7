"""Who holds what: each number of a model is on one rank, or on those that share its KV head; else zeros."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.gpu_models import PRESETS, config_folder, tensor_shapes
from gpu_worker.kv_cache import block_bytes
from gpu_worker.models.config import ModelConfig, ModelError, RopeConfig, read_config
from gpu_worker.models.loader import open_model
from gpu_worker.models.shard import Part, Shard

PLAIN = ModelConfig(
    family="llama", vocab_size=512, hidden_size=6, intermediate_size=256, num_layers=1, num_heads=8,
    num_kv_heads=4, head_dim=2, rms_eps=1e-6, max_position=64, rope=RopeConfig(), tie_embeddings=False,
    qkv_bias=True, o_bias=True, mlp_bias=True, qk_norm=True, sliding_windows=(None,),
)  # fmt: skip
SIZES = st.integers(1, 400)


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    kv_heads = draw(st.integers(1, 8))
    return replace(
        PLAIN,
        num_kv_heads=kv_heads,
        num_heads=kv_heads * draw(st.integers(1, 7)),
        head_dim=draw(st.sampled_from((2, 4))),
        intermediate_size=draw(SIZES),
        vocab_size=draw(SIZES),
    )


def whole_tensors(c: ModelConfig) -> dict[str, torch.Tensor]:
    """By name, every number of a tensor another one, none of them zero."""
    q, kv, inner = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim, c.intermediate_size
    shapes = {
        "model.embed_tokens.weight": (c.vocab_size, 6), "lm_head.weight": (c.vocab_size, 6),
        "a.q_proj.weight": (q, 6), "a.k_proj.weight": (kv, 6), "a.v_proj.weight": (kv, 6),
        "a.o_proj.weight": (6, q),
        "a.q_proj.bias": (q,), "a.k_proj.bias": (kv,), "a.v_proj.bias": (kv,), "a.o_proj.bias": (6,),
        "m.gate_proj.weight": (inner, 6), "m.up_proj.weight": (inner, 6), "m.down_proj.weight": (6, inner),
        "m.gate_proj.bias": (inner,), "m.down_proj.bias": (6,),
        "model.norm.weight": (6,), "a.q_norm.weight": (c.head_dim,), "a.input_layernorm.weight": (6,),
    }  # fmt: skip
    return {name: torch.arange(1, 1 + torch.Size(s).numel()).view(s) for name, s in shapes.items()}


def held(part: Part | None, whole: torch.Tensor) -> torch.Tensor:
    return whole if part is None else part.cut(whole)


@given(configs(), st.integers(1, 4))
def test_every_number_is_on_one_rank_beside_zeros(config: ModelConfig, size: int) -> None:
    shards = [Shard.of(config, rank, size) for rank in range(size)]
    assert all(shard.local == shards[0].local for shard in shards)
    copies = Counter({name: 1 for name in whole_tensors(config)})
    if size > config.num_kv_heads and size % config.num_kv_heads == 0:
        copies |= Counter(
            {f"a.{kv}_proj.{of}": size // config.num_kv_heads for kv in "kv" for of in ("weight", "bias")}
        )
    asked = whole_tensors(shards[0].local)
    for name, whole in whole_tensors(config).items():
        parts = [held(shard.part(name), whole) for shard in shards]
        assert all(part.shape == asked[name].shape for part in parts), name
        found = Counter(number for part in parts for number in part.flatten().tolist() if number)
        everywhere = shards[0].part(name) is None
        assert found == Counter(
            dict.fromkeys(whole.flatten().tolist(), size if everywhere else copies[name])
        ), name


@given(configs(), st.integers(1, 8))
def test_queries_are_where_their_keys_are(config: ModelConfig, size: int) -> None:
    def heads(shard: Shard, name: str, whole: int) -> list[int]:
        """For each of the rank's heads which one it is, from 1 on; 0 for one of zeros."""
        numbers = torch.arange(1, whole + 1).repeat_interleave(config.head_dim)
        return held(shard.part(name), numbers)[:: config.head_dim].tolist()

    of_all = []
    for rank in range(size):
        shard = Shard.of(config, rank, size)
        queries = heads(shard, "a.q_proj.bias", config.num_heads)
        keys = heads(shard, "a.k_proj.bias", config.num_kv_heads)
        assert (len(queries), len(keys)) == (shard.local.num_heads, shard.local.num_kv_heads)
        group = len(queries) // len(keys)
        assert group * len(keys) == len(queries)
        for place, query in enumerate(queries):
            if query:
                assert keys[place // group] == (query - 1) // (config.num_heads // config.num_kv_heads) + 1
        of_all += [query for query in queries if query]
        columns = shard.part("a.o_proj.weight")
        rows = shard.part("a.q_proj.weight")
        assert (columns and replace(columns, dim=0)) == rows
    assert of_all == list(range(1, config.num_heads + 1))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "here", "said"),
    [
        (8, 4, 2, (4, 2), {}),
        (8, 4, 4, (2, 1), {}),
        (9, 3, 2, (6, 2), {"zero_heads": 3, "zero_kv_heads": 1}),
        (9, 3, 4, (3, 1), {"zero_heads": 3, "zero_kv_heads": 1}),
        (28, 4, 8, (4, 1), {"ranks_of_a_kv_head": 2, "zero_heads": 4}),
        (8, 2, 4, (2, 1), {"ranks_of_a_kv_head": 2}),
    ],
)
def test_what_does_not_divide_is_said(
    heads: int, kv_heads: int, size: int, here: tuple[int, int], said: dict[str, int]
) -> None:
    config = replace(PLAIN, num_heads=heads, num_kv_heads=kv_heads, intermediate_size=512)
    shard = Shard.of(config, 0, size)
    assert (shard.local.num_heads, shard.local.num_kv_heads) == here
    assert shard.describe() == said


def test_padded_tiles_are_said() -> None:
    config = replace(PLAIN, intermediate_size=200, vocab_size=300)
    assert Shard.of(config, 1, 2).describe() == {"zero_feed_forward": 56, "zero_vocabulary": 84}
    assert (Shard.of(config, 1, 2).local.intermediate_size, Shard.of(config, 1, 2).local.vocab_size) == (
        128,
        192,
    )


def test_a_single_rank_holds_the_model_itself() -> None:
    shard = Shard.of(replace(PLAIN, intermediate_size=200), 0, 1)
    assert shard.local == shard.config and shard.describe() == {} and shard.part("a.q_proj.weight") is None


def test_transformers_modules_are_refused(tiny) -> None:
    files = open_model(tiny("llama")[1], "auto", 0, "transformers")
    assert files.shard(0, 1).local == files.config
    with pytest.raises(
        ModelError, match=r"cannot be split over 2 ranks.*--tensor-parallel 1.*--model-impl native"
    ):
        files.shard(1, 2)


def test_a_rank_holds_half_of_a_7b_shape(tmp_path: Path) -> None:
    """Within 3 %: what is replicated are the norms."""
    raw = PRESETS["qwen2.5-7b"]
    config = read_config(config_folder("qwen2.5-7b", tmp_path))
    shapes = dict(tensor_shapes(raw))
    whole = sum(map(math.prod, shapes.values()))
    for rank in range(2):
        shard = Shard.of(config, rank, 2)
        assert not shard.describe()
        parts = {name: shard.part(name) for name in shapes}
        own = sum(
            math.prod(shape) if (part := parts[name]) is None else math.prod(shape) * part.size // part.whole
            for name, shape in shapes.items()
        )
        assert own == pytest.approx(whole / 2, rel=0.03)
        assert all("norm" in name for name, part in parts.items() if part is None)
        sizes = [block_bytes(c, 16, torch.bfloat16) for c in (config, shard.local)]
        assert sizes[0] == 2 * sizes[1]
