"""The scheduler's configuration: frozen, validated once, at its start."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from pagoda.settings import ServiceSettings, check_listen
from scheduler_svc.core.config import CoreConfig


class SchedulerSettings(ServiceSettings):
    """Flags, variables (`PAGODA_SCHEDULER_*`) and the `[scheduler]` section of the configuration file."""

    section: ClassVar[str] = "scheduler"

    listen: str = Field("127.0.0.1:50051", description="host:port of the gRPC server; port 0 takes any.")
    metrics_host: str = Field("127.0.0.1", description="Address of /metrics.")
    metrics_port: int = Field(9401, ge=0, le=65535, description="Port of /metrics; 0 takes any.")
    max_inflight: int = Field(2, ge=1, le=8, description="Steps sent ahead of their results; 1 is lockstep.")
    horizon_ms: float = Field(8.0, ge=0, description="Device time that one step may cover; 0 is off.")
    max_batched_tokens: int = Field(
        8192, ge=1, description="Token budget of one iteration; a worker's own limit holds, too."
    )
    stall_ms: float = Field(
        0.0, ge=0, description="How long prompts may make running streams wait for a step; 0 is no limit."
    )
    preemption_mode: Literal["auto", "swap", "recompute"] = Field(
        "auto", description="What becomes of a preempted request's KV; auto: whichever is cheaper."
    )
    max_waiting: int = Field(4096, ge=1, description="Requests that may wait; more are refused.")
    prefix_cache: bool = Field(True, description="Reuse the KV of prompts that begin alike.")
    record: Path | None = Field(None, description="Write every event and plan to this file, for replay.")

    def check(self) -> None:
        """Refuse addresses that strangers can reach. Raises SystemExit."""
        check_listen("--listen", self.listen, self.token, self.insecure)
        check_listen("--metrics-host", self.metrics_host, self.token, self.insecure)

    def core(self) -> CoreConfig:
        """What the pure core is told of it."""
        return CoreConfig(
            max_inflight=self.max_inflight,
            horizon_us=int(self.horizon_ms * 1000),
            max_batched_tokens=self.max_batched_tokens,
            stall_us=int(self.stall_ms * 1000),
            prefix_cache=self.prefix_cache,
            preemption_mode=self.preemption_mode,
        )
