"""One worker group as the scheduler sees it: its blocks, rows, queue and steps in flight."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from scheduler_svc.core.blocks import BlockAllocator
from scheduler_svc.core.config import CoreConfig
from scheduler_svc.core.events import WorkerAttached
from scheduler_svc.core.group import Group
from scheduler_svc.core.prefix import PrefixIndex, extend_chain
from scheduler_svc.core.queue import WaitingQueue
from scheduler_svc.core.request import NEVER, NO_SLOT, Sequence
from scheduler_svc.core.rows import Rows


@dataclass(slots=True)
class Flight:
    """A step that has been sent and not been answered. `sampling` are its sampling rows' sequences."""

    step_id: int
    num_iterations: int
    sampling: list[Sequence]
    first: list[Sequence] = field(default_factory=list)  # whose token follows a prefill
    prompts: dict[int, tuple[Group, range]] = field(default_factory=dict)  # by row: tokens to report on
    searches: list[Group] = field(default_factory=list)  # that get candidates
    num_tokens: int = 0  # of one iteration
    only_decodes: bool = True
    num_swapped: int = 0  # blocks, out and in


class Move(NamedTuple):
    """How a beam's row goes on: from the row of `parent`, by `token`. `enters`: the slot has no row yet."""

    sequence: Sequence
    parent: int
    token: int
    enters: bool


# From so many tokens on a step's time goes by their number; of fewer each would take longer.
BUSY_TOKENS = 1024
# What a swap is taken to move before any was measured: 10 GB/s.
SWAP_BYTES_PER_US = 10_000


class Memory(NamedTuple):
    """What the block tables hold, each block counted once. Blocks unless the name says otherwise."""

    references: int  # entries of all block tables: what they would hold if none were shared
    held: int
    lookahead: int  # which hold no known token: for tokens that steps in flight are still to draw
    unused_slots: int  # token slots of held blocks without a known token's KV, look-ahead included


