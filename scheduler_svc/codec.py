"""Plans, results and outputs to messages and back: packed columns, each encoded once.

Columns are copied whole (`extend` and slices run in C); nothing here loops over rows that only decode.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice, pairwise
from operator import ge
from typing import Any

import msgspec

from pagoda.internal.v1 import worker_pb2 as wire
from pagoda.v1 import scheduler_pb2 as pb
from scheduler_svc.core.events import (
    LogprobEntry,
    NewRow,
    Plan,
    PromptLogprobs,
    RequestEnd,
    RowEnd,
    Sampling,
    SessionOutput,
    StepDone,
)
from scheduler_svc.core.worker import Flight

# What of a `Sampling` may be off, and is the workers' concern.
_ON_WIRE = wire.RowSampling.DESCRIPTOR.fields_by_name
ROW_OPTIONS = tuple(name for name in _ON_WIRE if getattr(Sampling(), name, 0) is None)
# Columns that messages and the core name alike.
_NO_COLUMNS = {"worker", "epoch", "step_id", "num_iterations", "new_rows"}
_NO_COLUMNS |= {"logprobs", "ended", "prompts", "candidates"}
PLAN_COLUMNS = tuple(name for name in Plan.__struct_fields__ if name not in _NO_COLUMNS)
OUTPUT_COLUMNS = tuple(name for name in SessionOutput.__struct_fields__ if name not in _NO_COLUMNS)

_ROW_ENDS = frozenset(int(end) for end in RowEnd)


class BadResult(ValueError):
    """A worker's result contradicts itself or the model; its session must end."""


# ------------------------------------------------------------------------------ towards the workers


def encode_step(plan: Plan) -> bytes:
    """`plan` as a serialized `AttachResponse`; every rank of the group is sent the same bytes."""
    message = wire.AttachResponse()
    step = message.step
    step.epoch = plan.epoch
    step.step_id = plan.step_id
    step.num_iterations = plan.num_iterations
    _extend(step, PLAN_COLUMNS, plan)
    for row in plan.new_rows:
        _fill_row(step.new_rows.add(), row)
    return message.SerializeToString()


def _extend(message: Any, names: Iterable[str], values: Plan | SessionOutput) -> None:
    """Put columns into an empty message; most are empty."""
    for name in names:
        if column := getattr(values, name):
            getattr(message, name).extend(column)


def encode_vocabulary(vocabulary: pb.Vocabulary) -> bytes:
    """`vocabulary` as a serialized `AttachResponse`."""
    return wire.AttachResponse(vocabulary=vocabulary).SerializeToString()


def _fill_row(message: wire.NewRow, row: NewRow) -> None:
    message.slot = row.slot
    if row.parent_slot is not None:
        message.parent_slot = row.parent_slot
    message.tokens.extend(row.tokens)
    message.num_prompt_tokens = row.num_prompt_tokens
    message.num_computed = row.num_computed
    message.blocks.extend(row.blocks)
    message.last_position = row.last_position
    message.traceparent = row.traceparent
    _fill_sampling(message.sampling, row.sampling)


def _fill_sampling(message: wire.RowSampling, sampling: Sampling) -> None:
    if sampling.temperature:
        message.temperature = sampling.temperature
    for name in ROW_OPTIONS:
        value = getattr(sampling, name)
        if value is not None:
            setattr(message, name, value)
    for token, value in sampling.logit_bias:
        message.bias_token_ids.append(token)
        message.bias_values.append(value)
    message.seed = sampling.seed
    message.min_tokens = sampling.min_tokens
    message.stop_token_ids.extend(sampling.stop_token_ids)


def decode_result(worker: str, result: wire.StepResult, flight: Flight, vocab_size: int) -> StepDone:
    """The event that `result` is: the answer to the step `flight`.

    Raises BadResult when its columns cannot be that.
    """
    event = StepDone(
        worker=worker,
        epoch=result.epoch,
        step_id=result.step_id,
        tokens=result.tokens[:],
        num_sampled=result.num_sampled[:],
        ended_rows=result.ended_rows[:],
        ended_reasons=list(map(int, result.ended_reasons)),
        logprobs=_decode_logprobs(result.logprobs) if result.HasField("logprobs") else (),
        device_us=result.device_us,
        idle_us=result.idle_us,
        prompts=_decode_prompts(result, flight) if flight.prompts or result.prompt_rows else (),
        swap_us=result.swap_us,
        beam_parents=result.beam_parents[:],
        beam_tokens=result.beam_tokens[:],
        beam_scores=result.beam_scores[:],
        beam_tops=_decode_logprobs(result.beam_logprobs, False) if result.HasField("beam_logprobs") else (),
    )
    if flight.searches or event.beam_parents:
        _check_candidates(event, flight, vocab_size)
    _check_columns(event, flight.num_iterations, len(flight.sampling), vocab_size)
    return event


