"""`python -m gpu_worker --tensor-parallel 2` as processes: ranks that attach, answer, and end together."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
import structlog
import torch

from gpu_worker.config import WorkerSettings
from gpu_worker.start import StartError, build
from pagoda.checksum import step_checksum
from pagoda.internal.v1 import worker_pb2
from tests.support.leftovers import wait_gone
from tests.support.metrics import scrape
from tests.unit.worker.fake_hub import FakeHub, Session
from tests.unit.worker.harness import Device, prompt
from tests.unit.worker.test_process import free_port

ROOT = Path(__file__).parents[3]
WAIT_S = 120


class Worker:
    """A worker with everything that it has started; they share a folder, in which nothing else runs."""

    def __init__(self, folder: Path, model: Path, *flags: str, **environment: str) -> None:
        self.folder = folder
        path = os.pathsep.join([str(ROOT), str(ROOT / "clients" / "python")])
        command = [sys.executable, "-m", "gpu_worker", "--model", str(model), "--num-blocks", "64"]
        if "--metrics-port" not in flags:
            command += ["--metrics-port", "0"]
        self.process = subprocess.Popen(
            [*command, "--dtype", "float32", *flags],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": path, **environment},
            stderr=subprocess.PIPE,
            text=True,
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        self.lines += self.process.stderr

    def ranks(self) -> list[int]:
        """The ranks' process ids."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [int(pid) for pid in children.split()]

    def end(self) -> tuple[int, str]:
        """Exit code and what all of them said, when nothing of it is left."""
        code = self.process.wait(WAIT_S)
        wait_gone(self.folder)
        self._reader.join(WAIT_S)
        return code, "".join(self.lines)


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    server = FakeHub()
    yield server
    server.stop()


@pytest.fixture
def model(tiny) -> Path:
    return tiny("llama")[1]


@pytest.fixture
def start(tmp_path: Path, model: Path) -> Iterator[Callable[..., Worker]]:
    started: list[Worker] = []

    def run(*flags: str, model: Path = model, **environment: str) -> Worker:
        started.append(Worker(tmp_path, model, *flags, **environment))
        return started[-1]

    yield run
    for worker in started:
        worker.process.kill()
        worker.process.wait()
    wait_gone(tmp_path)


def attached(hub: FakeHub) -> list[Session]:
    """The sessions of two ranks, by rank."""
    return sorted((hub.next_session() for _ in range(2)), key=lambda session: session.hello.rank)


def begun(hub: FakeHub) -> list[Session]:
    """Two ranks whose session has begun: they have answered a first step."""
    sessions = attached(hub)
    row = worker_pb2.NewRow(slot=2, tokens=prompt(9), num_prompt_tokens=9, blocks=[4], last_position=60)
    for session in sessions:
        session.start(1)
        session.send(worker_pb2.Step(epoch=1, num_iterations=1, new_rows=[row], slots=[2], num_tokens=[9]))
    return sessions


def test_two_ranks_attach_answer_and_end(hub, start, model):
    expected = Device(model).generate(0, prompt(9), 5)
    port = free_port()
    worker = start("--scheduler", hub.address, "--tensor-parallel", "2", "--metrics-port", str(port))
    sessions = begun(hub)
    hellos = [session.hello for session in sessions]
    assert [(h.rank, h.world_size) for h in hellos] == [(0, 2), (1, 2)]
    assert hellos[0].incarnation == hellos[1].incarnation and hellos[0].incarnation
    assert hellos[0].group_name == hellos[1].group_name and hellos[0].group_name
    for session in sessions:
        session.send(worker_pb2.Step(epoch=1, step_id=1, num_iterations=4, slots=[2]))
    first, second = ([session.result() for _ in range(2)] for session in sessions)
    assert [token for result in first for token in result.tokens] == expected
    assert [result.checksum for result in second] == [step_checksum(result) for result in first]
    assert not any(result.tokens or result.HasField("logprobs") or result.device_us for result in second)
    assert "pagoda:worker_steps_total" in scrape(f"http://127.0.0.1:{port}/metrics")
    assert len(worker.ranks()) == 2
    worker.process.send_signal(signal.SIGTERM)
    assert worker.end()[0] == 0


