"""Products of many rows by cuBLASLt with a tile of our own choice, where another than torch's is better.

torch takes the first algorithm that the library's heuristic proposes. Under a chip's power limit, which long
prompts reach, energy is what counts, of which the heuristic knows nothing. Here its proposals are asked for
once for each shape, and the one with the tile of `TILES` is taken; where none has it, torch does as ever.
"""

from __future__ import annotations

import ctypes
import functools
from ctypes import byref, c_float, c_int, c_int32, c_int64, c_size_t, c_uint32, c_uint64, c_void_p
from typing import Any

import torch

TILES = {(37888, 3584): 201, (18944, 3584): 201}
"""A tile's number in cublasLt.h by the weights' [N, K]. 201 is 176 x 128, columns of W by rows of x: at the
power limit it takes 0.93 to 0.98 of the time of torch's choice (benchmarks/gpu_algos.py, 3,584 to 8,192 rows,
H100 and H200), and two ranks' long prompts 0.985."""
LEAST_ROWS = 2048
PROPOSALS = 16

# Of cublasLt.h, cublas_api.h and library_types.h.
TYPE_F32, TYPE_BF16, COMPUTE_F32 = 0, 14, 68
DESC_TRANS_A, OP_T, CONFIG_TILE = 3, 1, 1


class Algorithm(ctypes.Structure):
    """`cublasLtMatmulAlgo_t`."""

    _fields_ = (("data", c_uint64 * 8),)


class Heuristic(ctypes.Structure):
    """`cublasLtMatmulHeuristicResult_t`."""

    _fields_ = (
        ("algo", Algorithm), ("workspace", c_size_t), ("state", c_int), ("waves", c_float),
        ("reserved", c_int * 4),
    )  # fmt: skip


@functools.cache
def library() -> ctypes.CDLL | None:
    """The library that torch has loaded; None where torch is built without it."""
    process = ctypes.CDLL(None)
    if hasattr(process, "cublasLtCreate"):  # preloaded: what torch calls then, as nothing else is named so
        return process
    try:
        return ctypes.CDLL(f"libcublasLt.so.{(torch.version.cuda or '').partition('.')[0]}")
    except OSError:
        return None


def _call(name: str, *arguments: Any) -> None:
    status = getattr(library(), f"cublasLt{name}")(*arguments)
    if status:
        raise RuntimeError(f"cublasLt{name} failed with status {status}")


def _made(name: str, *arguments: Any) -> c_void_p:
    made = c_void_p()
    _call(name, byref(made), *arguments)
    return made


@functools.cache
def _handle(device: torch.device) -> c_void_p:
    with torch.cuda.device(device):
        return _made("Create")


class Product:
    """x W^T of one shape by one algorithm that needs no workspace; x [rows, K], W [N, K] and the result are
    contiguous bfloat16. The library sees matrices by columns: to it this is a transposed W^T times x^T."""

    def __init__(self, rows: int, n: int, k: int, device: torch.device) -> None:
        self._handle, self._desc = _handle(device), _made("MatmulDescCreate", COMPUTE_F32, TYPE_F32)
        _call("MatmulDescSetAttribute", self._desc, DESC_TRANS_A, byref(c_int32(OP_T)), c_size_t(4))
        self._w, self._x, self._out = (
            _made("MatrixLayoutCreate", TYPE_BF16, c_uint64(height), c_uint64(width), c_int64(height))
            for height, width in ((k, n), (k, rows), (n, rows))
        )
        self._one, self._zero = c_float(1.0), c_float(0.0)
        self._algorithm: Algorithm | None = None

    def takes(self, tile: int) -> bool:
        """Finds an algorithm with this tile; whether there is one."""
        preference = _made("MatmulPreferenceCreate")  # as it comes, of no workspace
        found, proposals = c_int(), (Heuristic * PROPOSALS)()
        _call(
            "MatmulAlgoGetHeuristic", self._handle, self._desc, self._w, self._x, self._out, self._out,
            preference, PROPOSALS, proposals, byref(found),
        )  # fmt: skip
        _call("MatmulPreferenceDestroy", preference)
        for proposal in proposals[: found.value]:
            algorithm, has, written = proposal.algo, c_uint32(), c_size_t()
            _call(
                "MatmulAlgoConfigGetAttribute", byref(algorithm), CONFIG_TILE, byref(has), c_size_t(4),
                byref(written),
            )  # fmt: skip
            if proposal.state == 0 and has.value == tile:
                self._algorithm = algorithm
                return True
        return False

    def __call__(self, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """x W^T to `out`, on the current stream."""
        assert self._algorithm is not None, "takes has found one"
        result, stream = c_void_p(out.data_ptr()), torch.cuda.current_stream(x.device).cuda_stream
        _call(
            "Matmul", self._handle, self._desc, byref(self._one), c_void_p(weight.data_ptr()), self._w,
            c_void_p(x.data_ptr()), self._x, byref(self._zero), result, self._out, result, self._out,
            byref(self._algorithm), None, c_size_t(0), c_void_p(stream),
        )  # fmt: skip
        return out


@functools.cache
def chosen(rows: int, n: int, k: int, device: torch.device) -> Product | None:
    """How to compute [rows, K] times [N, K] transposed; None where torch is to."""
    if rows < LEAST_ROWS or (n, k) not in TILES or device.type != "cuda" or library() is None:
        return None
    product = Product(rows, n, k, device)
    return product if product.takes(TILES[n, k]) else None
