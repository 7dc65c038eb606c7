"""Where and with what a figure was measured."""

from __future__ import annotations

import datetime
import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
GPU_QUERY = "--query-gpu=name,driver_version,memory.total,clocks.max.sm"


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False, cwd=ROOT)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def facts(packages: Sequence[str], commit: str = "") -> dict[str, Any]:
    """Date, device, driver, commit and versions; what cannot be found out is None or empty."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name in packages:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    # Not through torch: a process that forks an engine must not have touched CUDA.
    gpus = _output("nvidia-smi", GPU_QUERY, "--format=csv,noheader").splitlines()
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit or _output("git", "rev-parse", "HEAD") or "unknown",
        "gpus": gpus,
        "versions": versions,
    }
