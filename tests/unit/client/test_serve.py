"""`pagoda serve` with real processes and a real supervisor, over stand-ins for the three services."""

from __future__ import annotations

import configparser
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pagoda.cli import cluster
from pagoda.cli.cluster import ClusterError, ClusterSpec

WAIT_S = 60

GATEWAY = """
import argparse, http.server, os
token = os.environ.get("PAGODA_GATEWAY_TOKEN") or os.environ.get("PAGODA_TOKEN")
parser = argparse.ArgumentParser()
parser.add_argument("--http-port", type=int)
port = parser.parse_known_args()[0].http_port
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        known = not token or self.headers.get("authorization") == "Bearer " + token
        self.send_response((200 if self.path == "/ready" else 404) if known else 401)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""
SCHEDULER = """
import argparse, grpc
from concurrent.futures import ThreadPoolExecutor
from pagoda.v1 import scheduler_pb2 as pb, scheduler_pb2_grpc
parser = argparse.ArgumentParser()
parser.add_argument("--listen")
class Control(scheduler_pb2_grpc.ControlServiceServicer):
    def Snapshot(self, request, context):
        return pb.SnapshotResponse(snapshot=pb.Snapshot(workers=[pb.WorkerSnapshot(name="worker-0")]))
server = grpc.server(ThreadPoolExecutor(2))
scheduler_pb2_grpc.add_ControlServiceServicer_to_server(Control(), server)
server.add_insecure_port(parser.parse_known_args()[0].listen)
server.start()
server.wait_for_termination()
"""
WORKER = """
import os, sys, time
if "{name}" in sys.argv:
    time.sleep({after})
    print("error: {word}", flush=True)
    os._exit({code})
