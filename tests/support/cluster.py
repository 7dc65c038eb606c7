"""The real services on free ports, as processes of their own, for end-to-end tests.

    with cluster(dtype="float32") as c:
        c.url, c.grpc, c.scheduler.address ...

When the block ends, everything that ran must have gone and every block must be free or cached.
"""

from __future__ import annotations

import contextlib
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import grpc

from pagoda.models import EMBEDDED_MODEL
from pagoda.v1 import scheduler_pb2 as pb
from pagoda.v1 import scheduler_pb2_grpc as rpc
from tests.support.cluster_sched import Process, SchedulerProcess, follow, scheduler, spawn, wait_until


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@dataclass
class Cluster:
    """Running services. `url` and `grpc` are the gateway's, empty without one."""

    scheduler: SchedulerProcess
    model: str
    dtype: str
    worker_args: tuple[str, ...] = ()
    workers: dict[str, Process] = field(default_factory=dict)
    gateway: Process | None = None
    url: str = ""
    grpc: str = ""
    metrics: str = ""

    def start_worker(self, name: str, wait: bool = True) -> Process:
        """Start a worker process under this group name."""
        process = Process(
            spawn(
                ["-m", "gpu_worker", "--scheduler", self.scheduler.address, "--model", self.model]
                + ["--dtype", self.dtype, "--group-name", name, "--metrics-port", str(free_port())]
                + list(self.worker_args)
            )
        )
        follow(process)
        self.workers[name] = process
        if wait:
            process.wait_for("attached", 120)
        return process

    def start_gateway(self, *flags: str) -> None:
        """Start a gateway and wait until it is ready."""
        http, grpc_port, metrics = free_port(), free_port(), free_port()
        self.url, self.grpc = f"http://127.0.0.1:{http}", f"127.0.0.1:{grpc_port}"
        self.metrics = f"http://127.0.0.1:{metrics}/metrics"
        self.gateway = Process(
            spawn(
                ["-m", "gateway_svc", "--scheduler", self.scheduler.address, "--model", self.model]
                + ["--http-port", str(http), "--grpc-port", str(grpc_port), "--metrics-port", str(metrics)]
                + list(flags)
            )
        )
        follow(self.gateway)
        wait_until(self.is_ready, 60, "the gateway is ready")

    def is_ready(self) -> bool:
        """Whether the first token can be served."""
        assert self.gateway is not None
        assert self.gateway.popen.poll() is None, "".join(self.gateway.text)
        try:
            with urllib.request.urlopen(f"{self.url}/ready", timeout=5) as reply:
                return bool(reply.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def snapshot(self, requests: bool = False, blocks: bool = False) -> pb.Snapshot:
        """The scheduler's state now."""
        return snapshot(self.scheduler.address, requests, blocks)

    def assert_idle(self) -> None:
        """Nothing runs, and free plus cached blocks are all blocks.

        Raises AssertionError when that is not so within a few seconds.
        """
        assert_idle(self.scheduler.address)


def snapshot(address: str, requests: bool = False, blocks: bool = False) -> pb.Snapshot:
    """The state of the scheduler at `address`."""
    with grpc.insecure_channel(address) as channel:
        request = pb.SnapshotRequest(include_requests=requests, include_blocks=blocks)
        return rpc.ControlServiceStub(channel).Snapshot(request, timeout=10).snapshot


def assert_idle(address: str) -> None:
    """See `Cluster.assert_idle`."""

    def idle() -> bool:
        now = snapshot(address)
        return not (now.num_running or now.num_waiting) and all(
            w.num_free_blocks + w.num_cached_blocks == w.num_blocks
            and not (w.num_slots_used or w.num_host_blocks_used)
            for w in now.workers
        )

    try:
        wait_until(idle, 15, "idle with all blocks back")
    except AssertionError as error:
        raise AssertionError(f"{error}\n{snapshot(address, requests=True)}") from None


@contextlib.contextmanager
def cluster(
    *,
    model: str = EMBEDDED_MODEL,
    dtype: str = "float32",
    workers: int = 1,
    scheduler_args: Sequence[str] = (),
    worker_args: Sequence[str] = (),
    gateway_args: Sequence[str] | None = None,
) -> Iterator[Cluster]:
    """Scheduler, workers named w0, w1, ... and, unless `gateway_args` is None, a gateway."""
    with scheduler(*scheduler_args) as process:
        running = Cluster(process, model, dtype, tuple(worker_args))
        try:
            for i in range(workers):
                running.start_worker(f"w{i}")
            if gateway_args is not None:
                running.start_gateway(*gateway_args)
            yield running
            running.assert_idle()
        except BaseException:
            for name, child in {"scheduler": process, **running.workers}.items():
                print(f"--- the end of {name}'s log\n{''.join(child.text[-20:])}")
            raise
        finally:
            for child in filter(None, [running.gateway, *running.workers.values()]):
                child.stop()
