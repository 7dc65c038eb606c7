"""The policy of one step: who runs, on which blocks, for how many iterations.

Read `make_plan` from top to bottom. Decodes come first, so that a long prompt never stalls a stream;
prompts in prefill share what is left of the token budget, less while streams would wait for them too long;
then the queue is admitted in order. Only when a step holds nothing but decodes may it look further ahead
than one iteration.
"""

from __future__ import annotations

import numpy as np

from scheduler_svc.core.config import CoreConfig
from scheduler_svc.core.events import NewRow, Plan
from scheduler_svc.core.group import Group, State
from scheduler_svc.core.request import NEVER, Sequence
from scheduler_svc.core.room import lacking, make_room, soon_lacking
from scheduler_svc.core.rows import Column
from scheduler_svc.core.stats import Stats
from scheduler_svc.core.swap import blocks_to_resume, most_blocks, swap_in
from scheduler_svc.core.worker import Flight, Worker


def make_plan(worker: Worker, config: CoreConfig, stats: Stats, now: float) -> Plan | None:
    """The next step of `worker`; None when its window is full or nothing can run."""
    if len(worker.inflight) >= worker.depth:
        return None
    decodes = make_room(worker, stats, now)
    if decodes is None:
        return None
    if not (decodes.size or worker.prefilling or worker.gathering or worker.queue):
        worker.blocked = ""
        return None
    if worker.inflight and decodes.size and worker.rows.is_beam[decodes].all():
        return None  # searches that wait for each other share steps from then on
    step = _Step(worker, stats, now, decodes, worker.prompt_budget(len(decodes), config.stall_us))
    if decodes.size:
        step.decode(1)
    step.continue_prefills()
    step.start_followers()
    step.admit()
    if not (step.plan.slots or step.plan.new_rows):
        return None
    if step.flight.only_decodes and not (worker.prefilling or step.flight.searches):
        step.look_ahead(config.horizon_us)
    return step.finish()


