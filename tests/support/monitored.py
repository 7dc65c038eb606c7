"""Scheduler, worker and gateway under the supervisor of `make cluster`, and a real Prometheus beside them.

    with monitored(folder) as stack:
        stack.prometheus.at("up", time.time())

Prometheus runs deploy/prometheus with the targets that `make monitoring` finds, but scrapes each second, and
an alert fires at once.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pagoda.cli.cluster import ClusterSpec, programs_of, with_ports
from pagoda.cli.supervise import Supervisor
from pagoda.models import EMBEDDED_MODEL
from tests.support.cluster import assert_idle, free_port
from tests.support.cluster_sched import wait_until
from tests.support.metrics import scrape
from tests.support.supervised import started
from tools import monitoring
from tools.boards.ask import Prometheus

START_TIMEOUT_S = 120.0
# Blocks for so few requests at once that some of the traffic is preempted.
WORKER = ("--num-blocks", "30", "--block-size", "16", "--max-model-len", "448")


@dataclass
class Stack:
    """What runs."""

    spec: ClusterSpec
    supervisor: Supervisor
    run_dir: Path
    prometheus: Prometheus

    @property
    def num_services(self) -> int:
        """How many Prometheus scrapes."""
        return len(monitoring.targets_of(self.run_dir))

    def kill(self, program: str) -> None:
        """kill -9; the supervisor starts it again."""
        pid = next(state.pid for state in self.supervisor.states() if state.name == program)
        os.kill(pid, signal.SIGKILL)

    def wait_ready(self) -> None:
        """Wait until the gateway can serve a first token."""

        def ready() -> bool:
            self.supervisor.states()  # raises when the supervisor has gone
            try:
                with urllib.request.urlopen(f"{self.spec.http_url}/ready", timeout=5) as reply:
                    return bool(reply.status == 200)
            except OSError:
                return False

        wait_until(ready, START_TIMEOUT_S, "the gateway is ready")

    def exposed(self) -> str:
        """What all services expose now."""
        ports = [port for _, port in monitoring.targets_of(self.run_dir)]
        return "".join(scrape(f"http://127.0.0.1:{port}/metrics") for port in ports)


@contextlib.contextmanager
def monitored(run_dir: Path) -> Iterator[Stack]:
    """All of it on free ports, until the block ends; then all must be idle and no block lost."""
    spec = with_ports(
        ClusterSpec(
            model=EMBEDDED_MODEL,
            dtype="bfloat16",
            http_port=0,
            grpc_port=0,
            scheduler_port=0,
            metrics_port=0,
            common_args=("--metrics-alias", "vllm"),
            worker_args=WORKER,
        )
    )
    with started(programs_of(spec), run_dir) as supervisor, prometheus(run_dir) as asked:
        stack = Stack(spec, supervisor, run_dir, asked)
        stack.wait_ready()
        yield stack
        assert_idle(spec.scheduler_target)


@contextlib.contextmanager
def prometheus(run_dir: Path) -> Iterator[Prometheus]:
    """A Prometheus that watches the cluster of `run_dir`."""
    folder = run_dir / "monitoring"
    (folder / "data").mkdir(parents=True)
    config = monitoring.write_config(folder, monitoring.targets_of(run_dir))
    hurry(config, r"(scrape|evaluation)_interval: \d+s", r"\1_interval: 1s")
    hurry(folder / "rules" / "alerts.yml", r"for: \d+m", "for: 0s")
    port = free_port()
    log = folder / "prometheus.log"
    with open(log, "wb") as out:
        process = subprocess.Popen(
            monitoring.command_line(config, folder / "data", port), stdout=out, stderr=subprocess.STDOUT
        )
    try:
        wait_until(lambda: answers(port) or process.poll() is not None, 60, "Prometheus is ready")
        assert process.poll() is None, log.read_text()
        yield Prometheus(f"http://127.0.0.1:{port}")
        assert process.poll() is None, log.read_text()
    finally:
        process.terminate()
        process.wait(30)


def answers(port: int) -> bool:
    """Whether a Prometheus on this port is ready for queries."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/-/ready", timeout=5) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def hurry(path: Path, pattern: str, replacement: str) -> None:
    """Change what the file says everywhere. Raises AssertionError where it does not say it."""
    text, count = re.subn(pattern, replacement, path.read_text())
    assert count, f"{path.name} has no {pattern}"
    path.write_text(text)
