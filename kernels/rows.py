"""The rows' state on the device, and what every step does to it: change, gather, accept.

A row is one sequence in a slot. Its tokens, counters, block table and sampling columns stay on the device
from its first step to its last; a step's inputs are gathered there and what was drawn is appended there, so
that the host neither waits for a token nor sends one back. A row that has ended is done: it takes part in
later iterations masked, computes one position without writing it, samples nothing and stays as it is.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from kernels.sample import SamplingColumns, ended

# What became of a sampling row in one iteration. 1 and 2 are `kernels.sample`'s STOP and LENGTH.
WAS_DONE = -1
GOES_ON = 0
NAN = 3

FREE = -1  # the mask of a row that may draw anything

# The order of the counters, and of the 32-bit sampling columns, in the matrix below.
COUNTERS = ("num_tokens", "num_prompt", "num_computed", "last_position")
INTEGERS = ("top_k", "min_tokens", "num_logprobs")
FLOATS = ("temperature", "top_p", "min_p", "presence", "frequency", "repetition")
# A fork takes these first counters from its parent.
INHERITED = 3

# What the host stages of a row that enters, as 32-bit words: its slot, the place of its numbers (stop ids,
# tokens and blocks, one behind the other), how many of them are stop ids and how many blocks; its seed; then
# its entries in the matrix, of which the first says how many tokens there are.
RECORD = struct.Struct(f"<4iQ{len(COUNTERS)}i{len(INTEGERS)}i{len(FLOATS)}f4x")
RECORD_WORDS = RECORD.size // 4
SEED_AT, NUMBERS_AT = 4, 6
NUM_NUMBERS = len(COUNTERS) + len(INTEGERS) + len(FLOATS)


@dataclass(frozen=True, eq=False)
class RowState:
    """Every slot's state. One slot more than rows may use: the last one is done for ever, and pads batches.

    Attributes:
        tokens: int32[S, max_len].
        block_tables: int32[S, MB].
        numbers: int32[13, S]: counters, integers and floats, which are views of it.
        counters: int32[4, S], in the order of `COUNTERS`, which are its rows:
        num_tokens: int32[S]: tokens of each row, the prompt's included.
        num_prompt: int32[S]: how many of those are the prompt's.
        num_computed: int32[S]: how many of those went through a forward.
        last_position: int32[S]: how many tokens fill the row.
        integers: int32[3, S], in the order of `INTEGERS`.
        floats: float32[6, S], in the order of `FLOATS`.
        done: bool[S].
        columns: how each row samples; views of `integers` and `floats` among them.
        block_size: tokens of a block.
    """

    tokens: torch.Tensor
    block_tables: torch.Tensor
    numbers: torch.Tensor
    counters: torch.Tensor
    num_tokens: torch.Tensor
    num_prompt: torch.Tensor
    num_computed: torch.Tensor
    last_position: torch.Tensor
    integers: torch.Tensor
    floats: torch.Tensor
    done: torch.Tensor
    columns: SamplingColumns
    block_size: int

    @classmethod
    def allocate(
        cls, num_slots: int, max_len: int, block_size: int, max_stop_ids: int, max_bias: int,
        device: torch.device,
    ) -> RowState:  # fmt: skip
        """State of `num_slots` rows and the one that pads; all is zero, nothing is done but the last."""
        size, i32 = num_slots + 1, torch.int32
        numbers = torch.zeros((NUM_NUMBERS, size), dtype=i32, device=device)
        counters, integers, floats = numbers.split((len(COUNTERS), len(INTEGERS), len(FLOATS)))
        floats = floats.view(torch.float32)
        done = torch.zeros(size, dtype=torch.bool, device=device)
        done[num_slots] = True
        views = {**dict(zip(INTEGERS, integers, strict=True)), **dict(zip(FLOATS, floats, strict=True))}
        columns = replace(SamplingColumns.allocate(size, device, max_stop_ids, max_bias), **views)
        return cls(
            tokens=torch.zeros((size, max_len), dtype=i32, device=device),
            block_tables=torch.zeros((size, -(-max_len // block_size)), dtype=i32, device=device),
            numbers=numbers, counters=counters, integers=integers, floats=floats, done=done,
            columns=columns, block_size=block_size, **dict(zip(COUNTERS, counters, strict=True)),
        )  # fmt: skip

    @cached_property
    def memory(self) -> tuple[torch.Tensor | int, ...]:
        """What `change` writes to on CUDA, and its sizes: made once, because each view costs the host."""
        stops, tables = self.columns.stop_ids, self.block_tables
        words = self.numbers, self.columns.seed.view(torch.int32), stops, self.done.view(torch.uint8)
        return (*words, self.tokens, tables, *stops.shape, self.tokens.shape[1], tables.shape[1])

    @property
    def padding_slot(self) -> int:
        """The slot that is always done."""
        return self.done.shape[0] - 1


@dataclass(frozen=True)
class Gathered:
    """Inputs of one forward over T tokens of B rows.

    Attributes:
        token_ids: int32[T].
        positions: int32[T].
        slot_mapping: int64[T]: block id * block size + offset; -1 for what is not to be written.
        seq_lens: int32[B]: tokens of each row, these included. From `gather_decodes` on CUDA 0 for a row that
            is done: attention then has no work for it, nor for the rows that pad a batch.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    slot_mapping: torch.Tensor
    seq_lens: torch.Tensor


