"""The CPU's kernels in C: how they are built, how many threads they use, and what the processor can do."""

import functools
from pathlib import Path

from kernels.cpu.build import library

__all__ = ["bf16_is_native", "library", "set_threads", "threads"]


@functools.cache
def bf16_is_native() -> bool:
    """Whether the processor multiplies bfloat16 itself (AVX512_BF16).

    Where it does not, torch is many times slower in bfloat16 than in float32. The C kernels are not: they
    widen bfloat16 as they load it, so it costs the same work and half the memory on any processor.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return False
    return any("avx512_bf16" in line.split() for line in lines if line.startswith("flags"))


def set_threads(n: int) -> None:
    """Sets how many threads the C kernels use, the calling one included (default: one a usable processor).

    Raises:
        ValueError: n is less than 1.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, not {n}")
    if (lib := library()) is not None:
        lib.pagoda_set_threads(n)


def threads() -> int:
    """How many threads the C kernels use; 1 where there is no library."""
    lib = library()
    return lib.pagoda_threads() if lib is not None else 1