def _check_columns(event: StepDone, num_iterations: int, num_sampling: int, vocab_size: int) -> None:
    """The core reads columns without looking twice, so a worker gone wrong is caught here."""
    tokens, counts, ended = event.tokens, event.num_sampled, event.ended_rows
    if counts:
        if len(counts) != num_sampling or max(counts) > num_iterations:
            raise BadResult(
                f"num_sampled has {len(counts)} rows of up to {max(counts)} tokens; "
                f"the step has {num_sampling} of up to {num_iterations}"
            )
        expected = sum(counts)
    else:
        expected = num_sampling * num_iterations
    if len(tokens) != expected:
        raise BadResult(f"{len(tokens)} tokens came, {expected} were due")
    if tokens and max(tokens) >= vocab_size:
        raise BadResult(f"token {max(tokens)} is not below the vocabulary's {vocab_size}")
    if ended:
        if len(ended) != len(event.ended_reasons):
            raise BadResult(f"{len(ended)} ended_rows, {len(event.ended_reasons)} ended_reasons")
        if any(a >= b for a, b in pairwise(ended)) or ended[-1] >= num_sampling:
            raise BadResult(f"ended_rows do not ascend below {num_sampling}")
        if not _ROW_ENDS.issuperset(event.ended_reasons):
            raise BadResult(f"ended_reasons hold something else than {sorted(_ROW_ENDS)}")
    if len(event.logprobs) > len(tokens):
        raise BadResult(f"{len(event.logprobs)} logprobs came for {len(tokens)} tokens")


def _check_candidates(event: StepDone, flight: Flight, vocab_size: int) -> None:
    searches = [group.search for group in flight.searches if group.search is not None]
    most = [len(search.beams) for search in searches for _ in range(2 * search.width)]
    columns = len(event.beam_parents), len(event.beam_tokens), len(event.beam_scores)
    num_tops = sum(len(s.beams) for s in searches if s.sampling.num_logprobs is not None)
    if set(columns) != {len(most)} or len(event.beam_tops) != num_tops:
        raise BadResult(f"{columns} candidates and {len(event.beam_tops)} alternatives came; "
                        f"{len(most)} and {num_tops} were due")  # fmt: skip
    if any(map(ge, event.beam_parents, most)) or max(event.beam_tokens, default=0) >= vocab_size:
        raise BadResult("a candidate follows no beam of its search, or is no token")


def _decode_logprobs(columns: wire.LogprobColumns, of_tokens: bool = True) -> tuple[LogprobEntry, ...]:
    """`of_tokens`: the entries are of tokens that were drawn, and not only alternatives."""
    top_ids, top_logprobs = columns.top_ids[:], columns.top_logprobs[:]
    if not of_tokens:
        nothing = [0] * len(columns.num_top)
        columns.token_logprobs.extend(nothing)
        columns.ranks.extend(nothing)
    counts = {len(columns.token_logprobs), len(columns.num_top), len(columns.ranks)}
    if len(counts) != 1 or sum(columns.num_top) != len(top_ids) or len(top_ids) != len(top_logprobs):
        raise BadResult("the columns of the logprobs are not parallel")
    entries = []
    start = 0
    for value, rank, count in zip(columns.token_logprobs, columns.ranks, columns.num_top, strict=True):
        end = start + count
        entries.append(LogprobEntry(value, rank, tuple(top_ids[start:end]), tuple(top_logprobs[start:end])))
        start = end
    return tuple(entries)


def _decode_prompts(result: wire.StepResult, flight: Flight) -> tuple[PromptLogprobs, ...]:
    due = {row: len(told) for row, (_, told) in flight.prompts.items()}
    came = dict(zip(result.prompt_rows, result.num_prompt_logprobs, strict=False))
    entries = _decode_logprobs(result.prompt_logprobs)
    if came != due or len(entries) != sum(due.values()):
        raise BadResult(f"{len(entries)} logprobs of prompts came, by row {came}; due were {due}")
    rest = iter(entries)
    return tuple(PromptLogprobs(row, tuple(islice(rest, count))) for row, count in came.items())


