"""A simulated worker: the real wire, a device that keeps time but multiplies nothing.

`SimDevice` does what a worker must do with a step, and fails on everything that a scheduler must not ask
for. Every cell of every KV block remembers (as a hash) the tokens up to and including the one whose KV it
holds, so that a wrong block table, an early reuse, a missing copy or a false prefix hit is seen at once.
`SimExecutor` runs steps on it at a fixed time an iteration and measures how long the device had nothing
to do. `python -m tests.support.sim_worker --help` runs one as a process, behind the real `HubClient`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import queue
import signal
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import FrameType

import numpy as np
import numpy.typing as npt

from gpu_worker.hub_client import HubClient
from gpu_worker.metrics import WorkerMetrics
from pagoda import logs
from pagoda.internal.v1 import worker_pb2 as wire
from pagoda.v1 import scheduler_pb2

ROOT = 1  # the hash of an empty prefix
GARBAGE = -1  # what a row that is done leaves behind where it is still in a batch
NUM_TOP = 20


def extend(prefix: int, token: int) -> int:
    """The hash of a prefix with one more token."""
    return hash((prefix, token))


def draw(prefix: int, seed: int, vocab_size: int, banned: Sequence[int] = ()) -> int:
    """What the model says after a prefix: any fixed function of prefix and seed."""
    token = hash((prefix, seed)) % vocab_size
    while token in banned:
        token = (token + 1) % vocab_size
    return token


def beam_logprobs(prefix: int, vocab_size: int) -> npt.NDArray[np.float64]:
    """What the model says to a search after a prefix."""
    return -np.random.default_rng(prefix % 2**63).standard_exponential(vocab_size)


def expected_output(
    prompt: Sequence[int],
    seed: int,
    max_tokens: int,
    vocab_size: int,
    stops: Sequence[int] = (),
    min_tokens: int = 0,
) -> list[int]:
    """What a request must yield, computed with no engine at all."""
    prefix = ROOT
    for token in prompt:
        prefix = extend(prefix, token)
    output: list[int] = []
    while len(output) < max_tokens and not (output and output[-1] in stops):
        output.append(draw(prefix, seed, vocab_size, stops if len(output) < min_tokens else ()))
        prefix = extend(prefix, output[-1])
    return output


class RuleBroken(AssertionError):
    """The scheduler asked for something that the protocol forbids."""


def check(holds: bool, rule: str) -> None:
    """Raises RuleBroken with `rule` unless it holds."""
    if not holds:
        raise RuleBroken(rule)


@dataclass
class Row:
    """One device row. `prefixes[p]` is the hash of its first p tokens."""

    tokens: list[int]
    prefixes: list[int]
    num_prompt: int
    num_computed: int
    blocks: list[int]
    last_position: int
    sampling: wire.RowSampling
    stops: frozenset[int]
    done: bool = False
    is_beam: bool = False
    checked: int = 0  # leading positions whose cells have been compared

    def add(self, token: int) -> None:
        """Append a token."""
        self.tokens.append(token)
        self.prefixes.append(extend(self.prefixes[-1], token))


@dataclass
class SimDevice:
    """Rows and blocks. `strict` compares every cell that a row attends to, every time."""

    num_blocks: int
    block_size: int
    max_slots: int
    vocab_size: int
    max_batched_tokens: int
    max_horizon: int
    strict: bool = True
    epoch: int = 0
    next_step: int = 0
    rows: dict[int, Row] = field(default_factory=dict)
    cells: dict[int, list[int | None]] = field(default_factory=dict)
    holders: Counter[int] = field(default_factory=Counter)

    def reset(self, epoch: int) -> None:
        """Forget all rows and contents, as a worker does when its stream ends."""
        self.epoch, self.next_step = epoch, 0
        self.rows.clear()
        self.cells.clear()
        self.holders.clear()

    def run(self, step: wire.Step) -> wire.StepResult:
        """Apply a step in the order of the wire and say what came of it."""
        check(step.epoch == self.epoch, f"a step of epoch {step.epoch} in epoch {self.epoch}")
        check(step.step_id == self.next_step, f"step {step.step_id} came, {self.next_step} was next")
        self.next_step += 1
        counts = list(step.num_tokens) or [1] * len(step.slots)
        check(len(step.slots) == len(counts) == len(set(step.slots)), "the batch's columns are wrong")
        check(bool(step.slots or step.new_rows), "a step without work")
        check(step.num_iterations == 1 or not step.beam_rows, "a horizon with a search")
        check(sum(counts) <= self.max_batched_tokens, "the token budget is overrun")
        check(1 <= step.num_iterations <= self.max_horizon, "the horizon is out of range")
        check(step.num_iterations == 1 or not step.num_tokens, "a horizon with a chunk or a fork")
        forks = self._apply_diffs(step)
        result = wire.StepResult(epoch=step.epoch, step_id=step.step_id)
        sampled: list[int] = []
        beams = {step.slots[row] for row in step.beam_rows}
        for place, (slot, count) in enumerate(zip(step.slots, counts, strict=True)):
            row = self.rows[slot]
            if row.sampling.HasField("num_prompt_logprobs"):
                self._report(row, count, result, place)
            if slot in beams:
                check(row.num_computed + count == len(row.tokens), "a search before its beam's last token")
                self._compute(row, count)
                continue
            check(not row.is_beam, "a beam draws")
            if slot in forks:
                self._fork(row, self.rows[forks[slot]])
                drawn = self._sample(row, result, len(sampled))
            else:
                check(count > 0, "a row without tokens that is no fork")
                drawn = self._forward(row, count, step.num_iterations, result, len(sampled))
            if drawn is not None:
                result.tokens.extend(drawn)
                sampled.append(len(drawn))
        if any(n != step.num_iterations for n in sampled):
            result.num_sampled.extend(sampled)
        self._candidates(step, result)
        return result

    def _candidates(self, step: wire.Step, result: wire.StepResult) -> None:
        start = 0
        for count, width in zip(step.beam_counts, step.beam_widths, strict=True):
            places, start = range(start, start + count), start + count
            rows = [self.rows[step.slots[step.beam_rows[i]]] for i in places]
            total = np.stack([beam_logprobs(row.prefixes[-1], self.vocab_size) for row in rows])
            total += np.array([step.beam_scores[i] for i in places])[:, None]
            stops = list(rows[0].stops)
            if len(rows[0].tokens) - rows[0].num_prompt < rows[0].sampling.min_tokens:
                total[:, stops] = -np.inf
            for ruled_out in ([], stops):
                total[:, ruled_out] = -np.inf
                order = np.argsort(-total, axis=None, kind="stable")[:width]
                result.beam_parents.extend((order // self.vocab_size).tolist())
                result.beam_tokens.extend((order % self.vocab_size).tolist())
                result.beam_scores.extend(total.reshape(-1)[order].tolist())
            for row in rows:
                if row.sampling.HasField("num_logprobs"):
                    number, last = row.sampling.num_logprobs, row.tokens[-1]
                    _add_tops(result.beam_logprobs, last, number, self.vocab_size)
        check(start == len(step.beam_rows) == len(step.beam_scores), "the columns of searches differ")

    # ---------------------------------------------------------------------------------------- diffs

    def _apply_diffs(self, step: wire.Step) -> dict[int, int]:
        """Everything before the forward; the forks of this step, by slot, with their parents."""
        for slot in step.released_slots:
            check(slot in self.rows, f"slot {slot} is released and holds nothing")
            self._let_go(self.rows.pop(slot))
        # A beam that moves lets go of what it has: its blocks may be among those that are copied over.
        going = {slot: self.rows[slot] for slot in step.beam_slots if slot in self.rows}
        for row in going.values():
            self._let_go(row)
        sources, targets = list(step.copy_src_blocks), list(step.copy_dst_blocks)
        check(len(sources) == len(targets), "the copies are not pairs")
        check(not set(sources) & set(targets), "a block is a source and a destination")
        check(len(set(targets)) == len(targets), "a block is a destination twice")
        for source, target in zip(sources, targets, strict=True):
            check(not self.holders[target], f"block {target} is held and copied over")
            self.cells[target] = list(self._block(source))
        forks = {}
        for new in step.new_rows:
            check(new.slot < self.max_slots and new.slot not in self.rows, f"slot {new.slot} is not free")
            if new.HasField("parent_slot"):
                check(not (new.tokens or new.blocks or new.num_computed), "a fork brings what it inherits")
                forks[new.slot] = new.parent_slot
            self.rows[new.slot] = self._new_row(new)
        self._move(step)
        for slot, block in zip(step.append_slots, step.append_blocks, strict=True):
            self._hold([block])
            self.rows[slot].blocks.append(block)
        replaced = zip(step.replace_slots, step.replace_indexes, step.replace_blocks, strict=True)
        for slot, index, block in replaced:
            self._hold([block])
            self.holders[self.rows[slot].blocks[index]] -= 1
            self.rows[slot].blocks[index] = block
        check(all(fork in step.slots for fork in forks), "a fork is not in the batch of its step")
        return forks

    def _new_row(self, new: wire.NewRow) -> Row:
        row = Row(
            [], [ROOT], new.num_prompt_tokens, new.num_computed, list(new.blocks), new.last_position,
            new.sampling, frozenset(new.sampling.stop_token_ids),
        )  # fmt: skip
        for token in new.tokens:
            check(token < self.vocab_size, f"token {token} is out of range")
            row.add(token)
        self._hold(row.blocks)
        if not new.HasField("parent_slot"):
            check(0 < row.num_prompt <= len(row.tokens) < row.last_position, "a row's lengths contradict")
            check(row.num_computed < len(row.tokens), "a row's last token is said to be computed")
            self._check_cells(row, row.num_computed)
        return row

    def _move(self, step: wire.Step) -> None:
        """Beams go on from where they, or others, were before."""
        before = {slot: self.rows[slot] for slot in step.beam_parent_slots}
        check(len(set(step.beam_slots)) == len(step.beam_slots), "a beam moves twice")
        moved = {}
        columns = step.beam_slots, step.beam_parent_slots, step.beam_tokens
        for slot, parent, token in zip(*columns, strict=True):
            old = before[parent]
            check(old.num_computed == len(old.tokens), "a beam goes on whose last token is not computed")
            moved[slot] = replace(
                self.rows[slot], tokens=[*old.tokens], prefixes=[*old.prefixes], blocks=[*old.blocks],
                num_prompt=old.num_prompt, num_computed=old.num_computed, is_beam=True, checked=0,
            )  # fmt: skip
            moved[slot].add(token)
            self._hold(old.blocks)
        self.rows |= moved

    def _let_go(self, row: Row) -> None:
        for block in row.blocks:
            self.holders[block] -= 1

    def _fork(self, row: Row, parent: Row) -> None:
        check(parent.num_computed == parent.num_prompt == row.num_prompt, "a fork from a partial prompt")
        row.tokens, row.prefixes = parent.tokens[: row.num_prompt], parent.prefixes[: row.num_prompt + 1]
        row.blocks, row.num_computed = list(parent.blocks), row.num_prompt
        self._hold(row.blocks)

    def _hold(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            check(block < self.num_blocks, f"block {block} is out of range")
            self.holders[block] += 1

    def _block(self, block: int) -> list[int | None]:
        return self.cells.setdefault(block, [None] * self.block_size)

    # -------------------------------------------------------------------------------------- forward

    def _forward(
        self, row: Row, count: int, iterations: int, result: wire.StepResult, index: int
    ) -> list[int] | None:
        """The tokens that the row gains; None while its prompt is not complete."""
        if row.done:
            self._leave_garbage(row)
            return []
        drawn: list[int] = []
        for _ in range(iterations):
            end = row.num_computed + count
            self._compute(row, count)
            if end < len(row.tokens):
                return None
            drawn += self._sample(row, result, index)
            if row.done:
                break
        return drawn

    def _compute(self, row: Row, count: int) -> None:
        end = row.num_computed + count
        check(end <= len(row.tokens), "more tokens are scheduled than the row has")
        for position in range(row.num_computed, end):
            self._write(row, position)
        row.num_computed = end
        if end == len(row.tokens):
            self._check_cells(row, end)

    def _report(self, row: Row, count: int, result: wire.StepResult, place: int) -> None:
        """Logprobs of the prompt's tokens behind those of a chunk."""
        told = row.tokens[row.num_computed + 1 : min(row.num_computed + count + 1, row.num_prompt)]
        if told:
            result.prompt_rows.append(place)
            result.num_prompt_logprobs.append(len(told))
        for token in told:
            number = row.sampling.num_prompt_logprobs
            _add_logprobs(result.prompt_logprobs, token, number, self.vocab_size)

    def _write(self, row: Row, position: int) -> None:
        index, offset = divmod(position, self.block_size)
        check(index < len(row.blocks), f"position {position} is not covered by the row's block table")
        block = row.blocks[index]
        check(self.holders[block] == 1, f"block {block} is written and others hold it")
        self._block(block)[offset] = row.prefixes[position + 1]

    def _leave_garbage(self, row: Row) -> None:
        """Overwrite the cell that a row which is done would have written, if it has one."""
        index, offset = divmod(row.num_computed, self.block_size)
        if index < len(row.blocks) and self.holders[row.blocks[index]] == 1:
            self._block(row.blocks[index])[offset] = GARBAGE

    def _check_cells(self, row: Row, num_positions: int) -> None:
        start = 0 if self.strict else row.checked
        for position in range(start, num_positions):
            index, offset = divmod(position, self.block_size)
            check(index < len(row.blocks), f"position {position} is not covered by the row's block table")
            found = self._block(row.blocks[index])[offset]
            check(found == row.prefixes[position + 1], f"position {position} of a row holds foreign KV")
        row.checked = num_positions

    def _sample(self, row: Row, result: wire.StepResult, index: int) -> list[int]:
        early = len(row.tokens) - row.num_prompt < row.sampling.min_tokens
        banned = tuple(row.stops) if early else ()
        token = draw(row.prefixes[-1], row.sampling.seed, self.vocab_size, banned)
        row.add(token)
        if row.sampling.HasField("num_logprobs"):
            _add_logprobs(result.logprobs, token, row.sampling.num_logprobs, self.vocab_size)
        reason = None
        if token in row.stops:
            reason = wire.ROW_END_STOP
        elif len(row.tokens) == row.last_position:
            reason = wire.ROW_END_LENGTH
        if reason is not None:
            row.done = True
            result.ended_rows.append(index)
            result.ended_reasons.append(reason)
        return [token]


