import pytest
import torch

from kernels.attention import cache_shape
from kernels.rope import rope_and_cache, rope_and_cache_reference

BOTH = pytest.mark.parametrize("op", [rope_and_cache, rope_and_cache_reference])


def table(max_len, dim, theta=10000.0):
    angles = torch.outer(torch.arange(max_len), theta ** -(torch.arange(0, dim, 2).double() / dim))
    return torch.cat((angles.cos(), angles.sin()), dim=1).float()


def rotated(x, cos_sin, positions):
    cos, sin = cos_sin.double()[positions.long()].unsqueeze(1).chunk(2, dim=-1)
    cos, sin = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)
    a, b = x.double().chunk(2, dim=-1)
    return x.double() * cos + torch.cat((-b, a), dim=-1) * sin


def caches(blocks, heads, block_size, dim, dtype):
    return [torch.full(s, 3.0, dtype=dtype) for s in cache_shape(blocks, heads, block_size, dim, dtype)]


@BOTH
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "dim", "block_size"), [(9, 3, 64, 16), (7, 1, 80, 8), (2, 2, 34, 24)]
)
def test_rotates_and_writes(
    op, num_heads, num_kv_heads, dim, block_size, dtype, threads, randn, generator, close
):
    tokens, blocks = 37, 9
    width = (num_heads + 2 * num_kv_heads) * dim
    qkv = randn(tokens, width, dtype=dtype)
    q, k, v = qkv.unflatten(1, (-1, dim)).split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    kv_before = qkv[:, num_heads * dim :].clone()
    cos_sin = table(500, dim)
    positions = torch.randint(500, (tokens,), generator=generator, dtype=torch.int32)
    slots = torch.randperm(blocks * block_size, generator=generator)[:tokens]
    slots[5] = -1
    key_cache, value_cache = caches(blocks, num_kv_heads, block_size, dim, dtype)
    expected_q, expected_k = rotated(q, cos_sin, positions), rotated(k, cos_sin, positions)
    op(q, k, v, cos_sin, positions, key_cache, value_cache, slots)

    close(q, expected_q, ulps=4 if dtype is torch.float32 else 1)
    assert torch.equal(qkv[:, num_heads * dim :], kv_before)
    keys = key_cache.permute(0, 3, 1, 2, 4).reshape(-1, num_kv_heads, dim)
    values = value_cache.transpose(1, 2).reshape(-1, num_kv_heads, dim)
    written = slots >= 0
    close(keys[slots[written]], expected_k[written], ulps=4 if dtype is torch.float32 else 1)
    assert torch.equal(values[slots[written]], v[written])
    untouched = torch.ones(len(keys), dtype=torch.bool)
    untouched[slots[written]] = False
    assert (keys[untouched] == 3).all() and (values[untouched] == 3).all()


def test_errors_name_the_argument(randn):
    def call(**changes):
        key_cache, value_cache = caches(2, 2, 8, 16, torch.float32)
        arguments = {
            "q": randn(3, 4, 16),
            "k": randn(3, 2, 16),
            "v": randn(3, 2, 16),
            "cos_sin": table(8, 16),
            "positions": torch.zeros(3, dtype=torch.int32),
            "key_cache": key_cache,
            "value_cache": value_cache,
            "slot_mapping": torch.zeros(3, dtype=torch.int64),
        }
        rope_and_cache(**arguments | changes)

    call()
    for name, bad in {
        "q": randn(3, 4, 32)[:, :, ::2],
        "k": randn(3, 4, 16),
        "v": randn(4, 2, 16),
        "cos_sin": table(8, 18),
        "positions": torch.zeros(3, dtype=torch.int64),
        "key_cache": randn(2, 2, 8, 16, 1),
        "value_cache": randn(2, 2, 8, 18),
        "slot_mapping": torch.zeros(3, dtype=torch.int32),
    }.items():
        with pytest.raises(ValueError, match=f"^{name} must"):
            call(**{name: bad})
