"""Memory for what kernels stream through, weights and KV cache: in huge pages where the system has them.

With 4 KiB pages every 64 cache lines cost an address translation that misses, and no prefetch crosses a page.
"""

import contextlib
import math
import mmap
import threading

import torch

CHUNK_BYTES = 64 << 20
HUGE_PAGE_BYTES = 2 << 20
ALIGNMENT = 64

_lock = threading.Lock()
_chunk = torch.empty(0, dtype=torch.uint8)
_used = 0


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """An uninitialised CPU tensor at a multiple of 64 bytes.

    Tensors are cut from larger chunks, so that small ones share huge pages; a chunk is given back to the
    system when the last tensor in it is dropped.
    """
    global _chunk, _used
    size = math.prod(shape) * dtype.itemsize
    with _lock:
        if _used + size > len(_chunk):
            _chunk, _used = pages(max(size, CHUNK_BYTES)), 0
        data = _chunk[_used : _used + size]
        _used += -(-size // ALIGNMENT) * ALIGNMENT
    return data.view(dtype).view(shape)


def pages(size: int) -> torch.Tensor:
    """uint8[size] of its own pages, which the system hands out zeroed when they are first touched."""
    # Room to begin at a huge page's boundary; pages that nobody touches cost nothing.
    mapping = mmap.mmap(-1, size + HUGE_PAGE_BYTES)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages serves small ones
            mapping.madvise(mmap.MADV_HUGEPAGE)
    chunk = torch.frombuffer(mapping, dtype=torch.uint8)
    start = -chunk.data_ptr() % HUGE_PAGE_BYTES
    return chunk[start : start + size]
