"""A device that the core can be run against without a wire: a plain model of what a worker must do.

It knows nothing of the scheduler. Every cell of every KV block remembers the tokens up to and including
the one whose KV it holds; a row that attends to a cell with another history fails the test. So wrong
block tables, early reuse, missing copies and false prefix hits are all seen.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np

from scheduler_svc.core.events import LogprobEntry, Plan, PromptLogprobs, RowEnd, StepDone, WorkerAttached
from tests.support.beam_reference import Logprobs

VOCAB = 50
STOP_ID = 7


@lru_cache(maxsize=1 << 14)
def logprobs_after(history: tuple[int, ...]) -> Logprobs:
    """What a search's model says after `history`; its outputs end now and then."""
    logits = np.random.default_rng(hash(history) % (1 << 63)).standard_normal(VOCAB) * 1.5
    logits[STOP_ID] += 1.0
    return logits - np.log(np.exp(logits).sum())


def next_token(history: tuple[int, ...], seed: int) -> int:
    """What the model says after `history`: any fixed function of the history and the seed."""
    return hash((history, seed)) % VOCAB


def expected_output(prompt: list[int], seed: int, max_tokens: int, stops: tuple[int, ...]) -> list[int]:
    """What a request must yield, computed with no engine at all."""
    tokens = list(prompt)
    for _ in range(max_tokens):
        tokens.append(next_token(tuple(tokens), seed))
        if tokens[-1] in stops:
            break
    return tokens[len(prompt) :]


def prompt_logprobs(prompt: list[int]) -> list[LogprobEntry]:
    """What the model says of a prompt's tokens after the first: entries that tell what stands before them."""
    return [
        LogprobEntry(-float(hash(tuple(prompt[: i + 1])) % 10_000), i, (), ()) for i in range(1, len(prompt))
    ]


@dataclass
class Row:
    """One device row."""

    tokens: list[int]
    num_computed: int
    blocks: list[int]
    last_position: int
    seed: int
    stops: tuple[int, ...]
    num_known: int
    num_told: int = 0
    """Tokens of the prompt, if their logprobs are wanted."""
    num_prompt: int = 0
    min_tokens: int = 0
    num_top: int | None = None
    is_beam: bool = False
    done: bool = False


