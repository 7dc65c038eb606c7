"""Pagoda's services as processes of their own, for measuring: started, watched, and ended by their ids."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import grpc

from pagoda.v1 import scheduler_pb2 as pb
from pagoda.v1 import scheduler_pb2_grpc as rpc

ROOT = Path(__file__).resolve().parents[1]
STOP_S = 10.0
STACKS_S = 2.0
POLL_S = 0.02
TAIL_LINES, STACK_LINES = 25, 70
LINE_CHARS = 600


class ServiceError(Exception):
    """A service ended, or is not ready in time; the message names it and ends with its last lines."""


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def environment(more: Mapping[str, str]) -> dict[str, str]:
    """The caller's variables without its Pagoda settings, with Pagoda to import, and `more`."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PAGODA_") or k == "PAGODA_CACHE"}
    path = [str(ROOT), str(ROOT / "clients/python"), *filter(None, [kept.get("PYTHONPATH")])]
    # A service that is told to abort says where each of its threads was.
    return kept | {"PYTHONPATH": os.pathsep.join(path), "PYTHONFAULTHANDLER": "1"} | dict(more)


class Processes:
    """Running processes by name, each with its log in `folder`; use as a context manager."""

    def __init__(self, folder: Path, variables: Mapping[str, str] | None = None) -> None:
        self._folder = folder
        self._environment = environment(variables or {})
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def start(self, name: str, *arguments: str, cwd: Path = ROOT) -> None:
        """Start Python with these arguments; `name` is also its log's."""
        with self.log_path(name).open("wb") as log:
            command = [sys.executable, *arguments]
            log.write(f"$ {' '.join(command)}\n".encode())
            log.flush()
            self._running[name] = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=self._environment, cwd=cwd
            )

    def log_path(self, name: str) -> Path:
        """Where a process logs to."""
        return self._folder / f"{name}.log"

    def pid(self, name: str) -> int:
        """The process id of what was started under this name."""
        return self._running[name].pid

    def tail(self, name: str, num_lines: int = TAIL_LINES) -> str:
        """The last lines of a log, or what it says from its end by a signal on; long lines cut."""
        lines = self.log_path(name).read_text(errors="replace").splitlines()
        fatal = next((i for i, line in enumerate(lines) if line.startswith("Fatal Python error")), None)
        lines = lines[-num_lines:] if fatal is None else lines[fatal : fatal + num_lines]
        return "\n".join(f"  {name}| {line[:LINE_CHARS]}" for line in lines)

    def check(self) -> None:
        """Raises ServiceError where a process has ended."""
        for name, process in self._running.items():
            if (code := process.poll()) is not None:
                raise ServiceError(f"{name} ended with {code}; its log's end:\n{self.tail(name)}")

    def show_stacks(self) -> None:
        """Print where every thread of every process is, which ends them: for a run that hangs."""
        for process in self._running.values():
            if process.poll() is None:
                process.send_signal(signal.SIGABRT)
        time.sleep(STACKS_S)
        for name in self._running:
            print(f"--- {name} hung here:\n{self.tail(name, STACK_LINES)}", flush=True)

    def stop(self) -> None:
        """End all, the last started first; kill what does not end by itself."""
        for process in reversed(self._running.values()):
            if process.poll() is None:
                process.terminate()
        deadline = time.monotonic() + STOP_S
        for process in self._running.values():
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._running.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


class Services(Processes):
    """Scheduler, one worker and, where wanted, a gateway."""

    def __init__(self, folder: Path, variables: Mapping[str, str] | None = None) -> None:
        super().__init__(folder, variables)
        self.address = f"127.0.0.1:{free_port()}"
        self.url = f"http://127.0.0.1:{free_port()}"

    def start_scheduler(self, *flags: str) -> None:
        """Start the scheduler on a port of its own."""
        self.start(
            "scheduler", "-m", "scheduler_svc", "--listen", self.address, "--metrics-port", "0", *flags
        )

    def start_worker(self, *command: str) -> None:
        """Start what dials the scheduler: the module's `-m` form and its flags."""
        self.start("worker", *command, "--scheduler", self.address)

    def start_gateway(self, model: Path, *flags: str) -> None:
        """Start the gateway over the tokenizer in `model`."""
        ports = ("--http-port", self.url.rpartition(":")[2], "--grpc-port", "0", "--metrics-port", "0")
        self.start(
            "gateway", "-m", "gateway_svc", "--scheduler", self.address, "--model", str(model), *ports, *flags
        )

    def wait_attached(self, limit_s: float) -> None:
        """Wait until a worker serves. Raises ServiceError."""
        with grpc.insecure_channel(self.address) as channel:
            stub = rpc.ControlServiceStub(channel)
            self._wait(lambda: bool(_snapshot(stub, wait=False).workers), limit_s, "no worker is attached")

    def wait_url(self, limit_s: float) -> None:
        """Wait until the gateway can serve a first token. Raises ServiceError."""
        self._wait(lambda: answers(f"{self.url}/ready"), limit_s, "the gateway is not ready")

    def _wait(self, holds: Callable[[], bool], limit_s: float, what: str) -> None:
        deadline = time.monotonic() + limit_s
        while True:
            self.check()
            try:
                if holds():
                    return
            except grpc.RpcError:
                pass  # the scheduler does not listen yet
            if time.monotonic() > deadline:
                self.show_stacks()
                raise ServiceError(f"{what} after {limit_s:.0f} s")
            time.sleep(POLL_S)

    def describe(self) -> str:
        """What the scheduler says of itself now, in a few lines, for a run that hangs."""
        try:
            with grpc.insecure_channel(self.address) as channel:
                now = _snapshot(rpc.ControlServiceStub(channel), wait=True)
        except grpc.RpcError as error:
            return f"the scheduler does not answer: {error}"
        lines = [f"{now.num_running} running, {now.num_waiting} waiting, {now.num_preemptions} preemptions"]
        for w in now.workers:
            lines.append(
                f"{w.name}: epoch {w.epoch}, {w.num_inflight} steps in flight, horizon {w.horizon}, "
                f"{w.num_slots_used} of {w.max_slots} slots, {w.num_free_blocks} of {w.num_blocks} blocks "
                f"free, {w.step_us} us an iteration"
            )
        lines += [f"waiting: {r.why_not_running}" for r in now.requests[:3] if r.why_not_running]
        return "\n".join(lines)


def _snapshot(stub: rpc.ControlServiceStub, wait: bool) -> pb.Snapshot:
    request = pb.SnapshotRequest(include_requests=wait, max_requests=3)
    snapshot: pb.Snapshot = stub.Snapshot(request, timeout=5).snapshot
    return snapshot


def answers(url: str) -> bool:
    """Whether a GET is answered with 200."""
    try:
        with urllib.request.urlopen(url, timeout=5) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, OSError):
        return False


@contextmanager
def reporting(services: Services) -> Iterator[None]:
    """What fails inside shows where every service was, which ends them, before it goes on its way."""
    try:
        yield
    except ServiceError:
        raise  # it tells all there is to tell
    except Exception:
        services.show_stacks()
        raise
