"""Which of cuBLASLt's algorithms is best for a layer's products once the chip is limited by its power.

    python -m benchmarks.gpu_algos [--rows 8192 1000 512 256] [--seconds 1.5] [--vary 0] [--out FILE]

In long prefills clocks fall to what the power limit leaves, so that energy a product counts, and what the
heuristic picks for a cold chip need not be best. For each product of a Qwen2.5-7B layer, as the engine has
torch run it, cuBLASLt's heuristic is asked for all that it knows. Each algorithm is checked against float32,
then timed cold (single bursts, with pauses). The fastest, and the fastest of other tiles, are then timed hot:
blocks of 0.2 s, torch's own choice and the candidate in turn, without pauses, so that both see the same
temperature and limit. "ratio" is the candidate's time over torch's, each the median of its blocks; below 1 the
candidate is better. `--vary N` also tries what is one attribute away from the N fastest; such algorithms
passed cuBLASLt's check, but were not proposed by it. A minute of an H100 for each number of rows.

Tiles and clusters are columns of W by rows of x: cuBLAS sees everything transposed.
"""

from __future__ import annotations

import argparse
import bisect
import ctypes
import json
import os
import re
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from ctypes import byref, c_float, c_int, c_int32, c_int64, c_size_t, c_uint16, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.gpu_facts import facts

BF16, F32 = torch.bfloat16, torch.float32
# Of cublasLt.h, cublas_api.h and library_types.h.
CUDA_TYPES = {BF16: 14, F32: 0}
COMPUTE_F32 = 68
DESC_TRANS_A, DESC_TRANS_B, DESC_EPILOGUE, DESC_BIAS = 3, 4, 7, 8
OP_N, OP_T, EPILOGUE_BIAS = 0, 1, 4
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
CLUSTERS = range(2, 17)
SPLITS = (1, 2, 3, 4, 6, 8)
MAX_CUSTOM = 16

MIB = 1 << 20
WORKSPACES = (32 * MIB, 128 * MIB)
REQUESTED = 64
# Distinct weights to go through, so that L2 (50 MB) holds none of them when their turn comes.
WEIGHT_BYTES = 200_000_000
GRAPH_SECONDS = 3e-3
BURSTS = 5
PAUSE = 6e-3
BLOCK_SECONDS = 0.2
HEAT_SECONDS = 0.8
MAX_REPLAYS = 500
BEST = 6
FINALISTS = 7
CHECKED_ROWS = 64
TOLERANCE = 0.01

Run = Callable[[int], Any]


class Algo(ctypes.Structure):
    """`cublasLtMatmulAlgo_t`."""

    _fields_ = [("data", c_uint64 * 8)]


class Heuristic(ctypes.Structure):
    """`cublasLtMatmulHeuristicResult_t`."""

    _fields_ = [
        ("algo", Algo), ("workspace", c_size_t), ("state", c_int), ("waves", c_float), ("reserved", c_int * 4),
    ]  # fmt: skip


class LtError(RuntimeError):
    """A function of cuBLASLt did not succeed."""


class Spec(NamedTuple):
    """A product x W^T of a layer: D = x W^T (+ bias), or D += x W^T where it `adds`."""

    name: str
    n: int
    k: int
    out: torch.dtype = BF16
    bias: bool = False
    adds: bool = False


SPECS = {
    spec.name: spec
    for spec in (
        Spec("qkv", 4608, 3584, bias=True),
        Spec("o", 3584, 3584, F32, adds=True),
        Spec("gate_up", 37888, 3584),
        Spec("down", 3584, 18944, F32, adds=True),
        Spec("o-bf16", 3584, 3584),
        Spec("down-bf16", 3584, 18944),
    )
}
ENGINE = ("qkv", "o", "gate_up", "down")


class Hot(NamedTuple):
    """What alternating blocks gave; clocks in MHz, power in W, None where nvidia-smi said nothing."""

    us: float
    torch_us: float
    ratio: float
    blocks: int
    mhz: float | None
    torch_mhz: float | None
    watts: float | None


