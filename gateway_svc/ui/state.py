"""A snapshot of the scheduler as the page gets it: JSON, with every row of numbers as runs.

A block's cell is the number of block tables that hold it; 0 is free, `CACHED` is held by nobody but findable
by its prefix. Tens of thousands of blocks have few runs, for neighbours mostly share a fate.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

from pagoda.v1 import scheduler_pb2 as pb

CACHED = -1
_STATES = {
    pb.REQUEST_STATE_WAITING: "waiting",
    pb.REQUEST_STATE_PREFILL: "prefill",
    pb.REQUEST_STATE_DECODE: "decode",
    pb.REQUEST_STATE_PREEMPTED: "preempted",
    pb.REQUEST_STATE_SWAPPED: "swapped",
}


class WorkerState(msgspec.Struct):
    """One worker group. `cells` is value, count, value, count, ... over its blocks."""

    name: str
    ranks: int
    device: str
    num_blocks: int
    block_size: int
    slots: int
    max_slots: int
    step_us: int
    waste: float
    sharing: float
    cells: list[int]


class RequestState(msgspec.Struct):
    """One request. `blocks` is first, count, first, count, ... over the blocks of all of its samples."""

    id: str
    state: str
    why: str
    worker: str
    age_us: int
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    samples: int
    blocks: list[int]


class State(msgspec.Struct):
    """What one event of the stream carries."""

    unix_us: int
    model: str
    waiting: int
    running: int
    generation_tokens: int
    prompt_tokens: int
    preemptions: int
    workers: list[WorkerState]
    requests: list[RequestState]


def state_of(snapshot: pb.Snapshot) -> State:
    """A snapshot that was asked for with requests and blocks."""
    return State(
        unix_us=snapshot.unix_us,
        model=snapshot.model.name,
        waiting=snapshot.num_waiting,
        running=snapshot.num_running,
        generation_tokens=snapshot.generation_tokens,
        prompt_tokens=snapshot.prompt_tokens,
        preemptions=snapshot.num_preemptions,
        workers=[_worker(worker) for worker in snapshot.workers],
        requests=[_request(request) for request in snapshot.requests],
    )


def _worker(worker: pb.WorkerSnapshot) -> WorkerState:
    return WorkerState(
        name=worker.name,
        ranks=worker.num_ranks,
        device=worker.device,
        num_blocks=worker.num_blocks,
        block_size=worker.block_size,
        slots=worker.num_slots_used,
        max_slots=worker.max_slots,
        step_us=worker.step_us,
        waste=worker.kv_waste_ratio,
        sharing=worker.kv_sharing_ratio,
        cells=cells(worker.ref_counts, worker.cached_blocks),
    )


def _request(request: pb.RequestSnapshot) -> RequestState:
    return RequestState(
        id=request.request_id,
        state=_STATES[request.state],
        why=request.why_not_running,
        worker=request.worker,
        age_us=request.age_us,
        prompt_tokens=request.prompt_tokens,
        cached_tokens=request.cached_tokens,
        output_tokens=sum(sample.output_tokens for sample in request.samples),
        samples=len(request.samples),
        blocks=ranges([block for sample in request.samples for block in sample.blocks]),
    )


def cells(ref_counts: Sequence[int], cached_blocks: Sequence[int]) -> list[int]:
    """Every block's cell, as runs of value and count."""
    values = np.fromiter(ref_counts, np.int32, len(ref_counts))
    cached = np.fromiter(cached_blocks, np.int64, len(cached_blocks))
    values[cached[values[cached] == 0]] = CACHED
    if not values.size:
        return []
    starts = np.concatenate(([0], np.flatnonzero(np.diff(values)) + 1))
    counts = np.diff(starts, append=values.size)
    runs: list[int] = np.stack([values[starts], counts], axis=1).ravel().tolist()
    return runs


def ranges(blocks: Sequence[int]) -> list[int]:
    """Block ids in ascending order without repetitions, as runs of first and count."""
    if not blocks:
        return []
    ids = np.unique(np.fromiter(blocks, np.int64, len(blocks)))
    starts = np.concatenate(([0], np.flatnonzero(np.diff(ids) != 1) + 1))
    counts = np.diff(starts, append=ids.size)
    runs: list[int] = np.stack([ids[starts], counts], axis=1).ravel().tolist()
    return runs