def _add_logprobs(columns: wire.LogprobColumns, token: int, count: int, vocab_size: int) -> None:
    """Logprobs that a test can tell from the token: -token/vocab, and the next ids as alternatives."""
    columns.token_logprobs.append(-token / vocab_size)
    columns.ranks.append(1)
    _add_tops(columns, token, count, vocab_size)


def _add_tops(columns: wire.LogprobColumns, token: int, count: int, vocab_size: int) -> None:
    columns.num_top.append(count)
    columns.top_ids.extend((token + i) % vocab_size for i in range(count))
    columns.top_logprobs.extend(-token / vocab_size - i for i in range(count))


# --------------------------------------------------------------------------------------------- time


@dataclass
class StepTimes:
    """When a step reached the worker's queue, and when the device began and ended it."""

    step_id: int
    queued: float
    began: float
    ended: float
    num_rows: int


@dataclass
class _Reset:
    epoch: int
    done: threading.Event


class SimExecutor:
    """Runs steps on a `SimDevice` in a thread, `iteration_s` each, as `hub_client.Executor` wants it.

    The device is free-running, as a GPU is: a step that was queued in time begins the moment the one before
    it ends, however late this thread wakes up.
    """

    def __init__(
        self,
        device: SimDevice,
        iteration_s: float,
        deliver: Callable[[wire.StepResult], None],
        fail: Callable[[BaseException, bool], None],
    ) -> None:
        self._device = device
        self._iteration_s = iteration_s
        self._deliver, self._fail = deliver, fail
        self._queue: queue.SimpleQueue[tuple[float, wire.Step] | _Reset] = queue.SimpleQueue()
        self.times: list[StepTimes] = []
        self.broken: list[str] = []
        self.learned: list[scheduler_pb2.Vocabulary] = []
        self.constrained: list[tuple[wire.NewRow, int]] = []  # with the number of vocabularies by then
        threading.Thread(target=self._run, name="sim", daemon=True).start()

    def reset(self, epoch: int) -> None:
        """Drop what is queued, forget all rows, and go on in `epoch`."""
        reset = _Reset(epoch, threading.Event())
        self._queue.put(reset)
        reset.done.wait()

    def submit(self, step: wire.Step) -> None:
        """Queue a step."""
        self._queue.put((time.perf_counter(), step))
        self.constrained += [(row, len(self.learned)) for row in step.new_rows if row.sampling.grammar]

    def learn(self, vocabulary: scheduler_pb2.Vocabulary) -> None:
        """What is drawn here follows no grammar; that it came is noted."""
        self.learned.append(vocabulary)

    def _run(self) -> None:
        free_at = 0.0
        while True:
            item = self._queue.get()
            if isinstance(item, _Reset):
                self._device.reset(item.epoch)
                item.done.set()
                continue
            queued, step = item
            if step.epoch != self._device.epoch:
                continue
            try:
                result = self._device.run(step)
            except Exception as error:
                self.broken.append(f"{type(error).__name__}: {error}")
                self._fail(error, True)
                continue
            began = max(queued, free_at)
            result.idle_us = int(1e6 * (began - free_at)) if free_at else 0
            free_at = began + self._iteration_s * step.num_iterations
            result.device_us = int(1e6 * (free_at - began))
            self.times.append(StepTimes(step.step_id, queued, began, free_at, len(step.slots)))
            time.sleep(max(0.0, free_at - time.perf_counter()))
            self._deliver(result)