@dataclass
class Candidate:
    """An algorithm, its attributes (None: it has none of that name), and what was measured; times in us."""

    algo: Algo
    config: dict[str, int | None]
    workspace: int
    waves: float
    origin: str
    error: str = "not measured"
    deviation: float | None = None
    cold_us: float | None = None
    hot: Hot | None = None

    @property
    def key(self) -> bytes:
        """Equal only for the same algorithm in the same configuration."""
        return bytes(self.algo)


def mapped(maps: str, name: str) -> Path:
    """Where a library lies that /proc/self/maps names; raises LookupError where it does not."""
    for line in maps.splitlines():
        path = Path(line.split(maxsplit=5)[-1])
        if path.name.startswith(name + ".so"):
            return path
    raise LookupError(f"{name} is not loaded")


def enum_names(header: str) -> dict[str, dict[int, str]]:
    """Of each kind in ENUMS what its numbers mean, from the text of cublasLt.h."""
    return {
        kind: {int(m[2]): m[1] for m in re.finditer(rf"^\s*{prefix}(\w+) = (\d+)", header, re.MULTILINE)}
        for kind, prefix in ENUMS.items()
    }


class Lt:
    """The cuBLASLt that torch has loaded. Everything raises LtError where the library refuses."""

    def __init__(self) -> None:
        torch.mm(*(torch.zeros(16, 16, device="cuda") for _ in range(2)))
        self.path = mapped(Path("/proc/self/maps").read_text(), "libcublasLt")
        # A preloaded library comes first for torch too; where there is none, the process at large has no such name.
        everything = ctypes.CDLL(None)
        self.library = everything if hasattr(everything, "cublasLtCreate") else ctypes.CDLL(str(self.path))
        self.library.cublasLtGetVersion.restype = c_size_t
        self.version = int(self.library.cublasLtGetVersion())
        self.handle = self.made("Create")
        self.workspace = torch.empty(max(WORKSPACES), dtype=torch.uint8, device="cuda")
        self.names = self._names()

    def _names(self) -> dict[str, dict[int, str]]:
        places = [self.path.parents[1] / "include", self.path.parent / "include"]
        places.append(Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include")
        for place in places:
            if (place / "cublasLt.h").exists():
                return enum_names((place / "cublasLt.h").read_text(errors="replace"))
        return {kind: {} for kind in ENUMS}

    def call(self, name: str, *args: Any) -> None:
        status = getattr(self.library, "cublasLt" + name)(*args)
        if status:
            raise LtError(f"cublasLt{name}: status {status}")

    def made(self, name: str, *args: Any) -> c_void_p:
        """What a function makes that takes a pointer's place first."""
        result = c_void_p()
        self.call(name, byref(result), *args)
        return result

    def get(self, kind: str, algo: Algo, number: int, value: Any) -> int:
        """Fills in an attribute ("Config" or "Cap") of an algorithm; the bytes written."""
        written = c_size_t()
        size = c_size_t(ctypes.sizeof(value))
        self.call(f"MatmulAlgo{kind}GetAttribute", byref(algo), number, byref(value), size, byref(written))
        return written.value

    def config(self, algo: Algo) -> dict[str, int | None]:
        """All attributes of an algorithm; None for those that it does not have."""
        result: dict[str, int | None] = {}
        for name, (number, kind) in CONFIG.items():
            value = kind()
            try:
                self.get("Config", algo, number, value)
                result[name] = int(value.value)
            except LtError:
                result[name] = None
        return result

    def choices(self, algo: Algo) -> dict[str, list[int]]:
        """Values of each attribute that the algorithm may take, as far as it says."""

        def ids(number: int, room: int = 1024) -> list[int]:
            values = (c_uint32 * room)()
            try:
                return list(values[: self.get("Cap", algo, number, values) // 4])
            except LtError:
                return []

        one = {number: (ids(number, 1) or [0])[0] for number in (CAP_SPLIT_K, CAP_SWIZZLE, CAP_CUSTOM_MAX)}
        return {
            "tile": ids(CAP_TILES),
            "stages": ids(CAP_STAGES),
            "cluster": list(CLUSTERS),
            "swizzle": [0, 1] if one[CAP_SWIZZLE] else [],
            "split_k": list(SPLITS) if one[CAP_SPLIT_K] else [],
            "custom": list(range(min(one[CAP_CUSTOM_MAX], MAX_CUSTOM) + 1)),
        }


def copies(spec: Spec, pool: int) -> int:
    """How many distinct weights to go through, of a pool of so many elements."""
    return min(-(-WEIGHT_BYTES // (2 * spec.n * spec.k)), pool // (spec.n * spec.k))


def launches(spec: Spec, rows: int, num_copies: int) -> int:
    """Products in a graph: whole rounds of the copies that take about GRAPH_SECONDS at an H100's best."""
    at_best = max(2 * rows * spec.n * spec.k / 800e12, 2 * spec.n * spec.k / 3e12)
    return num_copies * max(1, round(GRAPH_SECONDS / (num_copies * at_best)))


class Problem:
    """A product of so many rows: operands, descriptors, torch's way to compute it and cuBLASLt's."""

    def __init__(self, lt: Lt, spec: Spec, rows: int, pool: torch.Tensor) -> None:
        self.lt, self.spec, self.rows = lt, spec, rows
        n, k = spec.n, spec.k
        size = n * k
        self.weights = [w.view(n, k) for w in pool[: copies(spec, pool.numel()) * size].split(size)]
        self.launches = launches(spec, rows, len(self.weights))
        self.flops = 2 * rows * n * k
        self.x = torch.randn(rows, k, device="cuda", dtype=BF16)
        self.bias = torch.randn(n, device="cuda", dtype=BF16) if spec.bias else None
        self.start = torch.randn(rows, n, device="cuda", dtype=spec.out) if spec.adds else None
        self.out = torch.zeros(rows, n, device="cuda", dtype=spec.out)
        self.sample = torch.linspace(0, rows - 1, min(rows, CHECKED_ROWS)).long().unique().cuda()
        self.exact = self.x[self.sample].float() @ self.weights[0].float().t()
        for term in (self.bias, None if self.start is None else self.start[self.sample]):
            if term is not None:
                self.exact += term
        self._describe()

    def _describe(self) -> None:
        """Descriptors for D^T = W x^T in columns, which is how torch puts it."""
        lt, spec = self.lt, self.spec
        self.desc = lt.made("MatmulDescCreate", COMPUTE_F32, CUDA_TYPES[F32])
        self._set(DESC_TRANS_A, c_int32(OP_T))
        self._set(DESC_TRANS_B, c_int32(OP_N))
        if self.bias is not None:
            self._set(DESC_EPILOGUE, c_uint32(EPILOGUE_BIAS))
            self._set(DESC_BIAS, c_uint64(self.bias.data_ptr()))
        sizes = ((BF16, spec.k, spec.n), (BF16, spec.k, self.rows), (spec.out, spec.n, self.rows))
        # A layout of W, of x, and one for both C and D, which are one matrix. What counts lies one by one in
        # columns: the leading dimension is the number of rows.
        self.a, self.b, self.c = (
            lt.made("MatrixLayoutCreate", CUDA_TYPES[t], c_uint64(r), c_uint64(c), c_int64(r)) for t, r, c in sizes
        )
        self.alpha, self.beta = c_float(1.0), c_float(1.0 if spec.adds else 0.0)
        self.pointers = [c_void_p(w.data_ptr()) for w in self.weights]
        self.x_pointer, self.out_pointer = c_void_p(self.x.data_ptr()), c_void_p(self.out.data_ptr())

    def _set(self, number: int, value: Any) -> None:
        self.lt.call("MatmulDescSetAttribute", self.desc, number, byref(value), c_size_t(ctypes.sizeof(value)))

    @property
    def _layouts(self) -> tuple[c_void_p, ...]:
        return self.desc, self.a, self.b, self.c, self.c

    def proposals(self) -> Iterator[Candidate]:
        """What the heuristic proposes within each workspace limit, in its order; repeats are left out."""
        seen = set()
        for limit in WORKSPACES:
            preference = self.lt.made("MatmulPreferenceCreate")
            value, found = c_uint64(limit), c_int()
            self.lt.call("MatmulPreferenceSetAttribute", preference, PREF_WORKSPACE, byref(value), c_size_t(8))
            results = (Heuristic * REQUESTED)()
            self.lt.call(
                "MatmulAlgoGetHeuristic", self.lt.handle, *self._layouts, preference, REQUESTED, results,
                byref(found),
            )  # fmt: skip
            self.lt.call("MatmulPreferenceDestroy", preference)
            for i, result in enumerate(results[: found.value]):
                candidate = self._candidate(result, f"{limit // MIB} MiB {i}")
                if result.state == 0 and candidate.key not in seen:
                    seen.add(candidate.key)
                    yield candidate

    def _candidate(self, result: Heuristic, origin: str) -> Candidate:
        algo = Algo.from_buffer_copy(result.algo)
        return Candidate(algo, self.lt.config(algo), result.workspace, result.waves, origin)

    def neighbours(self, of: Candidate) -> Iterator[Candidate]:
        """What differs from a candidate in one attribute and passes the library's check."""
        for name, values in self.lt.choices(of.algo).items():
            for value in values:
                if value == of.config[name]:
                    continue
                changes = {name: value}
                if name == "split_k":
                    changes["reduction"] = REDUCE_IN_F32 if value > 1 else 0
                result = Heuristic(algo=of.algo)
                try:
                    for key, number in changes.items():
                        self._configure(result.algo, key, number)
                    algo = Algo.from_buffer_copy(result.algo)
                    self.lt.call(
                        "MatmulAlgoCheck", self.lt.handle, *self._layouts, byref(algo), byref(result)
                    )
                except LtError:
                    continue
                result.algo = algo
                if result.state == 0 and result.workspace <= max(WORKSPACES):
                    yield self._candidate(result, f"{of.origin}, {name}")

    def _configure(self, algo: Algo, name: str, value: int) -> None:
        number, kind = CONFIG[name]
        held = kind(value)
        size = c_size_t(ctypes.sizeof(held))
        self.lt.call("MatmulAlgoConfigSetAttribute", byref(algo), number, byref(held), size)

    def run_torch(self, i: int) -> None:
        """The product with the i-th copy, as the engine has torch compute it."""
        weight = self.weights[i % len(self.weights)].t()
        if self.spec.adds:
            torch.addmm(self.out, self.x, weight, out_dtype=F32, out=self.out)
        elif self.bias is not None:
            torch.addmm(self.bias, self.x, weight, out=self.out)
        else:
            torch.mm(self.x, weight, out=self.out)

    def runner(self, candidate: Candidate) -> Run:
        """The same by an algorithm."""

        def run(i: int) -> None:
            self.lt.call(
                "Matmul", self.lt.handle, self.desc, byref(self.alpha), self.pointers[i % len(self.pointers)],
                self.a, self.x_pointer, self.b, byref(self.beta), self.out_pointer, self.c, self.out_pointer,
                self.c, byref(candidate.algo), c_void_p(self.lt.workspace.data_ptr()),
                c_size_t(candidate.workspace), c_void_p(torch.cuda.current_stream().cuda_stream),
            )  # fmt: skip

        return run

    def deviation(self, run: Run) -> float:
        """The largest error in a sample of rows, over the largest result; inf where something was not written."""
        if self.start is None:
            self.out.fill_(float("nan"))
        else:
            self.out.copy_(self.start)
        run(0)
        if self.out.isnan().any().item():
            return float("inf")
        error = (self.out[self.sample].float() - self.exact).abs().max()
        return (error / self.exact.abs().max().clamp_min(1e-20)).item()

    def close(self) -> None:
        """Give the descriptors back."""
        self.lt.call("MatmulDescDestroy", self.desc)
        for layout in (self.a, self.b, self.c):
            self.lt.call("MatrixLayoutDestroy", layout)
