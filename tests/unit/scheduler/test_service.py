"""The scheduler as a process: how it starts, what it serves, what it must not import, how it ends."""

from __future__ import annotations

import asyncio
import itertools
import json
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from pagoda import transport
from pagoda.v1 import scheduler_pb2 as pb
from pagoda.v1 import scheduler_pb2_grpc
from scheduler_svc.record import replay
from tests.support.cluster_sched import SchedulerProcess, scheduler, sim_worker, wait_until
from tests.support.session_client import SessionClient, request
from tests.support.sim_worker import expected_output

PROMPT = [3, 4, 5]
# Runs the service as `python -m` does, and says at its end what had been imported.
LIST_MODULES = """
import atexit, json, runpy, sys
atexit.register(lambda: print(json.dumps({"names": sorted(sys.modules)}), file=sys.stderr))
runpy.run_module("scheduler_svc", run_name="__main__")
"""


def generate(address: str, token: str = "", **sampling: Any) -> list[int]:
    """One request of a direct client; its tokens."""
    with grpc.insecure_channel(address) as channel:
        stub: Any = scheduler_pb2_grpc.SchedulerServiceStub(channel)
        call = stub.GenerateTokens(request(PROMPT, **sampling), metadata=transport.bearer(token), timeout=60)
        return [t for response in call for t in response.token_ids]


def health(address: str, service: str) -> int:
    """What the health service says."""
    with grpc.insecure_channel(address) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        status: int = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=20).status
        return status


def test_it_serves_and_ends_cleanly_with_a_record_that_replays(tmp_path: Path) -> None:
    path = tmp_path / "run.rec"
    with scheduler("--record", str(path)) as running:
        assert health(running.address, "") == health_pb2.HealthCheckResponse.SERVING
        name = "pagoda.v1.SchedulerService"
        assert health(running.address, name) == health_pb2.HealthCheckResponse.NOT_SERVING
        with sim_worker(running.address, iteration_ms=1):
            wait_until(lambda: health(running.address, name) == health_pb2.HealthCheckResponse.SERVING)
            tokens = generate(running.address, max_tokens=30, seed=4, n=1)
            assert tokens == expected_output(PROMPT, 4, 30, 49152, (2,))
        assert running.stop(signal.SIGTERM) == 0
        wait_until(lambda: running.find("ended") is not None)
    report = replay(path)
    assert report.num_requests == 1 and not report.truncated


def test_the_log_line_of_a_requests_end_holds_counts_and_no_tokens() -> None:
    with scheduler() as running, sim_worker(running.address, iteration_ms=1):
        generate(running.address, max_tokens=30, seed=4, ignore_eos=True)
        line = running.wait_for("request_end")
    assert (line["prompt_tokens"], line["completion_tokens"], line["reason"]) == (3, 30, "length")
    for name in ("queue_s", "prefill_s", "decode_s", "total_s"):
        assert line[name] >= 0
    assert not any(isinstance(value, list) for value in line.values())


def test_it_ends_on_ctrl_c_while_streams_are_open() -> None:
    async def hold(address: str, running: SchedulerProcess) -> None:
        async with SessionClient(address) as client:
            (handle,) = await client.submit(request(PROMPT, max_tokens=4000, ignore_eos=True))
            await asyncio.to_thread(wait_until, lambda: bool(client.received[handle].tokens))
            assert await asyncio.to_thread(running.stop, signal.SIGINT) == 0

    with scheduler() as running, sim_worker(running.address, iteration_ms=1):
        asyncio.run(hold(running.address, running))


def test_it_imports_neither_torch_nor_a_tokenizer() -> None:
    ports = ["--listen", "127.0.0.1:0", "--metrics-port", "0"]
    popen = subprocess.Popen(
        [sys.executable, "-c", LIST_MODULES, *ports],
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[3],
    )
    assert popen.stderr is not None
    address = json.loads(popen.stderr.readline())["grpc"]
    with sim_worker(address, iteration_ms=1):
        assert generate(address, max_tokens=5, ignore_eos=True)
    popen.send_signal(signal.SIGTERM)
    _, errors = popen.communicate(timeout=30)
    assert popen.returncode == 0
    modules = json.loads(errors.splitlines()[-1])["names"]
    assert "scheduler_svc.engine" in modules
    forbidden = {"torch", "transformers", "tokenizers", "gpu_worker", "gateway_svc", "kernels"}
    assert not forbidden & {name.partition(".")[0] for name in modules}


def test_a_token_is_asked_for_everywhere_but_for_health() -> None:
    with scheduler("--token", "secret") as running, sim_worker(running.address, token="secret"):
        assert health(running.address, "") == health_pb2.HealthCheckResponse.SERVING
        for token in ("", "wrong"):
            with pytest.raises(grpc.RpcError) as refused:
                generate(running.address, token, max_tokens=2)
            assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
            with grpc.insecure_channel(running.address) as channel:
                control: Any = scheduler_pb2_grpc.ControlServiceStub(channel)
                with pytest.raises(grpc.RpcError) as refused:
                    control.Snapshot(pb.SnapshotRequest(), metadata=transport.bearer(token))
                assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
        assert generate(running.address, "secret", max_tokens=2, ignore_eos=True)
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(f"http://{running.metrics_address}/metrics", timeout=20)


def test_reflection_lists_every_service_with_its_methods() -> None:
    with scheduler() as running, grpc.insecure_channel(running.address) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        services = set(database.get_services())
        assert services >= {
            "pagoda.v1.SchedulerService",
            "pagoda.v1.ControlService",
            "pagoda.internal.v1.WorkerService",
            "grpc.health.v1.Health",
        }
        file = database.FindFileContainingSymbol("pagoda.v1.ControlService")
        assert [m.name for s in file.service if s.name == "ControlService" for m in s.method] == [
            "Abort",
            "Snapshot",
            "Watch",
        ]


@pytest.mark.parametrize("flag", ["--listen", "--metrics-port"])
def test_a_taken_port_is_an_error_that_names_the_flag(flag: str) -> None:
    with scheduler() as running:
        taken = running.address if flag == "--listen" else running.metrics_address.rsplit(":", 1)[1]
        ports = {"--listen": "127.0.0.1:0", "--metrics-port": "0", flag: taken}
        done = subprocess.run(
            [sys.executable, "-m", "scheduler_svc", *itertools.chain(*ports.items())],
            capture_output=True,
            text=True,
            timeout=60,
            cwd=Path(__file__).parents[3],
        )
    assert done.returncode == 1
    assert f"error: {flag}: cannot bind" in done.stderr and taken in done.stderr
    assert "Traceback" not in done.stderr
