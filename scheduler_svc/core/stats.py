"""Counters of the core, read by the metrics of the service."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Stats:
    """Counts since the start of the core. Tokens unless the name says otherwise."""

    num_preemptions: int = 0  # groups
    num_swaps: int = 0  # groups whose KV was kept in host memory when they were preempted
    swapped_tokens: int = 0  # whose KV went to host memory
    swapped_blocks: dict[str, int] = field(default_factory=lambda: {"out": 0, "in": 0})
    swapped_bytes: dict[str, int] = field(default_factory=lambda: {"out": 0, "in": 0})
    swap_us: int = 0  # device time of all swaps
    recomputed_tokens: int = 0  # whose KV had been computed before
    recompute_us: float = 0.0  # device time of that, by the rate of long steps
    prompt_tokens: int = 0  # looked up in the prefix cache
    prompt_tokens_cached: int = 0  # found there
    generation_tokens: int = 0
    replayed_requests: int = 0
    replayed_tokens: int = 0  # output that survived a worker's death
    finished: dict[str, int] = field(default_factory=dict)  # requests by how they ended
