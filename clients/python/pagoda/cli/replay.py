"""`pagoda replay`: the scheduler's core on a recorded run."""

from __future__ import annotations

from pathlib import Path


class ReplayError(Exception):
    """The record cannot be replayed, or the replay differs from it."""


def run(file: Path) -> str:
    """Replay `file`; what it went through, for people. Raises ReplayError."""
    try:
        from scheduler_svc import record
    except ImportError as error:
        raise ReplayError(
            f"replay needs the server package pagoda-server, which is not installed here ({error})"
        ) from error
    try:
        report = record.replay(file)
    except (record.Divergence, record.BadRecord) as error:
        raise ReplayError(str(error)) from error
    cut = "; the last frame was cut off, as by a kill" if report.truncated else ""
    counts = f"{report.num_plans} plans, {report.num_events} events, {report.num_requests} requests"
    return f"identical: {counts}{cut}"
