"""`python -m gpu_worker` as a process: it attaches, answers, ends cleanly, or says why it cannot start."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import grpc
import pytest

from pagoda.internal.v1 import worker_pb2
from tests.support.metrics import scrape
from tests.unit.worker.fake_hub import FakeHub
from tests.unit.worker.harness import Device, prompt

ROOT = Path(__file__).parents[3]
WAIT_S = 120


@pytest.fixture
def hub():
    server = FakeHub()
    yield server
    server.stop()


@pytest.fixture
def start():
    """Starts workers, and kills what is left of them."""
    started: list[subprocess.Popen] = []

    def run(*flags: str, **environment: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "gpu_worker", "--threads", "1", "--num-blocks", "64", *flags]
        process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **environment}, stderr=subprocess.PIPE, text=True
        )
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.wait()


def end(process: subprocess.Popen) -> tuple[int, str]:
    """Exit code and what it said."""
    _, said = process.communicate(timeout=WAIT_S)
    return process.returncode, said


def test_a_worker_attaches_answers_and_ends(hub, start, tiny):
    folder = tiny("llama")[1]
    expected = Device(folder).generate(0, prompt(9), 4)
    process = start(
        *("--scheduler", hub.address, "--model", str(folder), "--dtype", "float32", "--group-name", "g1"),
        *("--max-model-len", "128", "--metrics-port", "0", "--served-model-name", "tiny", "--max-slots", "5"),
    )
    session = hub.next_session()
    hello = session.hello
    assert (hello.protocol_min, hello.protocol_max) == (1, 1)
    assert (hello.model_name, hello.group_name, hello.rank, hello.world_size) == ("tiny", "g1", 0, 1)
    assert (hello.vocab_size, hello.max_model_len, hello.max_slots) == (200, 128, 5)
    assert (hello.block_size, hello.num_device_blocks, hello.num_host_blocks) == (16, 64, 40)
    assert hello.block_bytes == 2 * 3 * 16 * 2 * 16 * 4
    assert (hello.max_batched_tokens, hello.max_horizon) == (2048, 16)
    assert hello.dtype == "float32" and hello.device.startswith("cpu")
    assert list(hello.eos_token_ids) == [2] and hello.max_stop_ids == 1024
    assert hello.model_digest and hello.incarnation
    session.start(1)
    row = worker_pb2.NewRow(slot=2, tokens=prompt(9), num_prompt_tokens=9, blocks=[4], last_position=13)
    session.send(worker_pb2.Step(epoch=1, num_iterations=1, new_rows=[row], slots=[2], num_tokens=[9]))
    session.send(worker_pb2.Step(epoch=1, step_id=1, num_iterations=4, slots=[2]))
    first, second = session.result(), session.result()
    assert [*first.tokens, *second.tokens] == expected
    assert list(second.ended_reasons) == [worker_pb2.ROW_END_LENGTH]
    process.send_signal(signal.SIGTERM)
    session.ended.get(timeout=WAIT_S)
    assert end(process)[0] == 0


@pytest.mark.parametrize(("space", "blocks"), [("0", 0), ("0.0001", 8), ("1", 40)])
def test_swap_space(hub, start, tiny, space, blocks):
    """In GiB; never more than what all slots could fill."""
    flags = ("--dtype", "float32", "--max-model-len", "128", "--metrics-port", "0", "--max-slots", "5")
    start("--scheduler", hub.address, "--model", str(tiny("llama")[1]), *flags, "--swap-space", space)
    hello = hub.next_session().hello
    assert hello.num_host_blocks == blocks == min(40, int(float(space) * 2**30) // hello.block_bytes)


def test_refusal_ends_with_78(hub, start, tiny):
    hub.refusal = (grpc.StatusCode.FAILED_PRECONDITION, "block_size differs: 16 here, 32 there")
    process = start("--scheduler", hub.address, "--model", str(tiny("llama")[1]), "--metrics-port", "0")
    code, said = end(process)
    assert code == 78 and "block_size differs" in said


def test_interrupt_while_waiting_for_a_scheduler(hub, start, tiny):
    """Metrics are there before the scheduler is; SIGINT ends the worker at once."""
    hub.stop()
    process = start("--scheduler", hub.address, "--model", str(tiny("llama")[1]), "--metrics-port", "0")
    for line in process.stderr:
        if "no session" in line:
            break
    process.send_signal(signal.SIGINT)
    assert end(process)[0] == 0


def test_terminated_while_starting(start, tiny):
    process = start("--model", str(tiny("llama")[1]), "--metrics-port", "0")
    for line in process.stderr:
        if '"loading"' in line:
            break
    process.send_signal(signal.SIGTERM)
    assert end(process)[0] == 0


def test_metrics_port(hub, start, tiny):
    port = free_port()
    flags = ("--scheduler", hub.address, "--model", str(tiny("llama")[1]), "--metrics-port", str(port))
    start(*flags)
    hub.next_session()
    assert 'pagoda:worker_steps_total{engine="' in scrape(f"http://127.0.0.1:{port}/metrics")
    code, said = end(start(*flags))
    assert code == 1 and f"--metrics-port {port}" in said


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        (["--model", "/no/such/model"], 78, "neither"),
        (["--model", "MODEL", "--max-model-len", "100000"], 78, "--max-model-len 100000"),
        (["--model", "MODEL", "--device", "cuda"], 78, "no CUDA device"),
        (["--model", "MODEL", "--block-size", "20"], 2, "--block-size"),
        (["--model", "MODEL", "--max-slots", "5000"], 2, "--max-slots"),
        (["--model", "MODEL", "--swap-space", "-1"], 2, "--swap-space"),
    ],
)
def test_what_cannot_start(start, tiny, flags, code, said):
    flags = [str(tiny("llama")[1]) if flag == "MODEL" else flag for flag in flags]
    assert (got := end(start(*flags, "--metrics-port", "0")))[0] == code, got
    assert said in got[1]


def test_a_damaged_model_ends_with_78(start, tiny, tmp_path):
    shutil.copytree(tiny("llama")[1], tmp_path / "m")
    weights = tmp_path / "m" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    code, said = end(start("--model", str(tmp_path / "m"), "--metrics-port", "0"))
    assert code == 78 and str(weights) in said


def test_another_distribution_named_kernels(start, tiny, tmp_path):
    """Where `kernels` is found to be somebody else's, the worker says so and does not start."""
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text("")
    shim = tmp_path / "run.py"
    shim.write_text(
        "import runpy, sys\n"
        f"sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]\n"
        "runpy.run_module('gpu_worker', run_name='__main__')\n"
    )
    run = subprocess.run(
        [sys.executable, str(shim), "--model", str(tiny("llama")[1])],
        capture_output=True,
        text=True,
        timeout=WAIT_S,
    )
    assert run.returncode == 78
    assert str(package) in run.stderr and "not Pagoda's own" in run.stderr
