"""How cuBLASLt is read, and which of its algorithms are compared; what needs no GPU of it."""

import ctypes

import pytest

from benchmarks import gpu_watch
from benchmarks.gpu_algos import BEST, SPECS, Block, Candidate, compared, finalists, num_copies, num_launches
from benchmarks.gpu_algos_lt import (
    CONFIG,
    ENUMS,
    Lt,
    LtError,
    Matmul,
    Proposal,
    enum_names,
    mapped,
)
from benchmarks.gpu_watch import Watch, parse_sample
from kernels.cuda.cublaslt import Algorithm, Heuristic

HEADER = """
typedef enum {
  CUBLASLT_MATMUL_TILE_UNDEFINED = 0,
  CUBLASLT_MATMUL_TILE_128x256 = 23,
  CUBLASLT_MATMUL_TILE_END
} cublasLtMatmulTile_t;
 *  CUBLASLT_MATMUL_TILE_1x1 = 99 in a comment
  CUBLASLT_MATMUL_STAGES_64xAUTO = 35,
  CUBLASLT_CLUSTER_SHAPE_2x1x1 = 3,
"""


class PretendLibrary:
    """Counts what is made and given back; an algorithm's attributes are words of its own data."""

    def __init__(self, proposals):
        self.proposals = proposals  # (tile, workspace, state) of each; the same within every limit
        self.alive, self.limits = 0, []

    def __getattr__(self, name):
        if "Create" in name or "Destroy" in name:
            return lambda *args: self._count(1 if "Create" in name else -1)
        if name.endswith("DescSetAttribute"):
            return lambda *args: 0
        raise AttributeError(name)

    def _count(self, by):
        self.alive += by
        return 0

    def cublasLtMatmulPreferenceSetAttribute(self, preference, number, value, size):
        self.limits.append((number, value._obj.value, size.value))
        return 0

    def cublasLtMatmulAlgoGetHeuristic(self, handle, desc, a, b, c, d, preference, room, results, found):
        for result, (tile, workspace, state) in zip(results, self.proposals, strict=False):
            result.algo.data[1], result.workspace, result.state = tile, workspace, state
        found._obj.value = len(self.proposals)
        return 0

    def cublasLtMatmulAlgoConfigGetAttribute(self, algo, number, value, size, written):
        if number == CONFIG["inner"][0]:
            return 7
        value._obj.value = algo._obj.data[number % 8]
        return 0

    def cublasLtMatmulAlgoConfigSetAttribute(self, algo, number, value, size):
        algo._obj.data[number % 8] = value._obj.value
        return 0

    def cublasLtMatmulAlgoCapGetAttribute(self, algo, number, value, size, written):
        if number != 6:
            return 7
        value._obj[0], value._obj[1], value._obj[2] = 20, 23, 24
        written._obj.value = 12
        return 0

    def cublasLtMatmulAlgoCheck(self, handle, desc, a, b, c, d, algo, result):
        tile = algo._obj.data[1]
        result._obj.workspace = 1000 if tile == 24 else 0
        return 7 if algo._obj.data[0] else 0  # so that no cluster passes: its number falls on the same word


def library(*proposals):
    lt = object.__new__(Lt)
    lt._library, lt.handle = PretendLibrary(proposals), ctypes.c_void_p(1)
    return lt


def matmul(lt, bias=0):
    return Matmul(lt, 256, 4608, 3584, 14, bias, adds=False)


def test_structures_have_the_sizes_of_the_header():
    assert ctypes.sizeof(Algorithm) == 64
    assert ctypes.sizeof(Heuristic) == 96
    fields = (Heuristic.workspace, Heuristic.state, Heuristic.waves, Heuristic.reserved)
    assert [field.offset for field in fields] == [64, 72, 76, 80]
    assert [ctypes.sizeof(kind) for _, kind in CONFIG.values()] == [4] * 7 + [2] * 2


def test_a_header_gives_names():
    names = enum_names(HEADER)
    assert names.keys() == ENUMS.keys()
    assert names["tile"] == {0: "UNDEFINED", 23: "128x256"}
    assert names["stages"] == {35: "64xAUTO"}
    lt = library()
    lt.names = names
    assert [lt.name("tile", number) for number in (23, 500, None)] == ["128x256", "500", "-"]
    assert lt.name("inner", 1) == "1"