@dataclass(frozen=True)
class Changes:
    """What a step changes in the rows before its forward, staged in one array.

    Attributes:
        source: int32[n], on the device.
        records: place of the first new row's `RECORD`; the others follow it.
        num_rows: rows that enter.
        longest: tokens of the longest of these, known on the host.
        entries: place of the first of the block tables' new entries: E places in the flattened tables, and
            behind these E blocks. No place is within a new row's own blocks, and none stands twice.
        num_entries: E.
    """

    source: torch.Tensor
    records: int = 0
    num_rows: int = 0
    longest: int = 0
    entries: int = 0
    num_entries: int = 0


def change(state: RowState, changes: Changes) -> None:
    """Let new rows enter their slots, which are distinct, and put blocks into tables. New rows are not done;
    their stop ids are padded with -1.

    Args:
        state: changed in place.
        changes: which; at least one row or entry.
    """
    if state.tokens.is_cuda:
        from kernels.cuda import rows

        rows.change(state, changes)
        return
    source, first = changes.source, changes.records
    records = source[first : first + changes.num_rows * RECORD_WORDS].view(-1, RECORD_WORDS)
    slots = records[:, 0].long()
    state.numbers.index_copy_(1, slots, records[:, NUMBERS_AT : NUMBERS_AT + NUM_NUMBERS].t())
    state.columns.seed.view(torch.int32).view(-1, 2)[slots] = records[:, SEED_AT:NUMBERS_AT]
    state.done[slots] = False
    state.columns.stop_ids[slots] = -1
    for slot, place, *counts in records[:, [0, 1, 2, NUMBERS_AT, 3]].tolist():
        for part, count in zip(
            (state.columns.stop_ids, state.tokens, state.block_tables), counts, strict=True
        ):
            part[slot, :count] = source[place : place + count]
            place += count
    places, blocks = source[changes.entries :][: 2 * changes.num_entries].view(2, changes.num_entries)
    state.block_tables.view(-1)[places.long()] = blocks


def gather_decodes(state: RowState, slots: torch.Tensor, iteration: torch.Tensor) -> Gathered:
    """Each row's next token; counts it as computed, and the iteration as begun.

    Args:
        state: `num_computed` changes.
        slots: int64[B], distinct but for the padding slot.
        iteration: int32[1], one is added.
    """
    if slots.is_cuda:
        from kernels.cuda import rows

        return rows.gather_decodes(state, slots, iteration)
    iteration += 1
    live = state.done.index_select(0, slots).logical_not_()
    # A row that is done looks at position 0 only, which is in its table whatever became of the rest.
    starts = state.num_computed.index_select(0, slots).mul_(live)
    state.num_computed.index_add_(0, slots, live.to(torch.int32))
    return _gather(state, slots, starts, live, starts + 1)


