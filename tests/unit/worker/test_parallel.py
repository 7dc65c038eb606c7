"""Ranks as processes: they meet or say who is missing, and add up to the same bits everywhere."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.unit.worker.test_process import end, free_port

ROOT = Path(__file__).parents[3]
WAIT_S = 120

RANK = """
import json, os, sys, torch
from gpu_worker import parallel
from gpu_worker.config import WorkerSettings
rank, size, where, patience = sys.argv[1:]
parallel.RENDEZVOUS_S = float(patience)
flags = ["--rank", rank, "--world-size", size, "--rendezvous", where]
try:
    group = parallel.connect(WorkerSettings.load(flags), torch.device("cpu"))
except parallel.RendezvousError as error:
    print(error, file=sys.stderr, flush=True)
    os._exit(1)
"""
ADDS = """
torch.inference_mode().__enter__()
said = group.exchange("name", f"rank {rank}")
ranks, found = group.ranks(100, 576, torch.bfloat16), {}
for dtype in (torch.float32, torch.bfloat16):
    for rows in (1, 7, 100):
        own = torch.randn((rows, 576), generator=torch.Generator().manual_seed(group.rank)).to(dtype)
        part = ranks.part(1, rows, 576, dtype)
        part.copy_(own)
        total = ranks.summed(1, part)
        columns = ranks.gathered(own[:, ::2])
        assert total.shape == (rows, 576) and total.dtype == dtype and columns.dtype == dtype
        found[f"{dtype} {rows}"] = total.float().tolist(), columns.float().tolist()
print(json.dumps([ranks.rank, ranks.size, said, found]))
"""


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen]]:
    """Starts a rank that runs code after it has met the others."""
    started: list[subprocess.Popen] = []

    def run(rank: int, size: int, where: str, does: str = "", patience: float = 60) -> subprocess.Popen:
        path = os.pathsep.join([str(ROOT), str(ROOT / "clients" / "python")])
        command = [sys.executable, "-c", RANK + does, str(rank), str(size), where, str(patience)]
        environment = {**os.environ, "PYTHONPATH": path}
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.parametrize("size", [2, 3])
def test_sums_and_gathers_are_the_same_bits_on_all_ranks(start, size):
    where = f"127.0.0.1:{free_port()}"
    processes = [start(rank, size, where, ADDS) for rank in range(size)]
    answers = [json.loads(process.communicate(timeout=WAIT_S)[0]) for process in processes]
    names = [f"rank {rank}" for rank in range(size)]
    assert [answer[:3] for answer in answers] == [[rank, size, names] for rank in range(size)]
    found = answers[0][3]
    assert all(answer[3] == found for answer in answers)
    for dtype in (torch.float32, torch.bfloat16):
        for rows in (1, 7, 100):
            generators = [torch.Generator().manual_seed(rank) for rank in range(size)]
            parts = [torch.randn((rows, 576), generator=g).to(dtype) for g in generators]
            total, columns = (torch.tensor(values) for values in found[f"{dtype} {rows}"])
            added = parts[0].float()
            for part in parts[1:]:
                added = added + part.float()
            assert torch.equal(total, added.to(dtype).float())
            assert torch.equal(columns, torch.cat([part[:, ::2] for part in parts], 1).float())


def test_a_rank_that_has_died_is_an_error_for_the_others(start):
    where = f"127.0.0.1:{free_port()}"
    does = """
ranks = group.ranks(1, 8, torch.float32)
group.exchange("ready", "")
if group.rank == 1:
    os.kill(os.getpid(), 9)
try:
    while True:
        ranks.summed(1, torch.ones(1, 8))
except RuntimeError:
    os._exit(7)
"""
    processes = [start(rank, 2, where, does) for rank in range(2)]
    assert [end(process)[0] for process in processes] == [7, -9]


# ----------------------------------------------------------------------------------- who does not come


def test_a_rank_that_does_not_come_is_named(start):
    """By all, but for those that find that the first rank has given up before they have."""
    where = f"127.0.0.1:{free_port()}"
    ends = [end(process) for process in [start(rank, 4, where, patience=5) for rank in (0, 2)]]
    assert all(code == 1 and f"not at --rendezvous {where}: rank " in said for code, said in ends)
    assert any("rank 1, rank 3 of 4" in said for _, said in ends)


def test_without_the_first_rank_the_others_say_so(start):
    where = f"127.0.0.1:{free_port()}"
    code, said = end(start(1, 2, where, patience=2))
    assert code == 1 and f"not at --rendezvous {where}: rank 0 of 2" in said


def test_a_server_that_never_answers_is_not_waited_for(start):
    """Something listens at the port and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        where = f"127.0.0.1:{silent.getsockname()[1]}"
        code, said = end(start(1, 2, where, patience=2))
    assert code == 1 and f"not at --rendezvous {where}: rank 0 of 2" in said


def test_a_port_that_is_taken(start):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        where = f"127.0.0.1:{taken.getsockname()[1]}"
        code, said = end(start(0, 2, where))
    assert code == 1 and f"rank 0 cannot listen at --rendezvous {where}" in said and "in use" in said


def test_an_address_that_is_not_ours(start):
    code, said = end(start(0, 2, "203.0.113.1:9999"))
    assert code == 1 and "rank 0 cannot listen at --rendezvous 203.0.113.1:9999" in said
