"""Puts a model, its rows and its KV memory on a device: how many of each there are, and in what order."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import structlog
import torch

from gpu_worker import memory
from gpu_worker.batch import Padding, Shape
from gpu_worker.config import WorkerSettings
from gpu_worker.host_pool import HostPool, host_memory
from gpu_worker.kv_cache import KVCache, block_bytes
from gpu_worker.models.config import ModelConfig
from gpu_worker.models.decoder import Decoder
from gpu_worker.models.llama import Llama
from gpu_worker.models.loader import ModelFiles
from gpu_worker.parallel import Group
from gpu_worker.runner import Runner
from gpu_worker.slots import Rows
from gpu_worker.staging import Limits

LONGEST_DEFAULT = 32_768
NUM_BUFFERS = 9  # of staging and results: one more than steps may be in flight
KV_SHARE = 0.25
KV_CAP_BYTES = 4 << 30
SWAP_BYTES = {"cpu": 1 << 28, "cuda": 4 << 30}  # where the settings leave it to the device
# Slots, and tokens of an iteration, where the settings leave it to the device.
DEFAULT_SIZES = {"cpu": (64, 2048), "cuda": (512, 8192)}
GRAPH_BYTES = 16 << 20  # what a captured graph itself takes, beside its tensors
COMPILE_S = 180.0
# Batches that between them launch every variant of every kernel.
REHEARSED_ROWS = (1, 2, 8, 16, 24, 32, 64, 80)
EXIT_UNUSABLE = 78


class StartError(Exception):
    """The worker cannot start; the message says why, and `code` whether trying again may help."""

    def __init__(self, message: str, code: int = EXIT_UNUSABLE) -> None:
        super().__init__(message)
        self.code = code


def place_on_cpu(
    settings: WorkerSettings,
    files: ModelFiles,
    dtype: torch.dtype,
    device: torch.device,
    log: structlog.stdlib.BoundLogger,
    group: Group | None = None,
) -> tuple[Limits, Runner]:
    """The model, with as many KV blocks as a share of the free memory gives.

    Raises:
        StartError: there is no memory for a single block.
        ModelError: the model cannot be loaded.
    """
    limits, config = _limits(settings, files.config), _local(files, group)
    size = block_bytes(config, limits.block_size, dtype)
    num_blocks = settings.num_blocks
    if not num_blocks:
        free = _free_bytes()
        num_blocks = min(_all_slots(limits), int(min(free * KV_SHARE, KV_CAP_BYTES)) // size)
        log.info(
            "KV memory chosen: the least of a share of what is free, a cap, and what all slots could fill",
            num_blocks=num_blocks,
            tokens=num_blocks * limits.block_size,
            mib=num_blocks * size >> 20,
            free_mib=free >> 20,
            share=KV_SHARE,
            cap_mib=KV_CAP_BYTES >> 20,
            all_slots_full=_all_slots(limits),
        )
    _warn_if_short(num_blocks, limits, log)
    if num_blocks < 1:
        raise StartError(f"there is no memory for a single KV block of {size} bytes")
    swapped = _host_memory(settings, limits, config, size, device)
    limits = replace(limits, num_blocks=num_blocks, num_host_blocks=swapped.shape[1])
    cache = KVCache(config, num_blocks, limits.block_size, dtype, device)
    model, rows = _model(files, cache, dtype, device, limits, log, group), Rows(limits, device)
    return limits, Runner(model, cache, rows, limits, NUM_BUFFERS, host=HostPool(cache, swapped))


def place_on_cuda(
    settings: WorkerSettings,
    files: ModelFiles,
    dtype: torch.dtype,
    device: torch.device,
    log: structlog.stdlib.BoundLogger,
    group: Group | None = None,
) -> tuple[Limits, Runner]:
    """The model, with as many KV blocks as the device holds beside everything else, and its first graphs.

    Raises:
        StartError: the KV blocks do not fit.
        ModelError: the model cannot be loaded.
    """
    trial, config = replace(_limits(settings, files.config), num_blocks=1), _local(files, group)
    size = block_bytes(config, trial.block_size, dtype)
    pinning = ThreadPoolExecutor(1).submit(_host_memory, settings, trial, config, size, device)
    numbers = config, files.vocab_size, dtype, trial, 1 if group is None else group.size
    with _compiled_ahead(repr(numbers), trial, device, log) as rehearsal:
        cache = KVCache(config, 1, trial.block_size, dtype, device)
        model = _model(files, cache, dtype, device, trial, log, group)
        rows = Rows(trial, device)
        runner = Runner(model, cache, rows, trial, NUM_BUFFERS)
        rehearsal(runner)
    log.info("weights loaded", gib=round(torch.cuda.memory_allocated(device) / memory.GIB, 1))
    num_blocks = settings.num_blocks
    try:
        budget, padding = _measure(settings, files, trial, runner, device, group)
        num_blocks = memory.num_blocks(budget, size, _all_slots(trial), 1, num_blocks)
    except ValueError as error:
        raise StartError(str(error)) from error
    gib = {name: round(bytes_ / memory.GIB, 2) for name, bytes_ in vars(budget).items() if bytes_ > 1}
    log.info("KV memory chosen", num_blocks=num_blocks, tokens=num_blocks * trial.block_size, gib=gib)
    _warn_if_short(num_blocks, trial, log)
    swapped = pinning.result()
    limits = replace(trial, num_blocks=num_blocks, num_host_blocks=swapped.shape[1])
    cache = KVCache(config, num_blocks, limits.block_size, dtype, device)
    model.use(cache)
    runner = Runner(model, cache, rows, limits, NUM_BUFFERS, padding, HostPool(cache, swapped))
    with torch.inference_mode(), torch.cuda.stream(torch.cuda.Stream(device)):
        runner.capture_first()
    torch.cuda.synchronize(device)
    return limits, runner


def _local(files: ModelFiles, group: Group | None) -> ModelConfig:
    """The numbers of what this process holds."""
    return files.config if group is None else files.shard(group.rank, group.size).local


def _measure(
    settings: WorkerSettings, files: ModelFiles, trial: Limits, runner: Runner, device: torch.device,
    group: Group | None,
) -> tuple[memory.Budget, Padding | None]:  # fmt: skip
    """Where the device's memory goes when the largest batches run, and for which batches there are graphs.
    Raises ValueError when they do not fit."""
    in_use, total = memory.used_bytes(device)
    with memory.measured(device) as forward, torch.inference_mode():
        runner.rehearse(_largest(trial))
        padding = None
        if files.build is None:  # graphs hold what never looks at the device: transformers' modules do
            most = _launch_bound(runner, trial)
            if group is not None:  # batches must have one size on all ranks
                most = max(map(int, group.exchange("most tokens of a graph", str(most))))
            padding = Padding.for_graphs(trial.max_slots, most)
    shapes = padding.shapes() if padding else [_largest(trial)]
    with memory.measured(device) as pool, torch.inference_mode():
        for size in (lambda shape: shape.tokens, lambda shape: shape.samples):
            runner.rehearse(max(shapes, key=size))
    graphs = pool.bytes + GRAPH_BYTES * len(shapes)
    return memory.Budget(total, settings.gpu_memory_utilization, in_use, forward.bytes, graphs), padding


def _launch_bound(runner: Runner, limits: Limits) -> int:
    """Up to how many tokens a batch is worth a graph: those with which a device is busy for twice as long as
    the host is with launching them. With a small model those are all that a step may have."""
    torch.cuda.synchronize()
    begun = time.perf_counter()
    runner.rehearse(_largest(limits))
    launched = time.perf_counter()
    torch.cuda.synchronize()
    share = 2 * (launched - begun) / (time.perf_counter() - begun)
    return min(limits.max_batched_tokens, -(-int(share * limits.max_batched_tokens) // 512) * 512)


def _largest(limits: Limits) -> Shape:
    return Shape(limits.max_slots, limits.max_batched_tokens, limits.max_slots, True, 1, 1)


@contextmanager
def _compiled_ahead(
    key: str,
    limits: Limits,
    device: torch.device,
    log: structlog.stdlib.BoundLogger,
) -> Iterator[Callable[[Runner], None]]:
    """Has the kernels compiled side by side, unless they are in the cache. `key` is what they depend on."""
    from kernels.cuda import compile as ahead  # Triton is for CUDA alone
    from kernels.cuda.device import traits

    warmer = ahead.warmer(traits(device).capability, key, len(os.sched_getaffinity(0)))
    if warmer is None:
        yield lambda runner: None
        return

    def rehearse(runner: Runner) -> None:
        with warmer.rehearsal(), torch.inference_mode():
            for rows in (*(r for r in REHEARSED_ROWS if r < limits.max_slots), limits.max_slots):
                runner.rehearse(Shape(rows, rows, rows))
            runner.rehearse(_largest(limits))
            runner.rehearse_diff()

    yield rehearse
    log.info("compiling kernels, which later starts find in the cache")
    for line in warmer.finish(timeout=COMPILE_S):
        log.warning("a kernel was not compiled ahead", reason=line)


def _model(
    files: ModelFiles,
    cache: KVCache,
    dtype: torch.dtype,
    device: torch.device,
    limits: Limits,
    log: structlog.stdlib.BoundLogger,
    group: Group | None,
) -> Decoder:
    width = files.config.hidden_size
    ranks = None if group is None else group.ranks(limits.max_batched_tokens, width, dtype)

    def progress(done: int, of: int) -> None:
        log.info("loading", done_gb=round(done / 1e9, 1), of_gb=round(of / 1e9, 1))

    build: Callable[..., Decoder] = files.build or partial(Llama, ranks=ranks)
    return build(
        files.config,
        files.weights(progress),
        cache,
        dtype=dtype,
        device=device,
        vocab_size=files.vocab_size,
        max_len=limits.max_len,
    )


def _host_memory(
    settings: WorkerSettings, limits: Limits, config: ModelConfig, size: int, device: torch.device
) -> torch.Tensor:
    """The host blocks, of `size` bytes each, as a `HostPool` wants them. Raises StartError when they do not
    fit."""
    asked = settings.swap_space
    wanted = (
        min(SWAP_BYTES[settings.device], _free_bytes() * KV_SHARE) if asked is None else asked * memory.GIB
    )
    num_blocks, num_tensors = min(_all_slots(limits), int(wanted) // size), 2 * config.num_layers
    try:
        return host_memory(num_tensors, size // num_tensors, num_blocks, device)
    except (OSError, RuntimeError) as error:
        gib = num_blocks * size / memory.GIB
        raise StartError(
            f"no {gib:.1f} GiB of host memory for swapping: lower --swap-space ({error})"
        ) from error


def _limits(settings: WorkerSettings, config: ModelConfig) -> Limits:
    """All but the number of blocks."""
    max_len = settings.max_model_len or min(config.max_position, LONGEST_DEFAULT)
    if max_len > config.max_position:
        raise StartError(f"--max-model-len {max_len} is more than the model's {config.max_position}")
    slots, tokens = DEFAULT_SIZES[settings.device]
    max_slots = settings.max_slots or slots
    return Limits(
        max_slots=max_slots,
        max_len=max_len,
        block_size=settings.block_size,
        num_blocks=0,
        max_batched_tokens=max(settings.max_batched_tokens or tokens, max_slots),
        max_horizon=settings.max_horizon,
    )


def _warn_if_short(num_blocks: int, limits: Limits, log: structlog.stdlib.BoundLogger) -> None:
    if num_blocks * limits.block_size < limits.max_len:
        log.warning(
            "the KV memory cannot hold one sequence of the greatest length", max_model_len=limits.max_len
        )


def _all_slots(limits: Limits) -> int:
    """Blocks that all slots could fill."""
    return limits.max_slots * limits.table_len


def _free_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    raise StartError("/proc/meminfo does not say how much memory is available: set --num-blocks")
