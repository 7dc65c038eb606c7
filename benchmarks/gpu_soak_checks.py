"""What must hold of the services in the long run: the scheduler's books, and memory over time."""

from __future__ import annotations

import os
import subprocess
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pagoda.v1 import scheduler_pb2 as pb

MIB = 1 << 20
# What a process may grow by after the warm-up: so much for each request, and a slack for a heap that is cut
# up. A request that is kept by mistake takes some 8 KiB in the scheduler (its prompt alone): one in five of
# 18,000 that stays is seen.
GROWTH_BYTES_A_REQUEST = 1 << 10
HOST_SLACK_MIB = {"scheduler": 12.0, "worker": 256.0}
# A graph that is captured late takes 1 to 16 MiB of the device and 1 to 2 of its process. There is an end of
# graphs, so the second half of the run is given less.
DEVICE_MIB, DEVICE_LATE_MIB = 256.0, 64.0
HOST_LATE_MIB = {"scheduler": 12.0, "worker": 64.0}


def book_problems(now: pb.Snapshot) -> list[str]:
    """What does not add up in a snapshot with requests and blocks, at any moment.

    These are the scheduler's own integrity checks, worked out anew from what it shows: every reference
    count is the number of block tables that hold the block, no block is lost, no slot is held twice.
    """
    problems = []
    for worker in now.workers:
        held: Counter[int] = Counter()
        slots: list[int] = []
        for request in now.requests:
            if request.worker != worker.name:
                continue
            for sample in request.samples:
                held.update(sample.blocks)
                if sample.HasField("slot"):
                    slots.append(sample.slot)
                elif sample.blocks:
                    problems.append(f"{request.request_id} holds blocks without a slot")
        counts = list(worker.ref_counts)
        if len(counts) != worker.num_blocks:
            problems.append(f"{len(counts)} reference counts for {worker.num_blocks} blocks")
        wrong = [b for b, count in enumerate(counts) if count != held[b]]
        if wrong:
            b = wrong[0]
            problems.append(
                f"{len(wrong)} blocks have a wrong reference count: block {b} has {counts[b]}, "
                f"{held[b]} tables hold it"
            )
        in_use = sum(1 for count in counts if count)
        known = in_use + worker.num_free_blocks + worker.num_cached_blocks
        if known != worker.num_blocks:
            problems.append(f"{worker.num_blocks - known} of {worker.num_blocks} blocks are lost")
        cached = set(worker.cached_blocks)
        idle_cached = sum(1 for b in cached if b >= len(counts) or not counts[b])
        if len(cached) != len(worker.cached_blocks) or idle_cached != worker.num_cached_blocks:
            problems.append(
                f"{idle_cached} blocks that nobody holds can be hit, {worker.num_cached_blocks} are counted"
            )
        if len(set(slots)) != len(slots) or len(slots) != worker.num_slots_used:
            problems.append(
                f"{len(slots)} rows hold {len(set(slots))} slots, {worker.num_slots_used} are used"
            )
    return problems


def idle_problems(now: pb.Snapshot, epoch: int) -> list[str]:
    """What is wrong with a snapshot of a scheduler that should have nothing to do; see `book_problems`.

    Args:
        now: with requests and blocks.
        epoch: of the worker's session since the start: another one means that it was lost in between.
    """
    problems = book_problems(now)
    if now.num_running or now.num_waiting or now.requests:
        problems.append(
            f"{now.num_running} requests run, {now.num_waiting} wait, {len(now.requests)} are listed"
        )
    if len(now.workers) != 1 or now.workers[0].epoch != epoch:
        problems.append(f"there was one worker, and now {[(w.name, w.epoch) for w in now.workers]}")
    for worker in now.workers:
        if worker.num_slots_used or worker.num_inflight:
            problems.append(f"{worker.num_slots_used} slots used, {worker.num_inflight} steps in flight")
        free = worker.num_free_blocks + worker.num_cached_blocks
        if free != worker.num_blocks or any(worker.ref_counts):
            problems.append(f"{free} of {worker.num_blocks} blocks are free or cached")
    return problems


# --------------------------------------------------------------------------------------------- memory


@dataclass
class Memory:
    """One look at the memory, in MiB."""

    requests: int
    """That had been sent then."""
    seconds: float
    device: float | None
    """In use on the machine's GPUs, by whomever; None where there is none."""
    anon: dict[str, float] = field(default_factory=dict)
    """What each process has filled itself: nobody else can take it away, as with pages of files."""
    rss: dict[str, float] = field(default_factory=dict)


def look(requests: int, seconds: float, pids: dict[str, int], device: bool) -> Memory:
    """The memory now. Takes a second where a device is asked."""
    memory = Memory(requests, round(seconds, 1), device_used_mib() if device else None)
    page = os.sysconf("SC_PAGE_SIZE") / MIB
    for name, pid in pids.items():
        _, resident, shared, *_ = map(int, Path(f"/proc/{pid}/statm").read_text().split())
        memory.rss[name] = round(resident * page, 1)
        memory.anon[name] = round((resident - shared) * page, 1)
    return memory


def device_used_mib() -> float | None:
    """In use on all GPUs, as the driver counts it: that needs no context of ours; None without a GPU."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
        return sum(float(line) for line in done.stdout.split())
    except (OSError, subprocess.SubprocessError, ValueError):
        return None


def growth_problems(idle: Sequence[Memory]) -> list[str]:
    """What grew too much between looks at idle times, of which the first comes after the warm-up."""
    if len(idle) < 2:
        return []
    first, last = idle[0], idle[-1]
    middle = next(m for m in idle if m.requests - first.requests >= (last.requests - first.requests) / 2)
    problems = []
    for since, slacks in ((first, HOST_SLACK_MIB), (middle, HOST_LATE_MIB)):
        sent = last.requests - since.requests
        for name, slack in slacks.items():
            grown = last.anon[name] - since.anon[name]
            allowed = slack + sent * GROWTH_BYTES_A_REQUEST / MIB
            if grown > allowed:
                problems.append(
                    f"the {name} grew by {grown:.0f} MiB in the last {sent} requests "
                    f"({_series(idle, name)}); at most {allowed:.0f} are allowed"
                )
    if first.device is not None and last.device is not None:
        whole, late = last.device - first.device, last.device - (middle.device or 0.0)
        if whole > DEVICE_MIB or (middle is not last and late > DEVICE_LATE_MIB):
            problems.append(
                f"the device's memory grew by {whole:.0f} MiB ({_series(idle, '')}), {late:.0f} of them in "
                f"the second half; at most {DEVICE_MIB:.0f} and {DEVICE_LATE_MIB:.0f} are allowed"
            )
    return problems


def _series(idle: Sequence[Memory], name: str) -> str:
    return ", ".join(f"{(m.anon[name] if name else m.device) or 0:.0f}" for m in idle)


def growth(idle: Sequence[Memory]) -> dict[str, Any]:
    """The looks, and by how much each process and the device grew from the first to the last, in MiB."""
    if not idle:
        return {}
    first, last = idle[0], idle[-1]
    sent = max(1, last.requests - first.requests)
    grown: dict[str, float] = {name: last.anon[name] - first.anon[name] for name in first.anon}
    if first.device is not None and last.device is not None:
        grown["device"] = last.device - first.device
    return {
        "idle": [asdict(memory) for memory in idle],
        "grown_mib": {name: round(mib, 1) for name, mib in grown.items()},
        "kib_a_request": {name: round(1024 * mib / sent, 3) for name, mib in grown.items()},
    }
