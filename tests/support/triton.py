"""Triton kernels in tests: run by the interpreter where there is no GPU, compiled for any card everywhere.

Triton decides when it is imported whether functions are interpreted, and one process cannot do both. So
importing this module, which tests/conftest.py does before anything else, switches the interpreter on where
there is no NVIDIA device, and what is to be compiled is compiled by a helper process that never interprets.

The interpreter is right for float32 only; it knows no inline assembly and no programmatic launches.
"""

from __future__ import annotations

import atexit
import functools
import importlib
import os
import pickle
import struct
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

ROOT = Path(__file__).parents[2]
# Dynamic shared memory that one block can have, by compute capability (CUDA C++ Programming Guide, table 27).
SHARED_BYTES = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10}
ARCHS = tuple(SHARED_BYTES)
_ENV = "TRITON_INTERPRET"


@dataclass(frozen=True)
class Compiled:
    """What came out of a compilation.

    Attributes:
        name: of the kernel.
        arch: compute capability it is for, as 90.
        shared: bytes of shared memory that a block takes.
        num_warps: of a block.
        asm: the stages' texts by name ("ttgir", "ptx"), and "cubin" as bytes.
        registers: of a thread.
        spilled: bytes of registers that a thread keeps in local memory.
    """

    name: str
    arch: int
    shared: int
    num_warps: int
    asm: dict[str, Any]
    registers: int
    spilled: int


class CompileError(AssertionError):
    """A kernel does not compile, or no block of it fits the card."""


def interpreted() -> bool:
    """Whether kernels run on CPU tensors in this process; else they need CUDA tensors."""
    return os.environ.get(_ENV) == "1"


def device() -> str:
    """Where the tensors of kernels that are to be run must be: "cpu" or "cuda"."""
    return "cpu" if interpreted() else "cuda"


def _switch_on() -> None:
    if _ENV in os.environ or any(Path("/dev").glob("nvidia[0-9]*")):
        return
    if "triton.language" in sys.modules:
        raise RuntimeError(f"triton was imported before tests.support.triton: set {_ENV}=1 for this run")
    os.environ[_ENV] = "1"


def compile_for(
    kernel: Any,
    arch: int,
    signature: Mapping[str, str],
    constexprs: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
    divisible: Sequence[str] = (),
) -> Compiled:
    """Compile a kernel for a card that need not be there, and check that a block of it fits that card.

    Args:
        kernel: a `@triton.jit` function of a module, interpreted or not.
        arch: compute capability, as 80, 86, 89 or 90.
        signature: Triton's type of each argument that is no constexpr: "*bf16", "i32", "fp32". Pointers are
            taken to be aligned to 16 bytes, as torch's are.
        constexprs: values of the others; they must pickle. Arguments with a default may be left out. A number
            that is 1 is a constexpr for Triton's launcher, too.
        options: num_warps, num_stages, launch_pdl and the like.
        divisible: integer arguments that are multiples of 16, which the launcher tells the compiler as well.

    Raises:
        CompileError: it does not compile, or takes more shared memory than a block can have on that card.
    """
    function = getattr(kernel, "fn", kernel)
    request = (
        function.__module__,
        function.__qualname__,
        arch,
        dict(signature),
        dict(constexprs or {}),
        dict(options or {}),
        tuple(divisible),
    )
    helper = _helper()
    assert helper.stdin is not None and helper.stdout is not None
    _send(helper.stdin, request)
    result = _receive(helper.stdout)
    if isinstance(result, str):
        raise CompileError(f"{function.__qualname__} for sm_{arch}: {result}")
    assert isinstance(result, Compiled)
    if arch in SHARED_BYTES and result.shared > SHARED_BYTES[arch]:
        raise CompileError(
            f"{result.name} takes {result.shared} bytes of shared memory; sm_{arch} has {SHARED_BYTES[arch]}"
        )
    return result


@functools.cache
def _helper() -> subprocess.Popen[bytes]:
    command, env = [sys.executable, "-m", "tests.support.triton"], {**os.environ, _ENV: "0"}
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    atexit.register(process.kill)
    return process


def _send(stream: BinaryIO | Any, message: Any) -> None:
    data = pickle.dumps(message)
    stream.write(struct.pack("<q", len(data)) + data)
    stream.flush()


def _receive(stream: BinaryIO | Any) -> Any:
    header = stream.read(8)
    if len(header) < 8:
        raise EOFError("the compiling process has ended; its last words are on stderr")
    return pickle.loads(stream.read(struct.unpack("<q", header)[0]))


def _compile(
    module: str,
    name: str,
    arch: int,
    signature: dict[str, str],
    constexprs: dict[str, Any],
    options: dict[str, Any],
    divisible: tuple[str, ...],
) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = functools.reduce(getattr, name.split("."), importlib.import_module(module))
    for parameter in kernel.params:
        if parameter.name not in signature and parameter.has_default:
            constexprs.setdefault(parameter.name, parameter.default)
    types = {n: signature.get(n, "constexpr") for n in kernel.arg_names}
    missing = [n for n, kind in types.items() if kind == "constexpr" and n not in constexprs]
    if missing or (unknown := sorted({*signature, *constexprs} - types.keys())):
        raise ValueError(f"arguments without type or value: {missing}" if missing else f"unknown: {unknown}")
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, (n, kind) in enumerate(types.items())
        if kind.startswith("*") or n in divisible
    }
    source = ASTSource(kernel, types, constexprs, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    asm = dict(compiled.asm)
    registers, spilled = _resources(asm["cubin"])
    meta = compiled.metadata
    return Compiled(meta.name, arch, meta.shared, meta.num_warps, asm, registers, spilled)


def _resources(cubin: bytes) -> tuple[int, int]:
    """A thread's registers and bytes of stack: EIATTR_REGCOUNT and _FRAME_SIZE in the ELF file's .nv.info."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, _ = struct.unpack_from("<HHH", cubin, 0x3A)
    registers = spilled = 0
    for i in range(count):
        _, kind, _, _, offset, length = struct.unpack_from("<IIQQQQ", cubin, table + i * size)
        if kind != 0x70000000:  # SHT_LOPROC: .nv.info
            continue
        at = offset
        while at + 4 <= offset + length:
            form, attribute, value = struct.unpack_from("<BBH", cubin, at)
            at += 4
            if form == 4:
                if attribute in (0x2F, 0x11) and value == 8:
                    number = struct.unpack_from("<II", cubin, at)[1]
                    registers, spilled = (number, spilled) if attribute == 0x2F else (registers, number)
                at += value
    return registers, spilled


def _serve() -> None:
    """Answer requests from stdin until it ends. What Triton prints goes to stderr."""
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    # The class that the asking process knows, not this module's under its other name.
    api = importlib.import_module("tests.support.triton")
    while True:
        try:
            request = _receive(requests)
        except EOFError:
            return
        try:
            _send(answers, api._compile(*request))
        except Exception as error:
            _send(answers, f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    _serve()
else:
    _switch_on()
