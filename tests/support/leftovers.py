"""Which processes a command left behind: they all have its working directory."""

from __future__ import annotations

import os
import time
from pathlib import Path

WAIT_S = 60


def processes_in(folder: Path) -> list[int]:
    """Process ids whose working directory is `folder`."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and os.readlink(entry / "cwd") == str(folder):
                found.append(int(entry.name))
        except OSError:  # it ended while we looked
            continue
    return found


def wait_gone(folder: Path) -> None:
    """Wait until none is left. Raises AssertionError that names those which stay."""
    deadline = time.monotonic() + WAIT_S
    while left := processes_in(folder):
        assert time.monotonic() < deadline, f"left behind: {left}"
        time.sleep(0.05)
