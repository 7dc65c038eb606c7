"""Times at which a request passes certain methods, in processes that know nothing of it.

A process that finds this folder's `sitecustomize.py` (see `variables`) wraps those methods once their modules
are imported, and writes its stamps when it ends. `time.perf_counter` is the same clock for all processes.
"""

from __future__ import annotations

import atexit
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.gpu_services import environment

FOLDER = "STAMPS_FOLDER"
LOOK_EVERY_S, LOOK_FOR_S = 0.05, 60.0
# (module, class or "" for a function, method): what is stamped when it is entered, and when it is left.
ENTERED = [
    ("scheduler_svc.engine", "Engine", "submit"),
    ("scheduler_svc.engine", "Engine", "_turn"),
    ("scheduler_svc.worker_hub", "Rank", "post"),
    ("scheduler_svc.worker_hub", "WorkerHub", "_result"),
    ("scheduler_svc.session", "Outbox", "deliver"),
    ("gpu_worker.executor", "DeviceExecutor", "submit"),
    ("gpu_worker.executor", "DeviceExecutor", "_step"),
    ("gpu_worker.output", "", "collect"),
    ("gpu_worker.hub_client", "HubClient", "deliver"),
]
LEFT = [
    ("scheduler_svc.engine", "Engine", "_turn"),
    ("scheduler_svc.session", "Outbox", "take"),
    ("gpu_worker.staging", "Stager", "stage"),
    ("gpu_worker.slots", "Rows", "apply"),
    ("gpu_worker.graphs", "Graphs", "replay"),
]


class Stamp(NamedTuple):
    """When, seconds, and what."""

    at: float
    name: str


@contextmanager
def stamped() -> Iterator[tuple[Path, dict[str, str]]]:
    """A folder that fills with stamps, and the variables of processes that are to leave some there."""
    with tempfile.TemporaryDirectory(prefix="pagoda-stamps-") as folder:
        Path(folder, "sitecustomize.py").write_text("from benchmarks import stamps\nstamps.watch()\n")
        path = folder + os.pathsep + environment({})["PYTHONPATH"]
        yield Path(folder), {"PYTHONPATH": path, FOLDER: folder}


def read(folder: Path) -> list[Stamp]:
    """Everybody's stamps in the order of their times."""
    stamps = []
    for file in folder.glob("*.txt"):
        for line in file.read_text().splitlines():
            at, _, name = line.partition(" ")
            stamps.append(Stamp(float(at), name))
    return sorted(stamps)


def watch() -> None:
    """Stamp this process; called by its `sitecustomize`."""
    folder = os.environ.get(FOLDER)
    if not folder:
        return
    stamps: list[Stamp] = []

    def write() -> None:
        if stamps:
            lines = [f"{at:.9f} {name}\n" for at, name in stamps]
            Path(folder, f"{os.getpid()}.txt").write_text("".join(lines))

    leave = os._exit

    def write_and_leave(code: int) -> None:
        write()
        leave(code)

    atexit.register(write)
    os._exit = write_and_leave  # type: ignore[assignment]  # a worker ends by it
    threading.Thread(target=_wrap_all, args=(stamps,), daemon=True).start()


def _wrap_all(stamps: list[Stamp]) -> None:
    missing = [(place, False) for place in ENTERED] + [(place, True) for place in LEFT]
    deadline = time.monotonic() + LOOK_FOR_S
    while missing and time.monotonic() < deadline:
        missing = [(place, left) for place, left in missing if not _wrap(stamps, place, left)]
        time.sleep(LOOK_EVERY_S)


def _wrap(stamps: list[Stamp], place: tuple[str, str, str], left: bool) -> bool:
    """Wrap one method; False while its module is not imported."""
    module, owner, method = place
    holder: Any = sys.modules.get(module)
    if owner and holder is not None:
        holder = getattr(holder, owner, None)
    function: Callable[..., Any] | None = getattr(holder, method, None)
    if function is None:
        return False
    name = f"{module.partition('.')[0]} {owner}.{method}" + (" done" if left else "")

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if left:
            result = function(*args, **kwargs)
            stamps.append(Stamp(time.perf_counter(), name))
            return result
        stamps.append(Stamp(time.perf_counter(), name))
        return function(*args, **kwargs)

    setattr(holder, method, wrapped)
    return True
