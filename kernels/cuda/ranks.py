"""`kernels.ranks` on CUDA: sums and gathers over memory that all ranks map, fused with what follows them.

A rank fills its own part, and an exchange's kernel waits for the others and then reads theirs. Two ranks move
as many bytes in this way as in any other; more of them leave large sums to NCCL. How they wait is
`kernels.cuda.meet`'s. Parts of few rows are written to all ranks by the product itself: what the exchange
reads lies near then, and the way there is over while the kernel that follows still waits. The largest sums of
two ranks can also be cut, and the peer's part of each piece be brought while something else runs: see
`kernels.cuda.carry`.

When memory may be written again. A kernel that has waited for one program of a rank knows that this rank's
stream has done all before that kernel: the signal came after `gdc_wait`, so after every kernel in front, the
reads of earlier exchanges included. So a part may be filled once an exchange at another place has been
waited for since: the stream runs it before the product that fills the part. An exchange whose own kernel
writes what the others read either meets them before it writes, too (`gather_kernel`), or writes to the half
of its room that the epoch's lowest bit names (`kernels.cuda.draw`): the program that wrote there two epochs
ago has waited since, one epoch ago, for its only readers, which are the programs of its own number.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.cuda.carry import Carrier
from kernels.cuda.device import launch, traits
from kernels.cuda.linear import SKINNY_ROWS
from kernels.cuda.meet import addresses, meet
from kernels.cuda.norm import warps_of
from kernels.ranks import Place

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

PROGRAMS = 264
"""Most programs of an exchange: two for each of 132 SMs."""
GATHER_BLOCK = 2048
"""Numbers that a program of a gather takes at a time."""
GATHER_BYTES = 32 << 20
"""Room for what is gathered at once: 100 rows of a vocabulary of 152,064 on two ranks."""
ONE_SHOT_BYTES = 512 << 10
"""What more than two ranks sum in one read of all parts; beyond, NCCL."""
CARRIED_ROWS = 4096
"""From so many rows on two ranks' sums are carried: less is over too soon for what there is to hide."""
FIRST_PIECE, PIECE_ROWS = 7 / 16, 128
"""How much of the rows, in whole tiles of a product, is the first piece. Of 8,192 rows, 64 tiles, it is 28:
with 14 tiles of columns (256 of 3,584 each) and 132 SMs both pieces then take no more rounds than the whole
does, while two halves take one more. Also, what is brought first is hidden by the larger piece."""
LOCAL_PROGRAMS = 1056
"""Most programs of a sum that waits for nobody."""
ALIGNMENT = 512

_GATHERED, _CARRIED, _SLOTS = (len(Place) + i for i in range(3))


