"""`make monitoring`: Debian's Prometheus against the local cluster, in the foreground, until Ctrl-C.

    python tools/monitoring.py [--run-dir .run] [--port 9090] [--workers 1]

It runs deploy/prometheus as it is, but for the targets: those are read from the folder of the cluster that
`make cluster` runs, again and again, so that it may be started before the cluster or after it, and follows a
cluster with other ports or more workers. Where no cluster has run, it looks for one with the usual ports. Its
data lies in RUN_DIR/monitoring and stays there.
"""

from __future__ import annotations

import argparse
import configparser
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "deploy" / "prometheus"
UNPACKED = ROOT / ".prometheus" / "usr"
FIRST_PORT = 9400
FOLLOW_S = 2.0
STOP_S = 20.0
TIERS = {"gateway_svc": "gateway", "scheduler_svc": "scheduler", "gpu_worker": "worker"}

Targets = list[tuple[str, int]]


class MonitoringError(Exception):
    """Prometheus cannot be run; the message says what to do."""


def find(program: str) -> Path:
    """`prometheus` or `promtool`: what `make prometheus` unpacked, else what is installed.

    Raises MonitoringError where there is neither.
    """
    unpacked, installed = UNPACKED / "bin" / program, shutil.which(program)
    if unpacked.exists():
        return unpacked
    if installed is not None:
        return Path(installed)
    raise MonitoringError(
        f"{program} is not installed. `make prometheus` unpacks Debian's package into .prometheus/ and "
        "touches nothing else; `apt-get install prometheus` as root installs it, and starts a server of its "
        "own on port 9090."
    )


def usual_targets(num_workers: int) -> Targets:
    """Tier and port of each service, where they are unless told otherwise."""
    tiers = ["gateway", "scheduler", *["worker"] * num_workers]
    return [(tier, FIRST_PORT + i) for i, tier in enumerate(tiers)]


def targets_of(run_dir: Path) -> Targets:
    """Tier and port of each service of the cluster that runs, or ran last, in `run_dir`; none if none did."""
    parser = configparser.RawConfigParser(strict=False)
    parser.read(run_dir / "supervisord.conf")
    commands = [parser[s].get("command", "") for s in parser.sections() if s.startswith("program:")]
    found = []
    for command in commands:
        module, port = re.search(r"-m (\w+)", command), re.search(r"--metrics-port (\d+)", command)
        if module and port and module[1] in TIERS:
            found.append((TIERS[module[1]], int(port[1])))
    return found


def write_targets(folder: Path, targets: Targets) -> None:
    """Tell a running Prometheus where the services are. In one go: it never reads half a file."""
    groups = [{"labels": {"tier": tier}, "targets": [f"127.0.0.1:{port}"]} for tier, port in targets]
    fresh = folder / "targets" / "pagoda.new"
    fresh.write_text(json.dumps(groups, indent=1) + "\n")
    fresh.replace(folder / "targets" / "pagoda.yml")  # JSON is YAML


def write_config(folder: Path, targets: Targets, token: str = "") -> Path:
    """Copy deploy/prometheus to `folder`, with these targets and this token; the file to start from."""
    for part in ("rules", "targets"):
        shutil.rmtree(folder / part, ignore_errors=True)
        shutil.copytree(CONFIG / part, folder / part)
    text = (CONFIG / "prometheus.yml").read_text()
    if token:
        commented = "    # authorization:\n    #   credentials_file: token\n"
        assert commented in text, "deploy/prometheus/prometheus.yml shows how a token is given"
        text = text.replace(commented, commented.replace("# ", ""))
        secret = folder / "token"
        secret.touch(mode=0o600)
        secret.write_text(token)
    config = folder / "prometheus.yml"
    config.write_text(text)
    write_targets(folder, targets)
    return config


def command_line(config: Path, data: Path, port: int) -> list[str]:
    """How Prometheus is started, on loopback only. Raises MonitoringError when it is not there."""
    program = find("prometheus")
    pages = UNPACKED / "share" / "prometheus" / "web"
    return [
        str(program),
        f"--config.file={config}",
        f"--storage.tsdb.path={data}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--log.level=warn",
        # Debian's build looks for its pages where the package installs them.
        *([f"--web.local-assets={pages}/"] if program.is_relative_to(UNPACKED) and pages.exists() else []),
    ]


def check_free(port: int) -> None:
    """Raises MonitoringError when something listens on `port` already."""
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind(("127.0.0.1", port))
        except OSError as error:
            raise MonitoringError(
                f"cannot use 127.0.0.1:{port}: {error.strerror}. Perhaps Debian's own prometheus service "
                "runs there; choose another port: make monitoring PROMETHEUS_PORT=9091"
            ) from error


def run(run_dir: Path, port: int, num_workers: int) -> int:
    """Run Prometheus until SIGINT or SIGTERM; its exit status. Raises MonitoringError."""
    check_free(port)
    folder = run_dir.resolve() / "monitoring"
    (folder / "data").mkdir(parents=True, exist_ok=True)
    targets = targets_of(run_dir) or usual_targets(num_workers)
    config = write_config(folder, targets, os.environ.get("PAGODA_TOKEN", ""))
    told = threading.Event()

    def tell(number: int, frame: FrameType | None) -> None:
        told.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, tell)
    # In a session of its own, so that Ctrl-C is for us and Prometheus is told once.
    process = subprocess.Popen(command_line(config, folder / "data", port), start_new_session=True)
    try:
        print(f"Prometheus: http://127.0.0.1:{port}, alerts at /alerts; Ctrl-C ends it", flush=True)
        print(f"scraping {_words(targets)}", flush=True)
        while not told.wait(FOLLOW_S) and process.poll() is None:
            found = targets_of(run_dir) or targets
            if found != targets:
                targets = found
                write_targets(folder, targets)
                print(f"scraping {_words(targets)}", flush=True)
    finally:
        if process.poll() is None:
            process.terminate()
        try:
            status = process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            status = process.wait()
    if told.is_set():
        print("stopped", flush=True)
        return 0
    raise MonitoringError(f"Prometheus ended by itself with status {status}; its words are above")


def _words(targets: Targets) -> str:
    return ", ".join(f"{tier} :{port}" for tier, port in targets)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run-dir", type=Path, default=Path(".run"), help="of the cluster")
    parser.add_argument("--port", type=int, default=9090, help="where Prometheus listens, on 127.0.0.1")
    parser.add_argument("--workers", type=int, default=1, help="to expect where no cluster has run")
    given = parser.parse_args(argv)
    try:
        return run(given.run_dir, given.port, given.workers)
    except MonitoringError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