class Worker:
    """State of one attached worker group. It lives exactly as long as the worker's session."""

    def __init__(self, event: WorkerAttached, config: CoreConfig) -> None:
        self.name = event.worker
        self.epoch = event.epoch
        self.block_size = event.block_size
        self.max_model_len = event.max_model_len
        self.budget = min(config.max_batched_tokens, event.max_batched_tokens)
        # Every row must fit into one iteration, or the last rows would starve.
        slots = min(event.max_slots, self.budget, config.max_slots or event.max_slots)
        self.max_horizon = event.max_horizon
        self.depth = min(config.max_inflight, event.max_inflight)
        self.use_prefix = config.prefix_cache
        self.preemption_mode = config.preemption_mode
        self.watermark = max(1, int(config.watermark * event.num_blocks))
        self.index = PrefixIndex(event.num_blocks)
        self.allocator = BlockAllocator(event.num_blocks, self.index.forget)
        # Host blocks are held or free: none is kept, so none is evicted.
        self.host = BlockAllocator(event.num_host_blocks, self.index.forget)
        self.swap_outs: dict[int, int] = {}  # device block by host block, for the next plan
        self.rows = Rows(slots)
        self.queue = WaitingQueue(event.worker)
        self.running: dict[int, Group] = {}  # by key, in the order of admission
        self.prefilling: dict[int, Sequence] = {}  # by slot, in the order of admission
        self.gathering: dict[int, Group] = {}  # by key: groups whose followers have no row yet
        self.shared_tails: dict[int, Sequence] = {}  # by slot: rows whose last block may be shared
        self.released: list[int] = []  # slots that the next plan releases
        self.moves: dict[int, Move] = {}  # by slot: beams that go on, with the next plan
        self.inflight: deque[Flight] = deque()
        self.next_step = 0
        self.confirmed_step = -1
        self.iteration_us = 0.0  # moving average over steps of decodes
        self.token_us = 0.0  # the same for each token of steps that are long enough to tell
        self.least_token_us = 0.0  # of any step with prompts, for as long as there was none of those
        self.block_bytes = event.block_bytes
        self.block_us = event.block_bytes / SWAP_BYTES_PER_US  # moving average of swapping one block
        self.horizon = 1
        self.blocked = ""  # why the head of the queue is not admitted

    # --------------------------------------------------------------------------------------- times

    def took(self, flight: Flight, device_us: int, swap_us: int) -> None:
        """Learn from the time that a step took on the device, and its swaps of that."""
        if swap_us and flight.num_swapped:
            self.block_us = _average(self.block_us, swap_us / flight.num_swapped)
            device_us = max(0, device_us - swap_us)
        if flight.only_decodes:
            self.iteration_us = _average(self.iteration_us, device_us / flight.num_iterations)
        elif flight.num_tokens:
            token_us = device_us / flight.num_tokens
            self.least_token_us = min(token_us, self.least_token_us or token_us)
        if flight.num_tokens >= BUSY_TOKENS:
            self.token_us = _average(self.token_us, device_us / (flight.num_tokens * flight.num_iterations))

    def prompt_budget(self, num_decodes: int, stall_us: int) -> int:
        """Tokens of prompts that a step may hold beside so many decodes, such that it takes `stall_us`, but
        never so few that the device would not be busy. Without decodes nobody waits for the step; before any
        long step nobody knows its time.
        """
        budget = self.budget
        if num_decodes and stall_us and self.token_us:
            tokens = max(int(stall_us / self.token_us), BUSY_TOKENS, num_decodes + BUSY_TOKENS // 2)
            # In eighths of a power of two, about as workers pad batches: there one token more may cost many.
            eighth = 1 << tokens.bit_length() - 4
            budget = min(budget, tokens // eighth * eighth)
        return budget - num_decodes

    # ------------------------------------------------------------------------------ rows and blocks

    def place(self, sequence: Sequence, blocks: list[int], num_computed: int) -> None:
        """Start the row of `sequence`, which has a slot, on `blocks` that it holds already."""
        sequence.blocks = blocks
        self.rows.start(sequence, num_computed, len(blocks) * self.block_size)
        num_full = num_computed // self.block_size
        sequence.index_at = (num_full + 1) * self.block_size if self.use_prefix else NEVER
        if num_computed < sequence.group.num_to_prefill(sequence):
            self.prefilling[sequence.slot] = sequence

    def remove(self, sequence: Sequence) -> int:
        """Take `sequence` off the device; its blocks may be written by the next plan.

        Returns the step after whose result it may run again.
        """
        slot = sequence.slot
        last_step = int(self.rows.last_step[slot])
        self.prefilling.pop(slot, None)
        self.shared_tails.pop(slot, None)
        move = self.moves.pop(slot, None)
        # A follower that waits for its leader has no row on the device.
        if self.rows.last[slot] and not (move and move.enters):
            self.released.append(slot)
        self.rows.free(sequence)
        self.allocator.release(sequence.blocks)
        sequence.blocks = []
        sequence.index_at = NEVER
        return last_step

    def remove_group(self, group: Group) -> int:
        """Take every sample of `group` off the device; the step to wait for before it may run again."""
        group.followers = []
        steps = [self.remove(s) for s in group.samples if s.slot != NO_SLOT]
        self.running.pop(group.key, None)
        self.gathering.pop(group.key, None)
        return max(steps, default=-1)

    def fell_behind(self, sequence: Sequence) -> None:
        """The row of `sequence` sat iterations out, of which the step's answer has come: count anew what is
        computed and what the steps in flight will compute."""
        slot, rows = sequence.slot, self.rows
        coming = sum(f.num_iterations for f in self.inflight if any(s is sequence for s in f.sampling))
        rows.scheduled[slot] = min(len(sequence.tokens) - 1 + coming, int(rows.last[slot]))

    def append_blocks(self, sequence: Sequence, count: int) -> list[int]:
        """Add `count` new blocks to the table of `sequence`."""
        blocks = self.allocator.allocate(count)
        sequence.blocks.extend(blocks)
        self.rows.capacity[sequence.slot] += count * self.block_size
        return blocks

    # ----------------------------------------------------------------------------------------- beams

    def branch(self, sequence: Sequence, parent: Sequence) -> None:
        """Let `sequence`, a beam that ended, hold the blocks of `parent`."""
        self.allocator.release(sequence.blocks)
        self.allocator.share(parent.blocks)
        sequence.blocks, sequence.index_at = parent.blocks[:], parent.index_at

    def move(self, sequence: Sequence, parent: Sequence, token: int) -> None:
        """Let the row of `sequence`, which holds its parent's blocks, decode again, `token` first."""
        rows, slot, num_computed = self.rows, sequence.slot, len(parent.tokens)
        enters = not rows.last[slot]
        rows.start(sequence, num_computed, len(sequence.blocks) * self.block_size)
        rows.known[slot] = 0
        self.moves[slot] = Move(sequence, parent.slot, token, enters)
        self.shared_tails.pop(slot, None)
        if num_computed % self.block_size and self.allocator.ref_count(sequence.blocks[-1]) > 1:
            self.shared_tails[slot] = sequence

    def rest(self, sequence: Sequence) -> None:
        """Keep the slot of `sequence` for a beam to come."""
        self.allocator.release(sequence.blocks)
        sequence.blocks = []
        self.shared_tails.pop(sequence.slot, None)
        self.rows.scheduled[sequence.slot], self.rows.known[sequence.slot] = 0, NEVER

    # ----------------------------------------------------------------------------------- the prefix

    def hashes(self, sequence: Sequence) -> list[bytes]:
        """The chain over the confirmed tokens of `sequence`."""
        extend_chain(sequence.hashes, sequence.tokens, self.block_size, sequence.group.root)
        return sequence.hashes

    def hits(self, sequence: Sequence) -> list[int]:
        """Blocks of the prefix cache that `sequence` could start on; never over its last token, or the
        token before one whose logprob is to be delivered still: a token that is not computed reports nothing.
        """
        if not self.use_prefix:
            return []
        group, most = sequence.group, len(sequence.tokens) - 1
        if group.next_logprob < group.num_prompt:
            most = group.next_logprob - 1
        return self.index.match(self.hashes(sequence), most // self.block_size)

    def index_blocks(self, sequence: Sequence, num_tokens: int) -> None:
        """Index the full blocks of the first `num_tokens` tokens, which are known and computed."""
        if not self.use_prefix or sequence.slot == NO_SLOT:
            return
        done = sequence.index_at // self.block_size - 1
        num_full = num_tokens // self.block_size
        if num_full > done:
            hashes = self.hashes(sequence)
            for i in range(done, num_full):
                self.index.insert(hashes[i], sequence.blocks[i], self.allocator)
            sequence.index_at = (num_full + 1) * self.block_size

    def forget_content(self, sequence: Sequence) -> None:
        """The KV of `sequence` is not to be trusted: none of its blocks may be hit."""
        for block in sequence.blocks:
            self.index.forget(block)
            self.allocator.drop(block)

    # ---------------------------------------------------------------------------------- accounting

    def committed_blocks(self) -> int:
        """Blocks that rows in prefill, and followers that wait for them, will still ask for."""
        size, total = self.block_size, 0
        for sequence in self.prefilling.values():
            total += -(-len(sequence.tokens) // size) - len(sequence.blocks)
            group = sequence.group
            if group.followers:
                total += group.blocks_needed(size, [len(f.tokens) for f in group.followers])
                total -= group.num_prompt // size
        return total

    def memory(self) -> Memory:
        """What is held now and what of it is unused; O(rows), for only the ends of tables are looked at."""
        size, allocator = self.block_size, self.allocator
        references, lookahead, unused = 0, 0, 0.0
        for sequence in filter(None, self.rows.sequences):
            blocks = sequence.blocks
            references += len(blocks)
            known = min(int(self.rows.scheduled[sequence.slot]), len(sequence.tokens))
            for i in range(known // size, len(blocks)):
                # All holders of a block that is not full have filled it alike: each counts its part of it.
                unused += min(size, (i + 1) * size - known) / allocator.ref_count(blocks[i])
                lookahead += known <= i * size
        return Memory(references, allocator.num_blocks - allocator.num_free, lookahead, round(unused))

    def check_integrity(self) -> None:
        """Raises AssertionError unless reference counts, slots and rows agree."""
        refs = [0] * self.allocator.num_blocks
        used = 0
        for group in self.running.values():
            for sequence in group.samples:
                if sequence.slot == NO_SLOT:
                    assert not sequence.blocks, "a sequence without a slot holds blocks"
                    continue
                used += 1
                assert self.rows.sequences[sequence.slot] is sequence, "a slot holds another sequence"
                for block in sequence.blocks:
                    refs[block] += 1
        assert used + self.rows.num_free == self.rows.max_slots, "slots were lost"
        self.allocator.check_integrity(refs)

    def check_host(self, tables: Iterable[list[int]]) -> None:
        """Raises AssertionError unless `tables`, of all that is swapped out, account for every host block."""
        held = Counter(block for table in tables for block in table)
        self.host.check_integrity([held[block] for block in range(self.host.num_blocks)])


def _average(known: float, new: float) -> float:
    """The moving average after a new value; 0 stands for none before."""
    return known + (new - known) * (0.2 if known else 1.0)
