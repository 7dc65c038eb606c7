"""The process itself: flags, ports, what it imports, several processes, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator

import grpc.aio
import httpx
import pytest

from pagoda.v1 import inference_pb2 as pb
from pagoda.v1 import inference_pb2_grpc as rpc
from tests.support.data import model_folder
from tests.unit.gateway.conftest import ids_of, until
from tests.unit.gateway.fake_scheduler import FakeScheduler

# Runs the service and says, at its end, what it must never import.
MAIN = (
    "import sys; from gateway_svc.__main__ import main; main(); "
    "print('IMPORTED', [m for m in ('torch', 'scheduler_svc', 'gpu_worker') if m in sys.modules])"
)
ANY_PORT = ("--http-port", "0", "--grpc-port", "0", "--metrics-port", "0", "--grace-s", "1")


class Gateway:
    """A gateway process, and what it has logged."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.log: list[str] = []

    async def serving(self) -> dict[str, int]:
        """The log line that says the ports."""
        assert self.process.stderr is not None
        async with asyncio.timeout(60):
            while line := (await self.process.stderr.readline()).decode():
                self.log.append(line)
                if '"serving"' in line and '"http_port"' in line:
                    ports: dict[str, int] = json.loads(line)
                    return ports
        raise AssertionError("".join(self.log))

    async def end(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """Its exit code and output after a signal."""
        if self.process.returncode is None:
            self.process.send_signal(number)
        async with asyncio.timeout(30):
            out, err = await self.process.communicate()
        self.log += err.decode().splitlines()
        assert self.process.returncode is not None
        return self.process.returncode, out.decode()


@contextlib.asynccontextmanager
async def gateway(*flags: str, environment: dict[str, str] | None = None) -> AsyncIterator[Gateway]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", MAIN, "--model", str(model_folder()), *flags),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=os.environ | (environment or {}),
    )
    try:
        yield Gateway(process)
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()


def client(port: int) -> httpx.AsyncClient:
    # verify would only cost time: it makes a TLS context that is never used
    return httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", verify=False)


async def until_ready(port: int) -> None:
    async with client(port) as http, asyncio.timeout(30):
        answer = await http.get("/ready")
        while answer.status_code != 200:
            await asyncio.sleep(0.05)
            answer = await http.get("/ready")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_one_process_from_start_to_end(fake: FakeScheduler, number: int) -> None:
    """It serves, imports no torch, logs the end of each request without its text, and ends when told to."""
    async with gateway("--scheduler", fake.address, *ANY_PORT, "--served-model-name", "m") as running:
        port = (await running.serving())["http_port"]
        await until_ready(port)
        async with client(port) as http:
            chat = {"model": "m", "messages": [{"role": "user", "content": "a secret"}], "request_id": "abc"}
            answer = (await http.post("/v1/chat/completions", json=chat)).json()
            assert answer["choices"][0]["message"]["content"] == "Hello 世界 👋🏽!"
            await http.post("/v1/completions", json={"prompt": "a secret", "temperature": -1})
        code, out = await running.end(number)
        assert (code, out.strip()) == (0, "IMPORTED []")
    ends = [json.loads(line) for line in running.log if '"request_end"' in line]
    good = next(end for end in ends if end["request_id"] == "abc")
    assert (good["status"], good["route"], good["model"]) == ("ok", "/v1/chat/completions", "m")
    assert good["finish_reasons"] == ["stop"] and good["completion_tokens"] > 5
    assert good["prompt_tokens"] == len(fake.submitted[0].prompt_token_ids) and good["cached_tokens"] == 0
    assert 0 < good["ttft_s"] <= good["e2e_s"]
    bad = next(end for end in ends if end["request_id"] != "abc")
    assert bad["status"] == "invalid_argument" and bad["field"] == "temperature"
    assert not any("secret" in line or "Hello" in line for line in running.log)


async def test_running_streams_are_told_of_the_end(fake: FakeScheduler) -> None:
    """After the grace period, with an error that says to try again, and not by a cut connection."""
    fake.script = lambda request, index: ids_of(" word") * 100_000
    async with gateway("--scheduler", fake.address, *ANY_PORT) as running:
        port = (await running.serving())["http_port"]
        await until_ready(port)
        body = {"prompt": "x", "stream": True, "max_tokens": 100_000}
        async with client(port) as http, http.stream("POST", "/v1/completions", json=body) as response:
            lines = response.aiter_lines()
            await anext(lines)
            running.process.send_signal(signal.SIGTERM)
            rest = [line async for line in lines if line]
        assert rest[-1] == "data: [DONE]" and '"draining"' in rest[-2]
        assert (await running.end())[0] == 0