def test_a_group_has_the_name_that_it_is_given(hub, start):
    start("--scheduler", hub.address, "--group-name", "g/1", PAGODA_WORKER_TENSOR_PARALLEL="2")
    assert {session.hello.group_name for session in attached(hub)} == {"g/1"}


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_is_killed_ends_the_group(hub, start, victim):
    worker = start("--scheduler", hub.address, "--tensor-parallel", "2")
    begun(hub)[0].result()
    os.kill(worker.ranks()[victim], signal.SIGKILL)
    code, said = worker.end()
    assert code == 1 and f'"rank": {victim}, "code": -9' in said


def test_a_parent_that_is_killed_takes_its_ranks_along(hub, start):
    worker = start("--scheduler", hub.address, "--tensor-parallel", "2")
    begun(hub)[0].result()
    worker.process.kill()
    assert worker.end()[0] == -signal.SIGKILL


def test_a_session_that_ends_ends_the_group(hub, start):
    """A rank might be waited for by a kernel of another one: it does not dial again."""
    worker = start("--scheduler", hub.address, "--tensor-parallel", "2")
    sessions = begun(hub)
    sessions[0].result()
    sessions[1].close()
    code, said = worker.end()
    assert code == 1 and '"rank": 1, "code": 1' in said


def test_a_step_that_cannot_be_done_ends_the_group(hub, start):
    """Which a lone worker survives: the other ranks have done it, or wait for this one within it."""
    worker = start("--scheduler", hub.address, "--tensor-parallel", "2")
    sessions = begun(hub)
    sessions[1].send(worker_pb2.Step(epoch=1, step_id=1, num_iterations=1, slots=[5]))
    code, said = worker.end()
    assert code == 1 and "a step failed" in said and '"rank": 1, "code": 1' in said


def test_refusal_of_one_rank_is_final(hub, start):
    worker = start("--scheduler", hub.address, "--tensor-parallel", "2")
    hub.refusal = (grpc.StatusCode.FAILED_PRECONDITION, "block_size differs")
    code, said = worker.end()
    assert code == 78 and "block_size differs" in said


def test_a_model_that_is_not_there_is_final(start, tmp_path):
    worker = start("--tensor-parallel", "2", model=tmp_path / "none")
    code, said = worker.end()
    assert code == 78 and "neither" in said


def test_a_damaged_model_is_final(start, model, tmp_path):
    shutil.copytree(model, tmp_path / "m")
    weights = tmp_path / "m" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    code, said = start("--tensor-parallel", "2", model=tmp_path / "m").end()
    assert code == 78 and str(weights) in said


@pytest.mark.parametrize("moment", ["ranks started", '"loading"', "no session"])
def test_an_order_to_end_while_the_ranks_start(hub, start, moment):
    hub.stop()
    worker = start("--scheduler", hub.address, "--tensor-parallel", "2")
    deadline = time.monotonic() + WAIT_S
    while not any(moment in line for line in list(worker.lines)):
        assert time.monotonic() < deadline and worker.process.poll() is None, worker.lines
        time.sleep(0.02)
    worker.process.send_signal(signal.SIGTERM)
    assert worker.end()[0] == 0


def test_a_rank_that_waits_for_the_others_ends_at_once(start):
    """Started by something else, and alone so far. Its rendezvous would be waited for much longer."""
    where = f"127.0.0.1:{free_port()}"
    worker = start("--rank", "0", "--world-size", "2", "--rendezvous", where)
    deadline = time.monotonic() + WAIT_S
    port = f":{int(where.rpartition(':')[2]):04X} "
    while not any(port in line for line in Path("/proc/net/tcp").read_text().splitlines()):
        assert time.monotonic() < deadline and worker.process.poll() is None, worker.lines
        time.sleep(0.02)
    worker.process.send_signal(signal.SIGTERM)
    assert worker.end()[0] == -signal.SIGTERM


