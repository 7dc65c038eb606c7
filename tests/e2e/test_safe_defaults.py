"""Nobody is served by accident: loopback by default, a token or `--insecure` for more; no text in logs."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import re
import stat
import subprocess
import sys
import urllib.error
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

import pagoda
from pagoda.internal.v1 import worker_pb2, worker_pb2_grpc
from pagoda.transport import bearer
from pagoda.v1 import inference_pb2 as ipb
from pagoda.v1 import inference_pb2_grpc, scheduler_pb2_grpc
from pagoda.v1 import scheduler_pb2 as pb
from tests.support.cluster_sched import scheduler, wait_until
from tests.support.metrics import scrape

pytestmark = pytest.mark.timeout(600)

ROOT = Path(__file__).parents[2]
TOKEN = "a-token-for-the-tests"
# Words that no log has by chance.
SECRET = "Zwiebelkuchen Quetzalcoatl"
TIERS = ("scheduler_svc", "gateway_svc", "gpu_worker")
LISTENING = "0A"


def environment(**more: str) -> dict[str, str]:
    """The caller's environment without settings of ours; `pagoda.*` models are still found."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PAGODA_") or k == "PAGODA_CACHE"}
    return {**kept, **more}


@dataclass
class Served:
    """A running `pagoda serve`."""

    process: subprocess.Popen[str]
    run_dir: Path
    http: str = ""
    grpc: str = ""
    scheduler: str = ""

    @property
    def said(self) -> str:
        """What it has printed."""
        return (self.run_dir / "said").read_text()

    def processes(self) -> list[psutil.Process]:
        """The command, its supervisor and the services."""
        mine = psutil.Process(self.process.pid)
        return [mine, *mine.children(recursive=True)]

    def listening(self) -> dict[str, list[tuple[str, int]]]:
        """Where each tier's processes listen; under "" what is none of them."""
        places: dict[str, list[tuple[str, int]]] = {}
        listeners = tcp_listeners()
        for process in self.processes():
            command = process.cmdline()
            tier = next((tier for tier in TIERS if tier in command), "")
            found = [listeners[inode] for inode in sockets_of(process.pid) if inode in listeners]
            places.setdefault(tier, []).extend(found)
        return places


def tcp_listeners() -> dict[str, tuple[str, int]]:
    """Address and port of every listening TCP socket, by inode."""
    found = {}
    for name in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == LISTENING:
                address, port = fields[1].split(":")
                # Words of four bytes, each in the machine's order.
                words = [bytes.fromhex(address[i : i + 8])[::-1] for i in range(0, len(address), 8)]
                place = ipaddress.ip_address(b"".join(words))
                # An IPv6 socket may stand for an IPv4 address, as gRPC's do.
                mapped = place.ipv4_mapped if isinstance(place, ipaddress.IPv6Address) else None
                found[fields[9]] = (str(mapped or place), int(port, 16))
    return found


def sockets_of(pid: int) -> Iterator[str]:
    """Inodes of the sockets that a process holds."""
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed while we looked
            if match := re.fullmatch(r"socket:\[(\d+)\]", os.readlink(descriptor)):
                yield match[1]


@contextlib.contextmanager
def served(run_dir: Path, *options: str, **variables: str) -> Iterator[Served]:
    """`pagoda serve` on free ports, ready."""
    ports = [f"--{name}-port=0" for name in ("http", "grpc", "scheduler", "metrics")]
    command = [sys.executable, "-m", "pagoda.cli.main", "serve", "--run-dir", str(run_dir), *ports]
    command += ["--dtype", "bfloat16", "--num-blocks", "128", *options]
    with (run_dir / "said").open("w") as out:
        popen = subprocess.Popen(
            command, stdout=out, stderr=out, env=environment(**variables), cwd=ROOT, text=True
        )
    running = Served(popen, run_dir)
    try:
        wait_until(lambda: "ready" in running.said or popen.poll() is not None, 180, "pagoda serve is ready")
        assert popen.poll() is None, running.said
        running.http = found(r"ready at (\S+)", running.said)
        running.grpc = found(r"gRPC +(\S+)", running.said)
        running.scheduler = found(r"scheduler +(\S+)", running.said)
        yield running
    finally:
        popen.terminate()
        popen.wait(60)


def found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    assert match is not None, text
    return match[1]


# ---------------------------------------------------------------------------------------------- loopback