time.sleep(3600)
"""


class Served:
    """A `pagoda serve` in a folder of stand-ins."""

    def __init__(self, folder: Path, *options: str, worker: str = "import time; time.sleep(3600)") -> None:
        self.folder = folder
        for name, code in (("scheduler_svc", SCHEDULER), ("gpu_worker", worker), ("gateway_svc", GATEWAY)):
            (folder / name).mkdir()
            (folder / name / "__init__.py").write_text("")
            (folder / name / "__main__.py").write_text(code)
        (folder / "model").mkdir()
        self.run_dir = folder / "run"
        ports = [f"--{name}-port=0" for name in ("http", "grpc", "scheduler", "metrics")]
        command = [sys.executable, "-m", "pagoda.cli.main", "serve", "--model", "model", "--run-dir", "run"]
        with open(folder / "serve.out", "wb") as out:
            self.process = subprocess.Popen([*command, *ports, *options], cwd=folder, stdout=out, stderr=out)

    @property
    def said(self) -> str:
        return (self.folder / "serve.out").read_text()

    def wait_for(self, pattern: str) -> re.Match[str]:
        deadline = time.monotonic() + WAIT_S
        while (found := re.search(pattern, self.said)) is None:
            assert time.monotonic() < deadline and self.process.poll() is None, self.said
            time.sleep(0.05)
        return found

    def pids(self) -> list[int]:
        """Our services that run in this folder."""
        mine = []
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and os.readlink(entry / "cwd") == str(self.folder):
                    mine.append(int(entry.name))
            except OSError:  # it ended while we looked
                continue
        return mine

    def wait_gone(self) -> None:
        deadline = time.monotonic() + WAIT_S
        while self.pids():
            assert time.monotonic() < deadline, self.pids()
            time.sleep(0.05)


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Any]:
    started: list[Served] = []

    def start(*options: str, **how: Any) -> Served:
        started.append(Served(tmp_path, *options, **how))
        return started[-1]

    yield start
    for served in started:
        if served.process.poll() is None:
            served.process.terminate()
        served.process.wait(WAIT_S)
        served.wait_gone()


def test_serves_until_interrupted_and_leaves_nothing(serve: Any) -> None:
    served = serve()
    served.wait_for(r"ready at http://127\.0\.0\.1:\d+")
    assert "worker-0: loading weights" in served.said
    served.process.send_signal(signal.SIGINT)
    assert served.process.wait(WAIT_S) == 0
    served.wait_gone()
    assert "stopped" in served.said


def test_what_is_killed_comes_back(serve: Any) -> None:
    served = serve("--workers", "2")
    pid = int(served.wait_for(r"worker-1: loading weights \(process (\d+)\)")[1])
    served.wait_for("ready at")
    time.sleep(1.2)  # past its first second, in which supervisor would wait before it tries again
    os.kill(pid, signal.SIGKILL)
    again = served.wait_for(
        r"worker-1: ended \(terminated by SIGKILL\) and was started again.*\(process (\d+)\)"
    )
    assert int(again[1]) != pid


@pytest.mark.parametrize("after", [0.0, 1.5])
def test_a_worker_that_must_not_be_restarted_ends_the_command(serve: Any, after: float) -> None:
    served = serve(worker=WORKER.format(name="worker-0", after=after, word="the model does not fit", code=78))
    assert served.process.wait(WAIT_S) == 78
    assert "FATAL worker-0: exit status 78" in served.said
    assert "the model does not fit" in served.said
    # Supervisor tries once more when it ended in its first second and we looked too late.
    assert (served.run_dir / "supervisord.log").read_text().count("spawned: 'worker-0'") <= 2
    served.wait_gone()


def test_one_of_two_workers_may_stay_down(serve: Any) -> None:
    served = serve("--workers", "2", worker=WORKER.format(name="worker-1", after=1.2, word="no", code=78))
    served.wait_for("FATAL worker-1: exit status 78")
    served.wait_for("ready at")
    time.sleep(1)
    assert served.process.poll() is None


def test_a_service_that_cannot_start_is_given_up(serve: Any) -> None:
    served = serve(worker="raise SystemExit('broken: no such thing')")
    assert served.process.wait(WAIT_S) == 1
    assert "broken: no such thing" in served.said
    served.wait_gone()


def test_when_the_command_itself_is_killed_nothing_goes_on(serve: Any) -> None:
    served = serve()
    served.wait_for("ready at")
    served.process.kill()
    served.process.wait(WAIT_S)
    served.wait_gone()


def test_when_the_supervisor_is_killed_the_command_ends_and_nothing_goes_on(serve: Any) -> None:
    served = serve()
    served.wait_for("ready at")
    os.kill(int((served.run_dir / "supervisord.pid").read_text()), signal.SIGKILL)
    assert served.process.wait(WAIT_S) == 1
    assert "supervisord ended" in served.said
    served.wait_gone()


def test_the_token_reaches_the_services_and_no_command_line(serve: Any) -> None:
    served = serve("--token", "sesame")
    served.wait_for("ready at")
    services = [pid for pid in served.pids() if pid != served.process.pid]
    assert len(services) == 4
    assert not any(b"sesame" in Path(f"/proc/{pid}/cmdline").read_bytes() for pid in services)


def test_a_token_that_only_the_gateway_knows(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAGODA_GATEWAY_TOKEN", "other")
    served = serve()
    assert served.process.wait(WAIT_S) == 1
    assert "set PAGODA_TOKEN" in served.said


def test_down_stops_it_from_another_terminal(serve: Any) -> None:
    served = serve()
    served.wait_for("ready at")
    command = [sys.executable, "-m", "pagoda.cli.main", "down", "--run-dir", str(served.run_dir)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "stopped\n"
    assert len(served.pids()) <= 1  # the command itself, which may be about to notice
    assert served.process.wait(WAIT_S) == 0
    assert "stopped from outside" in served.said
    served.wait_gone()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "no cluster runs" in done.stdout


def test_a_second_one_in_the_same_folder_is_refused(serve: Any, tmp_path: Path) -> None:
    served = serve()
    served.wait_for("ready at")
    command = [sys.executable, "-m", "pagoda.cli.main", "serve", "--model", "model", "--run-dir", "run"]
    ports = [f"--{name}-port=0" for name in ("http", "grpc", "scheduler", "metrics")]
    done = subprocess.run([*command, *ports], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "runs in run already" in done.stderr


def test_a_port_in_use_is_named_with_its_option() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ClusterError, match=rf"127\.0\.0\.1:{port}: Address already in use.*--grpc-port"):
            cluster.with_ports(ClusterSpec(http_port=0, grpc_port=port, scheduler_port=0, metrics_port=0))


def test_free_ports_are_all_different() -> None:
    spec = cluster.with_ports(
        ClusterSpec(workers=3, http_port=0, grpc_port=0, scheduler_port=0, metrics_port=0)
    )
    ports = [spec.http_port, spec.grpc_port, spec.scheduler_port, spec.metrics_port, *spec.more_metrics_ports]
    assert len(set(ports)) == 8 and all(ports)


def test_a_missing_model_is_refused_at_once(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pagoda.cli.main", "serve", "--model", "no-such-model"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[3],
        check=False,
        env={**os.environ, "PAGODA_CACHE": str(tmp_path)},
    )
    assert done.returncode == 1
    assert "no-such-model" in done.stderr and "neither" in done.stderr


def test_missing_server_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        cluster.importlib.util, "find_spec", lambda name: None if name == "torch" else object()
    )
    with pytest.raises(ClusterError, match=r"torch is not installed.*\[worker\]"):
        cluster.check_installed()


def test_programs_carry_the_options_and_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    spec = ClusterSpec(
        model="m",
        workers=2,
        more_metrics_ports=(9401, 9402, 9403),
        common_args=("--insecure",),
        worker_args=("--x", "1"),
    )
    programs = {p.name: p.argv for p in cluster.programs_of(spec)}
    assert list(programs) == ["scheduler", "worker-0", "worker-1", "gateway"]
    worker = shlex.join(programs["worker-1"])
    assert "--group-name worker-1 --metrics-port 9403 --insecure --threads 4 --x 1" in worker
    assert "--listen 127.0.0.1:50051 --metrics-port 9401" in shlex.join(programs["scheduler"])
    assert "--http-host 127.0.0.1 --http-port 8000" in shlex.join(programs["gateway"])
    alone = ClusterSpec(more_metrics_ports=(1, 2))
    assert not any("--threads" in p.argv or "--model" in p.argv for p in cluster.programs_of(alone))


def test_workers_get_a_gpu_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    spec = ClusterSpec(device="cuda", workers=3, more_metrics_ports=(1, 2, 3, 4))
    gpus = [p.environment.get("CUDA_VISIBLE_DEVICES") for p in cluster.programs_of(spec)]
    assert gpus == [None, "4", "6", "4", None]


def test_a_worker_gets_a_gpu_for_each_of_its_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6,GPU-a,1")
    spec = ClusterSpec(device="cuda", workers=2, tensor_parallel=2, more_metrics_ports=(1, 2, 3))
    scheduler, *workers, gateway = cluster.programs_of(spec)
    gpus = [worker.environment["CUDA_VISIBLE_DEVICES"] for worker in workers]
    assert gpus == ["4,6", "GPU-a,1"]
    assert all("--tensor-parallel 2" in shlex.join(worker.argv) for worker in workers)
    assert "--tensor-parallel" not in [*scheduler.argv, *gateway.argv]
    assert [p.argv[p.argv.index("--metrics-port") + 1] for p in workers] == ["2", "3"], "one for each group"
    shared = replace(spec, workers=3, more_metrics_ports=(1, 2, 3, 4))
    gpus = [p.environment.get("CUDA_VISIBLE_DEVICES") for p in cluster.programs_of(shared)]
    assert gpus == [None, "4,6", "GPU-a,1", "4,6", None]
    alone = replace(spec, workers=1, more_metrics_ports=(1, 2))
    assert not cluster.programs_of(alone)[1].environment, "its ranks share all that can be seen"


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    spec = ClusterSpec(device="cuda", tensor_parallel=3, more_metrics_ports=(1, 2))
    with pytest.raises(ClusterError, match=r"--tensor-parallel 3 .* 2 can be seen.*0,1") as refused:
        cluster.programs_of(spec)
    assert refused.value.exit_code == 78
    cluster.programs_of(replace(spec, device="cpu"))  # ranks on a CPU need no device each
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(cluster, "_gpus", lambda: [Path("a"), Path("b")])
    with pytest.raises(ClusterError, match=r"2 can be seen$"):
        cluster.programs_of(spec)


def test_ranks_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    spec = ClusterSpec(workers=2, tensor_parallel=2, more_metrics_ports=(1, 2, 3))
    assert "--threads 2" in shlex.join(cluster.programs_of(spec)[1].argv)
    alone = replace(spec, workers=1, more_metrics_ports=(1, 2))
    assert "--threads" not in cluster.programs_of(alone)[1].argv, "the ranks share them by themselves"


def test_the_configuration_survives_supervisors_quoting(tmp_path: Path) -> None:
    program = cluster.Program(
        "worker-0", "workers", ("/a b/python", "-m", "x", "--model", "50%;'q'"), {"A": "1%"}
    )
    text = cluster.supervisor_config([program], tmp_path, tmp_path / "s.sock")
    parser = configparser.RawConfigParser(inline_comment_prefixes=(";", "#"), strict=False)
    parser.read_string(text)
    command = parser.get("program:worker-0", "command").replace("%%", "%")
    assert tuple(shlex.split(command)) == program.argv
    assert parser.get("program:worker-0", "environment") == 'A="1%%"'
    with pytest.raises(ClusterError, match="comment"):
        cluster.supervisor_config([cluster.Program("a", "b", ("x ;y",))], tmp_path, tmp_path / "s")


def test_the_template_for_a_machines_own_supervisor_agrees_with_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    parser = configparser.RawConfigParser(inline_comment_prefixes=(";", "#"), strict=False)
    parser.read(Path(__file__).parents[3] / "deploy" / "supervisor" / "pagoda.conf")
    ours = configparser.RawConfigParser()
    program = cluster.Program("worker-0", "workers", ("x",))
    ours.read_string(cluster.supervisor_config([program], Path("r"), Path("s")))
    sections = parser.sections()
    assert sections == ["program:pagoda-scheduler", "program:pagoda-worker", "program:pagoda-gateway"]
    for section in sections:
        for option in (
            "autorestart",
            "exitcodes",
            "startsecs",
            "startretries",
            "stopwaitsecs",
            "killasgroup",
        ):
            assert parser.get(section, option) == ours.get("program:worker-0", option)
        module, *argv = parser.get(section, "command").replace("\n", " ").split()[2:]
        flags = [arg for arg in argv if arg.startswith("--")]
        assert set(flags) <= set(re.findall(r"--[a-z-]+", help_of(module)))


def help_of(module: str) -> str:
    """What a service says of its flags."""
    done = subprocess.run(
        [sys.executable, "-m", module, "--help"], capture_output=True, text=True, check=True
    )
    return done.stdout


def test_the_flags_that_we_pass_on_are_ones_that_the_services_have() -> None:
    from pagoda.cli.main import _spec

    names = (
        *("served_model_name", "processes", "max_inflight", "horizon_ms", "max_batched_tokens"),
        *("max_waiting", "record", "block_size", "num_blocks", "gpu_memory_utilization", "max_slots"),
        *("max_model_len", "threads", "config", "log_level", "metrics_alias", "model", "device", "dtype"),
        *("otlp_traces_endpoint", "tool_call_parser", "stall_ms", "model_impl", "swap_space"),
        "preemption_mode",
    )
    given: dict[str, Any] = dict.fromkeys(names, "1")
    ports = {name: 1 for name in ("http_port", "grpc_port", "scheduler_port", "metrics_port", "workers")}
    ports["tensor_parallel"] = 2
    spec = _spec({**given, **ports, "host": "127.0.0.1", "insecure": True, "prefix_cache": False})
    for program in cluster.programs_of(replace(spec, more_metrics_ports=(1, 2))):
        flags = {arg for arg in program.argv[3:] if arg.startswith("--")}
        assert flags - {"--config"} <= set(re.findall(r"--[a-z-]+", help_of(program.argv[2])))
