"""Sums of two ranks whose transfer is hidden: a copy engine brings the peer's part while products run.

The rows of a batch are cut into pieces. Behind the product that fills a piece the compute stream goes on
with the next, and a second stream does the rest: it waits for that product, meets the peer's second stream,
which has waited for its own, and copies the peer's rows to memory of this rank, which takes no SM. The
compute stream waits for the copy only before it adds the two. There is one room for what is brought,
whatever the place: rows are brought again behind a later product of the compute stream, which runs after
their addition.

No epoch is counted twice: the second streams count with flags of their own (see `kernels.cuda.meet`), a
stream runs its kernels one by one, and both ranks call the same in the same order, so that the n-th meeting
of one second stream is the n-th of the other. And nothing waits in a circle: take the exchanges of both
streams in the order of the calls. Whatever one of them waits for on either rank, be it a product, a copy or
another exchange, was called before it; so the first that has not been passed can be. A meeting is one warp
that finds room beside any product, and while it waits it keeps nothing that the compute stream would need.

When a part may be written again (see also `kernels.cuda.ranks`). The peer's second stream copies a part
before it meets again. So once a compute stream has waited for what came behind a later meeting, the copy is
done: what has come of one place frees the other places' pieces that were brought before. An exchange of the
compute streams that was called after the peer had added a piece proves its copy, too, as the peer's compute
stream had waited for that. And a meeting proves what such an exchange does, because the second stream waits
for all that the compute stream was given before. So the rule stays: a part may be filled once an exchange at
another place has been waited for that began after the part's own was over, its additions included, or in a
row of pieces that are brought at places in turn, once those of the other place have come.
"""

from __future__ import annotations

import torch

from kernels.cuda.meet import meet_kernel


class Carrier:
    """Brings a peer's parts to this rank's device.

    Attributes:
        tables: int64[2] for each place: where both ranks' parts are, in their order, once brought.
    """

    def __init__(
        self, rank: int, own: list[torch.Tensor], theirs: list[torch.Tensor],
        flags: tuple[torch.Tensor, torch.Tensor],
    ) -> None:  # fmt: skip
        """Take the room.

        Args:
            rank: 0 or 1, this one.
            own: uint8, the room of each place here.
            theirs: the same of the peer, mapped.
            flags: of both ranks, as addresses, and this rank's; for the second stream alone.
        """
        self._rank, self._theirs, self._flags = rank, theirs, flags
        device = own[0].device
        self._room = torch.empty_like(own[0])
        pairs = [[one, self._room] if rank == 0 else [self._room, one] for one in own]
        self.tables = [torch.tensor([x.data_ptr() for x in pair], device=device) for pair in pairs]
        # Before a product's programs where it can be: the sooner a copy begins, the more of it is hidden.
        self._stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None

    def bring(self, place: int, part: torch.Tensor, rows: slice, quiet: bool) -> torch.cuda.Event | None:
        """Copies the peer's `rows` of a part of the shape of `part`, on the second stream behind all that the
        current one has been given; the event is when they have come. `quiet`: copies those of `part`."""
        source = part if quiet else _like(self._theirs[place], part)
        target = _like(self._room, part)
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(part.device))
        with torch.cuda.stream(self._stream):  # of a CPU's None: right here
            meet_kernel[(1,)](*self._flags, self._rank, int(quiet), SIZE=2, num_warps=1)
            target[rows].copy_(source[rows])
            return None if self._stream is None else self._stream.record_event()


def _like(room: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    return room[: part.nbytes].view(part.dtype).view(part.shape)
