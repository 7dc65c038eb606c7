"""`pagoda serve`: all three services under a supervisor, in the foreground, until Ctrl-C."""

from __future__ import annotations

import http.client
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import grpc
from rich.console import Console
from rich.markup import escape

from pagoda.calls import metadata_for
from pagoda.cli.cluster import (
    ClusterError,
    ClusterSpec,
    check_installed,
    check_model,
    programs_of,
    with_ports,
)
from pagoda.cli.supervise import State, Supervisor
from pagoda.v1 import scheduler_pb2 as spb
from pagoda.v1 import scheduler_pb2_grpc

POLL_S = 0.2


class Cluster:
    """A running local cluster: started, watched and stopped through this object."""

    def __init__(self, spec: ClusterSpec, run_dir: Path, console: Console) -> None:
        check_installed()
        if spec.model is not None:
            check_model(spec.model)
        self.spec = with_ports(spec)
        self._console = console
        self._supervisor = Supervisor(programs_of(self.spec), run_dir)
        self._seen: dict[str, State] = {}
        self._attached: set[str] = set()
        self._channel = grpc.insecure_channel(self.spec.scheduler_target)

    def start(self) -> None:
        """Start every process. Raises ClusterError."""
        self._supervisor.start()

    def stop(self) -> None:
        """End every process and wait for it."""
        self._channel.close()
        self._supervisor.stop()

    def wait_ready(self) -> None:
        """Show progress until the gateway can serve a first token. Raises ClusterError."""
        with self._console.status("starting scheduler, workers and gateway") as status:
            while not self._is_ready():
                self.look()
                waiting = [n for n in self._seen if n.startswith("worker-") and n not in self._attached]
                if waiting:
                    status.update(f"{', '.join(sorted(waiting))}: loading weights")
                time.sleep(POLL_S)
        self.look()

    def look(self) -> None:
        """Report what changed since the last look. Raises ClusterError when the cluster cannot go on."""
        states = self._supervisor.states()
        for state in states:
            self._report(self._seen.get(state.name), state)
            self._seen[state.name] = state
        self._report_workers()
        self._give_up_if_hopeless(states)

    def _report(self, before: State | None, now: State) -> None:
        doing = "loading weights" if now.name.startswith("worker-") else "starting"
        if before is None:
            if now.pid:
                self._say(f"{now.name}: {doing} (process {now.pid})")
            return
        if now.final and not before.final:
            self._say(
                f"[red]FATAL {now.name}: {now.last_exit}; it is not started again[/]\n"
                + escape(self._supervisor.log_tail(now.name))
            )
        elif now.pid != before.pid and now.pid:
            self._attached.discard(now.name)
            why = f"ended ({now.last_exit}) and " if now.last_exit else ""
            self._say(f"{now.name}: {why}was started again: {doing} (process {now.pid})")

    def _say(self, text: str) -> None:
        self._console.print(text, highlight=False, soft_wrap=True)

    def _report_workers(self) -> None:
        stub: Any = scheduler_pb2_grpc.ControlServiceStub(self._channel)  # type: ignore[no-untyped-call]
        request = spb.SnapshotRequest()
        try:
            snapshot = stub.Snapshot(request, timeout=1.0, metadata=metadata_for(None)).snapshot
        except grpc.RpcError as error:
            code = error.code()  # type: ignore[attr-defined]
            if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                return  # it is starting, again perhaps; its supervisor says so
            raise ClusterError(f"the scheduler refuses a snapshot: {code.name}: {error.details()}") from error
        attached = {worker.name for worker in snapshot.workers}
        for name in sorted(attached - self._attached):
            self._say(f"{name}: attached")
        self._attached = attached

    def _give_up_if_hopeless(self, states: list[State]) -> None:
        final = [state for state in states if state.final]
        workers = [state for state in states if state.name.startswith("worker-")]
        for state in final:
            if not state.name.startswith("worker-") or all(worker.final for worker in workers):
                code = 78 if state.last_exit == "exit status 78" else 1
                logs = self._supervisor.run_dir / "logs"
                raise ClusterError(f"{state.name} cannot run ({state.last_exit}); logs are in {logs}", code)

    def _is_ready(self) -> bool:
        host, port = self.spec.http_url.removeprefix("http://").rsplit(":", 1)
        connection = http.client.HTTPConnection(host, int(port), timeout=2.0)
        try:
            connection.request("GET", "/ready", headers=dict(metadata_for(None)))
            status = connection.getresponse().status
        except OSError:
            return False  # not listening yet
        finally:
            connection.close()
        if status == 401:
            raise ClusterError("the gateway wants a token that is not known here: set PAGODA_TOKEN")
        return status == 200


@contextmanager
def run_folder(given: Path | None) -> Iterator[Path]:
    """The folder of a cluster's logs and sockets: `given`, or a temporary one, removed if all went well."""
    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
        yield given
    else:
        folder = Path(tempfile.mkdtemp(prefix="pagoda-"))
        yield folder
        shutil.rmtree(folder)


def serve(spec: ClusterSpec, run_dir: Path | None, console: Console) -> None:
    """Run a cluster until SIGINT or SIGTERM. Raises ClusterError when it cannot start or go on."""
    with run_folder(run_dir) as folder:
        cluster = Cluster(spec, folder, console)
        signal.signal(signal.SIGTERM, as_interrupt)
        begin = time.monotonic()
        try:
            cluster.start()
            cluster.wait_ready()
            _announce(cluster.spec, folder, time.monotonic() - begin, console)
            while True:
                time.sleep(POLL_S)
                cluster.look()
        except KeyboardInterrupt:
            console.print("stopping")
        except ClusterError as error:
            if error.exit_code:
                raise
            console.print(str(error))
        finally:
            cluster.stop()
        console.print("stopped")


def _announce(spec: ClusterSpec, folder: Path, seconds: float, console: Console) -> None:
    console.print(f"\n[bold green]ready[/] at {spec.http_url} after {seconds:.1f} s", highlight=False)
    for what, where in (
        ("OpenAI API", f"{spec.http_url}/v1"),
        ("gRPC", spec.grpc_target),
        ("scheduler", f"{spec.scheduler_target}   (pagoda top --scheduler {spec.scheduler_target})"),
        ("logs", str(folder / "logs")),
    ):
        console.print(f"  {what:<12}{where}", highlight=False, soft_wrap=True)
    console.print("Ctrl-C stops everything.\n")


def as_interrupt(_signal: int, _frame: FrameType | None) -> None:
    """A signal handler: the command ends as it does at Ctrl-C."""
    raise KeyboardInterrupt
