"""Runs supervisord for a cluster and tells what becomes of its processes."""

from __future__ import annotations

import configparser
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import xmlrpc.client
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from supervisor.xmlrpc import Faults, SupervisorTransport

from pagoda.cli.cluster import FINAL_EXIT_CODES, STOP_WAIT_S, ClusterError, Program, supervisor_config

MAX_SOCKET_PATH = 100  # sockaddr_un holds 108 bytes, and supervisor appends its process id for a moment
TAIL_LINES = 12
STOP_ALL_S = 3 * STOP_WAIT_S + 5  # the tiers stop one after another


@dataclass(frozen=True)
class State:
    """One process as supervisord sees it. `final` says that it will not be started again."""

    name: str
    pid: int
    state: str
    final: bool
    last_exit: str


class Supervisor:
    """A supervisord of our own, for the programs of one cluster."""

    def __init__(self, programs: list[Program], run_dir: Path) -> None:
        self.run_dir = run_dir
        self._programs = {program.name: program for program in programs}
        self._process: subprocess.Popen[bytes] | None = None
        self._pids: dict[str, int] = {}

    def start(self) -> None:
        """Start supervisord. Raises ClusterError when it does not come up."""
        config = self.run_dir / "supervisord.conf"
        if config.exists() and (running := _control(config)) is not None:
            pid = running.supervisor.getPID()
            raise ClusterError(f"a cluster runs in {self.run_dir} already (supervisord is process {pid})")
        (self.run_dir / "logs").mkdir(parents=True, exist_ok=True)
        (self.run_dir / "supervisord.log").write_bytes(b"")
        config.write_text(supervisor_config([*self._programs.values()], self.run_dir, self._socket_path()))
        with open(self.run_dir / "supervisord.out", "wb") as out:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "pagoda.cli.bound_supervisord", str(os.getpid()), "-c", str(config)],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for us; we then stop it in order
            )
        deadline = time.monotonic() + 20
        while (control := _control(config)) is None:
            if self._process.poll() is not None or time.monotonic() > deadline:
                out_text = (self.run_dir / "supervisord.out").read_text().strip()
                raise ClusterError(f"supervisord did not start: {out_text}")
            time.sleep(0.02)
        self._control = control

    def states(self) -> list[State]:
        """What every process is doing. Raises ClusterError when supervisord is gone; with 0 when told to."""
        try:
            infos: Any = self._control.supervisor.getAllProcessInfo()
        except (OSError, xmlrpc.client.Fault) as error:
            if self._process is not None and self._process.wait(STOP_ALL_S) == 0:
                raise ClusterError("stopped from outside", 0) from error
            raise ClusterError(f"supervisord ended: {error}") from error
        exits = self._last_exits()
        states = []
        for info in infos:
            name, state = info["name"], info["statename"]
            self._pids[name] = info["pid"]
            last_exit = exits.get(name, "")
            refused = any(last_exit == f"exit status {code}" for code in FINAL_EXIT_CODES)
            if refused and state == "BACKOFF":  # it ended within its first second, which supervisor retries
                state = self._hold(name)
            final = state == "FATAL" or (refused and state in ("EXITED", "STOPPED"))
            states.append(State(name, info["pid"], state, final, last_exit))
        return states

    def _hold(self, name: str) -> str:
        """Keep a process from being tried again; its state after that."""
        try:
            self._control.supervisor.stopProcess(f"{self._programs[name].tier}:{name}")
        except xmlrpc.client.Fault as fault:
            if fault.faultCode != Faults.NOT_RUNNING:
                raise
            return "STARTING"  # the next try has begun; the next look decides
        return "STOPPED"

    def log_tail(self, name: str) -> str:
        """The last lines that a process wrote."""
        path = self.run_dir / "logs" / f"{name}.log"
        lines = path.read_text(errors="replace").splitlines() if path.exists() else []
        return "\n".join(lines[-TAIL_LINES:])

    def stop(self) -> None:
        """Stop every process, then supervisord; kill what does not listen."""
        if self._process is None:
            return
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(STOP_ALL_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for name, pid in self._pids.items():  # left only where supervisord itself was killed
            if pid and _command_of(pid) == self._programs[name].argv:
                os.killpg(pid, signal.SIGKILL)
        self._process = None

    def _socket_path(self) -> Path:
        path = self.run_dir.resolve() / "supervisor.sock"
        if len(str(path)) > MAX_SOCKET_PATH:
            path = Path(tempfile.mkdtemp(prefix="pagoda-")) / "supervisor.sock"
        return path

    def _last_exits(self) -> dict[str, str]:
        """How each process ended last: its log is the only place where supervisord says so in every case."""
        text = (self.run_dir / "supervisord.log").read_text(errors="replace")
        return dict(re.findall(r"exited: (\S+) \((.*?); (?:not )?expected\)", text))


def stop_running(run_dir: Path) -> bool:
    """Stop the cluster that runs in `run_dir`, and wait for its end; False when none does."""
    control = _control(run_dir / "supervisord.conf")
    if control is None:
        return False
    control.supervisor.shutdown()
    deadline = time.monotonic() + STOP_ALL_S
    while _control(run_dir / "supervisord.conf") is not None:
        if time.monotonic() > deadline:
            raise ClusterError(f"the cluster in {run_dir} does not end; its log: {run_dir}/supervisord.log")
        time.sleep(0.1)
    return True


def _control(config: Path) -> Any:
    """supervisord's control interface, None when none answers."""
    parser = configparser.RawConfigParser()
    parser.read(config)
    path = parser.get("unix_http_server", "file", fallback="").replace("%%", "%")
    if not os.path.exists(path):
        return None
    proxy = xmlrpc.client.ServerProxy(
        "http://127.0.0.1", transport=SupervisorTransport(serverurl=f"unix://{path}")
    )
    try:
        proxy.supervisor.getPID()
    except OSError:
        return None
    except xmlrpc.client.Fault as fault:
        if fault.faultCode != Faults.SHUTDOWN_STATE:  # while it stops its processes, it is still there
            raise
    return proxy


def _command_of(pid: int) -> tuple[str, ...]:
    """The command line of a process, empty when there is no such process."""
    path = Path(f"/proc/{pid}/cmdline")
    return tuple(path.read_text().split("\0")[:-1]) if path.exists() else ()
