"""How many KV blocks a device gets, and what is said when it cannot have them; the blocks themselves."""

from __future__ import annotations

import pytest
import torch

from gpu_worker.kv_cache import KVCache, block_bytes
from gpu_worker.memory import GIB, Budget, num_blocks
from gpu_worker.models.config import read_config

MIB = 1 << 20
BUDGET = Budget(total=80 * GIB, utilization=0.9, in_use=16 * GIB, forward=2 * GIB, graphs=1 * GIB)


def test_blocks_get_what_is_left():
    assert BUDGET.for_blocks == 53 * GIB
    assert num_blocks(BUDGET, MIB, wanted=10**6, least=1) == 53 * 1024
    assert num_blocks(BUDGET, MIB + 1, wanted=10**6, least=1) == 53 * 1024 - 1


def test_no_more_than_all_slots_could_fill():
    assert num_blocks(BUDGET, MIB, wanted=1000, least=10) == 1000


def test_a_number_that_was_asked_for_is_taken():
    assert num_blocks(BUDGET, MIB, wanted=100, least=10, asked=5000) == 5000


def test_too_many_asked_for():
    with pytest.raises(ValueError, match=r"60000 KV blocks of 1024 KiB") as caught:
        num_blocks(BUDGET, MIB, wanted=100, least=10, asked=60000)
    text = str(caught.value)
    assert "--num-blocks to at most 54272" in text and "--gpu-memory-utilization to 0.97" in text
    assert "53.0 are left and 58.6 needed" in text


def test_the_share_that_would_do_is_enough():
    """What the message advises works."""
    with pytest.raises(ValueError, match=r"--gpu-memory-utilization to 0\.94"):
        num_blocks(BUDGET, MIB, wanted=10**6, least=56 * 1024)
    more = Budget(BUDGET.total, 0.94, BUDGET.in_use, BUDGET.forward, BUDGET.graphs)
    assert num_blocks(more, MIB, wanted=10**6, least=56 * 1024) >= 56 * 1024


def test_a_model_that_leaves_nothing():
    full = Budget(total=24 * GIB, utilization=0.9, in_use=25 * GIB, forward=GIB, graphs=GIB)
    with pytest.raises(ValueError) as caught:
        num_blocks(full, MIB, wanted=1000, least=1)
    assert "0.0 are left" in str(caught.value) and "more memory" in str(caught.value)
    assert "raise --gpu-memory-utilization" not in str(caught.value), "no share would do"


@pytest.mark.parametrize("device", ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_block_of_the_pool_is_that_block_of_every_layer(tiny, device, dtype):
    config = read_config(tiny("llama")[1])
    cache = KVCache(config, 5, 16, dtype, torch.device(device))
    assert cache.pool.nbytes == 5 * block_bytes(config, 16, dtype)
    assert len(cache.tensors) == 2 * len(cache.layers) == 2 * config.num_layers
    assert not any(tensor.any() for tensor in cache.tensors)
    assert all(tensor.is_contiguous() and tensor.dtype is dtype for tensor in cache.tensors)
    for i, tensor in enumerate(cache.tensors):
        tensor[3] = i + 1
    cache.pool[:, 1] = cache.pool[:, 3]
    for i, tensor in enumerate(cache.tensors):
        assert (tensor[1] == i + 1).all() and not tensor[[0, 2, 4]].any()
        assert cache.layers[i // 2][i % 2] is tensor
