"""Rows that live on the device, indexed by slot: their tokens, counters, block tables and sampling columns.

Nothing here is read by the host. A row that has ended is marked done on the device and takes part in later
iterations masked: it computes one position without writing it, samples nothing and stays as it is.
"""

from __future__ import annotations

import torch

from gpu_worker.sampler import FLOATS, INTEGERS, MAX_BIAS, MAX_STOP_IDS
from gpu_worker.staging import Batch, Diff, Limits, NewRows
from kernels.blocks import copy_blocks
from kernels.layer import Step
from kernels.sample import Sampled, SamplingColumns, ended

# What became of a sampling row in one iteration. Positive ones are the wire's RowEnd.
WAS_DONE = -1
GOES_ON = 0
NAN = 3

# The counters' order in `NewRows.counters`; a fork takes the first three from its parent.
COUNTERS = ("num_tokens", "num_prompt", "num_computed", "last_position")
INHERITED = 3


class Rows:
    """The device's side of every slot.

    Attributes:
        tokens: int32[S, max_len].
        num_tokens, num_prompt, num_computed, last_position: int32[S].
        done: bool[S].
        block_tables: int32[S, MB].
        columns: how each row samples.
    """

    def __init__(self, limits: Limits, device: torch.device) -> None:
        num_slots, i32 = limits.max_slots, torch.int32
        self._block_size, self._max_len = limits.block_size, limits.max_len
        # One matrix a type, a slot in each column: a new row is one write, and a column is contiguous.
        self._counters = torch.zeros((len(COUNTERS), num_slots), dtype=i32, device=device)
        self._integers = torch.zeros((len(INTEGERS), num_slots), dtype=i32, device=device)
        self._floats = torch.zeros((len(FLOATS), num_slots), dtype=torch.float32, device=device)
        self.num_tokens, self.num_prompt, self.num_computed, self.last_position = self._counters
        self.done = torch.zeros(num_slots, dtype=torch.bool, device=device)
        self.tokens = torch.zeros((num_slots, limits.max_len), dtype=i32, device=device)
        self.block_tables = torch.zeros((num_slots, limits.table_len), dtype=i32, device=device)
        self.columns = SamplingColumns(
            seed=torch.zeros(num_slots, dtype=torch.int64, device=device),
            stop_ids=torch.full((num_slots, MAX_STOP_IDS), -1, dtype=i32, device=device),
            bias_ids=torch.full((num_slots, MAX_BIAS), -1, dtype=i32, device=device),
            bias_values=torch.zeros((num_slots, MAX_BIAS), device=device),
            **dict(zip(INTEGERS, self._integers, strict=True)),
            **dict(zip(FLOATS, self._floats, strict=True)),
        )
        self._iota = torch.arange(num_slots + 1, dtype=i32, device=device)

    def apply(self, diff: Diff, caches: list[torch.Tensor]) -> None:
        """Change what a step changes before its forward: block copies, new rows, block tables."""
        if diff.copies is not None:
            copy_blocks(caches, *diff.copies)
        if diff.new_rows is not None:
            self._enter(diff.new_rows)
        if diff.table_entries is not None:
            places, blocks = diff.table_entries
            self.block_tables.view(-1).index_copy_(0, places, blocks)

    def _enter(self, new: NewRows) -> None:
        slots, columns = new.slots, self.columns
        self._counters.index_copy_(1, slots, new.counters.t())
        self._integers.index_copy_(1, slots, new.integers.t())
        self._floats.index_copy_(1, slots, new.floats.t())
        self.done.index_fill_(0, slots, False)
        columns.seed.index_copy_(0, slots, new.seeds)
        columns.stop_ids.index_copy_(0, slots, new.stop_ids)
        if new.biases is not None:
            biased, ids, values = new.biases
            columns.bias_ids.index_copy_(0, biased, ids)
            columns.bias_values.index_copy_(0, biased, values)
        for slot, tokens, blocks in new.contents:
            self.tokens[slot, : len(tokens)].copy_(tokens)
            self.block_tables[slot, : len(blocks)].copy_(blocks)

    def gather(self, batch: Batch, cos_sin: torch.Tensor) -> tuple[torch.Tensor, Step]:
        """The inputs of one forward: each row's next tokens (int32[T]), their places, and the rows' block
        tables; `cos_sin` is the model's table of rotations."""
        slots, width = batch.slots, batch.table_width
        live = self.done.index_select(0, slots).logical_not_()
        # A row that is done looks at position 0 only, which is in its table whatever became of the rest.
        starts = self.num_computed.index_select(0, slots).mul_(live)
        tables = self.block_tables[:, :width].index_select(0, slots)
        if batch.chunks is None:
            rows, positions, row_slots = self._iota[: batch.num_tokens], starts, slots
            query_start, seq_lens = self._iota[: batch.num_tokens + 1], starts + 1
        else:
            rows = batch.chunks.row_of_token
            positions = starts.index_select(0, rows).add_(batch.chunks.offsets)
            row_slots, live = slots.index_select(0, rows), live.index_select(0, rows)
            query_start, seq_lens = batch.chunks.query_start, starts.add_(batch.chunks.lengths)
        token_ids = self.tokens.view(-1).index_select(0, row_slots * self._max_len + positions)
        entries = rows * width + positions.div(self._block_size, rounding_mode="floor")
        blocks = tables.view(-1).index_select(0, entries)
        places = blocks.to(torch.int64).mul_(self._block_size).add_(positions.remainder(self._block_size))
        return token_ids, Step(
            cos_sin=cos_sin,
            positions=positions,
            slot_mapping=places.masked_fill_(live.logical_not_(), -1),
            block_tables=tables,
            query_start=query_start,
            seq_lens=seq_lens,
        )

    def advance(self, batch: Batch) -> None:
        """Count what a forward computed; then forks become copies of their parents."""
        live = self.done.index_select(0, batch.slots).logical_not_().to(torch.int32)
        computed = live if batch.chunks is None else live.mul_(batch.chunks.lengths)
        self.num_computed.index_add_(0, batch.slots, computed)
        if batch.forks is not None:
            slots, parents = batch.forks
            for state in (self.tokens, self.block_tables, self.done):
                state.index_copy_(0, slots, state.index_select(0, parents))
            inherited = self._counters[:INHERITED]
            inherited.index_copy_(1, slots, inherited.index_select(1, parents))

    def accept(self, batch: Batch, sampled: Sampled) -> torch.Tensor:
        """Append what was drawn to the rows that go on, and mark the rows that end.

        Returns:
            int32[2, R]: the tokens, and what became of each row: `WAS_DONE`, `GOES_ON`, or the wire's RowEnd.
        """
        slots = batch.sample_slots
        was_done = self.done.index_select(0, slots)
        takes = sampled.finite.logical_and(was_done.logical_not())
        length = self.num_tokens.index_select(0, slots)
        # A full row has no next place; it writes its last one's own token there.
        place = slots * self._max_len + length.clamp(max=self._max_len - 1)
        flat = self.tokens.view(-1)
        flat.index_copy_(0, place, torch.where(takes, sampled.token_ids, flat.index_select(0, place)))
        self.num_tokens.index_add_(0, slots, takes.to(torch.int32))
        reasons = ended(
            sampled.token_ids, slots, self.columns, self.num_tokens, self.num_prompt, self.last_position
        )
        outcome = torch.where(takes, reasons.to(torch.int32), NAN).masked_fill_(was_done, WAS_DONE)
        self.done.index_copy_(0, slots, outcome.ne(GOES_ON))
        return torch.stack((sampled.token_ids, outcome))
