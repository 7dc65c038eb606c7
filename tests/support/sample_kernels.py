"""Triton kernels that only tests use."""

import triton
import triton.language as tl


@triton.jit
def scale_rows(x, out, width, factor, BLOCK: tl.constexpr, TWICE: tl.constexpr = False):
    """out[i] = factor x[i] / sum(x[i]), rows of `width` float32; twice that where TWICE."""
    row = tl.program_id(0)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        place = start + tl.arange(0, BLOCK)
        total += tl.load(x + row * width + place, mask=place < width, other=0.0).to(tl.float32)
    share = factor / tl.sum(total)
    if TWICE:
        share *= 2
    for start in range(0, width, BLOCK):
        place = start + tl.arange(0, BLOCK)
        values = tl.load(x + row * width + place, mask=place < width).to(tl.float32)
        tl.store(out + row * width + place, values * share, mask=place < width)


@triton.jit
def too_much_shared(x, out, N: tl.constexpr):
    """out = x @ x, [N, N] float32: at N = 128 more shared memory than small cards have."""
    place = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    values = tl.load(x + place)
    tl.store(out + place, tl.dot(values, values))


@triton.jit
def broken(x):
    """Does not compile."""
    tl.store(x, no_such_name)  # noqa: F821
