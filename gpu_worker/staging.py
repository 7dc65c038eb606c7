"""The host's half of a step: check it, follow its counts, and pack what the device needs into one buffer.

The host keeps only what follows from counts: how many tokens a row has and how many of them are computed, as
if no row ever stopped early. What was drawn, and whether a row is done, stays on the device and feeds the
next step there, so that a step can be staged while nobody has read the one before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from gpu_worker.sampler import MAX_BIAS, MAX_STOP_IDS, RowColumns, Trait, features_of, row_columns
from kernels.sample import Features
from pagoda.internal.v1 import worker_pb2

Values = Sequence[int] | np.ndarray


class StepError(Exception):
    """A step that does not fit the rows: the scheduler and this worker disagree, so the session must end."""


@dataclass(frozen=True)
class Limits:
    """How much a worker holds."""

    max_slots: int
    max_len: int
    block_size: int
    num_blocks: int
    max_batched_tokens: int
    max_horizon: int

    @property
    def table_len(self) -> int:
        """Entries of a row's block table."""
        return -(-self.max_len // self.block_size)


@dataclass
class NewRows:
    """N rows that enter slots in one step, forks included (whose tokens, table and counters come later)."""

    slots: torch.Tensor
    """int64[N]."""
    counters: torch.Tensor
    """int32[N, 4]: tokens, of these the prompt's, of these computed, last position."""
    integers: torch.Tensor
    """int32[N, len(INTEGERS)]."""
    floats: torch.Tensor
    """float32[N, len(FLOATS)]."""
    seeds: torch.Tensor
    """int64[N]."""
    stop_ids: torch.Tensor
    """int32[N, MAX_STOP_IDS]."""
    contents: list[tuple[int, torch.Tensor, torch.Tensor]]
    """Slot, tokens and blocks of each row that is no fork."""
    biases: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
    """Slots whose biases change (int64[M]), the ids and values ([M, MAX_BIAS], int32 and float32)."""


@dataclass
class Diff:
    """What a step changes on the device before its forward, in this order."""

    copies: tuple[torch.Tensor, torch.Tensor] | None = None
    """Source and destination blocks, int64."""
    new_rows: NewRows | None = None
    table_entries: tuple[torch.Tensor, torch.Tensor] | None = None
    """Places in the flattened block tables (int64) and the blocks that go there (int32)."""


@dataclass
class Batch:
    """One step's work, ready for the device: T tokens of B rows go through the forward, R rows sample."""

    num_iterations: int
    num_tokens: int
    """T."""
    slots: torch.Tensor
    """int64[B]."""
    sample_slots: torch.Tensor
    """int64[R]."""
    table_width: int
    """Entries of the batch's longest block table."""
    features: Features
    num_logprobs: list[int]
    """For each sampling row, -1 where it wants none."""
    chunks: Chunks | None = None
    """How rows and tokens belong together; None when each row has one token, which it samples from."""
    forks: tuple[torch.Tensor, torch.Tensor] | None = None
    """Slots of forks and of their parents, int64."""


@dataclass
class Chunks:
    """The shape of a ragged batch."""

    lengths: torch.Tensor
    """int32[B]."""
    query_start: torch.Tensor
    """int32[B + 1]."""
    row_of_token: torch.Tensor
    """int32[T], indexes into the batch's rows."""
    offsets: torch.Tensor
    """int32[T], place of each token in its chunk."""
    sample_index: torch.Tensor
    """int64[R], the token whose logits each sampling row draws from."""


class Staging:
    """A ring of int32 buffers in host memory, each with its place on the device.

    `put` packs values into the current buffer and returns the device tensor in which they appear; they are
    there for all work queued after `flush`. On a CPU both memories are one and `flush` has nothing to copy.
    A buffer is used again after `num_buffers` steps: one more than may be in flight.
    """

    def __init__(self, device: torch.device, capacity: int, num_buffers: int) -> None:
        pinned = device.type != "cpu"
        self._host = [torch.empty(capacity, dtype=torch.int32, pin_memory=pinned) for _ in range(num_buffers)]
        self._device = [torch.empty_like(h, device=device) for h in self._host] if pinned else self._host
        self._arrays = [buffer.numpy() for buffer in self._host]
        self._current = 0
        self._used = 0

    def begin(self) -> None:
        """Start the next step's buffer."""
        self._current = (self._current + 1) % len(self._host)
        self._used = 0

    def put(self, values: Values) -> torch.Tensor:
        """int32[len(values)] on the device.

        Raises:
            StepError: the step is larger than a buffer.
        """
        start, end = self._used, self._used + len(values)
        array = self._arrays[self._current]
        if end > len(array):
            raise StepError(f"more than the {len(array)} numbers that a step may carry")
        array[start:end] = values
        self._used = end + (end & 1)  # 64-bit values are read in place, so everything starts at an even index
        return self._device[self._current][start:end]

    def put_long(self, values: Values) -> torch.Tensor:
        """int64[len(values)] on the device."""
        return self.put(np.asarray(values, dtype=np.int64).view(np.int32)).view(torch.int64)

    def put_matrix(self, values: np.ndarray) -> torch.Tensor:
        """int32 or float32 [n, m] on the device, as `values` is."""
        flat = self.put(np.ascontiguousarray(values).reshape(-1).view(np.int32))
        return (flat.view(torch.float32) if values.dtype == np.float32 else flat).view(values.shape)

    def flush(self) -> None:
        """Queue the copy of everything put since `begin`."""
        if self._device is not self._host:
            n, i = self._used, self._current
            self._device[i][:n].copy_(self._host[i][:n], non_blocking=True)


class _HostRows:
    """What the host knows of each slot; `biased` are slots whose bias columns are not clear."""

    def __init__(self, num_slots: int, biased: np.ndarray | None = None) -> None:
        self.used = np.zeros(num_slots, dtype=bool)
        self.biased = np.zeros(num_slots, dtype=bool) if biased is None else biased
        columns = np.zeros((5, num_slots), dtype=np.int64)
        self.num_tokens, self.num_computed, self.num_blocks, self.traits, self.num_logprobs = columns


class Stager:
    """Turns step messages into a `Diff` and a `Batch`, and follows the rows' counts."""

    def __init__(self, limits: Limits, device: torch.device, num_buffers: int) -> None:
        self._limits = limits
        row = limits.max_len + limits.table_len + MAX_STOP_IDS + 2 * MAX_BIAS + 32
        capacity = limits.max_slots * row + 8 * limits.max_batched_tokens + 4 * limits.num_blocks
        self._staging = Staging(device, capacity, num_buffers)
        self._rows = _HostRows(limits.max_slots)

    def clear(self) -> None:
        """Forget every row; the device's bias columns keep what they hold, so that is remembered."""
        self._rows = _HostRows(self._limits.max_slots, self._rows.biased)

    def stage(self, step: worker_pb2.Step) -> tuple[Diff, Batch]:
        """Check a step and pack it. The tensors hold good until the ring comes round.

        Raises:
            StepError: the step names a slot, block or length that does not fit.
        """
        self._staging.begin()
        diff = Diff()
        self._release(step.released_slots)
        if len(step.copy_src_blocks) or len(step.copy_dst_blocks):
            diff.copies = self._copies(step)
        parents: dict[int, int] = {}
        if len(step.new_rows):
            parents = {r.slot: r.parent_slot for r in step.new_rows if r.HasField("parent_slot")}
            diff.new_rows = self._new_rows(step.new_rows)
        if len(step.append_slots) or len(step.replace_slots):
            diff.table_entries = self._table_entries(step)
        batch = self._batch(step, parents)
        self._staging.flush()
        return diff, batch

    def _release(self, slots: Sequence[int]) -> None:
        for slot in slots:
            self._check_used(slot)
            self._rows.used[slot] = False

    def _copies(self, step: worker_pb2.Step) -> tuple[torch.Tensor, torch.Tensor]:
        src, dst = step.copy_src_blocks, step.copy_dst_blocks
        if len(src) != len(dst):
            raise StepError(f"{len(src)} blocks to copy to {len(dst)}")
        self._check_blocks(src)
        self._check_blocks(dst)
        return self._staging.put_long(src), self._staging.put_long(dst)

    def _new_rows(self, rows: Sequence[worker_pb2.NewRow]) -> NewRows:
        host, put = self._rows, self._staging.put
        slots, counters, columns, contents = [], [], [], []
        for row in rows:
            slot, fork = row.slot, row.HasField("parent_slot")
            if slot >= self._limits.max_slots or host.used[slot]:
                raise StepError(f"new row: slot {slot} is not free")
            try:
                column = row_columns(row.sampling)
            except ValueError as error:
                raise StepError(f"new row in slot {slot}: {error}") from error
            host.used[slot] = True
            host.traits[slot], host.num_logprobs[slot] = column.traits, column.num_logprobs
            if not fork:
                self._check_new_row(row)
                host.num_tokens[slot], host.num_computed[slot] = len(row.tokens), row.num_computed
                host.num_blocks[slot] = len(row.blocks)
                contents.append((slot, put(row.tokens), put(row.blocks)))
            slots.append(slot)
            columns.append(column)
            counters.append((len(row.tokens), row.num_prompt_tokens, row.num_computed, row.last_position))
        stop_ids = np.full((len(rows), MAX_STOP_IDS), -1, dtype=np.int32)
        for i, column in enumerate(columns):
            stop_ids[i, : len(column.stop_ids)] = column.stop_ids
        matrix = self._staging.put_matrix
        new_rows = NewRows(
            slots=self._staging.put_long(slots),
            counters=matrix(np.array(counters, dtype=np.int32)),
            integers=matrix(np.array([c.integers for c in columns], dtype=np.int32)),
            floats=matrix(np.array([c.floats for c in columns], dtype=np.float32)),
            seeds=self._staging.put_long(np.array([c.seed for c in columns], dtype=np.uint64).view(np.int64)),
            stop_ids=matrix(stop_ids),
            contents=contents,
        )
        new_rows.biases = self._biases(slots, columns)
        return new_rows

    def _biases(
        self, slots: list[int], columns: list[RowColumns]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """Biases are rare and wide: only rows that have them, or follow one that had, write them."""
        biased = self._rows.biased
        changed = [(s, c) for s, c in zip(slots, columns, strict=True) if biased[s] or c.traits & Trait.BIAS]
        if not changed:
            return None
        ids = np.full((len(changed), MAX_BIAS), -1, dtype=np.int32)
        values = np.zeros((len(changed), MAX_BIAS), dtype=np.float32)
        for i, (slot, column) in enumerate(changed):
            count = len(column.bias_ids)
            ids[i, :count], values[i, :count] = column.bias_ids, column.bias_values
            biased[slot] = count > 0
        matrix = self._staging.put_matrix
        return self._staging.put_long([slot for slot, _ in changed]), matrix(ids), matrix(values)

    def _table_entries(self, step: worker_pb2.Step) -> tuple[torch.Tensor, torch.Tensor]:
        width, host = self._limits.table_len, self._rows
        if len(step.append_slots) != len(step.append_blocks):
            raise StepError(f"{len(step.append_slots)} slots to append {len(step.append_blocks)} blocks to")
        if not len(step.replace_slots) == len(step.replace_indexes) == len(step.replace_blocks):
            raise StepError("the columns of replaced blocks differ in length")
        self._check_blocks(step.append_blocks)
        self._check_blocks(step.replace_blocks)
        places = []
        for slot in step.append_slots:
            self._check_used(slot)
            index = int(host.num_blocks[slot])
            if index >= width:
                raise StepError(f"slot {slot}: its block table is full")
            host.num_blocks[slot] = index + 1
            places.append(slot * width + index)
        for slot, index in zip(step.replace_slots, step.replace_indexes, strict=True):
            self._check_used(slot)
            if index >= host.num_blocks[slot]:
                raise StepError(f"slot {slot}: its block table has no entry {index}")
            places.append(slot * width + index)
        blocks = [*step.append_blocks, *step.replace_blocks]
        return self._staging.put_long(places), self._staging.put(blocks)

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
        host, put_long = self._rows, self._staging.put_long
        forked = lengths == 0
        forks = slots[forked]
        parent_of = np.array([parents[s] for s in forks.tolist()], dtype=np.int64)
        rows, chunk = slots[~forked], lengths[~forked]
        host.num_computed[rows] += chunk
        last_token = np.zeros(self._limits.max_slots, dtype=np.int64)
        last_token[rows] = np.cumsum(chunk) - 1
        ready = host.num_computed[parent_of] == host.num_tokens[parent_of]
        if not (ready & np.isin(parent_of, rows)).all():
            raise StepError("a fork's parent does not sample in this step")
        for counts in (host.num_tokens, host.num_computed, host.num_blocks, last_token):
            counts[forks] = counts[parent_of]
        sampling = slots[host.num_computed[slots] == host.num_tokens[slots]]
        batch = self._sampling_batch(step, int(chunk.sum()), rows, sampling)
        batch.chunks = self._chunks(chunk, last_token[sampling])
        if len(forks):
            batch.forks = put_long(forks), put_long(parent_of)
        host.num_tokens[sampling] += 1
        return batch

    def _decode_batch(self, step: worker_pb2.Step, slots: np.ndarray) -> Batch:
        """Every row takes one token; unless all sample from it, the batch is ragged after all."""
        host, m = self._rows, step.num_iterations
        left = host.num_tokens[slots] - host.num_computed[slots]
        if (left < 1).any():
            raise StepError(f"step {step.step_id}: a row has no token left to compute")
        samples = left == 1
        if all_sample := bool(samples.all()):
            batch = self._sampling_batch(step, len(slots), slots, slots)
        elif m == 1:
            batch = self._sampling_batch(step, len(slots), slots, slots[samples])
            batch.chunks = self._chunks(np.ones(len(slots), dtype=np.int64), np.flatnonzero(samples))
        else:
            raise StepError(f"step {step.step_id}: several iterations, and a row that does not sample")
        host.num_computed[slots] += m
        host.num_tokens[slots if all_sample else slots[samples]] += m
        return batch

    def _sampling_batch(
        self, step: worker_pb2.Step, num_tokens: int, rows: np.ndarray, sampling: np.ndarray
    ) -> Batch:
        host = self._rows
        slots = self._staging.put_long(rows)
        num_logprobs = host.num_logprobs[sampling].tolist()
        traits = int(np.bitwise_or.reduce(host.traits[sampling], initial=0))
        return Batch(
            num_iterations=step.num_iterations,
            num_tokens=num_tokens,
            slots=slots,
            sample_slots=slots if sampling is rows else self._staging.put_long(sampling),
            table_width=int(host.num_blocks[rows].max(initial=1)),
            features=features_of(traits, max(num_logprobs, default=-1)),
            num_logprobs=num_logprobs,
        )

    def _chunks(self, lengths: np.ndarray, sample_index: np.ndarray) -> Chunks:
        starts = np.cumsum(lengths) - lengths
        return Chunks(
            lengths=self._staging.put(lengths),
            query_start=self._staging.put(np.append(starts, lengths.sum())),
            row_of_token=self._staging.put(np.repeat(np.arange(len(lengths)), lengths)),
            offsets=self._staging.put(np.arange(lengths.sum()) - np.repeat(starts, lengths)),
            sample_index=self._staging.put_long(sample_index),
        )

    # ---------------------------------------------------------------------------------------- checks

    def _check_used(self, slot: int) -> None:
        if slot >= self._limits.max_slots or not self._rows.used[slot]:
            raise StepError(f"slot {slot} holds no row")

    def _check_blocks(self, blocks: Sequence[int]) -> None:
        if len(blocks) and max(blocks) >= self._limits.num_blocks:
            raise StepError(f"block {max(blocks)} does not exist: there are {self._limits.num_blocks}")

    def _check_new_row(self, row: worker_pb2.NewRow) -> None:
        limits, num_tokens, num_blocks = self._limits, len(row.tokens), len(row.blocks)
        fits = row.num_prompt_tokens <= num_tokens <= limits.max_len and num_blocks <= limits.table_len
        if not fits or row.num_computed >= num_tokens or row.last_position > limits.max_len:
            raise StepError(
                f"new row in slot {row.slot}: {num_tokens} tokens, {row.num_prompt_tokens} of the prompt, "
                f"{row.num_computed} computed, {num_blocks} blocks, last position {row.last_position}"
            )
        self._check_blocks(row.blocks)

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
