"""`kernels.blocks` on CUDA: all layers' copies in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

WORDS = 1024


@triton.jit
def _copy_blocks_kernel(
    source, target, src, dst, source_words, target_words, block_words, WORDS: tl.constexpr
):  # fmt: skip
    """Program (n, c, i) copies piece i of pair n in cache c; a word is 64 bits."""
    pair, cache = tl.program_id(0), tl.program_id(1).to(tl.int64)
    word = tl.program_id(2) * WORDS + tl.arange(0, WORDS)
    inside = word < block_words
    values = tl.load(source + cache * source_words + tl.load(src + pair) * block_words + word, mask=inside)
    tl.store(target + cache * target_words + tl.load(dst + pair) * block_words + word, values, mask=inside)


def copy_blocks(
    caches: list[torch.Tensor], src: torch.Tensor, dst: torch.Tensor, into: list[torch.Tensor]
) -> None:
    """See `kernels.blocks.copy_blocks`; the caches must lie at equal distances, as slices of one pool do, and
    so must `into`. Host memory is read and written in place, by the address that the driver has for it."""
    block_words = caches[0].nbytes // len(caches[0]) // 8
    grid = (src.numel(), len(caches), triton.cdiv(block_words, WORDS))
    words = [cache[0].view(torch.int64).view(-1) for cache in (caches, into)]
    distances = _distance(caches) // 8, _distance(into) // 8
    _copy_blocks_kernel[grid](*words, src, dst, *distances, block_words, WORDS=WORDS, num_warps=4)


def _distance(caches: list[torch.Tensor]) -> int:
    first = caches[0]
    distance = caches[1].data_ptr() - first.data_ptr() if len(caches) > 1 else first.nbytes
    if any(c.data_ptr() != first.data_ptr() + i * distance for i, c in enumerate(caches)):
        raise ValueError("caches must be slices of one pool")
    return distance
