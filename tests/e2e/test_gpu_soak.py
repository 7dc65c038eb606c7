"""The long run of the GPU table, small and with a simulated worker: real services, real sockets."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu_services import ROOT, environment

pytestmark = pytest.mark.timeout(180)

SMALL = [
    *("--simulate", "--slots", "32", "--blocks", "300", "--at-once", "60"),
    *("--longest-prompt", "300", "--longest-answer", "64", "--cycle", "125"),
    *("--warm-requests", "100", "--rounds", "2", "--settle-s", "0", "--tell-s", "0.5"),
]


def start(folder: Path, *flags: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "benchmarks.gpu_soak", *SMALL, "--logs", str(folder / "logs")]
    command += ["--out", str(folder / "soak.json"), *flags]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT,
        env=environment({}),
    )  # fmt: skip


def test_all_holds_in_a_small_run(tmp_path: Path) -> None:
    process = start(tmp_path, "--num-requests", "500")
    said, _ = process.communicate(timeout=150)
    assert process.returncode == 0, said
    (row,) = json.loads((tmp_path / "soak.json").read_text())["results"]
    assert row["requests"] == 500 and row["num_violations"] == 0 and row["violations"] == []
    # A request that is sent twice is refused once and so ends twice.
    assert 500 <= sum(row["ended"].values()) <= 510
    assert row["preemptions"] and row["cached_share"] and row["sessions"] == 8
    assert row["ended"]["stopped: cancelled"] and row["ended"]["refused"] and row["ended"]["length"] > 250
    assert len(row["memory"]["idle"]) == 3 and row["book_checks"] >= 3


def test_an_interrupted_run_says_so_and_leaves_no_process(tmp_path: Path) -> None:
    process = start(tmp_path, "--num-requests", "50000")
    scheduler = tmp_path / "logs" / "scheduler.log"
    deadline = time.monotonic() + 60
    while not (scheduler.exists() and "request_end" in scheduler.read_text()):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "failed: interrupted" in said and "Traceback" not in said
    assert json.loads((tmp_path / "soak.json").read_text())["failed"] == "interrupted"
    assert _running(str(tmp_path)) == []


def _running(mark: str) -> list[str]:
    """Processes whose output goes below a folder."""
    found = []
    for link in Path("/proc").glob("[0-9]*/fd/1"):
        try:
            if str(link.readlink()).startswith(mark):
                found.append(link.parts[2])
        except OSError:
            continue
    return found
