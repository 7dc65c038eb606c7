"""Puts a worker together from its settings."""

from __future__ import annotations

import os
import platform
import socket
import time
import uuid
from dataclasses import dataclass

import structlog
import torch

import kernels.cpu
from gpu_worker.config import WorkerSettings
from gpu_worker.executor import DeviceExecutor
from gpu_worker.hub_client import HubClient
from gpu_worker.kv_cache import block_bytes
from gpu_worker.metrics import WorkerMetrics
from gpu_worker.models.config import ModelError
from gpu_worker.models.loader import ModelFiles, open_model
from gpu_worker.parallel import RendezvousError, connect
from gpu_worker.placement import NUM_BUFFERS, StartError, place_on_cpu, place_on_cuda
from gpu_worker.sampler import MAX_STOP_IDS
from gpu_worker.spans import RowSpans
from gpu_worker.staging import Limits, Stager, StepError
from pagoda import models
from pagoda.internal.v1 import worker_pb2
from pagoda.tracing import Tracing

PROTOCOL = 1
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
EXIT_RETRY = 1


@dataclass(frozen=True)
class Worker:
    """Everything that runs."""

    hub: HubClient
    executor: DeviceExecutor
    spans: RowSpans

    def run(self) -> int:
        """Serve until told to stop; returns the exit code."""
        self.executor.start()
        code = self.hub.run(self.executor)
        if code and self.hub.in_group:
            return code  # the step that runs may never end, for it waits for another rank
        self.executor.close(timeout=2.0)
        self.spans.close()
        return code


def build(settings: WorkerSettings, log: structlog.stdlib.BoundLogger) -> Worker:
    """Load the model, set the KV memory aside and open the metrics port.

    Raises:
        StartError: the model or a setting makes it impossible.
    """
    started = time.monotonic()
    tracing = Tracing.start(settings.otlp_traces_endpoint, "worker")
    device, dtype = _device(settings), _dtype(settings)
    name = settings.served_model_name or models.served_name(settings.model)
    who = [settings.group_name or f"{socket.gethostname()}-{os.getpid()}", uuid.uuid4().hex]
    try:
        if (group := connect(settings, device)) is not None:
            who = group.exchange("who", "/".join(who))[0].rsplit("/", 1)  # they are what rank 0 is
        path, how = models.resolve(settings.model), settings.load_format
        files = open_model(path, how, settings.seed, settings.model_impl, dtype)
        log.info("loading", model=name, path=str(files.path), device=device.type, dtype=str(dtype))
        load = place_on_cpu if device.type == "cpu" else place_on_cuda
        if padded := files.shard(settings.rank, settings.world_size).describe():
            log.info("the model does not divide evenly over its ranks", rank=settings.rank, **padded)
        limits, runner = load(settings, files, dtype, device, log, group)
    except (FileNotFoundError, ModelError) as error:
        raise StartError(str(error)) from error
    except RendezvousError as error:
        raise StartError(str(error), EXIT_RETRY) from error
    hello = _hello(settings, files, limits, dtype, name, who)
    metrics = WorkerMetrics(name, hello.group_name)
    if settings.metrics_port and hello.rank == 0:
        _serve_metrics(metrics, settings.metrics_port)
    hub = HubClient(settings.scheduler, hello, settings.token, metrics, log)
    spans = RowSpans(tracing, hello.group_name, hello.rank)
    executor = DeviceExecutor(
        runner,
        Stager(limits, device, NUM_BUFFERS, runner.padding),
        metrics,
        on_result=hub.deliver,
        on_failure=lambda error: hub.fail(error, fatal=not isinstance(error, StepError)),
        device=device,
        spans=spans,
    )
    log.info("ready", seconds=round(time.monotonic() - started, 2), threads=kernels.cpu.threads())
    return Worker(hub, executor, spans)


def _device(settings: WorkerSettings) -> torch.device:
    if settings.device == "cuda":
        if not torch.cuda.is_available():
            raise StartError("--device cuda: torch finds no CUDA device")
        if (visible := torch.cuda.device_count()) < settings.world_size:
            raise StartError(f"{settings.world_size} ranks want a CUDA device each; torch finds {visible}")
        torch.cuda.set_device(settings.rank)
        return torch.device("cuda", settings.rank)
    # The C kernels have threads of their own, and torch's would only take their cores away.
    torch.set_num_threads(1)
    kernels.cpu.set_threads(settings.threads or max(1, len(os.sched_getaffinity(0)) // settings.world_size))
    return torch.device("cpu")


def _dtype(settings: WorkerSettings) -> torch.dtype:
    if settings.dtype != "auto":
        return DTYPES[settings.dtype]
    native = settings.device == "cuda" or kernels.cpu.bf16_is_native()
    return torch.bfloat16 if native else torch.float32


def _serve_metrics(metrics: WorkerMetrics, port: int) -> None:
    try:
        metrics.serve(port)
    except OSError as error:
        raise StartError(f"--metrics-port {port}: {error.strerror}", EXIT_RETRY) from error


def _hello(
    settings: WorkerSettings, files: ModelFiles, limits: Limits, dtype: torch.dtype, name: str, who: list[str]
) -> worker_pb2.Hello:
    on_gpu, shard = settings.device == "cuda", files.shard(settings.rank, settings.world_size)
    return worker_pb2.Hello(
        protocol_min=PROTOCOL,
        protocol_max=PROTOCOL,
        model_name=name,
        model_digest=files.digest,
        group_name=who[0],
        incarnation=who[1],
        rank=settings.rank,
        world_size=settings.world_size,
        vocab_size=files.vocab_size,
        max_model_len=limits.max_len,
        block_size=limits.block_size,
        block_bytes=block_bytes(shard.local, limits.block_size, dtype),
        num_device_blocks=limits.num_blocks,
        num_host_blocks=limits.num_host_blocks,
        max_slots=limits.max_slots,
        max_batched_tokens=limits.max_batched_tokens,
        max_horizon=limits.max_horizon,
        device=torch.cuda.get_device_name() if on_gpu else f"cpu ({platform.machine()})",
        dtype=str(dtype).removeprefix("torch."),
        eos_token_ids=files.config.eos_token_ids,
        max_stop_ids=MAX_STOP_IDS,
    )
