import dataclasses

import pytest
import torch

from kernels import cpu
from kernels.attention import cache_shape
from kernels.layer import Layer, LayerStack, Step, forward_reference
from kernels.linear import pack

HIDDEN, INNER, HEADS, KV_HEADS, DIM, BLOCK = 48, 80, 6, 2, 16, 8


def make_layer(randn, dtype, **changes):
    def weight(n, k):
        return randn(n, k, dtype=dtype) * k**-0.5

    caches = [torch.full(s, float("nan"), dtype=dtype) for s in cache_shape(12, KV_HEADS, BLOCK, DIM, dtype)]
    arguments = {
        "input_norm": randn(HIDDEN, dtype=dtype),
        "qkv": pack(weight((HEADS + 2 * KV_HEADS) * DIM, HIDDEN), randn((HEADS + 2 * KV_HEADS) * DIM)),
        "o": pack(weight(HIDDEN, HEADS * DIM)),
        "post_norm": randn(HIDDEN, dtype=dtype),
        "gate_up": pack(weight(2 * INNER, HIDDEN)),
        "down": pack(weight(HIDDEN, INNER)),
        "key_cache": caches[0],
        "value_cache": caches[1],
        "num_heads": HEADS,
        "eps": 1e-5,
        "scale": DIM**-0.5,
    }
    return Layer(**arguments | changes)


