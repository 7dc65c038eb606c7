import pytest
import torch

from kernels.blocks import copy_blocks, copy_blocks_reference


@pytest.mark.parametrize("copy", [copy_blocks, copy_blocks_reference])
def test_copies_in_every_cache_and_nothing_else(copy, dtype, threads, randn):
    caches = [randn(9, 2, 8, 6, dtype=dtype), randn(9, 3, 4, dtype=dtype), randn(9, 1)]
    before = [cache.clone() for cache in caches]
    src, dst = torch.tensor([0, 8, 0]), torch.tensor([3, 1, 7])
    copy(caches, src, dst)
    for cache, old in zip(caches, before, strict=True):
        for block in range(9):
            source = {3: 0, 1: 8, 7: 0}.get(block, block)
            assert torch.equal(cache[block], old[source])


@pytest.mark.parametrize("copy", [copy_blocks, copy_blocks_reference])
def test_copies_into_other_caches(copy, dtype, threads, randn):
    caches, into = [randn(9, 2, 6, dtype=dtype), randn(9, 3)], [randn(4, 2, 6, dtype=dtype), randn(4, 3)]
    before = [cache.clone() for cache in into]
    copy(caches, torch.tensor([8, 0]), torch.tensor([1, 3]), into)
    for cache, target, old in zip(caches, into, before, strict=True):
        assert torch.equal(target, torch.stack([old[0], cache[8], old[2], cache[0]]))


def test_nothing_to_copy():
    empty = torch.empty(0, dtype=torch.int64)
    copy_blocks([torch.ones(2, 2)], empty, empty)
    copy_blocks([], torch.tensor([0]), torch.tensor([1]))


def test_errors_name_the_argument():
    cache, one = torch.zeros(3, 4), torch.tensor([1])
    with pytest.raises(ValueError, match=r"^src must"):
        copy_blocks([cache], one.int(), one)
    with pytest.raises(ValueError, match=r"^dst must"):
        copy_blocks([cache], one, torch.tensor([1, 2]))
    with pytest.raises(ValueError, match=r"^caches must"):
        copy_blocks([cache.t()], one, one)
    with pytest.raises(ValueError, match=r"^dst must lie in \[0, 3\)"):
        copy_blocks([cache], one, torch.tensor([3]))
    with pytest.raises(ValueError, match=r"^dst must lie in \[0, 1\)"):
        copy_blocks([cache], one, one, [torch.zeros(1, 4)])
    with pytest.raises(ValueError, match=r"^into must"):
        copy_blocks([cache], one, one, [torch.zeros(3, 5)])
