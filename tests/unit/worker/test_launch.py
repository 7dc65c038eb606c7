"""The process that starts ranks: whatever ends one ends all, whatever ends it ends them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.leftovers import processes_in, wait_gone

ROOT = Path(__file__).parents[3]
WAIT_S = 60

DRIVER = """
import sys
from gpu_worker.launch import launch
from pagoda import logs
sys.exit(launch({size}, [sys.executable, "rank.py"], logs.setup("test")))
"""
# Says that it is there, then does what its rank is to do.
RANK = """
import os, signal, sys, time
rank = int(os.environ["PAGODA_WORKER_RANK"])
assert os.environ["PAGODA_WORKER_WORLD_SIZE"] == "{size}"
def deaf():
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
def polite():
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: (open("told", "a").write(str(rank)), os._exit(0)))
def rest():
    open(f"up-{{rank}}", "w").write(str(os.getpid()))
    time.sleep(3600)
{does}
rest()
"""


class Ranks:
    """A driver and its ranks in a folder of their own."""

    def __init__(self, folder: Path, size: int, does: str) -> None:
        self.folder, self.size = folder, size
        (folder / "driver.py").write_text(DRIVER.format(size=size))
        (folder / "rank.py").write_text(RANK.format(size=size, does=does))
        path = os.pathsep.join([str(ROOT), str(ROOT / "clients" / "python")])
        self.process = subprocess.Popen(
            [sys.executable, "driver.py"],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": path},
            stderr=subprocess.PIPE,
            text=True,
        )

    def pids(self) -> list[int]:
        """The ranks' processes, once all of them are there."""
        deadline = time.monotonic() + WAIT_S
        while True:
            found = [self.folder / f"up-{rank}" for rank in range(self.size)]
            texts = [path.read_text() if path.exists() else "" for path in found]
            if all(texts):
                return [int(text) for text in texts]
            assert time.monotonic() < deadline and self.process.poll() is None
            time.sleep(0.02)

    def end(self) -> tuple[int, str]:
        """Exit code of the driver and what it said, when nothing of it is left."""
        said = self.process.communicate(timeout=WAIT_S)[1]
        wait_gone(self.folder)
        return self.process.returncode, said


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Ranks]]:
    started: list[Ranks] = []

    def run(does: str, size: int = 3) -> Ranks:
        started.append(Ranks(tmp_path, size, does))
        return started[-1]

    yield run
    for ranks in started:
        ranks.process.kill()
        ranks.process.wait()
        wait_gone(tmp_path)


@pytest.mark.parametrize("victim", [0, 2])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM])
def test_a_signal_to_one_rank_ends_all(start, victim, number):
    """Also one that would have been an order, had it come to the group: nobody else has heard it."""
    ranks = start("deaf() if rank == 1 else None")
    os.kill(ranks.pids()[victim], number)
    code, said = ranks.end()
    assert code == 1
    assert f'"rank": {victim}, "code": -{int(number)}, "event": "a rank ended", "level": "error"' in said


@pytest.mark.parametrize(("ends", "code"), [(1, 1), (78, 78), (2, 2), (17, 17), (0, 1)])
def test_a_rank_that_ends_ends_all(start, ends, code):
    ranks = start(
        "deaf()\n"
        "while rank == 1 and not (os.path.exists('up-0') and os.path.exists('up-2')): time.sleep(0.01)\n"
        f"if rank == 1: os._exit({ends})"
    )
    assert ranks.end()[0] == code


def test_what_no_further_try_would_mend_counts_whoever_ended_first(start):
    """One rank often fails because another one does. The parent, held back, finds that both have ended."""
    ranks = start(
        "if rank == 0: signal.signal(signal.SIGUSR1, lambda *_: os._exit(1))\n"
        "else: signal.signal(signal.SIGUSR1, lambda *_: os._exit(78))",
        size=2,
    )
    pids = ranks.pids()
    ranks.process.send_signal(signal.SIGSTOP)
    for pid in pids:
        os.kill(pid, signal.SIGUSR1)
        while state_of(pid) != "Z":
            time.sleep(0.01)
    ranks.process.send_signal(signal.SIGCONT)
    code, said = ranks.end()
    assert code == 78 and '"rank": 0, "code": 1' in said


def state_of(pid: int) -> str:
    """The state of a process, as one letter."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_order_to_end_goes_to_all(start, number):
    ranks = start("polite()")
    ranks.pids()
    ranks.process.send_signal(number)
    assert ranks.end()[0] == 0
    assert sorted((ranks.folder / "told").read_text()) == ["0", "1", "2"]


def test_a_rank_that_does_not_listen_is_killed_in_the_end(start):
    ranks = start("deaf() if rank == 1 else polite()")
    ranks.pids()
    ranks.process.send_signal(signal.SIGTERM)
    code, said = ranks.end()
    assert code == 0 and '"rank": 1, "code": -9' in said
    assert sorted((ranks.folder / "told").read_text()) == ["0", "2"]


def test_when_the_parent_is_killed_no_rank_goes_on(start):
    ranks = start("deaf()")
    ranks.pids()
    ranks.process.kill()
    assert ranks.end()[0] == -signal.SIGKILL


def test_ranks_whose_parent_is_killed_while_it_starts_them(start):
    """At no point is a rank left alone."""
    for moment in range(10):
        ranks = start("deaf()")
        time.sleep(0.02 * moment)
        ranks.process.kill()
        ranks.end()


def test_the_first_rank_inherits_the_rendezvous_and_the_parent_lets_go_of_it(start):
    ranks = start(
        "import socket\n"
        "port = int(os.environ['PAGODA_WORKER_RENDEZVOUS'].rpartition(':')[2])\n"
        "if rank == 0:\n"
        "    held = socket.socket(fileno=int(os.environ['PAGODA_RENDEZVOUS_FD']))\n"
        "    held.accept()[0].sendall(b'here')\n"
        "else:\n"
        "    met = socket.create_connection(('127.0.0.1', port)).recv(4)\n"
        "    assert met == b'here'\n"
        "open('port', 'w').write(str(port))",
        size=2,
    )
    pids = ranks.pids()
    listening = [pid for pid in [ranks.process.pid, *pids] if holds(pid, ranks.folder)]
    assert listening == [pids[0]]
    assert len(processes_in(ranks.folder)) == 3


def holds(pid: int, folder: Path) -> bool:
    """Whether a process holds the socket that listens at the port of the rendezvous."""
    port = f"{int((folder / 'port').read_text()):04X}"
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    inodes = [f"socket:[{line[9]}]" for line in lines if line[1].endswith(f":{port}") and line[3] == "0A"]
    assert len(inodes) == 1
    return any(os.readlink(fd) in inodes for fd in Path(f"/proc/{pid}/fd").iterdir())