def gather_chunks(
    state: RowState, slots: torch.Tensor, lengths: torch.Tensor, row_of_token: torch.Tensor,
    offsets: torch.Tensor, iteration: torch.Tensor,
) -> Gathered:  # fmt: skip
    """Each row's next tokens, as many as `lengths` says; counts them as computed, and the iteration as begun.

    Args:
        state: `num_computed` changes.
        slots: int64[B], distinct but for the padding slot.
        lengths: int32[B].
        row_of_token: int32[T], indexes into the batch's rows; -1 pads.
        offsets: int32[T], the place of each token in its row's chunk.
        iteration: int32[1], one is added.
    """
    if slots.is_cuda:
        from kernels.cuda import rows

        return rows.gather_chunks(state, slots, lengths, row_of_token, offsets, iteration)
    iteration += 1
    live = state.done.index_select(0, slots).logical_not_()
    starts = state.num_computed.index_select(0, slots).mul_(live)
    state.num_computed.index_add_(0, slots, live.to(torch.int32).mul_(lengths))
    row = row_of_token.clamp(min=0)
    padding = row_of_token < 0
    live = live.index_select(0, row).masked_fill_(padding, False)
    positions = starts.index_select(0, row).add_(offsets).masked_fill_(padding, 0)
    gathered = _gather(state, slots.index_select(0, row), positions, live, starts.add_(lengths))
    gathered.token_ids.masked_fill_(padding, 0)
    return gathered


def _gather(
    state: RowState, slots: torch.Tensor, positions: torch.Tensor, live: torch.Tensor, seq_lens: torch.Tensor
) -> Gathered:
    """The tokens at these positions of these slots, and where their keys and values go."""
    token_ids = state.tokens.view(-1).index_select(0, slots * state.tokens.shape[1] + positions)
    entries = slots * state.block_tables.shape[1] + positions.div(state.block_size, rounding_mode="floor")
    blocks = state.block_tables.view(-1).index_select(0, entries).to(torch.int64)
    places = blocks.mul_(state.block_size).add_(positions.remainder(state.block_size))
    return Gathered(token_ids, positions, places.masked_fill_(live.logical_not(), -1), seq_lens)


def fork(state: RowState, slots: torch.Tensor, parents: torch.Tensor) -> None:
    """Rows become copies of their parents, but for how they sample and where they end.

    Args:
        state: changed in place.
        slots: int64[N], distinct.
        parents: int64[N]; where they are among `slots`, as they were before.
    """
    for part in (state.tokens, state.block_tables, state.done):
        part.index_copy_(0, slots, part.index_select(0, parents))
    inherited = state.counters[:INHERITED]
    inherited.index_copy_(1, slots, inherited.index_select(1, parents))


def go_on(state: RowState, slots: torch.Tensor, tokens: torch.Tensor) -> None:
    """Append a token to each row.

    Args:
        state: tokens and num_tokens change.
        slots: int64[N], distinct; none of these rows is full.
        tokens: int32[N].
    """
    place = slots * state.tokens.shape[1] + state.num_tokens.index_select(0, slots)
    state.tokens.view(-1).index_copy_(0, place, tokens)
    state.num_tokens.index_add_(0, slots, torch.ones_like(tokens))


@dataclass(frozen=True)
class Masks:
    """What rows that follow grammars may draw, kept by the host while the device runs: it looks at each mask
    when it comes to draw, and a row whose mask is not there yet sits that iteration out. P masks of W words.

    Attributes:
        of_slot: int32[S] on the device: each row's mask, `FREE` for none.
        bits: int32[P, W] in host memory, see `kernels.sample.allow`.
        num_tokens: int32[P] in host memory: with how many tokens a row may draw within this mask.
        drawn: int64[P] in host memory, from `note`: the row's tokens in the upper half; in the lower one
            whether it is done (the highest bit) and its last token.
    """

    of_slot: torch.Tensor
    bits: torch.Tensor
    num_tokens: torch.Tensor
    drawn: torch.Tensor


