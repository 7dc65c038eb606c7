"""What the core may be told once, at its start."""

from __future__ import annotations

from typing import Literal

import msgspec


class CoreConfig(msgspec.Struct, frozen=True):
    """Policy of the scheduler. Sizes of a worker come with `WorkerAttached`, not from here."""

    max_inflight: int = 2  # depth D: steps sent ahead of their results; 1 switches run-ahead off
    horizon_us: int = 8000  # device time that one message should cover; 0 switches the horizon off
    max_batched_tokens: int = 8192  # token budget of one iteration; a worker may allow fewer
    stall_us: int = 0  # device time of a step that holds prompts beside decodes; 0 is no limit
    prefix_cache: bool = True
    max_slots: int | None = None  # rows at once; a worker may allow fewer
    preemption_mode: Literal["auto", "swap", "recompute"] = "auto"
    watermark: float = 0.01  # share of the blocks that must stay free when a group is admitted