def test_every_port_of_every_process_is_on_loopback(tmp_path: Path) -> None:
    with served(tmp_path) as running:
        places = running.listening()
    assert {tier: len(found) for tier, found in places.items()} == {
        "": 0,  # the supervisor is steered through a socket of the file system
        "scheduler_svc": 2,
        "gateway_svc": 3,
        "gpu_worker": 1,
    }
    for address, _ in (place for found in places.values() for place in found):
        assert ipaddress.ip_address(address).is_loopback


@pytest.mark.parametrize("tier", TIERS)
def test_each_service_by_itself_means_loopback(tier: str) -> None:
    done = run_service(tier, "--print-config")
    assert done.returncode == 0, done.stderr
    settings = json.loads(done.stdout)
    hosts = {name: value for name, value in settings.items() if name == "listen" or name.endswith("_host")}
    assert hosts or tier == "gpu_worker", "a worker's metrics are on loopback and nowhere else"
    assert all(value.split(":")[0] == "127.0.0.1" for value in hosts.values()), hosts
    assert not settings["insecure"]


def run_service(tier: str, *flags: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a service that is expected to end by itself."""
    return subprocess.run(
        [sys.executable, "-m", tier, *flags],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment(**variables),
        cwd=ROOT,
    )


REFUSED = [
    ("scheduler_svc", "--listen", "0.0.0.0:0"),
    ("scheduler_svc", "--listen", "[::]:0"),
    ("scheduler_svc", "--listen", "192.0.2.1:0"),
    ("scheduler_svc", "--metrics-host", "0.0.0.0"),
    ("gateway_svc", "--http-host", "0.0.0.0"),
    ("gateway_svc", "--http-host", ""),
    ("gateway_svc", "--grpc-host", "::"),
    ("gateway_svc", "--metrics-host", "0.0.0.0"),
]


@pytest.mark.parametrize(("tier", "flag", "address"), REFUSED)
def test_another_address_is_refused_at_start(tier: str, flag: str, address: str) -> None:
    done = run_service(tier, flag, address)
    assert done.returncode == 2
    said = done.stderr.strip()
    assert said.startswith(f"error: {flag}: ") and address in said
    assert "--token" in said and "--insecure" in said
    assert len(said.splitlines()) == 1


def test_the_same_by_variable_and_by_file(tmp_path: Path) -> None:
    done = run_service("gateway_svc", PAGODA_GATEWAY_METRICS_HOST="0.0.0.0")
    assert done.returncode == 2 and done.stderr.startswith("error: --metrics-host")
    file = tmp_path / "pagoda.toml"
    file.write_text('[scheduler]\nlisten = "0.0.0.0:0"\n')
    done = run_service("scheduler_svc", "--config", str(file))
    assert done.returncode == 2 and done.stderr.startswith("error: --listen")


def test_the_command_that_starts_all_refuses_it_too(tmp_path: Path) -> None:
    command = ["serve", "--host", "0.0.0.0", "--run-dir", str(tmp_path)]
    ports = [f"--{name}-port=0" for name in ("http", "grpc", "scheduler", "metrics")]
    done = run_service("pagoda.cli.main", *command, *ports)
    assert done.returncode not in (0, None)
    assert "can be reached from other machines" in done.stderr and "--insecure" in done.stderr


def test_insecure_allows_it() -> None:
    with scheduler("--metrics-host", "0.0.0.0", "--insecure") as running:
        assert running.metrics_address.startswith("0.0.0.0:")
        port = running.metrics_address.rsplit(":", 1)[1]
        assert "pagoda:" in scrape(f"http://127.0.0.1:{port}/metrics")


# ------------------------------------------------------------------------------------------ with a token


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """All services behind a token, reachable from everywhere, logging all they can, and recording."""
    run_dir = tmp_path_factory.mktemp("guarded")
    options = ("--host", "0.0.0.0", "--log-level", "debug", "--record", str(run_dir / "run.rec"))
    with served(run_dir, "--token", TOKEN, *options) as running:
        yield running


def attempts(running: Served) -> list[tuple[str, Any, Any]]:
    """Every kind of call: where it goes, what is called, with what."""
    control = scheduler_pb2_grpc.ControlServiceStub
    session = pb.SessionRequest(hello=pb.SessionHello(client_name="stranger"))
    hello = worker_pb2.AttachRequest(hello=worker_pb2.Hello(group_name="stranger"))
    tokens = pb.GenerateTokensRequest(prompt_token_ids=[5], sampling=pb.SamplingParams(max_tokens=1))
    reflected = reflection_pb2.ServerReflectionRequest(list_services="")
    return [
        (running.scheduler, lambda c: control(c).Snapshot, pb.SnapshotRequest()),
        (running.scheduler, lambda c: control(c).Abort, pb.AbortRequest(request_id="x")),
        (running.scheduler, lambda c: control(c).Watch, pb.WatchRequest()),
        (running.scheduler, lambda c: scheduler_pb2_grpc.SchedulerServiceStub(c).GenerateTokens, tokens),
        (running.scheduler, lambda c: scheduler_pb2_grpc.SchedulerServiceStub(c).Session, [session]),
        (running.scheduler, lambda c: worker_pb2_grpc.WorkerServiceStub(c).Attach, [hello]),
        (
            running.scheduler,
            lambda c: reflection_pb2_grpc.ServerReflectionStub(c).ServerReflectionInfo,
            [reflected],
        ),
        (
            running.grpc,
            lambda c: inference_pb2_grpc.InferenceServiceStub(c).Generate,
            ipb.GenerateRequest(text="x", sampling=pb.SamplingParams(max_tokens=1)),
        ),
        (
            running.grpc,
            lambda c: inference_pb2_grpc.InferenceServiceStub(c).ListModels,
            ipb.ListModelsRequest(),
        ),
        (
            running.grpc,
            lambda c: inference_pb2_grpc.InferenceServiceStub(c).Tokenize,
            ipb.TokenizeRequest(text="x"),
        ),
        (
            running.grpc,
            lambda c: reflection_pb2_grpc.ServerReflectionStub(c).ServerReflectionInfo,
            [reflected],
        ),
    ]


def call(address: str, method: Any, request: Any, token: str) -> Any:
    """The first response. Raises grpc.RpcError."""
    with grpc.insecure_channel(address) as channel:
        argument = iter(request) if isinstance(request, list) else request
        reply = method(channel)(argument, metadata=bearer(token), timeout=60)
        return next(iter(reply)) if hasattr(reply, "__next__") else reply


@pytest.mark.parametrize("token", ["", "wrong", TOKEN[:-1]])
def test_every_rpc_wants_the_token(guarded: Served, token: str) -> None:
    for address, method, request in attempts(guarded):
        with pytest.raises(grpc.RpcError) as refused:
            call(address, method, request, token)
        assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED, request


def test_every_rpc_passes_with_the_token(guarded: Served) -> None:
    for address, method, request in attempts(guarded):
        if isinstance(request, list) and isinstance(request[0], worker_pb2.AttachRequest):
            with pytest.raises(grpc.RpcError) as refused:
                call(address, method, request, TOKEN)
            assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION, "it is read, and does not fit"
        else:
            assert call(address, method, request, TOKEN) is not None


def test_health_checks_stay_open(guarded: Served) -> None:
    for address in (guarded.scheduler, guarded.grpc):
        check = health_pb2.HealthCheckRequest()
        reply = call(address, lambda c: health_pb2_grpc.HealthStub(c).Check, check, "")
        assert reply.status == health_pb2.HealthCheckResponse.SERVING
    assert httpx.get(f"{guarded.http}/health", timeout=60).status_code == 200


@pytest.mark.parametrize("token", ["", "wrong"])
def test_every_http_route_wants_the_token(guarded: Served, token: str) -> None:
    headers = {"authorization": f"Bearer {token}"} if token else {}
    with httpx.Client(base_url=guarded.http, headers=headers, timeout=60) as http:
        answers = [
            http.get(path) for path in ("/v1/models", "/metrics", "/version", "/docs", "/openapi.json")
        ]
        answers += [http.post(path, json={}) for path in ("/v1/chat/completions", "/v1/completions")]
        answers += [http.post("/tokenize", json={"prompt": "x"}), http.get("/nothing")]
    assert {answer.status_code for answer in answers} == {401}
    assert {answer.json()["error"]["code"] for answer in answers} == {"invalid_api_key"}
    good = {"authorization": f"Bearer {TOKEN}"}
    assert httpx.get(f"{guarded.http}/v1/models", headers=good, timeout=60).status_code == 200


def metrics_urls(running: Served) -> list[str]:
    """Of scheduler and gateway."""
    urls = []
    for process in running.processes():
        command = process.cmdline()
        if {"scheduler_svc", "gateway_svc"} & set(command):
            urls.append(f"http://127.0.0.1:{command[command.index('--metrics-port') + 1]}/metrics")
    return urls


def test_metrics_want_the_token(guarded: Served) -> None:
    urls = metrics_urls(guarded)
    assert len(urls) == 2
    for url in urls:
        for token in ("", "wrong"):
            with pytest.raises(urllib.error.HTTPError) as refused:
                scrape(url, token)
            assert refused.value.code == 401
        assert "pagoda:" in scrape(url, TOKEN)


def test_only_the_gateway_is_reachable_from_elsewhere(guarded: Served) -> None:
    """`--host` is the gateway's; scheduler, workers and all metrics stay on loopback."""
    places = guarded.listening()
    everywhere = {"0.0.0.0", "::"}  # gRPC makes the second of the first
    addresses = [address for address, _ in places["gateway_svc"]]
    assert sorted(address in everywhere for address in addresses) == [False, True, True]
    assert [address for address in addresses if address not in everywhere] == ["127.0.0.1"]
    for tier in ("scheduler_svc", "gpu_worker"):
        assert {address for address, _ in places[tier]} == {"127.0.0.1"}


def test_a_worker_with_another_token_ends_for_good(guarded: Served) -> None:
    flags = ("--scheduler", guarded.scheduler, "--metrics-port", "0", "--num-blocks", "128")
    done = run_service("gpu_worker", *flags, PAGODA_TOKEN="wrong")
    assert done.returncode == 78 and "UNAUTHENTICATED" in done.stderr


def test_the_token_is_in_no_command_line_and_no_file(guarded: Served) -> None:
    """Command lines can be read by everyone on the machine. That of this test is the one that has it."""
    for process in guarded.processes()[1:]:
        assert not any(TOKEN in argument for argument in process.cmdline())
    for path in guarded.run_dir.rglob("*"):
        if path.is_file():
            assert TOKEN.encode() not in path.read_bytes(), path


def test_no_log_and_no_record_holds_text(guarded: Served) -> None:
    headers = {"authorization": f"Bearer {TOKEN}"}
    messages = [{"role": "user", "content": SECRET}]
    bodies: list[tuple[str, Any]] = [
        ("/v1/chat/completions", {"messages": messages, "max_tokens": 4}),
        ("/v1/chat/completions", {"messages": messages, "max_tokens": 4, "stream": True, "stop": SECRET}),
        ("/v1/completions", {"prompt": SECRET, "max_tokens": 4, "echo": True, "cache_salt": "pepper"}),
        ("/v1/completions", {"prompt": {"text": SECRET}}),
        ("/v1/completions", {"prompt": SECRET, "temperature": SECRET}),
        ("/v1/completions", {"prompt": SECRET, "model": "another"}),
        ("/v1/completions", {"prompt": SECRET * 3000}),
        ("/tokenize", {"prompt": SECRET}),
    ]
    with httpx.Client(base_url=guarded.http, headers=headers, timeout=120) as http:
        for path, body in bodies:
            assert http.post(path, json=body).status_code in (200, 400, 404)
        http.post("/v1/completions", content=f'{{"prompt": "{SECRET}'.encode())
    with pagoda.Client(guarded.grpc, token=TOKEN) as client:
        client.generate(SECRET, max_tokens=4)
        with pytest.raises(pagoda.InvalidRequest):
            client.generate(SECRET, temperature=-1.0)
    logs = guarded.run_dir / "logs"
    wait_until(lambda: (logs / "gateway.log").read_text().count("request_end") >= 9, 60, "the log")
    wait_until(lambda: (guarded.run_dir / "run.rec").stat().st_size > 1000, 60, "the record")
    files = [path for path in guarded.run_dir.rglob("*") if path.is_file()]
    assert {"gateway.log", "scheduler.log", "worker-0.log", "run.rec"} <= {path.name for path in files}
    for path in files:
        content = path.read_bytes()
        assert not any(word.encode() in content for word in SECRET.split()), path


def test_only_its_owner_may_read_the_record(guarded: Served) -> None:
    """It holds prompts as token ids."""
    assert stat.S_IMODE((guarded.run_dir / "run.rec").stat().st_mode) == 0o600
