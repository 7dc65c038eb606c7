"""What a kernel asks to have brought to L2 while it must not read yet: the kernel in front may still run."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def prefetch(pointers, SIZE: tl.constexpr):
    """Brings SIZE bytes, a multiple of 16, from each pointer on, without waiting for them. A thread takes one
    pointer, or some do the same where pointers are fewer. From capability 9.0 on."""
    addresses = pointers.to(tl.int64, bitcast=True)
    sizes = tl.zeros_like(addresses).to(tl.int32) + SIZE
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;",
        "=r,l,r",
        [addresses, sizes],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