@triton.jit(do_not_specialize=["first", "end", "rank", "quiet"])
def sum_kernel(
    flags, own_flags, parts, own, hidden, weight, out, squares, first, end, rank, quiet, eps,
    SIZE: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """out = the sum of all ranks' parts, in their order, of rows `first` to `end` of [T, DIM] each. With
    `hidden`, that is added to it, and out is its RMS norm; with `squares` also, out is hidden * weight and
    squares the sum of its squares."""
    column = tl.arange(0, BLOCK)
    inside = column < DIM
    their_flags, their_parts = addresses(flags, own_flags, SIZE), addresses(parts, own, SIZE)
    if weight is not None:
        factor = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    if OVERLAPS:
        gdc_wait()
        gdc_launch_dependents()
    meet(their_flags, own_flags, rank, quiet, SIZE)
    for row in range(first + tl.program_id(0), end, tl.num_programs(0)):
        place = tl.cast(row, tl.int64) * DIM + column
        total = tl.zeros([BLOCK], tl.float32)
        for peer in tl.static_range(SIZE):
            # Not through L1, which is not kept equal to what others store.
            part = tl.load(their_parts[peer] + place, mask=inside, other=0.0, cache_modifier=".cg")
            total += part.to(tl.float32)
        if hidden is not None:
            total += tl.load(hidden + place, mask=inside, other=0.0).to(tl.float32)
            total = total.to(hidden.dtype.element_ty)
            tl.store(hidden + place, total, mask=inside)
            total = total.to(tl.float32)
            square = tl.sum(total * total, axis=0)
            if squares is not None:
                tl.store(squares + row, square)
            else:
                total *= tl.rsqrt(square / DIM + eps)
            total *= factor
        tl.store(out + place, total.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rank", "quiet"])
def gather_kernel(
    flags, own_flags, rooms, own, columns, out, total, width, stride, rank, quiet,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """out [rows, SIZE * width] = all ranks' columns [rows, width], `total` numbers in all of each rank."""
    their_flags, their_rooms = addresses(flags, own_flags, SIZE), addresses(rooms, own, SIZE)
    first, step = tl.program_id(0) * BLOCK, tl.num_programs(0) * BLOCK
    if OVERLAPS:
        gdc_wait()
        gdc_launch_dependents()
    meet(their_flags, own_flags, rank, quiet, SIZE)  # nobody reads any longer what was gathered before
    for start in range(first, total, step):
        place = start + tl.arange(0, BLOCK)
        number = tl.load(columns + place // width * stride + place % width, mask=place < total)
        tl.store(own + place, number, mask=place < total)
    meet(their_flags, own_flags, rank, quiet, SIZE)
    for start in range(first, total, step):
        place = start + tl.arange(0, BLOCK)
        target = out + place // width * (SIZE * width) + place % width
        for peer in tl.static_range(SIZE):
            number = tl.load(their_rooms[peer] + place, mask=place < total, cache_modifier=".cg")
            tl.store(target + peer * width, number, mask=place < total)


class Shared(NamedTuple):
    """Memory that all ranks have alike and can reach.

    Attributes:
        all: uint8, each rank's as this process sees it; all zeros by the time that it is given.
        handle: what keeps it mapped.
    """

    all: list[torch.Tensor]
    handle: Any = None


def symmetric(group: ProcessGroup, size: int, device: torch.device) -> Shared:
    """`size` bytes on each rank's device, through torch's symmetric memory. All ranks call this."""
    import torch.distributed._symmetric_memory as memory

    own = memory.empty(size, dtype=torch.uint8, device=device).zero_()
    torch.cuda.synchronize(device)
    handle = memory.rendezvous(own, group)  # returns when all have come here, so after their zeros
    start = own.data_ptr() - handle.get_buffer(handle.rank, (1,), torch.uint8).data_ptr()
    views = [handle.get_buffer(rank, (size,), torch.uint8, start) for rank in range(group.size())]
    views[handle.rank] = own
    return Shared(views, handle)


class Exchange(NamedTuple):
    """What a kernel is told of an exchange.

    Attributes:
        parts: int64, where each rank's part is.
        size: of how many ranks the kernel reads.
        quiet: 1 when it is to wait for nobody.
    """

    parts: torch.Tensor
    size: int
    quiet: int


class Slots(NamedTuple):
    """Where a product of few rows leaves its part: in its rank's slot in the memory of every rank.

    Attributes:
        own: [T, H], this rank's slot in its own memory.
        remotes: int64[size], where it is on each rank.
        parts: int64[size], where each rank's slot is in this rank's memory.
    """

    own: torch.Tensor
    remotes: torch.Tensor
    parts: torch.Tensor


class Brought(NamedTuple):
    """A piece of a sum whose peer's part is on its way.

    Attributes:
        place: of the sum.
        part: this rank's, [T, H].
        rows: of it, the piece.
        event: when they have come; None where nothing is done beside.
    """

    place: Place
    part: torch.Tensor
    rows: slice
    event: torch.cuda.Event | None


class DeviceRanks:
    """`kernels.ranks.Ranks` of one CUDA device a rank. Nothing here waits on the host; all can be captured.

    Attributes:
        rank: of this process.
        size: how many ranks there are.
        quiet: while set, nothing is signalled, waited for or sent, and parts lie in memory of this rank
            alone, which nobody else may be reading: for what each rank runs at its own time. The kernels are
            the same; what they give is not.
    """

    def __init__(
        self, group: ProcessGroup, device: torch.device, num_rows: int, width: int, dtype: torch.dtype,
        shared: Callable[[ProcessGroup, int, torch.device], Shared] = symmetric,
    ) -> None:  # fmt: skip
        """Take the memory, together with all ranks.

        Args:
            group: whose ranks these are.
            device: this rank's.
            num_rows: most rows of a sum or a draw.
            width: of the widest sum.
            dtype: of the sums.
            shared: how to come by the memory.
        """
        self.rank, self.size, self.quiet = group.rank(), group.size(), False
        self._group, self._device = group, device
        sums, draws = width * num_rows * dtype.itemsize, num_rows * 16
        self._slot_bytes = -(-SKINNY_ROWS * width * dtype.itemsize // ALIGNMENT) * ALIGNMENT
        slots = [self._slot_bytes * self.size] * 3
        sizes = [sums, sums, sums, draws, GATHER_BYTES, self.size * 4, *slots, PROGRAMS * self.size * 4]
        sizes = [-(-size // ALIGNMENT) * ALIGNMENT for size in sizes]
        self._shared = shared(group, sum(sizes), device)
        rooms = [one.split(sizes) for one in self._shared.all]
        self._rooms = rooms[self.rank]
        self._tables = [
            torch.tensor([room.data_ptr() for room in of_ranks], device=device)
            for of_ranks in zip(*rooms, strict=True)
        ]
        self._own_flags = self._rooms[-1].view(torch.int32)
        steps = self._slot_bytes * torch.arange(self.size, device=device)
        self._slots = [
            (self._tables[i] + steps[self.rank], steps + self._rooms[i].data_ptr())
            for i in range(_SLOTS, _SLOTS + 3)
        ]
        self._carrier: Carrier | None = None
        if self.size == 2 and num_rows >= CARRIED_ROWS:
            flags = self._tables[_CARRIED], self._rooms[_CARRIED].view(torch.int32)
            theirs = list(rooms[1 - self.rank][: Place.DRAWN])
            self._carrier = Carrier(self.rank, list(self._rooms[: Place.DRAWN]), theirs, flags)

    def part(self, place: Place, rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
        """Room [rows, width], contiguous, for this rank's part of a sum.

        Raises:
            ValueError: it is larger than what was taken.
        """
        return self._part(place, rows, width, dtype)

    def slots(self, place: Place, rows: int, width: int, dtype: torch.dtype) -> Slots:
        """Room for the part of a sum of at most `SKINNY_ROWS` rows, which the product is to write on all
        ranks: these read what is near then, and sooner."""
        room = self._rooms[_SLOTS + place]
        if self.quiet:
            room = torch.empty_like(room)
            first = room.data_ptr()
            steps = torch.arange(first, first + len(room), self._slot_bytes, device=self._device)
            remotes = parts = steps
        else:
            remotes, parts = self._slots[place]
        own = room[self.rank * self._slot_bytes :][: rows * width * dtype.itemsize]
        return Slots(own.view(dtype).view(rows, width), remotes, parts)

    def summed(
        self, place: Place, part: torch.Tensor, out: torch.Tensor | None = None,
        parts: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """The sum of all ranks' parts, in `out` or else in new memory; `out` may be of another float type.
        `parts` are those of `slots`."""
        out = torch.empty_like(part) if out is None else out
        self._sum(place, part, None, None, out, None, 0.0, parts)
        return out

    def pieces(self, rows: int) -> list[slice]:
        """How a batch is cut for `bring`; empty where its sums are not carried."""
        if self._carrier is None or rows < CARRIED_ROWS:
            return []
        first = int(rows * FIRST_PIECE) // PIECE_ROWS * PIECE_ROWS
        return [slice(0, first), slice(first, rows)]

    def add(
        self, place: Place, part: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor, eps: float,
        out: torch.Tensor, squares: torch.Tensor | None = None, parts: torch.Tensor | None = None,
    ) -> None:  # fmt: skip
        """Adds the sum of all ranks' parts to `hidden` and prepares what comes next.

        Args:
            place: of the parts.
            part: this rank's, [T, H].
            hidden: [T, H] contiguous, updated.
            weight: [H], of the norm that comes next.
            eps: of that norm.
            out: [T, H] contiguous; the norm's result, or with `squares` its input times the weight.
            squares: float32[T] or more, each row's sum of squares; see `kernels.cuda.linear.Normed`.
            parts: those of `slots`, where `part` is one of them.
        """
        self._sum(place, part, hidden, weight, out, squares, eps, parts)

    def bring(self, place: Place, part: torch.Tensor, rows: slice) -> Brought:
        """Has the peer's `rows` of [T, H] brought while the stream goes on, once both have filled them; they
        must be added before the same rows of any place are brought again."""
        assert self._carrier is not None, "pieces has given some"
        return Brought(place, part, rows, self._carrier.bring(place, part, rows, self.quiet))

    def add_brought(
        self, brought: Brought, hidden: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor
    ) -> None:
        """`add` of one piece's rows of `hidden` and `out`; bit for bit the same."""
        assert self._carrier is not None, "it has brought them"
        if brought.event is not None:
            brought.event.wait(torch.cuda.current_stream(self._device))
        place, part, rows, _ = brought
        parts = self._exchange(place, part).parts if self.quiet else self._carrier.tables[place]
        # Not launched ahead of the end of what is in front of it: that is on two streams.
        self._launch_sum(
            Exchange(parts, 2, 1), part, hidden, weight, out, None, eps, rows, LOCAL_PROGRAMS, False
        )  # fmt: skip

    def gathered(self, columns: torch.Tensor) -> torch.Tensor:
        """[R, n] of each rank side by side: [R, size * n]; columns have unit stride."""
        rows, width = columns.shape
        out = columns.new_empty(rows, self.size * width)
        most = max(1, GATHER_BYTES // (width * columns.itemsize))
        for first in range(0, rows, most):
            some = columns[first : first + most]
            own = self._part(_GATHERED, some.shape[0], width, columns.dtype)
            exchange = self._exchange(_GATHERED, own)
            total, overlaps = some.numel(), traits(self._device).overlaps
            launch(
                gather_kernel, (min(PROGRAMS, triton.cdiv(total, GATHER_BLOCK)),),
                self._tables[-1], self._own_flags, exchange.parts, own, some, out[first : first + most],
                total, width, some.stride(0), self.rank, exchange.quiet,
                SIZE=exchange.size, BLOCK=GATHER_BLOCK, OVERLAPS=overlaps, overlaps=overlaps,
            )  # fmt: skip
        return out

    def drawing(self, rows: int) -> tuple[tuple[torch.Tensor, ...], int, int]:
        """What `kernels.cuda.draw` needs to exchange a candidate a row: flags, own flags, all ranks' rooms
        and this rank's, int32 [rows, 2, 2]; how many ranks; whether it is quiet."""
        own = self._part(Place.DRAWN, rows, 4, torch.int32)
        exchange = self._exchange(Place.DRAWN, own)
        return (self._tables[-1], self._own_flags, exchange.parts, own), exchange.size, exchange.quiet

    def _part(self, place: int, rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
        size, room = rows * width * dtype.itemsize, self._rooms[place]
        if size > len(room):
            raise ValueError(f"{rows} rows of {width} take {size} bytes of the {len(room)} that there are")
        if self.quiet:
            return torch.empty(rows, width, dtype=dtype, device=self._device)
        return room[:size].view(dtype).view(rows, width)

    def _exchange(self, place: int, part: torch.Tensor) -> Exchange:
        if self.quiet:
            return Exchange(torch.full_like(self._tables[place], part.data_ptr()), self.size, 1)
        return Exchange(self._tables[place], self.size, 0)

    def _sum(
        self, place: Place, part: torch.Tensor, hidden: torch.Tensor | None, weight: torch.Tensor | None,
        out: torch.Tensor, squares: torch.Tensor | None, eps: float, parts: torch.Tensor | None,
    ) -> None:  # fmt: skip
        exchange = self._exchange(place, part)
        if parts is not None:
            exchange = exchange._replace(parts=parts)
        elif self.size > 2 and part.nbytes > ONE_SHOT_BYTES:
            if not self.quiet:
                torch.distributed.all_reduce(part, group=self._group)
            exchange = Exchange(exchange.parts[self.rank :], 1, 1)
        every, overlaps = slice(0, part.shape[0]), traits(self._device).overlaps
        self._launch_sum(exchange, part, hidden, weight, out, squares, eps, every, PROGRAMS, overlaps)

    def _launch_sum(
        self, exchange: Exchange, part: torch.Tensor, hidden: torch.Tensor | None,
        weight: torch.Tensor | None, out: torch.Tensor, squares: torch.Tensor | None, eps: float, rows: slice,
        programs: int, overlaps: bool,
    ) -> None:  # fmt: skip
        width = part.shape[1]
        launch(
            sum_kernel, (min(rows.stop - rows.start, programs),),
            self._tables[-1], self._own_flags, exchange.parts, part, hidden, weight, out, squares,
            rows.start, rows.stop, self.rank, exchange.quiet, eps,
            SIZE=exchange.size, DIM=width, BLOCK=triton.next_power_of_2(width), OVERLAPS=overlaps,
            overlaps=overlaps, num_warps=warps_of(width),
        )  # fmt: skip