class _Step:
    """One plan in the making, and the record of it that its answer is read through."""

    def __init__(self, worker: Worker, stats: Stats, now: float, decodes: Column, budget: int) -> None:
        """`budget`: how many tokens of prompts there may be beside the decodes."""
        self.worker = worker
        self.stats = stats
        self.now = now
        self.decodes = decodes
        self.budget = budget
        step_id = worker.next_step
        self.plan = Plan(worker.name, worker.epoch, step_id, 1, slots=decodes.tolist())
        self.flight = Flight(step_id, 1, [])
        self.chunks: list[Sequence] = []
        sequences = worker.rows.sequences
        for slot in self.plan.slots:
            sequence = sequences[slot]
            assert sequence is not None
            self.flight.sampling.append(sequence)
        self.decoding = self.flight.sampling
        is_beam = worker.rows.is_beam[decodes]
        if is_beam.any():
            self._searches(is_beam.tolist())

    # --------------------------------------------------------------------------------------- decodes

    def decode(self, iterations: int) -> None:
        """Give every decoding row blocks for its next `iterations` tokens and count them as scheduled."""
        worker, plan = self.worker, self.plan
        if worker.shared_tails:
            self._copy_tails()
        lacks = lacking(worker, self.decodes, iterations)
        for i in np.flatnonzero(lacks).tolist():
            sequence = self.decoding[i]
            for block in worker.append_blocks(sequence, int(lacks[i])):
                plan.append_slots.append(sequence.slot)
                plan.append_blocks.append(block)

    def _copy_tails(self) -> None:
        """Copy-on-write: a row about to write into a block that others hold gets its own copy."""
        worker, plan = self.worker, self.plan
        for slot, sequence in list(worker.shared_tails.items()):
            if worker.rows.scheduled[slot] >= worker.rows.last[slot]:
                continue
            del worker.shared_tails[slot]
            shared = sequence.blocks[-1]
            if worker.allocator.ref_count(shared) == 1:
                continue
            (own,) = worker.allocator.allocate(1)
            worker.allocator.release([shared])
            sequence.blocks[-1] = own
            plan.copy_src_blocks.append(shared)
            plan.copy_dst_blocks.append(own)
            plan.replace_slots.append(slot)
            plan.replace_indexes.append(len(sequence.blocks) - 1)
            plan.replace_blocks.append(own)

    def _searches(self, is_beam: list[bool]) -> None:
        """Beams among the decodes draw nothing: their searches get candidates."""
        pairs = list(zip(self.decoding, is_beam, strict=True))
        self.flight.sampling = [sequence for sequence, beam in pairs if not beam]
        places = {slot: i for i, slot in enumerate(self.plan.slots)}
        groups = {s.group.key: (s.group.search.shape, s.group) for s, _ in pairs if s.group.search}
        for _, group in sorted(groups.values(), key=lambda entry: entry[0]):
            self._search(group, places)

    def _search(self, group: Group, places: dict[int, int]) -> None:
        """Let a search have candidates in this step, for beams at these places of the batch, by slot."""
        plan, search = self.plan, group.search
        assert search is not None
        for beam in search.beams:
            plan.beam_rows.append(places[beam.sequence.slot])
            plan.beam_scores.append(beam.score)
            self.worker.rows.known[beam.sequence.slot] = NEVER
        plan.beam_counts.append(len(search.beams))
        plan.beam_widths.append(search.width)
        self.flight.searches.append(group)

    def look_ahead(self, horizon_us: int) -> None:
        """Choose the horizon m, so that one message covers about `horizon_us` of device time."""
        worker, rows = self.worker, self.worker.rows
        if not horizon_us or not worker.iteration_us:
            worker.horizon = 1
            return
        remaining = rows.last[self.decodes] - rows.scheduled[self.decodes]
        # While others wait, do not run past the first row that ends: its place is wanted.
        enough = int(remaining.min() if len(worker.queue) else remaining.max())
        m = max(1, min(worker.max_horizon, int(horizon_us / worker.iteration_us), enough))
        while m > 1 and lacking(worker, self.decodes, m).sum() > worker.allocator.num_free:
            m -= 1
        if m > 1:
            self.decode(m)
        self.plan.num_iterations = self.flight.num_iterations = worker.horizon = m

    # --------------------------------------------------------------------------------------- prompts

    def continue_prefills(self) -> None:
        """Give the rows in prefill their next chunks, oldest first."""
        for sequence in list(self.worker.prefilling.values()):
            if self.budget <= 0:
                return
            self._chunk(sequence)

    def _chunk(self, sequence: Sequence) -> None:
        """Schedule the next chunk of `sequence`: what budget and blocks allow."""
        worker, rows, plan = self.worker, self.worker.rows, self.plan
        slot, size = sequence.slot, worker.block_size
        start, known = int(rows.scheduled[slot]), sequence.group.num_to_prefill(sequence)
        end = min(known, start + self.budget)
        end = min(end, (len(sequence.blocks) + worker.allocator.num_free) * size)
        if end <= start:
            return
        for block in worker.append_blocks(sequence, max(0, -(-end // size) - len(sequence.blocks))):
            plan.append_slots.append(slot)
            plan.append_blocks.append(block)
        self.budget -= end - start
        group = sequence.group
        if start < group.num_prompt - 1 and group.samplings[0].num_prompt_logprobs is not None:
            told = range(start + 1, min(end + 1, group.num_prompt))
            self.flight.prompts[len(plan.slots)] = group, told
        self._join(sequence, end - start)
        rows.scheduled[slot] = end
        self.chunks.append(sequence)
        if end == known:
            del worker.prefilling[slot]
            if end < len(sequence.tokens):
                self._gather_beams(group)
                return
            self.flight.first.append(sequence)
            if group.search is not None:
                self._search(group, {slot: len(plan.slots) - 1})
                return
            self.flight.sampling.append(sequence)
            self._fork(sequence)

    def _gather_beams(self, group: Group) -> None:
        """Let beams that entered rows of their own decode, once all stand before their last tokens."""
        slots = [sequence.slot for sequence in group.starters()]
        if not group.followers and not any(slot in self.worker.prefilling for slot in slots):
            self.worker.rows.known[slots] = 0

    def _join(self, sequence: Sequence, num_tokens: int) -> None:
        """Put a row that is no plain decode into the batch."""
        plan = self.plan
        if not plan.num_tokens:
            plan.num_tokens = [1] * len(plan.slots)
        plan.slots.append(sequence.slot)
        plan.num_tokens.append(num_tokens)
        self.flight.only_decodes = False

    def _fork(self, leader: Sequence) -> None:
        """The leader's prompt is complete: followers without output sample from the same logits."""
        worker, group = self.worker, leader.group
        if leader.num_output or not group.followers:
            return
        partial = group.num_prompt % worker.block_size
        for sequence in [f for f in group.followers if not f.num_output]:
            group.followers.remove(sequence)
            worker.allocator.share(leader.blocks)
            worker.place(sequence, list(leader.blocks), group.num_prompt)
            self._new_row(sequence, leader.slot)
            self._join(sequence, 0)
            self.flight.sampling.append(sequence)
            if partial:
                worker.shared_tails[sequence.slot] = sequence
                worker.shared_tails[leader.slot] = leader

    def start_followers(self) -> None:
        """Start followers that do not fork: on the leader's prompt blocks once it has computed them."""
        worker = self.worker
        for group in list(worker.gathering.values()):
            leader = next((s for s in group.starters() if s not in group.followers), None)
            for sequence in list(group.followers):
                shared = self._shared_prompt(leader, sequence)
                if shared is None:
                    break
                # The leader's own where there are others of the same content: what the group needs at most
                # was reckoned with its prompt's blocks once.
                blocks = shared + worker.hits(sequence)[len(shared) :]
                if not self._can_start(blocks):
                    break
                group.followers.remove(sequence)
                self._start(sequence, blocks)
                leader = leader or sequence
            if not group.followers:
                del worker.gathering[group.key]

    def _shared_prompt(self, leader: Sequence | None, sequence: Sequence) -> list[int] | None:
        """The leader's blocks that `sequence` starts on; None while it has to wait for them."""
        if leader is None:  # it ended: the first follower takes its place
            return []
        worker, size = self.worker, self.worker.block_size
        if leader.slot in worker.prefilling and not leader.num_output and not sequence.num_output:
            return None  # it will fork
        num_full = sequence.num_prompt // size
        if worker.rows.scheduled[leader.slot] < num_full * size or leader in self.chunks:
            return None
        return leader.blocks[: min(num_full, (len(sequence.tokens) - 1) // size)]

    def _can_start(self, blocks: list[int]) -> bool:
        """Whether budget and cache allow a first token after `blocks`."""
        allocator = self.worker.allocator
        idle = sum(1 for block in blocks if not allocator.ref_count(block))
        return self.budget > 0 and allocator.num_free - idle > 0

    def _start(self, sequence: Sequence, blocks: list[int]) -> None:
        """Start the row of `sequence`, which holds a slot, on `blocks` that hold its first tokens."""
        worker = self.worker
        worker.allocator.share(blocks)
        worker.place(sequence, list(blocks), len(blocks) * worker.block_size)
        self._new_row(sequence, None)
        group = sequence.group
        if group.num_preemptions or group.num_replays:
            again = len(sequence.tokens) - len(blocks) * worker.block_size
            self.stats.recomputed_tokens += again
            self.stats.recompute_us += again * (worker.token_us or worker.least_token_us)
        self._chunk(sequence)
        if group.search is not None and len(group.search.beams) > 1:
            self._gather_beams(group)

    def _new_row(self, sequence: Sequence, parent_slot: int | None) -> None:
        self.flight.only_decodes = False
        forked = parent_slot is not None
        self.plan.new_rows.append(
            NewRow(
                slot=sequence.slot,
                parent_slot=parent_slot,
                tokens=() if forked else tuple(sequence.tokens),
                num_prompt_tokens=sequence.num_prompt,
                num_computed=0 if forked else int(self.worker.rows.scheduled[sequence.slot]),
                blocks=() if forked else tuple(sequence.blocks),
                last_position=sequence.last_position,
                sampling=sequence.group.samplings[sequence.index],
                traceparent=sequence.group.traceparent,
            )
        )

    # ------------------------------------------------------------------------------------- admission

    def admit(self) -> None:
        """Admit from the queue in order, until one does not fit: nobody overtakes."""
        worker = self.worker
        worker.blocked = ""
        while (group := worker.queue.peek()) is not None:
            worker.blocked = self._why_not(group)
            if worker.blocked:
                return
            worker.queue.pop()
            self._admit(group)

    def _why_not(self, group: Group) -> str:
        """What `group` waits for; empty when it can start in this step."""
        worker = self.worker
        if self.budget <= 0:
            return "the token budget of a step is used up"
        if group.resume_after > worker.confirmed_step:
            return "its last step before preemption is still in flight"
        if group.search is not None and group.search.awaiting is not None:
            return "its session has to say which of its beams end"
        if worker.running and (group.alone or next(iter(worker.running.values())).alone):
            return "a request that was there when a worker died twice runs alone"
        live = group.live()
        if len(live) > worker.rows.num_free:
            return f"it needs {len(live)} slots, {worker.rows.num_free} are free"
        if group.swapped:
            need, idle_hits = blocks_to_resume(worker, group.starters())
            moved = len(worker.swap_outs) + len(self.plan.swap_in_host_blocks)
            if moved and moved + need > most_blocks(worker):
                return "others come back from host memory before it, as many as a step may bring back"
        else:
            hits = worker.hits(live[0])
            idle_hits = sum(1 for block in hits if not worker.allocator.ref_count(block))
            need = group.blocks_needed(worker.block_size, [len(s.tokens) for s in live]) - len(hits)
        free = worker.allocator.num_free - idle_hits - worker.committed_blocks()
        spare = max(worker.watermark, soon_lacking(worker, self.decodes))
        if worker.running and need + spare > free:
            return f"it needs {need} blocks and {spare} to spare, {max(free, 0)} are free"
        return ""

    def _admit(self, group: Group) -> None:
        worker, stats = self.worker, self.stats
        live = group.live()
        for sequence in live:
            worker.rows.take(sequence)
        worker.running[group.key] = group
        group.state = State.RUNNING
        if group.pauses:
            group.pauses.append(("resumed", self.now))
        if group.swapped:
            self._swap_in(group)
            return
        leader, *group.followers = group.starters()
        if group.followers:
            worker.gathering[group.key] = group
        hits = worker.hits(leader)
        if group.first_scheduled is None:
            group.first_scheduled = self.now
            group.cached_tokens = min(len(hits) * worker.block_size, group.num_prompt)
            stats.prompt_tokens += group.num_prompt
            stats.prompt_tokens_cached += group.cached_tokens
        self._start(leader, hits)

    def _swap_in(self, group: Group) -> None:
        """Start the rows of a group whose KV comes back in this step; they take their next tokens at once,
        but for the beams of a search, which do with the next."""
        worker, starters = self.worker, group.starters()
        swap_in(worker, starters, self.plan, self.stats)
        for sequence in starters:
            worker.place(sequence, sequence.blocks, len(sequence.tokens) - 1)
            if worker.use_prefix:
                sequence.index_at = worker.block_size  # what came back is to be indexed again
            self._new_row(sequence, None)
            self._chunk(sequence)
        if group.search is not None and len(group.search.beams) > 1:
            self._gather_beams(group)

    # ---------------------------------------------------------------------------------------- finish

    def finish(self) -> Plan:
        """Commit the step: count decodes as scheduled, index prompts, and put it in flight."""
        worker, rows, plan = self.worker, self.worker.rows, self.plan
        decodes = self.decodes
        rows.scheduled[decodes] = np.minimum(
            rows.scheduled[decodes] + plan.num_iterations, rows.last[decodes]
        )
        rows.last_step[plan.slots] = plan.step_id
        for sequence in self.chunks:
            # Hits from the next step on: this one's admissions are over.
            worker.index_blocks(sequence, min(int(rows.scheduled[sequence.slot]), len(sequence.tokens)))
        plan.released_slots, worker.released = worker.released, []
        if worker.swap_outs:
            plan.swap_out_host_blocks = list(worker.swap_outs)
            plan.swap_out_device_blocks = list(worker.swap_outs.values())
            worker.swap_outs = {}
        self.flight.num_swapped = len(plan.swap_out_host_blocks) + len(plan.swap_in_host_blocks)
        for slot, move in worker.moves.items():
            plan.beam_slots.append(slot)
            plan.beam_parent_slots.append(move.parent)
            plan.beam_tokens.append(move.token)
            if move.enters:  # with how it samples; the rest is its parent's
                group = move.sequence.group
                sampling, limit = group.samplings[move.sequence.index], move.sequence.last_position
                row = NewRow(slot, None, (move.token,), 1, 0, (), limit, sampling, group.traceparent)
                plan.new_rows.append(row)
        worker.moves.clear()
        self.flight.num_tokens = sum(plan.num_tokens) or len(plan.slots)
        worker.next_step += 1
        worker.inflight.append(self.flight)
        return plan
