"""cuBLASLt through ctypes, as far as `gpu_algos` needs it: a product x W^T, and the algorithms for it.

The library is the one that torch has loaded. Where it refuses, LtError is raised. Products are described as
torch describes them: in columns, D^T = W x^T, so that an algorithm's tile is so many columns of W by so many
rows of x.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Iterator, Sequence
from ctypes import byref, c_float, c_int, c_int32, c_int64, c_size_t, c_uint16, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kernels.cuda.cublaslt import (
    COMPUTE_F32,
    DESC_TRANS_A,
    OP_T,
    TYPE_BF16,
    TYPE_F32,
    Algorithm,
    Heuristic,
    library,
)

# Of cublasLt.h, cublas_api.h and library_types.h.
DESC_TRANS_B, DESC_EPILOGUE, DESC_BIAS = 4, 7, 8
OP_N, EPILOGUE_BIAS = 0, 4
PREF_WORKSPACE = 1
CAP_SPLIT_K, CAP_SWIZZLE, CAP_TILES, CAP_CUSTOM_MAX, CAP_STAGES = 0, 2, 6, 7, 13
REDUCE_IN_F32 = 2
# Attributes of an algorithm: number and type.
CONFIG: dict[str, tuple[int, Any]] = {
    "id": (0, c_int32), "tile": (1, c_uint32), "split_k": (2, c_int32), "reduction": (3, c_uint32),
    "swizzle": (4, c_uint32), "custom": (5, c_uint32), "stages": (6, c_uint32), "inner": (7, c_uint16),
    "cluster": (8, c_uint16),
}  # fmt: skip
ENUMS = {
    "tile": "CUBLASLT_MATMUL_TILE_", "stages": "CUBLASLT_MATMUL_STAGES_",
    "inner": "CUBLASLT_MATMUL_INNER_SHAPE_", "cluster": "CUBLASLT_CLUSTER_SHAPE_",
}  # fmt: skip
# Tried where the library does not tell what an algorithm may take: clusters of up to 16 blocks, and splits.
CLUSTERS = range(2, 17)
SPLITS = (1, 2, 3, 4, 6, 8)
MAX_CUSTOM = 16

MIB = 1 << 20
REQUESTED = 64


class LtError(RuntimeError):
    """A function of cuBLASLt did not succeed."""


@dataclass
class Proposal:
    """An algorithm as configured.

    Attributes:
        config: attributes by the names of CONFIG; None where the library knows no such attribute of it.
        workspace: bytes that it needs.
        waves: how often it fills the device, by the library's estimate.
        origin: who proposed it: the workspace limit and the place in the heuristic's order.
    """

    algo: Algorithm
    config: dict[str, int | None]
    workspace: int
    waves: float
    origin: str

    @property
    def key(self) -> bytes:
        """Equal only for the same algorithm in the same configuration."""
        return bytes(self.algo)


def mapped(maps: str, name: str) -> Path:
    """Where a library lies that the text of /proc/self/maps names; raises LookupError where it does not."""
    for line in maps.splitlines():
        path = Path(line.split(maxsplit=5)[-1])
        if path.name.startswith(name + ".so"):
            return path
    raise LookupError(f"{name} is not loaded")


def enum_names(header: str) -> dict[str, dict[int, str]]:
    """What the numbers of each kind in ENUMS mean, from the text of cublasLt.h."""
    return {
        kind: {int(m[2]): m[1] for m in re.finditer(rf"^\s*{prefix}(\w+) = (\d+)", header, re.MULTILINE)}
        for kind, prefix in ENUMS.items()
    }


class Lt:
    """The library, and a handle of it for the current device.

    Attributes:
        path: of the library that this process has loaded.
        version: as cublasLtGetVersion gives it.
        names: see `enum_names`; empty where no header lies beside the library or in CUDA_HOME.
    """

    def __init__(self) -> None:
        self.path = mapped(Path("/proc/self/maps").read_text(), "libcublasLt")
        self._library = library()
        self._library.cublasLtGetVersion.restype = c_size_t
        self.version = int(self._library.cublasLtGetVersion())
        self.handle = self.made("Create")
        self.names = self._names()

    def _names(self) -> dict[str, dict[int, str]]:
        cuda_home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
        for place in (self.path.parents[1], self.path.parent, cuda_home):
            header = place / "include" / "cublasLt.h"
            if header.exists():
                return enum_names(header.read_text(errors="replace"))
        return {kind: {} for kind in ENUMS}

    def name(self, kind: str, number: int | None) -> str:
        """What an attribute's value means, as 128x256; the number where that is not known, "-" for None."""
        return "-" if number is None else self.names.get(kind, {}).get(number, str(number))

    def call(self, name: str, *args: Any) -> None:
        """A function by its name without cublasLt; integers are C ints unless they come as something else."""
        status = getattr(self._library, "cublasLt" + name)(*args)
        if status:
            raise LtError(f"cublasLt{name}: status {status}")

    def made(self, name: str, *args: Any) -> c_void_p:
        """What a function makes whose first argument is the place for it."""
        result = c_void_p()
        self.call(name, byref(result), *args)
        return result

    def _get(self, kind: str, algo: Algorithm, number: int, value: Any) -> int:
        """Fills in an attribute ("Config" or "Cap") of an algorithm; the bytes written."""
        written = c_size_t()
        size = c_size_t(ctypes.sizeof(value))
        self.call(f"MatmulAlgo{kind}GetAttribute", byref(algo), number, byref(value), size, byref(written))
        return written.value

    def config(self, algo: Algorithm) -> dict[str, int | None]:
        """All attributes of an algorithm; None for those that it does not have."""
        result: dict[str, int | None] = {}
        for name, (number, kind) in CONFIG.items():
            value = kind()
            try:
                self._get("Config", algo, number, value)
                result[name] = int(value.value)
            except LtError:
                result[name] = None
        return result

    def configure(self, algo: Algorithm, name: str, value: int) -> None:
        """Set an attribute."""
        number, kind = CONFIG[name]
        held = kind(value)
        size = c_size_t(ctypes.sizeof(held))
        self.call("MatmulAlgoConfigSetAttribute", byref(algo), number, byref(held), size)

    def choices(self, algo: Algorithm) -> dict[str, list[int]]:
        """Values that each attribute may take, as far as the library tells."""

        def capability(number: int, room: int) -> list[int]:
            values = (c_uint32 * room)()
            try:
                return list(values[: self._get("Cap", algo, number, values) // 4])
            except LtError:
                return []

        splits, swizzles, customs = (
            sum(capability(number, 1)) for number in (CAP_SPLIT_K, CAP_SWIZZLE, CAP_CUSTOM_MAX)
        )
        return {
            "tile": capability(CAP_TILES, 1024),
            "stages": capability(CAP_STAGES, 1024),
            "cluster": list(CLUSTERS),
            "swizzle": [0, 1] if swizzles else [],
            "split_k": list(SPLITS) if splits else [],
            "custom": list(range(min(customs, MAX_CUSTOM) + 1)),
        }


class Matmul:
    """D = x W^T (+ bias) or D += x W^T, of row-major bfloat16 x [rows, K] and W [N, K], and D [rows, N]."""

    def __init__(self, lt: Lt, rows: int, n: int, k: int, out: int, bias: int, adds: bool) -> None:
        """`out` is D's TYPE_..., `bias` the address of N bfloat16 numbers or 0."""
        self._lt = lt
        self._desc = lt.made("MatmulDescCreate", COMPUTE_F32, TYPE_F32)
        self._set(DESC_TRANS_A, c_int32(OP_T))
        self._set(DESC_TRANS_B, c_int32(OP_N))
        if bias:
            self._set(DESC_EPILOGUE, c_uint32(EPILOGUE_BIAS))
            self._set(DESC_BIAS, c_uint64(bias))
        # Of W, of x, and one of both C and D, which are one matrix here as for torch. Seen in columns, each
        # is dense, so that its leading dimension is its number of rows.
        self._a, self._b, self._c = (
            lt.made("MatrixLayoutCreate", kind, c_uint64(height), c_uint64(width), c_int64(height))
            for kind, height, width in ((TYPE_BF16, k, n), (TYPE_BF16, k, rows), (out, n, rows))
        )
        self._alpha, self._beta = c_float(1.0), c_float(1.0 if adds else 0.0)

    def _set(self, number: int, value: Any) -> None:
        size = c_size_t(ctypes.sizeof(value))
        self._lt.call("MatmulDescSetAttribute", self._desc, number, byref(value), size)

    @property
    def _problem(self) -> tuple[c_void_p, ...]:
        return self._lt.handle, self._desc, self._a, self._b, self._c, self._c

    def close(self) -> None:
        """Give the descriptors back."""
        self._lt.call("MatmulDescDestroy", self._desc)
        for layout in (self._a, self._b, self._c):
            self._lt.call("MatrixLayoutDestroy", layout)

    def proposals(self, workspaces: Sequence[int]) -> Iterator[Proposal]:
        """What the heuristic proposes within each limit (bytes), in its order; repeats are left out."""
        seen = set()
        for limit in workspaces:
            preference = self._lt.made("MatmulPreferenceCreate")
            value, found = c_uint64(limit), c_int()
            results = (Heuristic * REQUESTED)()
            try:
                self._lt.call(
                    "MatmulPreferenceSetAttribute", preference, PREF_WORKSPACE, byref(value), c_size_t(8)
                )
                self._lt.call(
                    "MatmulAlgoGetHeuristic", *self._problem, preference, REQUESTED, results, byref(found)
                )
            finally:
                self._lt.call("MatmulPreferenceDestroy", preference)
            for i, result in enumerate(results[: found.value]):
                proposal = self._proposal(result.algo, result, f"{limit // MIB} MiB #{i}")
                if result.state == 0 and proposal.key not in seen:
                    seen.add(proposal.key)
                    yield proposal

    def neighbours(self, of: Proposal, workspace: int) -> Iterator[Proposal]:
        """What differs in one attribute, passes the library's check and fits a workspace of so many bytes."""
        for name, values in self._lt.choices(of.algo).items():
            for value in values:
                if value == of.config[name]:
                    continue
                algo, result = Algorithm.from_buffer_copy(of.algo), Heuristic()
                try:
                    self._lt.configure(algo, name, value)
                    if name == "split_k":
                        self._lt.configure(algo, "reduction", REDUCE_IN_F32 if value > 1 else 0)
                    self._lt.call("MatmulAlgoCheck", *self._problem, byref(algo), byref(result))
                except LtError:
                    continue
                if result.state == 0 and result.workspace <= workspace:
                    yield self._proposal(algo, result, f"{of.origin}, {name}")

    def _proposal(self, algo: Algorithm, result: Heuristic, origin: str) -> Proposal:
        algo = Algorithm.from_buffer_copy(algo)
        return Proposal(algo, self._lt.config(algo), result.workspace, result.waves, origin)

    def run(self, proposal: Proposal, w: int, x: int, d: int, workspace: int, stream: int) -> None:
        """Launch it; matrices, workspace and stream are addresses."""
        out = c_void_p(d)
        self._lt.call(
            "Matmul", self._lt.handle, self._desc, byref(self._alpha), c_void_p(w), self._a, c_void_p(x),
            self._b, byref(self._beta), out, self._c, out, self._c, byref(proposal.algo),
            c_void_p(workspace), c_size_t(proposal.workspace), c_void_p(stream),
        )  # fmt: skip
