"""Start a worker: load the model, set KV memory aside, attach to the scheduler.

Exit codes: 0 after SIGTERM or SIGINT; 78 when this worker can never serve (a bad model, or the scheduler
refuses it), so that a supervisor leaves it alone; 2 for bad settings; 1 for all that a restart may mend.

With --tensor-parallel this process only starts the ranks of a group, and ends as they do (`launch.py`).
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import importlib.util
import os
import signal
import sys
import threading
from pathlib import Path
from typing import NoReturn

EXIT_UNUSABLE = 78
EXIT_FAILED = 1
SWITCH_EVERY_S = 1e-4


def check_kernels() -> str | None:
    """Why `kernels` is not ours, or None. transformers looks for a distribution of that name, which may be
    installed beside us and, depending on the path, be found first."""
    home = Path(__file__).resolve().parent.parent / "kernels"
    spec = importlib.util.find_spec("kernels")
    found = Path(spec.origin).resolve().parent if spec is not None and spec.origin else None
    if found == home and (home / "cpu" / "build.py").exists():
        return None
    owners = importlib.metadata.packages_distributions().get("kernels", ["no distribution"])
    return (
        f"the Python package `kernels` is {found or 'missing'} (from {', '.join(owners)}), not Pagoda's own "
        f"in {home}. Uninstall the other one, or start the worker in an environment without it."
    )


def wake_device(index: int) -> None:
    """Let the CUDA driver make its context while Python imports torch: neither waits for the other."""

    def work() -> None:
        with contextlib.suppress(OSError, AttributeError):  # torch will say what is wrong with the driver
            driver = ctypes.CDLL("libcuda.so.1")
            context = ctypes.c_void_p()
            if driver.cuInit(0) == 0:
                driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), index)

    threading.Thread(target=work, name="wake-device", daemon=True).start()


def main() -> int:
    """Run the worker; returns the exit code."""
    if (reason := check_kernels()) is not None:
        print(f"error: {reason}", file=sys.stderr)
        return EXIT_UNUSABLE
    from gpu_worker.config import WorkerSettings

    settings = WorkerSettings.load()
    from pagoda import logs

    is_rank = settings.world_size > 1
    if settings.tensor_parallel > 1 and not is_rank:
        from gpu_worker.launch import launch

        command = [sys.executable, *sys.orig_argv[1:]]
        return launch(settings.tensor_parallel, command, logs.setup("worker", settings.log_level))
    if settings.device == "cuda":
        wake_device(settings.rank)
    from gpu_worker.start import StartError, Worker, build

    # Threads that wait for masks of grammars or for the device have little to do then, and a step to catch.
    sys.setswitchinterval(SWITCH_EVERY_S)
    log = logs.setup("worker", settings.log_level)
    if is_rank:
        log = log.bind(rank=settings.rank)
    for number in (signal.SIGTERM, signal.SIGINT):
        # A rank that starts may be waiting for another one inside torch, where no handler of ours would run.
        signal.signal(number, signal.SIG_DFL if is_rank else lambda *_: sys.exit(0))
    try:
        worker: Worker = build(settings, log)
    except StartError as error:
        log.error("this worker cannot start", reason=str(error))
        end(error.code)
    except Exception as error:
        log.error("this worker cannot start", exc_info=error)
        end(EXIT_FAILED)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: worker.hub.stop())
    code = worker.run()
    log.info("worker ends", code=code)
    end(code)


def end(code: int) -> NoReturn:
    """End at once: a thread that is still in a long kernel, or waits for another rank, must not hold up the
    end, and there is nothing left to clean up."""
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    raise SystemExit(main())
