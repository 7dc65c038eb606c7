"""Compiles the C files of this folder into one shared library, once a machine, and loads it.

The library lies in `$PAGODA_CACHE/kernels` (default `~/.cache/pagoda/kernels`) under the hash of everything
it was made from: sources, flags, compiler and processor. Any number of processes may build it at once: each
writes a file of its own and renames it into place. `PAGODA_CPU_FLAGS` replaces the default flags.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCE_DIR = Path(__file__).resolve().parent
DEFAULT_FLAGS = "-O3 -march=native"
FIXED_FLAGS = ("-std=gnu11", "-fPIC", "-pthread", "-fno-math-errno", "-fno-trapping-math", "-Wall")


class BuildError(Exception):
    """The library cannot be made on this machine; the message says why."""


@functools.cache
def library() -> ctypes.CDLL | None:
    """The loaded library, built when the cache has none for these sources, flags and processor.

    Returns None, after one warning that says why, when it cannot be built or loaded: callers then use the
    torch references, which are correct and slow. `PAGODA_CPU_KERNELS=0` asks for that without a warning.
    """
    if os.environ.get("PAGODA_CPU_KERNELS", "1") == "0":
        return None
    try:
        return ctypes.CDLL(str(build()))
    except (BuildError, OSError) as error:
        warnings.warn(
            f"Pagoda's CPU kernels are not available, so this process runs on slow ones: {error}",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def build() -> Path:
    """Path of the shared library, compiled now if the cache does not hold it.

    Raises:
        BuildError: there is no C compiler, it fails on the sources, or the cache cannot be written.
    """
    compiler = (os.environ.get("CC") or shutil.which("gcc") or shutil.which("cc") or "").split()
    if not compiler:
        raise BuildError("there is no C compiler: install gcc, or name one in CC")
    flags = os.environ.get("PAGODA_CPU_FLAGS", DEFAULT_FLAGS).split()
    target = cache_dir() / f"kernels-{_digest(compiler, flags)}.so"
    if not target.exists():
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
                os.replace(_compile(compiler, flags, Path(scratch)), target)
        except OSError as error:
            raise BuildError(f"cannot write the library to {target.parent}: {error}") from error
    return target


def cache_dir() -> Path:
    """The folder that holds built libraries."""
    root = os.environ.get("PAGODA_CACHE")
    return (Path(root) if root else Path.home() / ".cache" / "pagoda") / "kernels"


def _digest(compiler: list[str], flags: list[str]) -> str:
    """Hash of everything that decides what the library contains."""
    digest = hashlib.blake2b(digest_size=12)
    for part in (*compiler, *FIXED_FLAGS, *flags, _processor()):
        digest.update(part.encode() + b"\0")
    for path in sorted((*SOURCE_DIR.glob("*.c"), *SOURCE_DIR.glob("*.h"))):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _processor() -> str:
    """What -march=native depends on: the processor's model and its features."""
    names = ("model name", "flags", "Features", "CPU part")
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    first: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() in names:
            first.setdefault(name.strip(), value.strip())
    return platform.machine() + repr(sorted(first.items()))


def _compile(compiler: list[str], flags: list[str], scratch: Path) -> Path:
    """Compiles the files side by side, links them, and returns the library's path inside `scratch`."""

    def compiled(source: Path) -> str:
        output = str(scratch / f"{source.stem}.o")
        _run([*compiler, *FIXED_FLAGS, *flags, "-c", str(source), "-o", output])
        return output

    sources, target = sorted(SOURCE_DIR.glob("*.c")), scratch / "kernels.so"
    with ThreadPoolExecutor(len(sources)) as pool:
        objects = list(pool.map(compiled, sources))
    _run([*compiler, "-shared", "-pthread", *objects, "-o", str(target), "-lm"])
    return target


def _run(command: list[str]) -> None:
    try:
        job = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    except OSError as error:
        raise BuildError(f"cannot run the C compiler {command[0]}: {error}") from error
    if job.returncode:
        raise BuildError(f"{' '.join(command)} failed:\n{job.stdout[-2000:]}")
