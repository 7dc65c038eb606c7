"""Which algorithm a product gets, and on a GPU that it computes the same as torch's."""

import ctypes
from types import SimpleNamespace

import pytest
import torch

from kernels.cuda import cublaslt
from kernels.cuda.linear import wide_linear
from kernels.linear import PackedLinear
from tests.support import triton as support

ON_GPU = not support.interpreted()
DEVICE = torch.device(support.device())
WIDEST = (18944, 3584)


class PretendLibrary:
    """Proposes (tile, state) as told, and keeps what a product is launched with."""

    def __init__(self, *proposals):
        self.proposals, self.made, self.launched = proposals, 0, None

    def __getattr__(self, name):
        if name.endswith(("Create", "Destroy", "DescSetAttribute")):
            return self._make if name.endswith("Create") else lambda *_: 0
        raise AttributeError(name)

    def _make(self, place, *_):
        self.made += 1
        place._obj.value = self.made
        return 0

    def cublasLtMatmulAlgoGetHeuristic(self, handle, desc, w, x, c, d, preference, room, results, found):
        for result, (tile, state) in zip(results, self.proposals, strict=False):
            result.algo.data[1], result.state = tile, state
        found._obj.value = len(self.proposals)
        return 0

    def cublasLtMatmulAlgoConfigGetAttribute(self, algo, number, value, size, written):
        value._obj.value = algo._obj.data[number]
        return 0

    def cublasLtMatmul(self, handle, desc, one, w, *rest):
        self.launched = w.value, rest[-4]._obj.data[1]
        return 15


@pytest.fixture
def library(monkeypatch):
    """Puts a pretend library in the place of the real one; gives it."""

    def put(*proposals):
        pretended = PretendLibrary(*proposals)
        monkeypatch.setattr(cublaslt, "library", lambda: pretended)
        monkeypatch.setattr(cublaslt, "_handle", lambda device: ctypes.c_void_p(1))
        return pretended

    cublaslt.chosen.cache_clear()
    yield put
    cublaslt.chosen.cache_clear()


def test_the_tile_is_taken_from_what_is_proposed(library, monkeypatch):
    pretended = library((201, 15), (209, 0), (201, 0))  # the first is refused for this product
    product = cublaslt.chosen(4096, *WIDEST, torch.device("cuda", 0))
    assert cublaslt.chosen(4096, *WIDEST, torch.device("cuda", 0)) is product
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    x, weight, out = torch.zeros(1), torch.zeros(1), torch.zeros(1)
    with pytest.raises(RuntimeError, match="cublasLtMatmul failed with status 15"):
        product(x, weight, out)
    assert pretended.launched == (weight.data_ptr(), 201)


def test_torch_computes_what_is_not_proposed_or_not_listed(library):
    library((209, 0))
    device = torch.device("cuda", 0)
    assert cublaslt.chosen(4096, *WIDEST, device) is None
    library((201, 0))
    assert cublaslt.chosen(cublaslt.LEAST_ROWS - 1, *WIDEST, device) is None
    assert cublaslt.chosen(4096, 3584, 18944, device) is None
    assert cublaslt.chosen(4096, *WIDEST, torch.device("cpu")) is None
    assert cublaslt.chosen(cublaslt.LEAST_ROWS, *WIDEST, device) is not None


@pytest.mark.parametrize("rows", [2048, 2112, 3584, 4607, 8192] if ON_GPU else [3])
@pytest.mark.parametrize("shape", cublaslt.TILES if ON_GPU else [(64, 32)])
@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
def test_results_are_those_of_a_plain_product(shape, rows, strided, randn, close):
    n, k = shape
    data = (randn(n, k, dtype=torch.bfloat16) * k**-0.5).to(DEVICE)
    weight = PackedLinear(shape, data.dtype, data.dtype, data, None, is_packed=False)
    x = randn(rows, 2 * k if strided else k, dtype=torch.bfloat16).to(DEVICE)[:, :k]
    out = torch.full((rows, n), float("nan"), dtype=torch.bfloat16, device=DEVICE)
    assert wide_linear(x, weight, out) is out
    exact = x.float() @ data.float().t()
    close(out, exact)
