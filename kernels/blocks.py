"""Copies whole blocks of the paged cache: for copy-on-write, and to host memory and back."""

import ctypes

import torch

from kernels.checks import require
from kernels.cpu.functions import function, i32, i64, ptr

_c_copy_blocks = function("pagoda_copy_blocks", ptr, ptr, ptr, i32, ptr, ptr, i64)


def copy_blocks(
    caches: list[torch.Tensor], src: torch.Tensor, dst: torch.Tensor, into: list[torch.Tensor] | None = None
) -> None:
    """In every cache, copies block src[i] to block dst[i], of the same cache or of its counterpart `into`.

    Args:
        caches: tensors whose first dim counts blocks: the key and value caches of all layers. Contiguous.
        src: [n] int64 block ids.
        dst: [n] int64 block ids. Where blocks stay within their caches, none may be both.
        into: as many tensors, with blocks of the same sizes. On a GPU, `src` and `dst` are there, and one of
            `caches` and `into` may be in host memory that the device can reach (see `gpu_worker.host_pool`).

    Raises:
        ValueError: a shape or type is wrong, or, on a CPU, an id is outside a cache; the message names the
            argument. On a GPU nobody waits to look at the ids.
    """
    into = caches if into is None else into
    copies = src.numel()
    require("src", src, torch.int64, (copies,))
    require("dst", dst, torch.int64, (copies,))
    if not caches or not copies:
        return
    if not all(cache.is_contiguous() for cache in (*caches, *into)):
        raise ValueError("caches must be contiguous")
    if [cache.nbytes // len(cache) for cache in caches] != [cache.nbytes // len(cache) for cache in into]:
        raise ValueError("into must have blocks of the caches' sizes")
    if src.is_cuda:
        from kernels.cuda.blocks import copy_blocks as launch

        launch(caches, src, dst, into)
        return
    for name, ids, blocks in (("src", src, min(map(len, caches))), ("dst", dst, min(map(len, into)))):
        if int(ids.min()) < 0 or int(ids.max()) >= blocks:
            raise ValueError(f"{name} must lie in [0, {blocks})")
    if (c := _c_copy_blocks()) is not None:
        array = ctypes.c_void_p * len(caches)
        sizes = (ctypes.c_int64 * len(caches))(*(cache.nbytes // len(cache) for cache in caches))
        pointers = [array(*(cache.data_ptr() for cache in those)) for those in (caches, into)]
        c(*pointers, sizes, len(caches), src.data_ptr(), dst.data_ptr(), copies)
        return
    copy_blocks_reference(caches, src, dst, into)


def copy_blocks_reference(
    caches: list[torch.Tensor], src: torch.Tensor, dst: torch.Tensor, into: list[torch.Tensor] | None = None
) -> None:
    """`copy_blocks` in plain torch, on any device."""
    for cache, target in zip(caches, caches if into is None else into, strict=True):
        target[dst.to(target.device)] = cache[src.to(cache.device)].to(target.device)