def test_a_loaded_library_is_found():
    maps = "7f00-7f01 r-xp 00000000 08:01 12 /usr/lib/libc.so.6\n7f02-7f03 rw-p 0 00:00 0\n"
    maps += "7f04-7f05 r--p 0 08:01 13 /a dir/lib/libcublasLt.so.13\n"
    assert str(mapped(maps, "libcublasLt")) == "/a dir/lib/libcublasLt.so.13"
    with pytest.raises(LookupError):
        mapped(maps, "libcublas")


def test_proposals_are_listed_once_and_failed_ones_not():
    lt = library((23, 100, 0), (20, 0, 15), (24, 7, 0))
    product = matmul(lt, bias=4096)
    found = list(product.proposals([32 << 20, 128 << 20]))
    assert [(p.config["tile"], p.workspace, p.origin) for p in found] == [
        (23, 100, "32 MiB #0"),
        (24, 7, "32 MiB #2"),
    ]
    assert found[0].config["inner"] is None
    assert lt._library.limits == [(1, 32 << 20, 8), (1, 128 << 20, 8)]
    product.close()
    assert lt._library.alive == 0


def test_neighbours_differ_in_one_attribute_and_fit():
    lt = library((23, 0, 0))
    product = matmul(lt)
    (start,) = product.proposals([1 << 20])
    assert [p.config["tile"] for p in product.neighbours(start, workspace=1000)] == [20, 24]
    assert [p.config["tile"] for p in product.neighbours(start, workspace=999)] == [20]
    assert start.config["tile"] == 23


def test_a_refusal_says_which_function():
    lt = library()
    with pytest.raises(LtError, match="cublasLtMatmulAlgoCapGetAttribute: status 7"):
        lt.call("MatmulAlgoCapGetAttribute", None, 0, None, None, None)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_weights_come_from_memory_and_graphs_go_through_all_of_them(spec):
    pool = max(s.n * s.k for s in SPECS.values())
    copies = num_copies(spec, pool)
    assert 2 * spec.n * spec.k * copies >= 200_000_000
    for rows in (256, 8192):
        assert num_launches(spec, rows, copies) % copies == 0
    assert num_launches(spec, 256, copies) >= num_launches(spec, 8192, copies) >= copies


def candidate(tile, us, error=""):
    return Candidate(Proposal(Algorithm(), {"tile": tile}, 0, 1.0, ""), error, cold_us=us)


def test_the_fastest_and_other_tiles_go_on():
    same = [candidate(1, 100.0 + i) for i in range(BEST + 3)]
    others = [candidate(2, 120.0), candidate(3, 124.9), candidate(3, 124.95), candidate(4, 126.0)]
    wrong = candidate(5, 90.0, error="off")
    chosen = finalists([*reversed(same), *others, wrong])
    assert [(c.proposal.config["tile"], c.cold_us) for c in chosen] == [
        (1, 100.0), (2, 120.0), (3, 124.9), (1, 101.0), (1, 102.0), (1, 103.0), (1, 104.0), (1, 105.0),
    ]  # fmt: skip
    assert finalists([wrong]) == []


@pytest.fixture
def watch(monkeypatch):
    def missing(*args, **kwargs):
        raise FileNotFoundError

    monkeypatch.setattr(gpu_watch.subprocess, "Popen", missing)
    return Watch()


def test_medians_of_the_blocks_are_compared(watch):
    watch.samples += [(0.5, 1400.0, 690.0), (1.5, 1300.0, 700.0), (2.5, 1500.0, 700.0), (9.0, 0.0, 0.0)]
    torch_blocks = [(Block(0.2, 0, 1), 100), (Block(0.3, 2, 3), 100), (Block(0.9, 4, 5), 100)]
    own = [(Block(0.27, 1, 2), 100), (Block(0.54, 3, 4), 200), (Block(0.1, 5, 6), 1000)]
    hot = compared(own, torch_blocks, watch)
    assert (hot.us, hot.torch_us, hot.ratio) == pytest.approx((2700, 3000, 0.9))
    assert (hot.blocks, hot.mhz, hot.torch_mhz, hot.watts) == (3, 1300, 1450, 700)
    watch.close()


def test_without_nvidia_smi_there_are_no_means(watch):
    assert watch.means([(0, 1e12)]) == (None, None)


def test_a_line_of_nvidia_smi_is_a_sample():
    first, second = (parse_sample(f"2026/11/23 03:34:{s}, 1395, 699.12\n") for s in ("20.123", "21.123"))
    assert first is not None and second is not None
    assert second[0] - first[0] == pytest.approx(1)
    assert first[1:] == (1395.0, 699.12)
    for line in ("", "timestamp, clocks.sm, power.draw", "2026/11/23 03:34:20.123, [N/A], 1", "No devices"):
        assert parse_sample(line) is None
