"""`kernels.rows` on CUDA: a launch for each of them, whatever the number of rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.rows import (
    FREE,
    GOES_ON,
    NAN,
    NUM_NUMBERS,
    NUMBERS_AT,
    RECORD_WORDS,
    SEED_AT,
    WAS_DONE,
    Changes,
    Gathered,
    Masks,
    RowState,
)
from kernels.sample import LENGTH, STOP

BLOCK = 128
SPAN = 1024
ACCEPT_BLOCK = 8
STOPS = 64

_GOES_ON, _NAN, _WAS_DONE = tl.constexpr(GOES_ON), tl.constexpr(NAN), tl.constexpr(WAS_DONE)
_FREE = tl.constexpr(FREE)
_LENGTH, _STOP = tl.constexpr(LENGTH), tl.constexpr(STOP)
_RECORD_WORDS, _SEED_AT = tl.constexpr(RECORD_WORDS), tl.constexpr(SEED_AT)
_NUMBERS_AT, _NUM_NUMBERS = tl.constexpr(NUMBERS_AT), tl.constexpr(NUM_NUMBERS)
_LANES = tl.constexpr(triton.next_power_of_2(NUM_NUMBERS))


@triton.jit(do_not_specialize=["records", "num_rows", "entries", "num_entries"])
def _change_kernel(
    source,
    records,
    num_rows,
    entries,
    num_entries,
    numbers,
    seeds,
    stops,
    done,
    tokens,
    tables,
    num_slots,
    num_stops,
    max_len,
    table_len,
    SPAN: tl.constexpr,
):
    """Program (n, i) writes piece i of new row n; behind the rows, piece i of the tables' entries."""
    row, piece = tl.program_id(0), tl.program_id(1)
    offset = piece * SPAN + tl.arange(0, SPAN)
    if row == num_rows:
        inside = offset < num_entries
        place = tl.load(source + entries + offset, mask=inside, other=0)
        block = tl.load(source + entries + num_entries + offset, mask=inside)
        tl.store(tables + place, block, mask=inside)
    else:
        record = source + records + row * _RECORD_WORDS
        slot = tl.load(record).to(tl.int64)
        part = source + tl.load(record + 1)
        count = tl.load(record + 2)
        ids = tl.load(part + offset, mask=offset < count, other=-1)
        tl.store(stops + slot * num_stops + offset, ids, mask=offset < num_stops)
        part += count
        count = tl.load(record + _NUMBERS_AT)
        inside = offset < count
        tl.store(tokens + slot * max_len + offset, tl.load(part + offset, mask=inside), mask=inside)
        part += count
        inside = offset < tl.load(record + 3)
        tl.store(tables + slot * table_len + offset, tl.load(part + offset, mask=inside), mask=inside)
        if piece == 0:
            lane = tl.arange(0, _LANES)
            value = tl.load(record + _NUMBERS_AT + lane, mask=lane < _NUM_NUMBERS)
            tl.store(numbers + lane * num_slots + slot, value, mask=lane < _NUM_NUMBERS)
            word = tl.arange(0, 2)
            tl.store(seeds + slot * 2 + word, tl.load(record + _SEED_AT + word))
            tl.store(done + slot, 0)


