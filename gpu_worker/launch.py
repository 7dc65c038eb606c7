"""Starts the ranks of a group as processes of this machine, and sees to it that they end together.

The process that does so does nothing else, and imports no torch. When a rank ends, for whatever reason, the
others may be waiting for it inside a kernel, so they are killed at once and the group ends with that rank's
exit code: whoever started this process starts the whole group again, or does not.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import time

import structlog

RENDEZVOUS_FD = "PAGODA_RENDEZVOUS_FD"
GRACE_S = 6.0  # from being told to end; supervisors wait longer before they kill
LOOK_EVERY_S = 1.0
FINAL_CODES = (2, 78)  # the next try would end the same
PR_SET_PDEATHSIG = 1
STOP = (signal.SIGTERM, signal.SIGINT)
WATCHED = (*STOP, signal.SIGCHLD)

Running = dict[int, subprocess.Popen[bytes]]


def launch(size: int, command: list[str], log: structlog.stdlib.BoundLogger) -> int:
    """Run `command` as `size` ranks until they have ended. A process calls it once, in its main thread.

    SIGTERM and SIGINT go to all of them. The ranks are told who they are by the worker's variables, and the
    first one inherits the socket of their rendezvous, so that no other process can take its port.

    Returns:
        0 after SIGTERM or SIGINT, else the code of the rank that ended first: 1 for a signal, and for a 0
        that nobody asked for. A code that says that no further try will help counts, whoever ended first.
    """
    # Blocked, signals wait until they are asked for: none is lost between two looks.
    signal.pthread_sigmask(signal.SIG_BLOCK, WATCHED)
    parent, libc = os.getpid(), ctypes.CDLL(None)

    def bind() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before it could be watched
            os._exit(1)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, WATCHED)

    with socket.create_server(("127.0.0.1", 0), backlog=size) as listener:
        fd, (host, port) = listener.fileno(), listener.getsockname()
        os.environ["PAGODA_WORKER_WORLD_SIZE"] = str(size)
        os.environ["PAGODA_WORKER_RENDEZVOUS"] = f"{host}:{port}"
        running = {}
        for rank in range(size):
            own = {"PAGODA_WORKER_RANK": str(rank), RENDEZVOUS_FD: str(fd)}
            inherited = [fd] if rank == 0 else []
            running[rank] = subprocess.Popen(
                command, env={**os.environ, **own}, pass_fds=inherited, preexec_fn=bind
            )
    log.info("ranks started", processes=[process.pid for process in running.values()])
    return _watch(running, log)


def _watch(running: Running, log: structlog.stdlib.BoundLogger) -> int:
    told = 0.0  # when they were told to end
    codes: list[int] = []
    while running:
        heard = signal.sigtimedwait(WATCHED, LOOK_EVERY_S)
        if heard is not None and heard.si_signo in STOP:
            told = told or time.monotonic()
            _send(running, heard.si_signo)
        for rank in [rank for rank, process in running.items() if process.poll() is not None]:
            codes.append(running.pop(rank).returncode)
            say = log.info if told or len(codes) > 1 else log.error
            say("a rank ended", rank=rank, code=codes[-1])
        if time.monotonic() > told + GRACE_S if told else codes:
            _send(running, signal.SIGKILL)
    final = (code for code in codes if code in FINAL_CODES)
    return 0 if told else next(final, max(1, codes[0]))


def _send(running: Running, number: int) -> None:
    for process in running.values():
        process.send_signal(number)
