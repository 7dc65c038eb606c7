"""The stamps of a first token's way, through a simulated worker: real services, real sockets."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu_services import ROOT, environment

pytestmark = pytest.mark.timeout(120)

WAY = ["begins", "Engine.submit", "Engine._turn", "Rank.post", "WorkerHub._result", "Outbox.deliver", "ends"]


def test_every_station_is_met_in_order(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu_first_token", "--simulate", "--settle-s", "1"]
    command += ["--repeat", "3", "--worker-args", "--iteration-ms 5", "--logs", str(tmp_path / "logs")]
    command += ["--base", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment({}), check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split(maxsplit=2) for line in done.stdout.splitlines() if len(line.split()) >= 3]
    stations = [(float(total), name) for _, total, name in rows if name.split()[-1] == "done" or any(
        name.endswith(station) for station in WAY)]  # fmt: skip
    times = [next(at for at, name in stations if name.endswith(station)) for station in WAY]
    assert times == sorted(times) and times[-1] > 5000  # the device's 5 ms are between