def idle_times(times: Sequence[StepTimes], num_rows: int = 1) -> list[float]:
    """Seconds between the end of a step and the beginning of the next, where both have so many rows."""
    return [
        after.began - before.ended
        for before, after in itertools.pairwise(times)
        if after.step_id == before.step_id + 1 and min(before.num_rows, after.num_rows) >= num_rows
    ]


def share_queued_ahead(times: Sequence[StepTimes], num_rows: int = 1) -> float:
    """The share of steps that were in the worker's queue before the step before them ended."""
    ahead = [
        after.queued <= before.ended
        for before, after in itertools.pairwise(times)
        if after.step_id == before.step_id + 1 and min(before.num_rows, after.num_rows) >= num_rows
    ]
    return sum(ahead) / len(ahead) if ahead else 0.0


# ------------------------------------------------------------------------------------------ process


def hello_for(device: SimDevice, group: str = "w0", **changes: object) -> wire.Hello:
    """What a worker with this device says of itself."""
    fields: dict[str, object] = {
        "protocol_min": 1, "protocol_max": 1, "model_name": "simulated", "model_digest": "sim-1",
        "group_name": group, "incarnation": uuid.uuid4().hex, "rank": 0, "world_size": 1,
        "vocab_size": device.vocab_size, "max_model_len": 4096, "block_size": device.block_size,
        "block_bytes": 4096, "num_device_blocks": device.num_blocks, "num_host_blocks": 0,
        "max_slots": device.max_slots, "max_batched_tokens": device.max_batched_tokens,
        "max_horizon": device.max_horizon, "device": "simulated", "dtype": "none",
        "eos_token_ids": [2], "max_stop_ids": 16,
    }  # fmt: skip
    return wire.Hello(**{**fields, **changes})


