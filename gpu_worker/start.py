"""Puts a worker together from its settings."""

from __future__ import annotations

import os
import platform
import socket
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import structlog
import torch

import kernels.cpu
from gpu_worker.config import WorkerSettings
from gpu_worker.executor import DeviceExecutor
from gpu_worker.hub_client import HubClient
from gpu_worker.kv_cache import KVCache, block_bytes
from gpu_worker.metrics import WorkerMetrics
from gpu_worker.models.config import ModelConfig, ModelError
from gpu_worker.models.llama import Llama
from gpu_worker.models.loader import ModelFiles, open_model
from gpu_worker.runner import Runner
from gpu_worker.sampler import MAX_STOP_IDS
from gpu_worker.slots import Rows
from gpu_worker.staging import Limits, Stager, StepError
from pagoda import models
from pagoda.internal.v1 import worker_pb2

PROTOCOL = 1
LONGEST_DEFAULT = 32_768
MAX_INFLIGHT = 8  # steps that the staging ring can hold beside the one being filled
KV_SHARE = 0.25
KV_CAP_BYTES = 4 << 30
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
EXIT_UNUSABLE = 78
EXIT_RETRY = 1


class StartError(Exception):
    """The worker cannot start; the message says why, and `code` whether trying again may help."""

    def __init__(self, message: str, code: int = EXIT_UNUSABLE) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Worker:
    """Everything that runs."""

    hub: HubClient
    executor: DeviceExecutor

    def run(self) -> int:
        """Serve until told to stop; returns the exit code."""
        self.executor.start()
        code = self.hub.run(self.executor)
        self.executor.close(timeout=2.0)
        return code


def build(settings: WorkerSettings, log: structlog.stdlib.BoundLogger) -> Worker:
    """Load the model, set the KV memory aside and open the metrics port.

    Raises:
        StartError: the model or a setting makes it impossible.
    """
    started = time.monotonic()
    device, dtype = _device(settings), _dtype(settings)
    try:
        files = open_model(models.resolve(settings.model), settings.load_format, settings.seed)
        limits = _limits(settings, files.config, dtype, log)
        name = settings.served_model_name or models.served_name(settings.model)
        log.info("loading", model=name, path=str(files.path), device=device.type, dtype=str(dtype))
        cache = KVCache(files.config, limits.num_blocks, limits.block_size, dtype, device)
        model = Llama(
            files.config,
            files.weights(),
            cache,
            dtype=dtype,
            device=device,
            vocab_size=files.vocab_size,
            max_len=limits.max_len,
        )
    except (FileNotFoundError, ModelError) as error:
        raise StartError(str(error)) from error
    group = settings.group_name or f"{socket.gethostname()}-{os.getpid()}"
    metrics = WorkerMetrics(name, group)
    if settings.metrics_port:
        _serve_metrics(metrics, settings.metrics_port)
    hello = _hello(settings, files, limits, dtype, name, group)
    hub = HubClient(settings.scheduler, hello, settings.token, metrics, log)
    rows = Rows(limits, device)
    executor = DeviceExecutor(
        Runner(model, cache, rows),
        Stager(limits, device, num_buffers=MAX_INFLIGHT + 1),
        metrics,
        on_result=hub.deliver,
        on_failure=lambda error: hub.fail(error, fatal=not isinstance(error, StepError)),
    )
    log.info("ready", seconds=round(time.monotonic() - started, 2), threads=kernels.cpu.threads())
    return Worker(hub, executor)


def _device(settings: WorkerSettings) -> torch.device:
    if settings.device == "cuda":
        if not torch.cuda.is_available():
            raise StartError("--device cuda: torch finds no CUDA device")
        return torch.device("cuda", 0)
    # The C kernels have threads of their own, and torch's would only take their cores away.
    torch.set_num_threads(1)
    kernels.cpu.set_threads(settings.threads or len(os.sched_getaffinity(0)))
    return torch.device("cpu")


def _dtype(settings: WorkerSettings) -> torch.dtype:
    if settings.dtype != "auto":
        return DTYPES[settings.dtype]
    native = settings.device == "cuda" or kernels.cpu.bf16_is_native()
    return torch.bfloat16 if native else torch.float32


def _limits(
    settings: WorkerSettings, config: ModelConfig, dtype: torch.dtype, log: structlog.stdlib.BoundLogger
) -> Limits:
    max_len = settings.max_model_len or min(config.max_position, LONGEST_DEFAULT)
    if max_len > config.max_position:
        raise StartError(f"--max-model-len {max_len} is more than the model's {config.max_position}")
    size = block_bytes(config, settings.block_size, dtype)
    num_blocks = settings.num_blocks
    if not num_blocks:
        needed = settings.max_slots * -(-max_len // settings.block_size)
        free = _free_bytes(settings)
        num_blocks = min(needed, int(min(free * KV_SHARE, KV_CAP_BYTES)) // size)
        log.info(
            "KV memory chosen: the least of a share of what is free, a cap, and what all slots could fill",
            num_blocks=num_blocks,
            tokens=num_blocks * settings.block_size,
            mib=num_blocks * size >> 20,
            free_mib=free >> 20,
            share=KV_SHARE,
            cap_mib=KV_CAP_BYTES >> 20,
            all_slots_full=needed,
        )
    if num_blocks * settings.block_size < max_len:
        log.warning("the KV memory cannot hold one sequence of the greatest length", max_model_len=max_len)
    if num_blocks < 1:
        raise StartError(f"there is no memory for a single KV block of {size} bytes")
    return Limits(
        max_slots=settings.max_slots,
        max_len=max_len,
        block_size=settings.block_size,
        num_blocks=num_blocks,
        max_batched_tokens=max(settings.max_batched_tokens, settings.max_slots),
        max_horizon=settings.max_horizon,
    )


def _free_bytes(settings: WorkerSettings) -> int:
    if settings.device == "cuda":
        return torch.cuda.mem_get_info()[0]
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    raise StartError("/proc/meminfo does not say how much memory is available: set --num-blocks")


def _serve_metrics(metrics: WorkerMetrics, port: int) -> None:
    try:
        metrics.serve(port)
    except OSError as error:
        raise StartError(f"--metrics-port {port}: {error.strerror}", EXIT_RETRY) from error


def _hello(
    settings: WorkerSettings, files: ModelFiles, limits: Limits, dtype: torch.dtype, name: str, group: str
) -> worker_pb2.Hello:
    on_gpu = settings.device == "cuda"
    return worker_pb2.Hello(
        protocol_min=PROTOCOL,
        protocol_max=PROTOCOL,
        model_name=name,
        model_digest=files.digest,
        group_name=group,
        incarnation=uuid.uuid4().hex,
        rank=0,
        world_size=1,
        vocab_size=files.vocab_size,
        max_model_len=limits.max_len,
        block_size=limits.block_size,
        block_bytes=block_bytes(files.config, limits.block_size, dtype),
        num_device_blocks=limits.num_blocks,
        num_host_blocks=0,
        max_slots=limits.max_slots,
        max_batched_tokens=limits.max_batched_tokens,
        max_horizon=limits.max_horizon,
        device=torch.cuda.get_device_name() if on_gpu else f"cpu ({platform.machine()})",
        dtype=str(dtype).removeprefix("torch."),
        eos_token_ids=files.config.eos_token_ids,
        max_stop_ids=MAX_STOP_IDS,
    )