def make_step(**changes):
    """Two prompts, of 19 and 1 tokens."""
    tables = torch.tensor([[3, 5, 7], [2, -1, -1]], dtype=torch.int32)
    token = torch.arange(19)
    slots = torch.cat((tables[0][token // BLOCK] * BLOCK + token % BLOCK, torch.tensor([2 * BLOCK])))
    angles = torch.outer(torch.arange(32), 100.0 ** -(torch.arange(0, DIM, 2) / DIM))
    arguments = {
        "cos_sin": torch.cat((angles.cos(), angles.sin()), dim=1),
        "positions": torch.cat((token, torch.tensor([0]))).int(),
        "slot_mapping": slots,
        "block_tables": tables,
        "query_start": torch.tensor([0, 19, 20], dtype=torch.int32),
        "seq_lens": torch.tensor([19, 1], dtype=torch.int32),
    }
    return Step(**arguments | changes)


@pytest.mark.parametrize("options", ["plain", "qwen3", "window"])
def test_equals_the_single_operations(options, dtype, threads, randn):
    changes = {"window": {"sliding_window": 5}, "plain": {}}.get(options)
    layers = []
    for _ in range(3):
        norms = {name: randn(DIM, dtype=dtype) for name in ("q_norm", "k_norm")}
        layers.append(make_layer(randn, dtype, **norms if changes is None else changes))
    hidden = randn(20, HIDDEN, dtype=dtype)
    mine, theirs = hidden.clone(), hidden.clone()
    _, delta = LayerStack(layers).forward(mine, make_step())
    caches = [cache.clone() for layer in layers for cache in (layer.key_cache, layer.value_cache)]
    expected = forward_reference(layers, theirs, make_step())
    assert torch.isfinite(delta).all()
    assert torch.equal(delta, expected) and torch.equal(mine, theirs)
    after = [cache for layer in layers for cache in (layer.key_cache, layer.value_cache)]
    for one, other in zip(caches, after, strict=True):
        assert torch.equal(one.nan_to_num(99), other.nan_to_num(99))


def test_matches_plain_torch(randn):
    layer = make_layer(randn, torch.float32)
    hidden = randn(20, HIDDEN)
    x, step = hidden.double(), make_step()

    def norm(x, weight):
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight

    cos, sin = step.cos_sin.double()[step.positions.long()].unsqueeze(1).repeat(1, 1, 2).split(DIM, dim=2)
    cos, sin = cos[..., : DIM // 2].repeat(1, 1, 2), sin[..., DIM // 2 :].repeat(1, 1, 2)

    def rotate(x):
        a, b = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-b, a), dim=-1) * sin

    qkv = norm(x, layer.input_norm) @ layer.qkv.weight().double().t() + layer.qkv.bias
    q, k, v = qkv.unflatten(1, (-1, DIM)).split([HEADS, KV_HEADS, KV_HEADS], dim=1)
    q, k, v = (t.transpose(0, 1) for t in (rotate(q), rotate(k), v))
    attended = [
        torch.nn.functional.scaled_dot_product_attention(
            *(t[:, rows] for t in (q, k, v)), is_causal=True, enable_gqa=True
        )
        for rows in (slice(19), slice(19, 20))
    ]
    x = x + torch.cat(attended, dim=1).transpose(0, 1).flatten(1) @ layer.o.weight().double().t()
    gate, up = (norm(x, layer.post_norm) @ layer.gate_up.weight().double().t()).chunk(2, dim=1)
    delta = (torch.nn.functional.silu(gate) * up) @ layer.down.weight().double().t()

    hidden, result = LayerStack([layer]).forward(hidden, step)
    torch.testing.assert_close(hidden.double(), x, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(result.double(), delta, rtol=1e-4, atol=1e-5)


def test_a_token_does_not_depend_on_its_batch(dtype, randn):
    if cpu.library() is None:
        return  # torch makes no such promise
    stack = LayerStack([make_layer(randn, dtype) for _ in range(2)])
    hidden, step = randn(20, HIDDEN, dtype=dtype), make_step()
    whole = stack.forward(hidden.clone(), step)[1]
    last = dataclasses.replace(
        step,
        positions=step.positions[18:19],
        slot_mapping=step.slot_mapping[18:19],
        block_tables=step.block_tables[:1],
        query_start=torch.tensor([0, 1], dtype=torch.int32),
        seq_lens=step.seq_lens[:1],
    )
    assert torch.equal(stack.forward(hidden[18:19].clone(), last)[1], whole[18:19])


def test_only_wanted_tokens_are_returned(dtype, randn):
    stack = LayerStack([make_layer(randn, dtype) for _ in range(2)])
    hidden = randn(20, HIDDEN, dtype=dtype)
    wanted = torch.tensor([18, 19, 3])
    parts = stack.forward(hidden.clone(), make_step(wanted=wanted))
    for part, whole in zip(parts, stack.forward(hidden.clone(), make_step()), strict=True):
        assert torch.equal(part, whole[wanted])


def test_errors_name_the_argument(randn):
    stack = LayerStack([make_layer(randn, torch.float32)])
    with pytest.raises(ValueError, match=r"^hidden must"):
        stack.forward(randn(20, HIDDEN + 1), make_step())
    with pytest.raises(ValueError, match=r"^hidden must be torch.float32"):
        stack.forward(randn(20, HIDDEN).bfloat16(), make_step())
    for name, bad in {
        "positions": torch.zeros(20, dtype=torch.int64),
        "slot_mapping": torch.zeros(20, dtype=torch.int32),
        "block_tables": torch.zeros(3, 3, dtype=torch.int32),
        "query_start": torch.zeros(2, dtype=torch.int32),
        "seq_lens": torch.zeros(2, dtype=torch.int64),
        "cos_sin": torch.zeros(9, DIM + 2),
        "wanted": torch.zeros(2, dtype=torch.int32),
    }.items():
        with pytest.raises(ValueError, match=f"^{name} must"):
            stack.forward(randn(20, HIDDEN), make_step(**{name: bad}))
    for name, bad in {
        "qkv": pack(randn(8, HIDDEN)),
        "o": pack(randn(HIDDEN, 8)),
        "gate_up": pack(randn(2 * INNER, HIDDEN).bfloat16()),
        "down": pack(randn(HIDDEN, INNER + 1)),
        "post_norm": randn(HIDDEN + 1),
        "k_norm": randn(DIM).bfloat16(),
        "key_cache": randn(2, 2),
        "num_heads": 7,
    }.items():
        with pytest.raises(ValueError, match=r"must be"):
            LayerStack([make_layer(randn, torch.float32, **{name: bad})])