def main() -> None:
    """Attach a simulated worker to a scheduler until SIGTERM; write what was measured."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--scheduler", required=True)
    parser.add_argument("--group", default="w0")
    parser.add_argument("--model-name", default="simulated")
    parser.add_argument("--token", default="")
    parser.add_argument("--iteration-ms", type=float, default=8.0)
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--blocks", type=int, default=4096)
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--max-horizon", type=int, default=16)
    parser.add_argument("--max-model-len", type=int, default=4096)
    parser.add_argument("--lenient", action="store_true", help="compare each KV cell only once")
    parser.add_argument("--report", type=Path, help="where to write the times, as JSON")
    given = parser.parse_args()
    log = logs.setup("sim_worker")
    device = SimDevice(
        given.blocks, given.block_size, given.slots, given.vocab, max_batched_tokens=8192,
        max_horizon=given.max_horizon, strict=not given.lenient,
    )  # fmt: skip
    hello = hello_for(device, given.group, model_name=given.model_name, max_model_len=given.max_model_len)
    client = HubClient(given.scheduler, hello, given.token, WorkerMetrics("simulated", given.group), log)
    executor = SimExecutor(device, given.iteration_ms / 1000, client.deliver, client.fail)

    def stop(_number: int, _frame: FrameType | None) -> None:
        client.stop()

    signal.signal(signal.SIGTERM, stop)
    code = client.run(executor)
    if given.report:
        report = {"broken": executor.broken, "times": [asdict(times) for times in executor.times]}
        given.report.write_text(json.dumps(report))
    sys.exit(code)


if __name__ == "__main__":
    main()
