"""How the ranks of a group wait for each other within kernels.

The wait is each program's own, for the program of the same number on every other rank. In each rank's memory
stands, for each program and each rank, how many exchanges that program has begun there (its epoch). A program
adds one to its count on all the others (release: whatever its rank's stream did before is seen with it) and
reads until theirs have come as far as its own (acquire). As all ranks launch the same grids in one order,
a program has the same epoch everywhere, whatever the grids before were. One that is ahead waits one epoch
later, so that "as far" is enough; a difference stays right when a count wraps.

Two kernels that may run at once, on two streams, must not count with the same flags: each stream has its own,
and the argument holds for each of them.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def addresses(table, like, SIZE: tl.constexpr):
    """Where each rank's memory is: int64[SIZE] as pointers of the type of `like`. They are asked for ahead of
    a `meet`, behind which each would be waited for."""
    pointers = ()
    for peer in tl.static_range(SIZE):
        pointer = tl.multiple_of(tl.load(table + peer).to(like.dtype), 16)
        pointers = pointers + (pointer,)  # type: ignore[assignment]  # unrolled, so the type may change
    return pointers


@triton.jit
def epoch_of(own_flags, rank, SIZE: tl.constexpr):
    """How many exchanges this program has begun."""
    return tl.load(own_flags + tl.program_id(0) * SIZE + rank, cache_modifier=".cg")


@triton.jit
def meet(flags, own_flags, rank, quiet, SIZE: tl.constexpr):
    """Returns when this program has come as far on every rank: what any of them stored before, and what the
    kernels in front of it did, can then be read. `flags` are all ranks' addresses of theirs."""
    if quiet == 0:
        cell = tl.program_id(0) * SIZE
        tl.debug_barrier()  # all threads have stored what they have
        for peer in tl.static_range(SIZE):
            if peer != rank:
                tl.atomic_add(flags[peer] + cell + rank, 1, sem="release", scope="sys")
        epoch = epoch_of(own_flags, rank, SIZE) + 1
        for peer in tl.static_range(SIZE):
            if peer != rank:
                seen = tl.atomic_add(own_flags + cell + peer, 0, sem="acquire", scope="sys")
                while seen - epoch < 0:
                    seen = tl.atomic_add(own_flags + cell + peer, 0, sem="acquire", scope="sys")
        tl.debug_barrier()  # no thread reads on before the one that waited has seen all
        tl.store(own_flags + cell + rank, epoch)


@triton.jit(do_not_specialize=["rank", "quiet"])
def meet_kernel(flags, own_flags, rank, quiet, SIZE: tl.constexpr):
    """Nothing but a `meet`, of one program: what is behind it on the stream is so on all ranks."""
    meet(addresses(flags, own_flags, SIZE), own_flags, rank, quiet, SIZE)
