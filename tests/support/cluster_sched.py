"""Starts the scheduler and simulated workers as processes of their own, for tests and benchmarks."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.sim_worker import StepTimes

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 20.0


@dataclass
class Process:
    """A process of ours whose log lines (JSON on stderr) are read as they come."""

    popen: subprocess.Popen[str]
    lines: list[dict[str, Any]] = field(default_factory=list)
    text: list[str] = field(default_factory=list)

    def read(self) -> None:
        """Collect the log until it ends."""
        assert self.popen.stderr is not None
        for line in self.popen.stderr:
            self.text.append(line)
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue  # a warning of a library: `text` has it
            if isinstance(entry, dict):
                self.lines.append(entry)

    def find(self, event: str) -> dict[str, Any] | None:
        """The first log entry of this event."""
        return next((line for line in list(self.lines) if line.get("event") == event), None)

    def wait_for(self, event: str, timeout_s: float = START_TIMEOUT_S) -> dict[str, Any]:
        """Wait until an event is logged. Raises AssertionError with the log when it does not come."""
        wait_until(lambda: self.find(event) is not None or self.popen.poll() is not None, timeout_s)
        found = self.find(event)
        assert found is not None, f"{event!r} was not logged:\n{''.join(self.text)}"
        return found

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal and wait for the end; the exit status."""
        if self.popen.poll() is None:
            self.popen.send_signal(number)
        try:
            return self.popen.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            self.popen.wait()
            raise


@dataclass
class SchedulerProcess(Process):
    """A scheduler and where it listens."""

    address: str = ""
    metrics_address: str = ""


def wait_until(holds: Callable[[], bool], timeout_s: float = 30.0, what: str = "") -> None:
    """Poll until `holds`. Raises AssertionError after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.01)


def spawn(arguments: list[str], environment: dict[str, str] | None = None) -> subprocess.Popen[str]:
    # The caches are where the caller's are; no other setting of the caller's is meant for what we start.
    variables = {k: v for k, v in os.environ.items() if not k.startswith("PAGODA_") or k == "PAGODA_CACHE"}
    return subprocess.Popen(
        [sys.executable, *arguments],
        stderr=subprocess.PIPE,
        text=True,
        env={**variables, **(environment or {})},
        cwd=Path(__file__).parents[2],
    )


def follow(process: Process) -> None:
    threading.Thread(target=process.read, daemon=True).start()


@contextlib.contextmanager
def scheduler(*flags: str, **environment: str) -> Iterator[SchedulerProcess]:
    """A scheduler on free ports, until the block ends."""
    ports = ["--listen", "127.0.0.1:0", "--metrics-port", "0"]
    process = SchedulerProcess(spawn(["-m", "scheduler_svc", *ports, *flags], environment))
    follow(process)
    try:
        listening = process.wait_for("listening")
        process.address, process.metrics_address = listening["grpc"], listening["metrics"]
        yield process
    finally:
        process.stop()


@dataclass
class SimProcess(Process):
    """A simulated worker and where it will write its report."""

    report_path: Path | None = None

    def report(self) -> list[StepTimes]:
        """Stop the worker; when each of its steps was queued and done.

        Raises AssertionError where the scheduler broke a rule.
        """
        self.stop()
        assert self.report_path is not None
        report = json.loads(self.report_path.read_text())
        assert not report["broken"], report["broken"]
        return [StepTimes(**times) for times in report["times"]]


@contextlib.contextmanager
def sim_worker(address: str, report: Path | None = None, **options: object) -> Iterator[SimProcess]:
    """A simulated worker attached to `address`, until the block ends; options are its flags."""
    flags = ["--scheduler", address]
    for name, value in options.items():
        flags += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    if report is not None:
        flags += ["--report", str(report)]
    process = SimProcess(spawn(["-m", "tests.support.sim_worker", *flags]), report_path=report)
    follow(process)
    try:
        process.wait_for("attached")
        yield process
    finally:
        process.stop()
