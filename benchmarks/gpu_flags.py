"""Flags that programs share which measure through the services, and what is made of them."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu_facts import facts
from benchmarks.gpu_services import Services


def add_service_flags(p: argparse.ArgumentParser, **defaults: Any) -> None:
    """Add the flags of scheduler, worker and model; a program's own defaults by name, `logs` among them."""
    p.add_argument("--model", type=Path, help="a model folder instead of a preset's")
    p.add_argument("--load-format", default="dummy", help="of the weights: auto reads, dummy draws them")
    p.add_argument("--base", type=Path, default=Path("/tmp/models"), help="where model folders are made")
    p.add_argument("--out", type=Path, help="JSON file, written as results come")
    p.add_argument("--logs", type=Path, help="folder of the services' logs")
    p.add_argument("--device", default="cuda")
    p.add_argument("--dtype", default="bfloat16")
    p.add_argument("--context", type=int, default=4096)
    p.add_argument("--slots", type=int, default=512)
    p.add_argument("--batched-tokens", type=int, default=8192)
    p.add_argument("--scheduler-args", type=shlex.split, default=[], help="more flags, in one word")
    p.add_argument("--worker-args", type=shlex.split, default=[], help="more flags, in one word")
    p.add_argument("--ready-s", type=float, default=180, help="longest start of the services")
    p.add_argument("--settle-s", type=float, default=8, help="at rest before what is measured: for graphs")
    p.add_argument("--commit", default="", help="what is measured, where git cannot say")
    p.set_defaults(**defaults)


def worker_command(o: argparse.Namespace, model: Path, *more: str, load_format: str = "") -> list[str]:
    """The worker's command with `more` of the program's own flags, but for the scheduler's address."""
    return [
        *("-m", "gpu_worker", "--model", str(model), "--load-format", load_format or o.load_format),
        *("--device", o.device, "--dtype", o.dtype, "--max-model-len", str(o.context)),
        *("--max-slots", str(o.slots), "--max-batched-tokens", str(o.batched_tokens), "--metrics-port", "0"),
        *more,
        *o.worker_args,
    ]


def start(o: argparse.Namespace, services: Services, worker: Sequence[str], *scheduler: str) -> None:
    """Start a scheduler with these flags and this worker. Raises ServiceError unless they are soon ready."""
    limits = ("--max-batched-tokens", str(o.batched_tokens))
    services.start_scheduler(*limits, *scheduler, *o.scheduler_args)
    services.start_worker(*worker)
    services.wait_attached(o.ready_s)


def described(o: argparse.Namespace, packages: Sequence[str]) -> dict[str, Any]:
    """What every result begins with: where and with what it was measured, and the program's flags."""
    return {
        "facts": facts(packages, o.commit),
        "flags": {name: str(value) for name, value in vars(o).items()},
    }