# ----------------------------------------------------------------------------- towards the sessions


def encode_output(
    outputs: Sequence[SessionOutput], usages: Sequence[RequestEnd], failures: Sequence[pb.RequestFailure]
) -> bytes:
    """One serialized `SessionResponse` of all `outputs`, oldest first.

    A gateway that keeps up gets each step's columns as they are; one that is behind gets the same rows
    merged, one a sample.
    """
    message = pb.SessionResponse()
    columns = message.output
    if outputs:
        fill_columns(columns, outputs[0] if len(outputs) == 1 else merge_outputs(outputs))
    for end in usages:
        columns.usage_handles.append(end.handle)
        fill_usage(columns.usages.add(), end)
    columns.failures.extend(failures)
    return message.SerializeToString()


def fill_columns(columns: pb.OutputColumns, output: SessionOutput) -> None:
    """Put `output` into an empty message."""
    _extend(columns, OUTPUT_COLUMNS, output)
    add_logprobs(columns.logprobs, output.logprobs)
    for asked in output.candidates:
        columns.candidates.add(
            handle=asked.handle, step=asked.step, parents=asked.parents, token_ids=asked.token_ids
        )
    for part in output.prompts:
        columns.prompt_handles.append(part.of)
        columns.num_prompt_logprobs.append(len(part.entries))
        add_logprobs(columns.prompt_logprobs, part.entries)


def add_logprobs(column: Any, entries: Iterable[LogprobEntry]) -> None:
    """Append a `TokenLogprob` for each entry."""
    for entry in entries:
        message = column.add(logprob=entry.logprob, rank=entry.rank)
        message.top_ids.extend(entry.top_ids)
        message.top_logprobs.extend(entry.top_logprobs)


def fill_usage(message: pb.Usage, end: RequestEnd) -> None:
    """Put the counts of `end` into an empty message."""
    message.prompt_tokens = end.prompt_tokens
    message.cached_tokens = end.cached_tokens
    message.completion_tokens = end.completion_tokens


class _Row(msgspec.Struct):
    """What several outputs brought one sample."""

    tokens: list[int] = []
    reason: int | None = None
    score: float | None = None
    logprobs: list[LogprobEntry] | None = None


def merge_outputs(outputs: Sequence[SessionOutput]) -> SessionOutput:
    """One output that says what `outputs` say, with one row a sample, in order of first appearance."""
    rows: dict[tuple[int, int], _Row] = {}
    for output in outputs:
        for key, row in split_rows(output):
            into = rows.setdefault(key, _Row())
            into.tokens += row.tokens
            into.reason = into.reason if row.reason is None else row.reason
            into.score = into.score if row.score is None else row.score
            if row.logprobs is not None:
                into.logprobs = (into.logprobs or []) + row.logprobs
    merged = SessionOutput(
        handles=[handle for handle, _ in rows],
        indexes=[index for _, index in rows],
        num_tokens=[len(row.tokens) for row in rows.values()],
        prompts=[part for output in outputs for part in output.prompts],
        candidates=[asked for output in outputs for asked in output.candidates],
    )
    for i, row in enumerate(rows.values()):
        merged.tokens += row.tokens
        if row.reason is not None:
            merged.ended_rows.append(i)
            merged.ended_reasons.append(row.reason)
        if row.score is not None:
            merged.score_rows.append(i)
            merged.scores.append(row.score)
        if row.logprobs is not None:
            merged.logprob_rows.append(i)
            merged.logprobs += row.logprobs
    return merged


def split_rows(output: SessionOutput) -> list[tuple[tuple[int, int], _Row]]:
    """The rows of `output`, each with its (handle, index)."""
    reasons = dict(zip(output.ended_rows, output.ended_reasons, strict=True))
    scores = dict(zip(output.score_rows, output.scores, strict=True))
    with_logprobs = set(output.logprob_rows)
    rows = []
    token = entry = 0
    for i, handle in enumerate(output.handles):
        count = output.num_tokens[i] if output.num_tokens else 1
        row = _Row(output.tokens[token : token + count], reasons.get(i), scores.get(i))
        if i in with_logprobs:
            row.logprobs = output.logprobs[entry : entry + count]
            entry += count
        token += count
        rows.append(((handle, output.indexes[i] if output.indexes else 0), row))
    return rows
