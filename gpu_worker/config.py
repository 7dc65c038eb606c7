"""The worker's settings."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from pagoda.models import EMBEDDED_MODEL
from pagoda.settings import ServiceSettings


class WorkerSettings(ServiceSettings):
    """Flags, `PAGODA_WORKER_*` variables and the `[worker]` section of the TOML file."""

    section: ClassVar[str] = "worker"

    scheduler: str = Field("127.0.0.1:50051", description="Address of the scheduler that the worker dials.")
    model: str = Field(EMBEDDED_MODEL, description="Name or path of a folder or GGUF file.")
    served_model_name: str = Field(
        "", description="Name that clients use; empty: the last part of the model's path."
    )
    load_format: Literal["auto", "dummy"] = Field("auto", description="dummy draws random weights.")
    model_impl: Literal["auto", "native", "transformers"] = Field(
        "auto", description="Whose layers to run; auto: transformers' where an architecture is not native."
    )
    seed: int = Field(0, ge=0, lt=2**31, description="Of dummy weights.")
    device: Literal["cpu", "cuda"] = Field("cpu", description="What to run on.")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Of weights and KV; auto is bfloat16 where the device multiplies it natively."
    )
    threads: int = Field(
        0, ge=0, le=64, description="Threads of the CPU kernels; 0: this rank's share of the usable cores."
    )
    tensor_parallel: int = Field(
        1, ge=1, le=64, description="Ranks to start, each with a device, that hold one model together."
    )
    rank: int = Field(0, ge=0, description="Which rank this is, where something else starts the ranks.")
    world_size: int = Field(1, ge=1, le=64, description="How many ranks something else starts.")
    rendezvous: str = Field(
        "", pattern=r"^(.+:\d+)?$", description="HOST:PORT where rank 0 listens for the other ranks."
    )
    group_name: str = Field(
        "", description="Name of this worker group, unique in a cluster; empty: host and pid."
    )
    block_size: int = Field(16, ge=16, le=256, multiple_of=16, description="Tokens of one KV block.")
    num_blocks: int = Field(0, ge=0, description="KV blocks; 0: from the memory that is free.")
    swap_space: float | None = Field(
        None,
        ge=0,
        description="GiB of host memory for the KV of preempted requests [4 on CUDA, 0.25 on a CPU].",
    )
    gpu_memory_utilization: float = Field(
        0.9,
        gt=0.0,
        le=1.0,
        description="Share of a CUDA device's memory to fill; the KV blocks get the rest.",
    )
    max_slots: int = Field(
        0, ge=0, le=4096, description="Most sequences at a time; 0: 64 on a CPU, 512 on a CUDA device."
    )
    max_model_len: int = Field(0, ge=0, description="Longest sequence; 0: the model's, at most 32768.")
    max_batched_tokens: int = Field(
        0, ge=0, description="Most tokens of one iteration; 0: 2048 on a CPU, 8192 on a CUDA device."
    )
    max_horizon: int = Field(16, ge=1, le=256, description="Most iterations of one step.")
    metrics_port: int = Field(9402, ge=0, le=65535, description="Port of /metrics on 127.0.0.1; 0: none.")

    @model_validator(mode="after")
    def _check_ranks(self) -> Self:
        if self.rank >= self.world_size:
            raise ValueError(f"--rank {self.rank} is not below --world-size {self.world_size}")
        if self.world_size > 1 and not self.rendezvous:
            raise ValueError(f"--world-size {self.world_size} needs --rendezvous HOST:PORT")
        if 1 < self.world_size != self.tensor_parallel != 1:
            raise ValueError("--tensor-parallel starts ranks itself, and --world-size says another number")
        return self
