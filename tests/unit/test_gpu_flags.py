"""What programs that measure through the services are told arrives at the worker."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

from benchmarks import gpu, gpu_groups, gpu_soak, gpu_structured, oversubscription
from benchmarks.gpu_flags import described, worker_command
from gpu_worker.config import WorkerSettings

PROGRAMS = pytest.mark.parametrize(
    ("program", "slots", "context"),
    [
        (gpu, 512, 4096),
        (gpu_groups, 256, 4096),
        (gpu_soak, 512, 4096),
        (gpu_structured, 64, 4096),
        (oversubscription, 512, 2048),
    ],
    ids=lambda value: value.__name__ if isinstance(value, ModuleType) else "",
)


@PROGRAMS
def test_each_has_its_defaults(
    program: ModuleType, slots: int, context: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [program.__name__])
    o = program.parse()
    settings = WorkerSettings.load(worker_command(o, Path("folder"), load_format="dummy")[2:])
    assert (settings.max_slots, settings.max_model_len, settings.max_batched_tokens) == (slots, context, 8192)
    assert (settings.device, settings.dtype, settings.load_format) == ("cuda", "bfloat16", "dummy")
    assert (str(settings.model), settings.metrics_port) == ("folder", 0)
    assert str(o.logs).startswith("/tmp/pagoda-"), "logs have a folder of the program's own"
    assert described(o, ["numpy"])["flags"]["slots"] == str(slots)


@PROGRAMS
def test_the_worker_is_told_what_a_program_is(
    program: ModuleType, slots: int, context: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = "--device cpu --dtype float32 --slots 80 --context 512 --batched-tokens 256 --load-format auto"
    monkeypatch.setattr(
        sys, "argv", [program.__name__, *flags.split(), "--worker-args", "--num-blocks 64 --block-size 32"]
    )
    command = worker_command(program.parse(), Path("folder"), "--num-blocks", "32", "--threads", "1")
    settings = WorkerSettings.load(command[2:])
    assert (settings.device, settings.dtype, settings.load_format) == ("cpu", "float32", "auto")
    assert (settings.max_slots, settings.max_model_len, settings.max_batched_tokens) == (80, 512, 256)
    assert (settings.num_blocks, settings.block_size, settings.threads) == (64, 32, 1), "the last one counts"
