"""Beam search: what a search keeps, and what one step of candidates makes of it.

A search's beams are sequences of its group, which hold slots and share blocks like samples; its results are
apart. The rules are those of transformers' `generate`: of a step's candidates, only the best `width` may
become results, which are ordered by the sum of their tokens' logprobs over their length to the power of the
length penalty; the best `width` of those that do not end go on; a full row ends everything.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from scheduler_svc.core.events import BeamCandidates, Finish, LogprobEntry, Sampling, SessionOutput
from scheduler_svc.core.request import Sequence

if TYPE_CHECKING:
    from scheduler_svc.core.group import Group
    from scheduler_svc.core.worker import Worker

Chain: TypeAlias = "tuple[Chain, LogprobEntry] | None"
"""The logprobs of a beam's tokens, last first: beams of one origin share them."""


class EarlyStopping(IntEnum):
    """When a search that has `width` results ends. Values equal `pagoda.v1.EarlyStopping`."""

    HEURISTIC = 1
    FIRST = 2
    NEVER = 3


class Candidate(NamedTuple):
    """A token that may go on the beam in place `parent`, and the score that the beam then has."""

    parent: int
    token: int
    score: float


class Candidates(NamedTuple):
    """One step's, best first. Those of `best` that do not end come first in `rest`, which holds no stop ids.

    `tops` are the alternatives to each beam's next token, for a search that reports logprobs.
    """

    best: list[Candidate]
    rest: list[Candidate]
    tops: list[LogprobEntry]


@dataclass(slots=True)
class Beam:
    """A sequence that goes on. `origin` is its place among the candidates of the step before."""

    sequence: Sequence
    score: float = 0.0
    logprobs: Chain = None
    origin: int = 0


class Result(NamedTuple):
    """An output that has ended, with the prompt before it."""

    score: float
    tokens: array[int]
    logprobs: Chain
    finish: Finish


class Search:
    """One beam search. `wanted` are the places of the results that the caller still wants."""

    def __init__(self, sampling: Sampling, n: int, leader: Sequence) -> None:
        assert sampling.beam_width is not None
        self.sampling = sampling
        self.width = sampling.beam_width
        self.wanted = list(range(n))
        self.beams = [Beam(leader)]
        self.results: list[Result] = []
        self.num_steps = 0
        self.awaiting: Candidates | None = None  # which of them end, the session is to say

    @property
    def shape(self) -> tuple[int, int]:
        """What searches have in common that a device can handle together."""
        return len(self.beams), self.width

    def ask(self, handle: int, candidates: Candidates) -> BeamCandidates:
        """Wait for a verdict on what may go on."""
        self.awaiting = candidates
        parents = [self.beams[c.parent].origin for c in candidates.rest] if self.num_steps else []
        return BeamCandidates(handle, self.num_steps, parents, [c.token for c in candidates.rest])

    def choose(self, candidates: Candidates, stopped: Seq[int] = ()) -> list[tuple[int, Candidate]]:
        """Take a step: results are added, and those that go on are returned, with their places among the
        candidates of `rest`; none when the search has ended. `stopped` are places of some that end there."""
        self.awaiting = None
        self.num_steps += 1
        leader = self.beams[0].sequence
        length = leader.num_output + 1
        is_full = leader.num_prompt + length >= leader.last_position
        halted = {candidates.rest[i][:2] for i in stopped if i < len(candidates.rest)}
        for candidate in candidates.best:
            ends = candidate.token in self.sampling.stop_token_ids or candidate[:2] in halted
            if ends or is_full:
                tokens = self.beams[candidate.parent].sequence.tokens[:]
                tokens.append(candidate.token)
                finish = Finish.STOP if ends else Finish.LENGTH
                logprobs = self.extended(candidate, candidates)
                self.results.append(Result(self._rated(candidate.score, length), tokens, logprobs, finish))
        self.results.sort(key=lambda result: -result.score)
        del self.results[self.width :]
        rest = [(i, c) for i, c in enumerate(candidates.rest) if c[:2] not in halted]
        if is_full or not rest or (len(self.results) == self.width and self._is_over(rest[0][1], length)):
            return []
        return rest

    def _is_over(self, best: Candidate, length: int) -> bool:
        """Whether a search that has all its results ends though `best` would go on."""
        if self.sampling.early_stopping == EarlyStopping.FIRST:
            return True
        if self.sampling.early_stopping == EarlyStopping.NEVER and self.sampling.length_penalty > 0:
            leader = self.beams[0].sequence
            length = leader.last_position - leader.num_prompt
        return self._rated(best.score, length) <= self.results[-1].score

    def _rated(self, score: float, length: int) -> float:
        return score / float(length**self.sampling.length_penalty)

    def extended(self, candidate: Candidate, candidates: Candidates) -> Chain:
        """The logprobs of a beam and the candidate that follows it."""
        if not candidates.tops:
            return None
        beam, top = self.beams[candidate.parent], candidates.tops[candidate.parent]
        # A rank is known as far as the alternatives go; 0 stands for one beyond.
        rank = top.top_ids.index(candidate.token) + 1 if candidate.token in top.top_ids else 0
        entry = LogprobEntry(candidate.score - beam.score, rank, top.top_ids, top.top_logprobs)
        return beam.logprobs, entry

    def go_on(
        self, worker: Worker | None, chosen: list[tuple[int, Candidate]], candidates: Candidates,
        samples: list[Sequence],
    ) -> None:  # fmt: skip
        """Let `chosen` be the beams. A beam's first child keeps its row, others take the rows of beams that
        have none; on `worker`, unless it is None, they share the blocks of their parents."""
        before = [beam.sequence for beam in self.beams]
        kept = {c.parent: before[c.parent] for _, c in chosen}
        keeps = {sequence.index for sequence in kept.values()}
        spare = iter([sample for sample in samples if sample.index not in keeps])
        beams = []
        for origin, candidate in chosen:
            parent = before[candidate.parent]
            sequence = kept.pop(candidate.parent, None)
            if sequence is None:
                sequence = next(spare)
                sequence.tokens, sequence.hashes = parent.tokens[:], parent.hashes[:]
                if worker is not None:
                    worker.branch(sequence, parent)
            if worker is not None:
                worker.move(sequence, parent, candidate.token)
            beams.append(Beam(sequence, candidate.score, self.extended(candidate, candidates), origin))
        for sequence in spare:
            sequence.tokens, sequence.hashes = sequence.tokens[: sequence.num_prompt], []
            if worker is not None:
                worker.rest(sequence)
        for beam, (_, candidate) in zip(beams, chosen, strict=True):
            beam.sequence.tokens.append(candidate.token)
        self.beams = beams

    def deliver(self, group: Group, index: int, out: SessionOutput) -> Sequence:
        """Put the result of this place into `out`; a sequence that tells of it."""
        result, num_prompt = self.results[index], group.num_prompt
        sequence = Sequence(group, index, result.tokens, num_prompt, len(result.tokens))
        sequence.finish = result.finish
        row = len(out.handles)
        out.handles.append(group.handle)
        out.indexes.append(index)
        out.num_tokens.append(sequence.num_output)
        out.tokens += result.tokens[num_prompt:].tolist()
        out.ended_rows.append(row)
        out.ended_reasons.append(int(result.finish))
        out.score_rows.append(row)
        out.scores.append(result.score)
        chain, entries = result.logprobs, []
        while chain is not None:
            chain, entry = chain
            entries.append(entry)
        if entries:
            out.logprob_rows.append(row)
            out.logprobs += reversed(entries)
        return sequence
