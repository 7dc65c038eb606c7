"""Copies whole blocks of the paged cache: what copy-on-write of a shared block needs."""

import ctypes

import torch

from kernels.checks import require
from kernels.cpu.functions import function, i32, i64, ptr

_c_copy_blocks = function("pagoda_copy_blocks", ptr, ptr, i32, ptr, ptr, i64)


def copy_blocks(caches: list[torch.Tensor], src: torch.Tensor, dst: torch.Tensor) -> None:
    """In every cache, copies block src[i] to block dst[i]; no block may be both.

    Args:
        caches: tensors whose first dim counts blocks: the key and value caches of all layers. Contiguous.
        src: [n] int64 block ids.
        dst: [n] int64 block ids.

    Raises:
        ValueError: a shape or type is wrong, or, on a CPU, an id is outside a cache; the message names the
            argument. On a GPU nobody waits to look at the ids.
    """
    copies = src.numel()
    require("src", src, torch.int64, (copies,))
    require("dst", dst, torch.int64, (copies,))
    if not caches or not copies:
        return
    if not all(cache.is_contiguous() for cache in caches):
        raise ValueError("caches must be contiguous")
    if caches[0].is_cuda:
        from kernels.cuda.blocks import copy_blocks as launch

        launch(caches, src, dst)
        return
    if caches[0].is_cpu:
        blocks = min(len(cache) for cache in caches)
        if min(int(src.min()), int(dst.min())) < 0 or max(int(src.max()), int(dst.max())) >= blocks:
            raise ValueError(f"src and dst must lie in [0, {blocks})")
    if caches[0].is_cpu and (c := _c_copy_blocks()) is not None:
        pointers = (ctypes.c_void_p * len(caches))(*(cache.data_ptr() for cache in caches))
        sizes = (ctypes.c_int64 * len(caches))(*(cache.nbytes // len(cache) for cache in caches))
        c(pointers, sizes, len(caches), src.data_ptr(), dst.data_ptr(), copies)
        return
    copy_blocks_reference(caches, src, dst)


def copy_blocks_reference(caches: list[torch.Tensor], src: torch.Tensor, dst: torch.Tensor) -> None:
    """`copy_blocks` in plain torch, on any device."""
    for cache in caches:
        cache[dst] = cache[src]