def change(state: RowState, changes: Changes) -> None:
    """See `kernels.rows.change`: one launch, because the host's time for each delays the step."""
    num_rows, num_entries = changes.num_rows, changes.num_entries
    widest = max(num_entries, changes.longest, state.columns.stop_ids.shape[1] if num_rows else 0)
    _change_kernel[(num_rows + (num_entries > 0), -(-widest // SPAN))](
        changes.source, changes.records, num_rows, changes.entries, num_entries, *state.memory, SPAN=SPAN
    )


@triton.jit(do_not_specialize=["num_rows"])
def _gather_decodes_kernel(
    slots,
    iteration,
    done,
    num_computed,
    tokens,
    tables,
    token_ids,
    positions,
    slot_mapping,
    seq_lens,
    num_rows,
    max_len,
    table_len,
    BLOCK_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if tl.program_id(0) == 0:
        tl.store(iteration, tl.load(iteration) + 1)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < num_rows
    slot = tl.load(slots + row, mask=inside, other=0)
    live = inside & (tl.load(done + slot, mask=inside, other=1) == 0)
    # A row that is done looks at position 0 only, which is in its table whatever became of the rest.
    start = tl.load(num_computed + slot, mask=live, other=0)
    tl.store(num_computed + slot, start + 1, mask=live)
    tl.store(token_ids + row, tl.load(tokens + slot * max_len + start, mask=inside), mask=inside)
    block = tl.load(tables + slot * table_len + start // BLOCK_SIZE, mask=live, other=0).to(tl.int64)
    place = tl.where(live, block * BLOCK_SIZE + start % BLOCK_SIZE, -1)
    tl.store(slot_mapping + row, place, mask=inside)
    tl.store(positions + row, start, mask=inside)
    tl.store(seq_lens + row, tl.where(live, start + 1, 0), mask=inside)


def gather_decodes(state: RowState, slots: torch.Tensor, iteration: torch.Tensor) -> Gathered:
    """See `kernels.rows.gather_decodes`."""
    num_rows = slots.shape[0]
    gathered = _allocate(num_rows, num_rows, slots.device)
    _gather_decodes_kernel[(triton.cdiv(num_rows, BLOCK),)](
        slots,
        iteration,
        state.done.view(torch.uint8),
        state.num_computed,
        state.tokens,
        state.block_tables,
        gathered.token_ids,
        gathered.positions,
        gathered.slot_mapping,
        gathered.seq_lens,
        num_rows,
        state.tokens.shape[1],
        state.block_tables.shape[1],
        BLOCK_SIZE=state.block_size,
        BLOCK=BLOCK,
        num_warps=4,
    )
    return gathered


@triton.jit(do_not_specialize=["num_rows"])
def _start_chunks_kernel(
    slots, lengths, iteration, done, num_computed, starts, seq_lens, num_rows, BLOCK: tl.constexpr
):
    """Where each row's chunk starts. A kernel of its own, because every token's program reads it."""
    if tl.program_id(0) == 0:
        tl.store(iteration, tl.load(iteration) + 1)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < num_rows
    slot = tl.load(slots + row, mask=inside, other=0)
    length = tl.load(lengths + row, mask=inside, other=0)
    live = inside & (tl.load(done + slot, mask=inside, other=1) == 0)
    start = tl.load(num_computed + slot, mask=live, other=0)
    tl.store(num_computed + slot, start + length, mask=live)
    # -1 tells the tokens' programs that the row is done.
    tl.store(starts + row, tl.where(live, start, -1), mask=inside)
    tl.store(seq_lens + row, start + length, mask=inside)


@triton.jit(do_not_specialize=["num_tokens"])
def _gather_chunks_kernel(
    slots,
    starts,
    row_of_token,
    offsets,
    tokens,
    tables,
    token_ids,
    positions,
    slot_mapping,
    num_tokens,
    max_len,
    table_len,
    BLOCK_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = token < num_tokens
    row = tl.load(row_of_token + token, mask=inside, other=-1)
    real = row >= 0
    slot = tl.load(slots + row, mask=real, other=0)
    start = tl.load(starts + row, mask=real, other=-1)
    live = start >= 0
    position = tl.where(real, tl.maximum(start, 0) + tl.load(offsets + token, mask=inside, other=0), 0)
    tl.store(token_ids + token, tl.load(tokens + slot * max_len + position, mask=real, other=0), mask=inside)
    block = tl.load(tables + slot * table_len + position // BLOCK_SIZE, mask=live, other=0).to(tl.int64)
    place = tl.where(live, block * BLOCK_SIZE + position % BLOCK_SIZE, -1)
    tl.store(slot_mapping + token, place, mask=inside)
    tl.store(positions + token, position, mask=inside)


def gather_chunks(
    state: RowState,
    slots: torch.Tensor,
    lengths: torch.Tensor,
    row_of_token: torch.Tensor,
    offsets: torch.Tensor,
    iteration: torch.Tensor,
) -> Gathered:
    """See `kernels.rows.gather_chunks`."""
    num_rows, num_tokens = slots.shape[0], row_of_token.shape[0]
    gathered = _allocate(num_tokens, num_rows, slots.device)
    starts = torch.empty_like(gathered.seq_lens)
    _start_chunks_kernel[(triton.cdiv(num_rows, BLOCK),)](
        slots,
        lengths,
        iteration,
        state.done.view(torch.uint8),
        state.num_computed,
        starts,
        gathered.seq_lens,
        num_rows,
        BLOCK=BLOCK,
        num_warps=4,
    )
    _gather_chunks_kernel[(triton.cdiv(num_tokens, BLOCK),)](
        slots,
        starts,
        row_of_token,
        offsets,
        state.tokens,
        state.block_tables,
        gathered.token_ids,
        gathered.positions,
        gathered.slot_mapping,
        num_tokens,
        state.tokens.shape[1],
        state.block_tables.shape[1],
        BLOCK_SIZE=state.block_size,
        BLOCK=BLOCK,
        num_warps=4,
    )
    return gathered


def _allocate(num_tokens: int, num_rows: int, device: torch.device) -> Gathered:
    i32 = torch.int32
    return Gathered(
        token_ids=torch.empty(num_tokens, dtype=i32, device=device),
        positions=torch.empty(num_tokens, dtype=i32, device=device),
        slot_mapping=torch.empty(num_tokens, dtype=torch.int64, device=device),
        seq_lens=torch.empty(num_rows, dtype=i32, device=device),
    )


@triton.jit(do_not_specialize=["num_rows", "padding_slot"])
def _hold_kernel(
    slots,
    of_slot,
    due,
    done,
    num_tokens,
    num_computed,
    takers,
    of_row,
    num_rows,
    padding_slot,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < num_rows
    slot = tl.load(slots + row, mask=inside, other=0)
    live = inside & (tl.load(done + slot, mask=inside, other=1) == 0)
    mask = tl.load(of_slot + slot, mask=live, other=_FREE)
    has_mask = mask != _FREE
    # The host writes to these while the device runs.
    wanted = tl.load(due + mask, mask=has_mask, other=0, volatile=True)
    held = has_mask & (wanted != tl.load(num_tokens + slot, mask=has_mask, other=0))
    computed = tl.load(num_computed + slot, mask=held, other=0)
    tl.store(num_computed + slot, computed - 1, mask=held)
    tl.store(takers + row, tl.where(held, padding_slot, slot), mask=inside)
    tl.store(of_row + row, tl.where(held, _FREE, mask), mask=inside)


def hold(state: RowState, slots: torch.Tensor, masks: Masks) -> tuple[torch.Tensor, torch.Tensor]:
    """See `kernels.rows.hold`."""
    num_rows, takers = slots.shape[0], torch.empty_like(slots)
    of_row = torch.empty(num_rows, dtype=torch.int32, device=slots.device)
    _hold_kernel[(triton.cdiv(num_rows, BLOCK),)](
        slots,
        masks.of_slot,
        masks.num_tokens,
        state.done.view(torch.uint8),
        state.num_tokens,
        state.num_computed,
        takers,
        of_row,
        num_rows,
        state.padding_slot,
        BLOCK=BLOCK,
        num_warps=4,
    )
    return takers, of_row


@triton.jit(do_not_specialize=["num_rows"])
def _note_kernel(slots, of_row, token_ids, done, num_tokens, drawn, num_rows, BLOCK: tl.constexpr):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < num_rows
    mask = tl.load(of_row + row, mask=inside, other=_FREE)
    told = mask != _FREE
    slot = tl.load(slots + row, mask=told, other=0)
    value = tl.load(num_tokens + slot, mask=told, other=0).to(tl.int64) << 32
    value += (tl.load(done + slot, mask=told, other=0) != 0).to(tl.int64) << 31
    value += tl.load(token_ids + row, mask=told, other=0)
    tl.store(drawn + mask, value, mask=told)


def note(
    state: RowState, slots: torch.Tensor, of_row: torch.Tensor, token_ids: torch.Tensor, masks: Masks
) -> None:
    """See `kernels.rows.note`."""
    num_rows = slots.shape[0]
    _note_kernel[(triton.cdiv(num_rows, BLOCK),)](
        slots,
        of_row,
        token_ids,
        state.done.view(torch.uint8),
        state.num_tokens,
        masks.drawn,
        num_rows,
        BLOCK=BLOCK,
        num_warps=4,
    )


@triton.jit(do_not_specialize=["num_rows"])
def _accept_kernel(
    slots,
    token_ids,
    finite,
    iteration,
    drawn,
    tokens,
    num_tokens,
    num_prompt,
    last_position,
    min_tokens,
    stop_ids,
    done,
    num_rows,
    max_len,
    num_stops,
    STOPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < num_rows
    slot = tl.load(slots + row, mask=inside, other=0)
    token = tl.load(token_ids + row, mask=inside, other=0)
    was_done = tl.load(done + slot, mask=inside, other=1) != 0
    takes = inside & (tl.load(finite + row, mask=inside, other=0) != 0) & ~was_done
    length = tl.load(num_tokens + slot, mask=inside, other=0)
    tl.store(tokens + slot * max_len + length, token, mask=takes & (length < max_len))
    length += 1
    tl.store(num_tokens + slot, length, mask=takes)
    hits = tl.zeros([BLOCK], dtype=tl.int32)
    base = 0
    more = num_stops > 0
    while more:  # most rows have a handful of stop ids, which come before the padding
        place = base + tl.arange(0, STOPS)
        ids = tl.load(
            stop_ids + slot[:, None] * num_stops + place[None, :],
            mask=takes[:, None] & (place < num_stops)[None, :],
            other=-1,
        )
        hits = tl.maximum(hits, tl.max((ids == token[:, None]).to(tl.int32), axis=1))
        base += STOPS
        more = (base < num_stops) & (tl.max(tl.min(ids, axis=1), axis=0) >= 0)
    stops = hits != 0
    prompt = tl.load(num_prompt + slot, mask=takes, other=0)
    stops &= length - prompt > tl.load(min_tokens + slot, mask=takes, other=0)
    full = length >= tl.load(last_position + slot, mask=takes, other=0)
    outcome = tl.where(stops, _STOP, tl.where(full, _LENGTH, _GOES_ON))
    outcome = tl.where(takes, outcome, tl.where(was_done, _WAS_DONE, _NAN))
    tl.store(done + slot, 1, mask=inside & (outcome != _GOES_ON))
    out = drawn + tl.load(iteration) * 2 * num_rows + row
    tl.store(out, token, mask=inside)
    tl.store(out + num_rows, outcome, mask=inside)


def accept(
    state: RowState,
    slots: torch.Tensor,
    token_ids: torch.Tensor,
    finite: torch.Tensor,
    iteration: torch.Tensor,
    drawn: torch.Tensor,
) -> None:
    """See `kernels.rows.accept`."""
    num_rows, num_stops = slots.shape[0], state.columns.stop_ids.shape[1]
    _accept_kernel[(triton.cdiv(num_rows, ACCEPT_BLOCK),)](
        slots,
        token_ids,
        finite.view(torch.uint8),
        iteration,
        drawn,
        state.tokens,
        state.num_tokens,
        state.num_prompt,
        state.last_position,
        state.columns.min_tokens,
        state.columns.stop_ids,
        state.done.view(torch.uint8),
        num_rows,
        state.tokens.shape[1],
        num_stops,
        STOPS=STOPS,
        BLOCK=ACCEPT_BLOCK,
        num_warps=1,
    )