def test_ranks_that_something_else_starts(hub, start):
    where = f"127.0.0.1:{free_port()}"
    common = ("--scheduler", hub.address, "--world-size", "2", "--rendezvous", where)
    workers = [start("--rank", str(rank), *common) for rank in (1, 0)]
    begun(hub)[0].result()
    for worker in workers:
        worker.process.send_signal(signal.SIGTERM)
    codes = [worker.process.wait(WAIT_S) for worker in workers]
    # One that hears of the other's end before the order has lost its group.
    assert 0 in codes and set(codes) <= {0, 1}


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        (["--rank", "2", "--world-size", "2", "--rendezvous", "h:1"], 2, "--rank 2 is not below"),
        (["--rank", "1"], 2, "--rank 1 is not below --world-size 1"),
        (["--world-size", "2"], 2, "--rendezvous HOST:PORT"),
        (["--world-size", "2", "--rendezvous", "nowhere"], 2, "--rendezvous"),
        (["--world-size", "2", "--rendezvous", "h:1", "--tensor-parallel", "3"], 2, "--tensor-parallel"),
        (["--tensor-parallel", "0"], 2, "--tensor-parallel"),
        (["--tensor-parallel", "2", "--device", "cuda"], 78, "CUDA device"),
        (["--tensor-parallel", "2", "--max-model-len", "100000"], 78, "--max-model-len 100000"),
    ],
)
def test_what_cannot_start(start, flags, code, said):
    got = start(*flags).end()
    assert got[0] == code and said in got[1], got


def test_more_ranks_than_devices(monkeypatch):
    """torch is told that it sees one device, because here it sees none."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    flags = ["--device", "cuda", "--rank", "1", "--world-size", "2", "--rendezvous", "127.0.0.1:1"]
    with pytest.raises(StartError, match="2 ranks want a CUDA device each; torch finds 1") as wrong:
        build(WorkerSettings.load(flags), structlog.get_logger())
    assert wrong.value.code == 78


STUCK = """
import os, signal, sys, threading
from pathlib import Path
import structlog
from gpu_worker.executor import DeviceExecutor
from gpu_worker.hub_client import HubClient
from gpu_worker.metrics import WorkerMetrics
from gpu_worker.spans import RowSpans
from gpu_worker.start import Worker
from pagoda.internal.v1 import worker_pb2
from tests.unit.worker.harness import CPU, Device

device = Device(Path(sys.argv[2]))
device.runner.run = lambda *_: threading.Event().wait()
metrics, spans = WorkerMetrics("m", "g"), RowSpans(None, "g", 0)
hello = worker_pb2.Hello(group_name="g", world_size=int(sys.argv[3]))
hub = HubClient(sys.argv[1], hello, "", metrics, structlog.get_logger())
executor = DeviceExecutor(device.runner, device.stager, metrics, hub.deliver, hub.fail, CPU, spans)
os._exit(Worker(hub, executor, spans).run())
"""


def test_a_rank_that_hangs_in_a_step_is_gone_when_its_session_ends(hub, model):
    """As one does whose kernel waits for a rank that has died."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "clients" / "python")])
    process = subprocess.Popen(
        [sys.executable, "-c", STUCK, hub.address, str(model), "2"], env={**os.environ, "PYTHONPATH": path}
    )
    try:
        session = hub.next_session()
        row = worker_pb2.NewRow(slot=2, tokens=prompt(9), num_prompt_tokens=9, blocks=[4], last_position=60)
        session.start(1)
        session.send(worker_pb2.Step(epoch=1, num_iterations=1, new_rows=[row], slots=[2], num_tokens=[9]))
        session.heartbeats.get(timeout=WAIT_S)  # a second without a result
        assert session.results.empty()
        session.close()
        assert process.wait(WAIT_S) == 1
    finally:
        process.kill()
        process.wait()