def hold(state: RowState, slots: torch.Tensor, masks: Masks) -> tuple[torch.Tensor, torch.Tensor]:
    """Let rows without their mask sit an iteration out: the next one computes the same token again.

    Args:
        state: `num_computed` of rows that are held goes back by one.
        slots: int64[R], distinct but for the padding slot.
        masks: of all rows.

    Returns:
        int64[R]: slots for `accept`, the padding slot in place of a row that is held.
        int32[R]: the rows' masks; `FREE` for rows that are held or done.
    """
    if slots.is_cuda:
        from kernels.cuda import rows

        return rows.hold(state, slots, masks)
    mask = masks.of_slot.index_select(0, slots).masked_fill_(state.done.index_select(0, slots), FREE)
    due = masks.num_tokens.index_select(0, mask.clamp(min=0))
    held = mask.ne(FREE).logical_and_(due.ne(state.num_tokens.index_select(0, slots)))
    state.num_computed.index_add_(0, slots, held.to(torch.int32).neg_())
    return slots.masked_fill(held, state.padding_slot), mask.masked_fill_(held, FREE)


def note(
    state: RowState, slots: torch.Tensor, of_row: torch.Tensor, token_ids: torch.Tensor, masks: Masks
) -> None:
    """Tell the host what rows drew within their masks, once it is accepted.

    Args:
        state: of the rows.
        slots: int64[R].
        of_row: int32[R], from `hold`.
        token_ids: int32[R].
        masks: `drawn` changes.
    """
    if slots.is_cuda:
        from kernels.cuda import rows

        rows.note(state, slots, of_row, token_ids, masks)
        return
    places = of_row.ge(0).nonzero().flatten()
    rows_of = slots.index_select(0, places)
    told = state.num_tokens.index_select(0, rows_of).long() << 32
    told += state.done.index_select(0, rows_of).long() << 31
    masks.drawn[of_row.index_select(0, places).long()] = told + token_ids.index_select(0, places)


def accept(
    state: RowState, slots: torch.Tensor, token_ids: torch.Tensor, finite: torch.Tensor,
    iteration: torch.Tensor, drawn: torch.Tensor,
) -> None:  # fmt: skip
    """Append what was drawn to the rows that go on, mark the rows that end, and note what happened.

    Args:
        state: tokens, num_tokens and done change.
        slots: int64[R], distinct but for the padding slot.
        token_ids: int32[R].
        finite: bool[R]; where it is False, the row ends with `NAN` and takes no token.
        iteration: int32[1], the place in `drawn`.
        drawn: int32[m, 2, R], written at `iteration`: the tokens, and what became of each row: `WAS_DONE`,
            `GOES_ON`, `NAN`, or `kernels.sample`'s STOP or LENGTH.
    """
    if slots.is_cuda:
        from kernels.cuda import rows

        rows.accept(state, slots, token_ids, finite, iteration, drawn)
        return
    was_done = state.done.index_select(0, slots)
    takes = finite.logical_and(was_done.logical_not())
    length = state.num_tokens.index_select(0, slots)
    # A full row has no next place; it writes its last one's own token there.
    max_len = state.tokens.shape[1]
    place = slots * max_len + length.clamp(max=max_len - 1)
    flat = state.tokens.view(-1)
    flat.index_copy_(0, place, torch.where(takes, token_ids, flat.index_select(0, place)))
    state.num_tokens.index_add_(0, slots, takes.to(torch.int32))
    reasons = ended(token_ids, slots, state.columns, state.num_tokens, state.num_prompt, state.last_position)
    outcome = torch.where(takes, reasons.to(torch.int32), NAN).masked_fill_(was_done, WAS_DONE)
    state.done.index_copy_(0, slots, outcome.ne(GOES_ON))
    drawn[int(iteration)] = torch.stack((token_ids, outcome))
