"""Rows that live on the device, indexed by slot: a step's changes go in, the forward's inputs come out."""

from __future__ import annotations

import torch

from gpu_worker.batch import Inputs
from gpu_worker.sampler import MAX_BIAS, MAX_STOP_IDS
from gpu_worker.staging import Diff, Limits
from kernels.blocks import copy_blocks
from kernels.layer import Step
from kernels.rows import RECORD_WORDS, Changes, RowState, change, fork, gather_chunks, gather_decodes, go_on


class Rows:
    """The device's side of every slot. Nothing here is read by the host.

    Attributes:
        state: tokens, counters, block tables and sampling columns.
        iota: int32, 0 and up, one more than there are slots.
    """

    def __init__(self, limits: Limits, device: torch.device) -> None:
        self.state = RowState.allocate(
            limits.max_slots, limits.max_len, limits.block_size, MAX_STOP_IDS, MAX_BIAS, device
        )
        self.iota = torch.arange(limits.max_slots + 2, dtype=torch.int32, device=device)

    def apply(self, diff: Diff, caches: list[torch.Tensor]) -> None:
        """Change what a step changes before its forward: block copies, new rows, block tables."""
        if diff.copies is not None:
            copy_blocks(caches, *diff.copies)
        if diff.changes is not None:
            change(self.state, diff.changes)
        if diff.moves is not None:
            slots, parents, going, tokens = diff.moves
            fork(self.state, slots, parents)
            go_on(self.state, going, tokens)
        if diff.entries is not None:
            change(self.state, diff.entries)
        if diff.biases is not None:
            biased, ids, values = diff.biases
            self.state.columns.bias_ids.index_copy_(0, biased, ids)
            self.state.columns.bias_values.index_copy_(0, biased, values)

    def rehearse(self, caches: list[torch.Tensor]) -> None:
        """Run what `apply` runs, on the row that pads; it stays done."""
        state = self.state
        record = torch.zeros(RECORD_WORDS, dtype=torch.int32, device=state.tokens.device)
        record[0] = state.padding_slot
        change(state, Changes(record, num_rows=1))
        state.done[state.padding_slot] = True
        nothing = torch.zeros(1, dtype=torch.int64, device=state.tokens.device)
        copy_blocks(caches, nothing, nothing)

    def gather(self, inputs: Inputs, cos_sin: torch.Tensor, width: int) -> tuple[torch.Tensor, Step]:
        """The inputs of one forward: each row's next tokens (int32[T]), their places, and the rows' block
        tables, of which the first `width` entries matter; `cos_sin` is the model's table of rotations."""
        state, chunks = self.state, inputs.chunks
        if chunks is None:
            gathered = gather_decodes(state, inputs.slots, inputs.iteration)
        else:
            rows = (chunks.lengths, chunks.row_of_token, chunks.offsets)
            gathered = gather_chunks(state, inputs.slots, *rows, inputs.iteration)
        tables = state.block_tables
        table_rows: torch.Tensor | None = inputs.slots
        if not tables.is_cuda:  # there, kernels look a row's table up by its slot
            tables, table_rows = tables[:, :width].index_select(0, inputs.slots), None
        return gathered.token_ids, Step(
            cos_sin=cos_sin,
            positions=gathered.positions,
            slot_mapping=gathered.slot_mapping,
            block_tables=tables,
            query_start=inputs.query_start,
            seq_lens=gathered.seq_lens,
            table_rows=table_rows,
            tiles=None if chunks is None else chunks.tiles,
            wanted=None if chunks is None else chunks.sample_index,
        )
