"""The host's half of a step: check it, follow its counts, and pack what the device needs into one buffer.

The host keeps only what follows from counts: how many tokens a row has and how many of them are computed, as
if no row ever stopped early. What was drawn, and whether a row is done, stays on the device and feeds the
next step there, so that a step can be staged while nobody has read the one before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import Any

import numpy as np
import torch

from gpu_worker.batch import Padding, Shape, pack
from gpu_worker.beams import Beams, moves, searches
from gpu_worker.buffers import Staging
from gpu_worker.host_rows import HostRows, StepError
from gpu_worker.prompt_logprobs import Wanted, wanted
from gpu_worker.sampler import MAX_BIAS, Trait, features_of, row_columns
from kernels.attention import make_tiles
from kernels.rows import RECORD, RECORD_WORDS, Changes
from kernels.sample import Features
from pagoda.internal.v1 import worker_pb2


@dataclass(frozen=True)
class Limits:
    """How much a worker holds."""

    max_slots: int
    max_len: int
    block_size: int
    num_blocks: int
    max_batched_tokens: int
    max_horizon: int
    num_host_blocks: int = 0

    @property
    def table_len(self) -> int:
        """Entries of a row's block table."""
        return -(-self.max_len // self.block_size)


Pairs = tuple[torch.Tensor, torch.Tensor]
"""Source and destination blocks, int64."""


@dataclass
class Diff:
    """What a step changes on the device before its forward, in this order; but `swap_in` is last."""

    swap_out: Pairs | None = None
    """Device blocks to host blocks."""
    swap_in: Pairs | None = None
    """Host blocks to device blocks."""
    copies: Pairs | None = None
    """Within the device."""
    changes: Changes | None = None
    """Rows that enter slots, forks included (whose tokens, table and counters come later), and new entries of
    block tables."""
    moves: tuple[torch.Tensor, ...] | None = None
    """Beams that go on: slots of those that become copies of others, these others' (int64), slots of all, and
    the token of each (int32). They come between `changes`, which are then new rows alone, and `entries`."""
    entries: Changes | None = None
    """New entries of block tables, behind `moves`."""
    biases: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
    """Slots whose biases change (int64[M]), the ids and values ([M, MAX_BIAS], int32 and float32)."""


@dataclass
class Batch:
    """One step's work, staged: T tokens of B rows go through the forward, R rows sample."""

    num_iterations: int
    shape: Shape
    block: torch.Tensor
    """int32[shape.size], see `gpu_worker.batch`."""
    table_width: int
    """Entries of the batch's longest block table."""
    features: Features
    num_logprobs: list[int]
    """For each sampling row, -1 where it wants none; padding is not counted."""
    sampling: np.ndarray
    """Slots of the sampling rows, in order; int64[R] in host memory, without padding."""
    forks: tuple[torch.Tensor, torch.Tensor] | None = None
    """Slots of forks and of their parents, int64."""
    prompts: Wanted | None = None
    """The prompt tokens whose logprobs are to be reported; None where no row asked for any."""
    constrained: Sequence[int] = ()
    """Slots of the sampling rows that follow grammars."""
    beams: Beams | None = None
    drawing: tuple[torch.Tensor, torch.Tensor] | None = None
    """Beside beams, the rows that sample: places among the logits, and slots, int64[R]."""

    @property
    def draws(self) -> bool:
        """Whether logits are wanted: else there are only chunks that end before their prompts do."""
        return bool(self.num_logprobs) or self.beams is not None

    @property
    def num_drawing(self) -> int:
        """Rows that draw, padding included."""
        return self.shape.samples if self.drawing is None else len(self.num_logprobs)


class Stager:
    """Turns step messages into a `Diff` and a `Batch`, and follows the rows' counts."""

    def __init__(
        self, limits: Limits, device: torch.device, num_buffers: int, padding: Padding | None = None
    ) -> None:
        """`num_buffers` is one more than the steps that may be in flight; `padding` is for graphs."""
        self._limits = limits
        self._padding = padding or Padding()
        self._largest_block = lru_cache(self._padding.largest)
        self._tiled = device.type != "cpu"
        self._staging = Staging(device, 8 * limits.max_batched_tokens + 64 * limits.max_slots, num_buffers)
        self._rows = HostRows(limits.max_slots)

    def clear(self) -> None:
        """Forget every row; the device's bias columns keep what they hold, so that is remembered."""
        self._rows = HostRows(self._limits.max_slots, self._rows.biased)

    def stage(self, step: worker_pb2.Step) -> tuple[Diff, Batch]:
        """Check a step and pack it. The tensors hold good until the ring comes round.

        Raises:
            StepError: the step names a slot, block or length that does not fit.
        """
        self._staging.begin(self._bound(step))
        diff = Diff()
        self._release(step.released_slots)
        device, host = self._limits.num_blocks, self._limits.num_host_blocks
        diff.swap_out = self._pairs(step.swap_out_device_blocks, step.swap_out_host_blocks, device, host)
        diff.copies = self._pairs(step.copy_src_blocks, step.copy_dst_blocks, device, device)
        diff.swap_in = self._pairs(step.swap_in_host_blocks, step.swap_in_device_blocks, host, device)
        parents: dict[int, int] = {}
        changes: dict[str, int] = {}
        if len(step.new_rows):
            parents = {r.slot: r.parent_slot for r in step.new_rows if r.HasField("parent_slot")}
            changes, diff.biases = self._new_rows(step.new_rows)
        if len(step.beam_slots):
            if changes:
                diff.changes, changes = Changes(self._staging.buffer, **changes), {}
            diff.moves = moves(step, self._rows, self._staging)
        if len(step.append_slots) or len(step.replace_slots):
            changes |= self._table_entries(step)
        if changes:
            staged = Changes(self._staging.buffer, **changes)
            diff.changes, diff.entries = (staged, None) if diff.moves is None else (diff.changes, staged)
        batch = self._batch(step, parents)
        self._staging.flush()
        return diff, batch

    def _bound(self, step: worker_pb2.Step) -> int:
        """No fewer numbers than staging a step takes."""
        rows, slots = step.new_rows, len(step.slots)
        numbers = sum(len(r.tokens) + len(r.blocks) + len(r.sampling.stop_token_ids) for r in rows)
        numbers += len(rows) * (RECORD_WORDS + 2 * MAX_BIAS + 64)
        blocks = 8 * (len(step.append_slots) + len(step.replace_slots)) + 4 * len(step.copy_src_blocks)
        blocks += 4 * (len(step.swap_out_host_blocks) + len(step.swap_in_host_blocks))
        # In steps of 64, so that few sizes are ever asked for.
        tokens = max(slots, sum(step.num_tokens))
        batch = self._largest_block(-(-slots // 64) * 64, -(-tokens // 64) * 64)
        if len(step.num_tokens) and (
            self._rows.told_until.any() or any(row.sampling.HasField("num_prompt_logprobs") for row in rows)
        ):
            numbers += 6 * tokens
        beams = 16 * (len(step.beam_slots) + len(step.beam_rows))
        return numbers + blocks + batch + beams + 4 * slots + 256

    def _release(self, slots: Sequence[int]) -> None:
        for slot in slots:
            self._rows.check_used(slot)
            self._rows.used[slot] = False

    def _pairs(self, src: Sequence[int], dst: Sequence[int], num_src: int, num_dst: int) -> Pairs | None:
        """Blocks to copy, of so many that there are on either side; None when there are none to copy."""
        if len(src) != len(dst):
            raise StepError(f"{len(src)} blocks to copy to {len(dst)}")
        self._check_blocks(src, num_src)
        self._check_blocks(dst, num_dst)
        return (self._staging.put_long(src), self._staging.put_long(dst)) if len(src) else None

    def _new_rows(
        self, rows: Sequence[worker_pb2.NewRow]
    ) -> tuple[dict[str, int], tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None]:
        """Pack a record and the numbers of each row; their part of `Changes`, and the biases that change."""
        host, staging = self._rows, self._staging
        longest = 0
        records = staging.reserve(len(rows) * RECORD_WORDS)
        for i, row in enumerate(rows):
            slot, stops = row.slot, row.sampling.stop_token_ids
            tokens: Sequence[int] = row.tokens
            blocks: Sequence[int] = row.blocks
            if slot >= self._limits.max_slots or host.used[slot]:
                raise StepError(f"new row: slot {slot} is not free")
            try:
                column = row_columns(row.sampling)
            except ValueError as error:
                raise StepError(f"new row in slot {slot}: {error}") from error
            host.used[slot] = True
            host.traits[slot], host.num_logprobs[slot] = column.traits, column.num_logprobs
            host.num_stops[slot] = len(stops)
            asks = row.sampling.HasField("num_prompt_logprobs") and not row.HasField("parent_slot")
            host.told_until[slot] = row.num_prompt_tokens - 1 if asks else 0
            host.num_prompt_top[slot] = row.sampling.num_prompt_logprobs
            if row.HasField("parent_slot"):
                tokens, blocks = (), ()
            else:
                self._check_new_row(row)
                host.num_tokens[slot], host.num_computed[slot] = len(tokens), row.num_computed
                host.num_blocks[slot] = len(blocks)
            place = staging.write(stops, tokens, blocks)
            RECORD.pack_into(
                staging.array.data, 4 * (records + i * RECORD_WORDS),
                slot, place, len(stops), len(blocks), row.sampling.seed,
                len(tokens), row.num_prompt_tokens, row.num_computed, row.last_position,
                *column.integers, *column.floats,
            )  # fmt: skip
            longest = max(longest, len(tokens))
        return {"records": records, "num_rows": len(rows), "longest": longest}, self._biases(rows)

    def _biases(
        self, rows: Sequence[worker_pb2.NewRow]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """Biases are rare and wide: only rows that have them, or follow one that had, write them."""
        biased = self._rows.biased
        changed = [(r.slot, r.sampling) for r in rows if biased[r.slot] or r.sampling.bias_token_ids]
        if not changed:
            return None
        ids = np.full((len(changed), MAX_BIAS), -1, dtype=np.int32)
        values = np.zeros((len(changed), MAX_BIAS), dtype=np.float32)
        for i, (slot, sampling) in enumerate(changed):
            count = len(sampling.bias_token_ids)
            ids[i, :count], values[i, :count] = sampling.bias_token_ids, sampling.bias_values
            biased[slot] = count > 0
        matrix = self._staging.put_matrix
        return self._staging.put_long([slot for slot, _ in changed]), matrix(ids), matrix(values)

    def _table_entries(self, step: worker_pb2.Step) -> dict[str, int]:
        """Pack the places and the blocks of new entries: their part of `Changes`."""
        width, host = self._limits.table_len, self._rows
        if len(step.append_slots) != len(step.append_blocks):
            raise StepError(f"{len(step.append_slots)} slots to append {len(step.append_blocks)} blocks to")
        if not len(step.replace_slots) == len(step.replace_indexes) == len(step.replace_blocks):
            raise StepError("the columns of replaced blocks differ in length")
        self._check_blocks(step.append_blocks, self._limits.num_blocks)
        self._check_blocks(step.replace_blocks, self._limits.num_blocks)
        counts = host.num_blocks
        places: list[int] = []
        for slot, run in groupby(step.append_slots):
            self._rows.check_used(slot)
            count, start = sum(1 for _ in run), int(counts[slot])
            if start + count > width:
                raise StepError(f"slot {slot}: its block table is full")
            counts[slot] = start + count
            places.extend(range(slot * width + start, slot * width + start + count))
        entering = {row.slot for row in step.new_rows}.difference(step.beam_slots)
        for slot, index in zip(step.replace_slots, step.replace_indexes, strict=True):
            self._rows.check_used(slot)
            if index >= counts[slot] or slot in entering:
                raise StepError(f"slot {slot}: its block table has no entry {index} to replace")
            places.append(slot * width + index)
        entries = self._staging.write(places, step.append_blocks, step.replace_blocks)
        return {"entries": entries, "num_entries": len(places)}

    def _batch(self, step: worker_pb2.Step, parents: dict[int, int]) -> Batch:
        slots = np.array(step.slots, dtype=np.int64)
        self._check_batch(step, slots)
        if not len(step.num_tokens) and not parents:
            return self._decode_batch(step, slots)
        lengths = np.array(step.num_tokens, dtype=np.int64)
        self._check_lengths(step, slots, lengths, parents)
        if (lengths == 1).all():
            return self._decode_batch(step, slots)
        return self._ragged_batch(step, slots, lengths, parents)

    def _ragged_batch(
        self, step: worker_pb2.Step, slots: np.ndarray, lengths: np.ndarray, parents: dict[int, int]
    ) -> Batch:
        """Chunks of prompts, decodes and forks, in any order."""
        host = self._rows
        rows, chunk = (slots, lengths) if not parents else (slots[lengths > 0], lengths[lengths > 0])
        starts = host.num_computed[rows]
        host.num_computed[rows] = starts + chunk
        last = np.cumsum(chunk) - 1
        if parents:
            forks = slots[lengths == 0]
            parent_of = self._fork(forks, parents, rows)
            last_token = np.zeros(self._limits.max_slots, dtype=np.int64)
            last_token[rows] = last
            last_token[forks] = last_token[parent_of]
            last = last_token[slots]
        samples = host.num_computed[slots] == host.num_tokens[slots]
        sampling = slots[samples]
        parts: dict[str, Any] = {
            "slots": rows, "lengths": chunk, "sample_slots": sampling, "sample_index": last[samples],
        }  # fmt: skip
        num_tiles = (0, 0)
        if self._tiled:
            parts["paged"], parts["fresh"] = tiles = make_tiles(chunk, starts)
            num_tiles = len(tiles[0]), len(tiles[1])
        sizes = len(rows), int(chunk.sum()), len(sampling), *num_tiles
        shape = self._padding.chunks(*sizes, has_decodes=bool((chunk == 1).any()))
        batch = self._sampling_batch(step, shape, rows, sampling, **parts)
        left = host.told_until[rows] - starts
        if left.max(initial=0) > 0:
            asking = np.stack([rows, chunk, starts, left, host.num_prompt_top[rows]])
            batch.prompts = wanted(step.slots, asking, self._staging.put_long)
        if parents:
            batch.forks = self._staging.put_long(forks), self._staging.put_long(parent_of)
        host.num_tokens[sampling] += 1
        return batch

    def _fork(self, forks: np.ndarray, parents: dict[int, int], rows: np.ndarray) -> np.ndarray:
        """Give forks their parents' counts; the parents."""
        host = self._rows
        parent_of = np.array([parents[slot] for slot in forks.tolist()], dtype=np.int64)
        ready = host.num_computed[parent_of] == host.num_tokens[parent_of]
        if not (ready & np.isin(parent_of, rows)).all():
            raise StepError("a fork's parent does not sample in this step")
        for counts in (host.num_tokens, host.num_computed, host.num_blocks):
            counts[forks] = counts[parent_of]
        return parent_of

    def _decode_batch(self, step: worker_pb2.Step, slots: np.ndarray) -> Batch:
        """Every row takes one token; unless all sample from it, the batch is ragged after all."""
        host, m = self._rows, step.num_iterations
        left = host.num_tokens[slots] - host.num_computed[slots]
        if (left < 1).any():
            raise StepError(f"step {step.step_id}: a row has no token left to compute")
        if (left > 1).any():
            if m > 1:
                raise StepError(f"step {step.step_id}: several iterations, and a row that does not sample")
            return self._ragged_batch(step, slots, np.ones(len(slots), dtype=np.int64), {})
        host.num_computed[slots] += m
        batch = self._sampling_batch(step, self._padding.decodes(len(slots)), slots, slots, slots=slots)
        host.num_tokens[slots] += m
        return batch

    def _sampling_batch(
        self, step: worker_pb2.Step, shape: Shape, rows: np.ndarray, sampling: np.ndarray, **parts: np.ndarray
    ) -> Batch:
        host, beams, drawing = self._rows, None, None
        if len(step.beam_rows):
            beams, draws = searches(step, sampling, host, self._staging)
            put, sampling = self._staging.put_long, sampling[draws]
            drawing = put(np.flatnonzero(draws)), put(sampling)
        num_logprobs = host.num_logprobs[sampling].tolist()
        traits = int(np.bitwise_or.reduce(host.traits[sampling], initial=0))
        constrained = sampling[(host.traits[sampling] & Trait.GRAMMAR) > 0] if traits & Trait.GRAMMAR else ()
        return Batch(
            num_iterations=step.num_iterations,
            shape=shape,
            block=self._staging.put(pack(shape, self._limits.max_slots, **parts)),
            table_width=int(host.num_blocks[rows].max(initial=1)),
            features=features_of(traits, max(num_logprobs, default=-1)),
            num_logprobs=num_logprobs,
            sampling=sampling,
            constrained=[int(slot) for slot in constrained],
            beams=beams,
            drawing=drawing,
        )

    # ---------------------------------------------------------------------------------------- checks

    def _check_blocks(self, blocks: Sequence[int], limit: int) -> None:
        if len(blocks) and max(blocks) >= limit:
            raise StepError(f"block {max(blocks)} does not exist: there are {limit}")

    def _check_new_row(self, row: worker_pb2.NewRow) -> None:
        limits, num_tokens, num_blocks = self._limits, len(row.tokens), len(row.blocks)
        fits = row.num_prompt_tokens <= num_tokens <= limits.max_len and num_blocks <= limits.table_len
        if not fits or row.num_computed >= num_tokens or row.last_position > limits.max_len:
            raise StepError(
                f"new row in slot {row.slot}: {num_tokens} tokens, {row.num_prompt_tokens} of the prompt, "
                f"{row.num_computed} computed, {num_blocks} blocks, last position {row.last_position}"
            )
        self._check_blocks(row.blocks, limits.num_blocks)

    def _check_batch(self, step: worker_pb2.Step, slots: np.ndarray) -> None:
        limits = self._limits
        if slots.max(initial=0) >= limits.max_slots or not self._rows.used[slots].all():
            raise StepError(f"step {step.step_id}: a slot of the batch holds no row")
        if len(set(step.slots)) != len(slots):
            raise StepError(f"step {step.step_id}: a slot stands twice in the batch")
        if not 1 <= step.num_iterations <= limits.max_horizon:
            raise StepError(f"{step.num_iterations} iterations, at most {limits.max_horizon}")

    def _check_lengths(
        self, step: worker_pb2.Step, slots: np.ndarray, lengths: np.ndarray, parents: dict[int, int]
    ) -> None:
        host = self._rows
        if len(lengths) != len(slots) or lengths.sum() > self._limits.max_batched_tokens:
            raise StepError(f"step {step.step_id}: {lengths.sum()} tokens for {len(slots)} rows do not fit")
        if step.num_iterations > 1 and (lengths != 1).any():
            raise StepError(f"step {step.step_id}: several iterations, and a row that is no decode")
        if set(slots[lengths == 0].tolist()) != set(parents):
            raise StepError(f"step {step.step_id}: the forks are not the rows without tokens")
        rows = slots[lengths > 0]
        if (host.num_computed[rows] + lengths[lengths > 0] > host.num_tokens[rows]).any():
            raise StepError(f"step {step.step_id}: a row has fewer tokens left than its chunk")