async def test_several_processes_share_ports_and_metrics(fake: FakeScheduler) -> None:
    async with gateway("--scheduler", fake.address, *ANY_PORT, "--processes", "2") as running:
        ports = await running.serving()
        while ports.get("processes") != 2:
            ports = await running.serving()
        port = ports["http_port"]
        await until(lambda: len(fake.sessions) == 2, 60)
        await until_ready(port)
        for i in range(30):  # a connection each: the kernel deals them out
            async with client(port) as http:
                answer = await http.post("/v1/completions", json={"prompt": "x", "request_id": f"r{i}"})
                assert answer.status_code == 200
        async with grpc.aio.insecure_channel(f"127.0.0.1:{ports['grpc_port']}") as channel:
            stub = rpc.InferenceServiceStub(channel)
            assert [r async for r in stub.Generate(pb.GenerateRequest(text="x"))]
        assert min(fake.submits_by_session.values()) > 0, "both served"
        async with httpx.AsyncClient() as http:
            on_its_own_port = (await http.get(f"http://127.0.0.1:{ports['metrics_port']}/metrics")).text
            through_a_process = (await http.get(f"http://127.0.0.1:{port}/metrics")).text
        for text in (on_its_own_port, through_a_process):
            line = next(x for x in text.splitlines() if x.startswith("pagoda:request_success_total"))
            assert line.endswith(" 31.0"), "of both processes"
        code, _ = await running.end()
        assert code == 0
    assert not fake.sessions


async def test_the_end_of_one_process_ends_all(fake: FakeScheduler) -> None:
    async with gateway("--scheduler", fake.address, *ANY_PORT, "--processes", "2") as running:
        while (await running.serving()).get("processes") != 2:
            pass
        await until(lambda: len(fake.sessions) == 2, 60)
        children = await _children(running.process.pid)
        os.kill(children[-1], signal.SIGKILL)
        async with asyncio.timeout(30):
            await running.process.communicate()
        assert running.process.returncode not in (0, None)
    await until(lambda: not fake.sessions, 30)


async def _children(pid: int) -> list[int]:
    import psutil  # type: ignore[import-untyped]

    return [
        child.pid for child in psutil.Process(pid).children() if "spawn_main" in " ".join(child.cmdline())
    ]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--http-host", "0.0.0.0"), ("--http-host", "token", "--insecure")),
        (("--grpc-host", "0.0.0.0"), ("--grpc-host", "token")),
        (("--metrics-host", "::"), ("--metrics-host", "token")),
        (("--grpc-host", "::1", "--model", "nothing"), ("--model",)),
        (("--model", "no-such-model"), ("--model", "no-such-model")),
        (("--model", "/dev/null"), ("--model", "/dev/null")),
        (("--processes", "0"), ("--processes",)),
        (("--http-port", "99999"), ("--http-port",)),
    ],
)
async def test_refused_at_start(flags: tuple[str, ...], words: tuple[str, ...]) -> None:
    async with gateway(*ANY_PORT, *flags) as running, asyncio.timeout(60):
        _, err = await running.process.communicate()
        assert running.process.returncode not in (0, None)
        assert all(word in err.decode() for word in words), err.decode()
        assert "Traceback" not in err.decode()


@pytest.mark.parametrize("processes", ["1", "2"])
async def test_a_port_that_is_taken_is_an_error(fake: FakeScheduler, processes: str) -> None:
    """Also where the one who has it shares it."""
    first_flags = ("--scheduler", fake.address, *ANY_PORT, "--processes", processes)
    async with gateway(*first_flags) as first:
        port = str((await first.serving())["http_port"])
        async with gateway(*first_flags, "--http-port", port) as second, asyncio.timeout(60):
            _, err = await second.process.communicate()
            assert (
                second.process.returncode == 1
                and f"--http-port: cannot listen on 127.0.0.1:{port}" in err.decode()
            )
        assert (await first.end())[0] == 0


async def test_other_addresses_with_a_token(fake: FakeScheduler) -> None:
    await fake.stop()
    fake.token = "secret"
    await fake.start()
    flags = ("--scheduler", fake.address, *ANY_PORT, "--http-host", "0.0.0.0")
    async with gateway(*flags, environment={"PAGODA_TOKEN": "secret"}) as running:
        port = (await running.serving())["http_port"]
        async with client(port) as http:
            assert (await http.get("/health")).status_code == 200
            # A probe holds no token: it is told the state (not yet attached, then ready), not refused.
            async with asyncio.timeout(30):
                while (status := (await http.get("/ready")).status_code) == 503:  # noqa: ASYNC110 - as a probe
                    await asyncio.sleep(0.05)
            assert status == 200
            for route in ("/v1/models", "/metrics", "/docs"):
                response = await http.get(route)
                assert response.status_code == 401 and response.json()["error"]["code"] == "invalid_api_key"
            assert (
                await http.get("/v1/models", headers={"authorization": "Bearer wrong"})
            ).status_code == 401
            good = {"authorization": "Bearer secret"}
            assert (await http.get("/v1/models", headers=good)).status_code == 200
        assert (await running.end())[0] == 0