@dataclass
class ModelDevice:
    """Executes plans at once; its answers are handed out when the test asks for them."""

    attached: WorkerAttached
    rows: dict[int, Row] = field(default_factory=dict)
    cells: dict[tuple[int, int], tuple[int, ...]] = field(default_factory=dict)
    host: dict[int, list[tuple[int, ...] | None]] = field(default_factory=dict)
    """What host blocks hold; a block that came back holds nothing any more."""
    next_step: int = 0
    swap_block_us: int = 10
    holds: random.Random | None = None
    """Lets rows that decode sit iterations out, as rows of grammars may."""
    batch: list[int] = field(default_factory=list)

    def run(self, plan: Plan) -> StepDone:
        """Apply `plan` in the order that the wire prescribes, checking every rule on the way."""
        assert plan.epoch == self.attached.epoch and plan.step_id == self.next_step
        self.next_step += 1
        counts = plan.num_tokens or [1] * len(plan.slots)
        assert len(counts) == len(plan.slots) == len(set(plan.slots))
        assert plan.slots or plan.new_rows, "a step without work"
        assert sum(counts) <= self.attached.max_batched_tokens
        assert 1 <= plan.num_iterations <= self.attached.max_horizon
        assert plan.num_iterations == 1 or not plan.num_tokens
        assert plan.num_iterations == 1 or not plan.beam_rows
        self._apply_diffs(plan)
        self.batch = plan.slots
        beams = {plan.slots[row] for row in plan.beam_rows}
        assert len(beams) == len(plan.beam_rows) == len(plan.beam_scores) == sum(plan.beam_counts)
        tokens: list[int] = []
        sampled: list[int] = []
        ended: dict[int, RowEnd] = {}
        prompts: list[PromptLogprobs] = []
        forks = {n.slot: n for n in plan.new_rows if n.parent_slot is not None}
        for place, (slot, count) in enumerate(zip(plan.slots, counts, strict=True)):
            row = self.rows[slot]
            told = prompt_logprobs(row.tokens[: row.num_told])[row.num_computed : row.num_computed + count]
            if told:
                prompts.append(PromptLogprobs(place, tuple(told)))
            row.is_beam = row.is_beam or slot in beams
            if slot in beams:
                assert count > 0 and row.num_computed + count == len(row.tokens), "not a beam's last token"
                self._compute(row, count)
                continue
            assert not row.is_beam or row.num_computed + count < len(row.tokens), "a beam draws"
            if slot in forks:
                parent = self.rows[forks[slot].parent_slot]
                row.tokens, row.blocks = parent.tokens[: forks[slot].num_prompt_tokens], list(parent.blocks)
                row.num_computed = row.num_known = len(row.tokens)
                drawn = self._sample(row, ended, len(sampled))
            else:
                iterations = plan.num_iterations
                if self.holds and row.num_computed >= row.num_known and count == 1:
                    iterations = self.holds.randint(0, iterations)
                drawn = self._forward(row, count, iterations, ended, len(sampled))
            if drawn is not None:
                tokens.extend(drawn)
                sampled.append(len(drawn))
        full = all(n == plan.num_iterations for n in sampled)
        return StepDone(
            worker=plan.worker, epoch=plan.epoch, step_id=plan.step_id, tokens=tokens,
            num_sampled=[] if full else sampled, ended_rows=list(ended),
            ended_reasons=[int(r) for r in ended.values()], device_us=1000 * plan.num_iterations,
            prompts=tuple(prompts), **self._candidates(plan),
            swap_us=self.swap_block_us * (len(plan.swap_out_host_blocks) + len(plan.swap_in_host_blocks)),
        )  # fmt: skip

    def _candidates(self, plan: Plan) -> dict[str, Any]:
        parents, tokens, scores = [], [], []
        tops: list[LogprobEntry] = []
        start = 0
        for count, width in zip(plan.beam_counts, plan.beam_widths, strict=True):
            places = range(start, start + count)
            start += count
            rows = [self.rows[plan.slots[plan.beam_rows[i]]] for i in places]
            assert 0 < count <= width and len({len(row.tokens) for row in rows}) == 1
            total = np.empty((count, VOCAB))
            for i, row in enumerate(rows):
                self._check_cells(row)
                raw = logprobs_after(tuple(row.tokens))
                total[i] = raw + plan.beam_scores[start - count + i]
                if len(row.tokens) - row.num_prompt < row.min_tokens:
                    total[i, list(row.stops)] = -np.inf
                if row.num_top is not None:
                    ids = np.argsort(-raw, kind="stable")[: row.num_top].tolist()
                    tops.append(LogprobEntry(0.0, 0, tuple(ids), tuple(raw[ids].tolist())))
            going = total.copy()
            going[:, list(rows[0].stops)] = -np.inf
            for values in (total, going):
                order = np.argsort(-values, axis=None, kind="stable")[:width]
                parents += (order // VOCAB).tolist()
                tokens += (order % VOCAB).tolist()
                scores += values.reshape(-1)[order].tolist()
        columns = {"beam_parents": parents, "beam_tokens": tokens, "beam_scores": scores}
        return columns | {"beam_tops": tuple(tops)}

    def _apply_diffs(self, plan: Plan) -> None:
        self._swap_out(plan)
        for slot in plan.released_slots:
            del self.rows[slot]
        assert not set(plan.copy_src_blocks) & set(plan.copy_dst_blocks), "a block is source and destination"
        for source, target in zip(plan.copy_src_blocks, plan.copy_dst_blocks, strict=True):
            for i in range(self.attached.block_size):
                self.cells.pop((target, i), None)
                if (source, i) in self.cells:
                    self.cells[target, i] = self.cells[source, i]
        self._swap_in(plan)
        for new in plan.new_rows:
            assert new.slot not in self.rows, "a row was put into a slot that is taken"
            self.rows[new.slot] = Row(
                list(new.tokens), new.num_computed, list(new.blocks), new.last_position,
                new.sampling.seed, new.sampling.stop_token_ids, len(new.tokens),
                0 if new.sampling.num_prompt_logprobs is None else new.num_prompt_tokens,
                new.num_prompt_tokens, new.sampling.min_tokens, new.sampling.num_logprobs,
            )  # fmt: skip
        self._move(plan)
        for slot, block in zip(plan.append_slots, plan.append_blocks, strict=True):
            self.rows[slot].blocks.append(block)
        for slot, i, block in zip(plan.replace_slots, plan.replace_indexes, plan.replace_blocks, strict=True):
            self.rows[slot].blocks[i] = block

    def _swap_out(self, plan: Plan) -> None:
        targets = plan.swap_out_host_blocks
        assert len(set(targets)) == len(targets), "a host block is a destination twice"
        size = self.attached.block_size
        for source, target in zip(plan.swap_out_device_blocks, targets, strict=True):
            assert 0 <= target < self.attached.num_host_blocks, "no such host block"
            self.host[target] = [self.cells.get((source, i)) for i in range(size)]
            assert self.host[target][0] is not None, "a block that was never written goes to host memory"

    def _swap_in(self, plan: Plan) -> None:
        """Whoever attends to a block with what another group left in its host block will notice."""
        targets = plan.swap_in_device_blocks
        assert len(set(targets)) == len(targets), "a block is a destination twice"
        for source, target in zip(plan.swap_in_host_blocks, targets, strict=True):
            for i, cell in enumerate(self.host[source]):
                self.cells.pop((target, i), None)
                if cell is not None:
                    self.cells[target, i] = cell
        for source in plan.swap_in_host_blocks:
            self.host.pop(source, None)  # the last block of several rows comes back several times

    def _move(self, plan: Plan) -> None:
        before = {slot: self.rows[slot] for slot in plan.beam_parent_slots}
        assert len(set(plan.beam_slots)) == len(plan.beam_slots), "a beam moves twice"
        moved = {}
        for slot, parent, token in zip(
            plan.beam_slots, plan.beam_parent_slots, plan.beam_tokens, strict=True
        ):
            old, row = before[parent], self.rows[slot]
            assert old.num_computed == len(old.tokens), "a beam goes on before its last token is computed"
            moved[slot] = replace(
                row, tokens=[*old.tokens, token], num_computed=old.num_computed, blocks=list(old.blocks),
                num_prompt=old.num_prompt, is_beam=True,
            )  # fmt: skip
        self.rows |= moved

    def _forward(
        self, row: Row, count: int, iterations: int, ended: dict[int, RowEnd], index: int
    ) -> list[int] | None:
        drawn: list[int] = []
        for _ in range(iterations):
            if row.done:
                break
            self._compute(row, count)
            if row.num_computed < len(row.tokens):
                return None
            drawn += self._sample(row, ended, index)
        return drawn

    def _compute(self, row: Row, count: int) -> None:
        assert row.num_computed + count <= len(row.tokens), "more tokens scheduled than the row has"
        for position in range(row.num_computed, row.num_computed + count):
            self._write(row, position)
        row.num_computed += count

    def _write(self, row: Row, position: int) -> None:
        size = self.attached.block_size
        block = row.blocks[position // size]
        # A beam outside the batch may be one that ended, whose row keeps what it had until another takes it.
        holders = [
            r
            for slot, r in self.rows.items()
            if block in r.blocks and not r.done and (not r.is_beam or slot in self.batch)
        ]
        assert len(holders) <= 1, "a block that others hold was written"
        self.cells[block, position % size] = tuple(row.tokens[: position + 1])

    def _check_cells(self, row: Row) -> None:
        size = self.attached.block_size
        for position in range(row.num_computed):
            cell = self.cells.get((row.blocks[position // size], position % size))
            assert cell == tuple(row.tokens[: position + 1]), "the row attends to foreign KV"

    def _sample(self, row: Row, ended: dict[int, RowEnd], index: int) -> list[int]:
        self._check_cells(row)
        row.tokens.append(next_token(tuple(row.tokens), row.seed))
        if row.tokens[-1] in row.stops:
            row.done, ended[index] = True, RowEnd.STOP
        elif len(row.tokens) == row.last_position:
            row.done, ended[index] = True, RowEnd.LENGTH
        return row.tokens[-1:]
