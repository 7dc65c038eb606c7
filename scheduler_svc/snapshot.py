"""The state of the core at one moment, as the wire has it, and why a request is not running."""

from __future__ import annotations

from pagoda.v1 import scheduler_pb2 as pb
from scheduler_svc.core.group import Group, State
from scheduler_svc.core.request import NO_SLOT
from scheduler_svc.core.scheduler import Scheduler
from scheduler_svc.core.worker import Worker


def snapshot_of(core: Scheduler, now: float, requests: bool, blocks: bool, max_requests: int) -> pb.Snapshot:
    """A snapshot of `core`; `requests` lists up to `max_requests`, `blocks` adds tables and counts."""
    listed = list(core.groups.values())[:max_requests] if requests else []
    ahead: dict[str, int] = {}
    return pb.Snapshot(
        num_waiting=core.num_waiting,
        num_running=core.num_running,
        generation_tokens=core.stats.generation_tokens,
        prompt_tokens=core.stats.prompt_tokens,
        num_preemptions=core.stats.num_preemptions,
        swapped_tokens=core.stats.swapped_tokens,
        recomputed_tokens=core.stats.recomputed_tokens,
        workers=[_worker(w, blocks) for w in core.workers.values()],
        requests=[_request(core, g, now, blocks, ahead) for g in sorted(listed, key=lambda g: g.rank)],
    )


def _worker(worker: Worker, blocks: bool) -> pb.WorkerSnapshot:
    allocator = worker.allocator
    memory = worker.memory()
    return pb.WorkerSnapshot(
        name=worker.name,
        epoch=worker.epoch,
        num_blocks=allocator.num_blocks,
        num_free_blocks=allocator.num_free - allocator.num_cached,
        num_cached_blocks=allocator.num_cached,
        block_size=worker.block_size,
        max_slots=worker.rows.max_slots,
        num_slots_used=worker.rows.max_slots - worker.rows.num_free,
        num_inflight=len(worker.inflight),
        horizon=worker.horizon,
        step_us=int(worker.iteration_us),
        ref_counts=[allocator.ref_count(b) for b in range(allocator.num_blocks)] if blocks else [],
        cached_blocks=worker.index.blocks() if blocks else [],
        kv_waste_ratio=memory.unused_slots / max(1, memory.held * worker.block_size),
        kv_sharing_ratio=1 - memory.held / memory.references if memory.references else 0.0,
        num_shared_blocks=allocator.num_shared,
        num_lookahead_blocks=memory.lookahead,
        num_host_blocks=worker.host.num_blocks,
        num_host_blocks_used=worker.host.num_blocks - worker.host.num_free,
    )


def _request(
    core: Scheduler, group: Group, now: float, blocks: bool, ahead: dict[str, int]
) -> pb.RequestSnapshot:
    worker = core.workers.get(group.worker)
    why = ""
    if group.state is State.WAITING:
        waiting = pb.REQUEST_STATE_PREEMPTED if group.num_preemptions else pb.REQUEST_STATE_WAITING
        state = pb.REQUEST_STATE_SWAPPED if group.swapped else waiting
        position = ahead.get(group.worker, 0)
        ahead[group.worker] = position + 1
        why = _why(worker, position)
    else:
        prefilling = worker is not None and any(s.slot in worker.prefilling for s in group.samples)
        state = pb.REQUEST_STATE_PREFILL if prefilling or group.followers else pb.REQUEST_STATE_DECODE
    return pb.RequestSnapshot(
        request_id=group.request_id,
        state=state,
        why_not_running=why,
        worker=group.worker,
        priority=group.priority,
        age_us=int((now - group.arrived) * 1e6),
        prompt_tokens=group.num_prompt,
        cached_tokens=group.cached_tokens,
        num_preemptions=group.num_preemptions,
        samples=[
            pb.SampleSnapshot(
                index=s.index,
                slot=None if s.slot == NO_SLOT else s.slot,
                output_tokens=s.num_output,
                num_computed=int(worker.rows.scheduled[s.slot]) if worker and s.slot != NO_SLOT else 0,
                blocks=list(s.blocks) if blocks else [],
                finish_reason=pb.FinishReason.ValueType(s.finish or 0),
            )
            for s in group.samples
        ],
    )


def _why(worker: Worker | None, position: int) -> str:
    if worker is None:
        return "no worker is attached"
    if position:
        return f"{position} requests are ahead of it in the queue of {worker.name}"
    return worker.blocked or "it is next and starts with the next step"
