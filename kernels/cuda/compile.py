"""Compiles Triton kernels side by side before they are first launched.

Triton compiles a kernel when it is launched for the first time, one after the other, a second or more each;
a model needs some twenty. Here a rehearsal notes what would be compiled, a helper process compiles all of it
at once, each kernel in a fork of its own, and the launches that follow find the results in Triton's cache.
That is kept beside Pagoda's other caches; a second start compiles nothing and needs no rehearsal.

`python -m kernels.cuda.compile ARCH NUM` is the helper: one JSON object a line in, one a line out.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.metadata
import json
import os
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from kernels.cpu.build import cache_dir

SOURCE_DIR = Path(__file__).resolve().parent


def use_cache() -> Path:
    """Let Triton keep what it compiles in Pagoda's cache, unless TRITON_CACHE_DIR says where; the folder."""
    return Path(os.environ.setdefault("TRITON_CACHE_DIR", str(cache_dir().parent / "triton")))


class Warmer:
    """Compiles kernels in the background, in processes of its own. None of them touches the device.

    Failures do no harm here: the launch that needs the kernel compiles it again and raises.
    """

    def __init__(self, arch: int, num_processes: int, marker: Path) -> None:
        """Start the helper, which imports torch and Triton meanwhile.

        Args:
            arch: the device's compute capability, as 90.
            num_processes: how many kernels to compile at once.
            marker: made when everything that was rehearsed is in the cache.
        """
        self._marker = marker
        self._noted: dict[str, str] = {}
        self._answers: list[dict[str, Any]] = []
        command = [sys.executable, "-m", __spec__.name, str(arch), str(num_processes)]
        root = SOURCE_DIR.parent.parent
        env = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
        self._helper = subprocess.Popen(
            command,
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            pipesize=1 << 20,  # a recipe is some 5 KB, and noting one should not wait for compilations
        )
        self._reader = threading.Thread(target=self._read, name="kernels", daemon=True)
        self._reader.start()

    @contextmanager
    def rehearsal(self) -> Iterator[None]:
        """Inside, what a launch would compile first is compiled in the background, and not launched.

        All else runs, and finds zeros where a kernel would have written into a new tensor, so that nothing
        takes garbage for an index.
        """
        import triton

        before = triton.knobs.runtime.jit_cache_hook
        triton.knobs.runtime.jit_cache_hook = self._note
        try:
            with _Zeroed():
                yield
        finally:
            triton.knobs.runtime.jit_cache_hook = before

    def finish(self, timeout: float | None = None) -> list[str]:
        """Wait until all is compiled; what went wrong, a line each."""
        assert self._helper.stdin is not None
        with suppress(BrokenPipeError):
            self._helper.stdin.close()
        self._reader.join(timeout)
        errors = [f"{answer['name']}: {answer['error']}" for answer in self._answers if answer["error"]]
        missing = len(self._noted) - len(self._answers)
        if missing:
            errors.append(f"{missing} kernels were not compiled in time, or the helper ended early")
        if not errors:
            with suppress(OSError):  # without it, the next start rehearses again
                self._marker.parent.mkdir(parents=True, exist_ok=True)
                self._marker.touch()
        self.close()
        return errors

    def close(self) -> None:
        """End the helper, whatever it is doing."""
        self._helper.kill()
        self._helper.wait()

    def _note(self, *, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        data = compile["specialization_data"]
        if data not in self._noted:
            kernel = fn.jit_function.fn
            self._noted[data] = kernel.__qualname__
            recipe = {"module": kernel.__module__, "name": kernel.__qualname__, "data": data}
            assert self._helper.stdin is not None
            with suppress(BrokenPipeError):
                self._helper.stdin.write(json.dumps(recipe) + "\n")
                self._helper.stdin.flush()
        return True  # Triton takes it as compiled elsewhere, and does not launch

    def _read(self) -> None:
        assert self._helper.stdout is not None
        for line in self._helper.stdout:
            self._answers.append(json.loads(line))


def warmer(arch: int, key: str, num_processes: int) -> Warmer | None:
    """A started `Warmer`, or None when the cache holds everything already.

    Args:
        arch: the device's compute capability, as 90.
        key: whatever decides which kernels are needed: the model's shape, dtype, and the worker's limits.
        num_processes: how many kernels to compile at once.
    """
    digest = hashlib.blake2b(
        f"{key}\0{arch}\0{importlib.metadata.version('triton')}".encode(), digest_size=12
    )
    for path in sorted(SOURCE_DIR.glob("*.py")):
        digest.update(path.read_bytes())
    marker = use_cache() / f"complete-{digest.hexdigest()}"
    threading.Thread(target=_hash_triton, name="hash-triton", daemon=True).start()
    return None if marker.exists() else Warmer(arch, num_processes, marker)


class _Zeroed(TorchFunctionMode):
    """New tensors hold zeros."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.empty, torch.empty_like, torch.Tensor.new_empty):
            result.zero_()
        return result


def _hash_triton() -> None:
    """Triton hashes its own 400 MB once a process, which need not wait for the first launch."""
    from triton.runtime.cache import triton_key

    triton_key()


class _AbsentDevice:
    """A Triton driver that knows what to compile for and has nothing to run it on."""

    def __init__(self, arch: int) -> None:
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return 0


def _compile(module: str, name: str, data: str) -> None:
    """Compile one kernel into the cache, and the C stub that launches it."""
    kernel = functools.reduce(getattr, name.split("."), importlib.import_module(module))
    compiled = kernel.preload(data)
    with suppress(Exception):  # as where there is no libcuda; the launch makes what is missing
        from triton.backends.nvidia.driver import CudaLauncher

        CudaLauncher(compiled.src, compiled.metadata)


def _serve(arch: int, num_processes: int) -> None:
    """Fork for each recipe: the forks share the imports, which take seconds, and nothing else."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    from triton.runtime.driver import driver

    _hash_triton()
    driver.set_active(_AbsentDevice(arch))
    running: dict[int, tuple[str, int]] = {}

    def reap() -> None:
        pid, status = os.wait()
        name, pipe = running.pop(pid)
        with os.fdopen(pipe) as stream:
            error = stream.read()
        error = error or (f"ended with status {status}" if status else "")
        print(json.dumps({"name": name, "error": error}), file=answers, flush=True)

    for line in sys.stdin:
        recipe = json.loads(line)
        importlib.import_module(recipe["module"])
        while len(running) >= num_processes:
            reap()
        mine, theirs = os.pipe()
        if pid := os.fork():
            os.close(theirs)
            running[pid] = recipe["name"], mine
            continue
        try:
            _compile(**recipe)
        except BaseException as error:
            os.write(theirs, f"{type(error).__name__}: {error}"[:4000].encode())
            traceback.print_exc()
        finally:
            os._exit(0)
    while running:
        reap()


if __name__ == "__main__":
    _serve(int(sys.argv[1]), int(sys.argv[2]))
