"""Paged attention in Triton: on the GPU where there is one, else float32 in Triton's interpreter."""

import numpy as np
import pytest
import torch

from tests.support.scale import scaled
from tests.support.triton import ARCHS, compile_for, device, interpreted

pytest.importorskip("triton")
from kernels.attention import (
    QUERY_TILE,
    Tiles,
    cache_shape,
    key_words,
    make_tiles,
    paged_attention,
    paged_attention_reference,
)
from kernels.cuda import attention, prefill

DEVICE = device()
DTYPES = [torch.float32] if interpreted() else [torch.float32, torch.bfloat16]
HUGE = 2**31 - 1
# (query heads, kv heads, head size, block size)
SHAPES = [(14, 2, 64, 16), (7, 1, 128, 16), (2, 2, 32, 32), (6, 2, 80, 48), (18, 1, 96, 16)]
DECODES = [(1, n) for n in (1, 63, 64, 65, 700, 16, 17, 130, 2)]
MIXED = [(1, 70), (150, 150), (0, 9), (9, 200), (1, 1), (2, 2), (130, 250), (0, 1), (1, 300)]


class Batch:
    """Sequences in a paged cache in which all that must not be read is NaN, or a block far outside."""

    def __init__(self, shape, rows, dtype, randn, generator, padding=0, scale=None):
        heads, kv_heads, dim, block_size = shape
        self.rows, self.dtype, self.block_size, self.scale = rows, dtype, block_size, scale or dim**-0.5
        counts = [-(-length // block_size) for _, length in rows]
        ids = torch.randperm(sum(counts) + 3, generator=generator, dtype=torch.int32).tolist()
        shapes = cache_shape(len(ids), kv_heads, block_size, dim, dtype, "cuda")
        self.key_cache, self.value_cache = (torch.full(s, float("nan"), dtype=dtype) for s in shapes)
        self.starts = [length - n for n, length in rows]
        # A table of more slots than rows, each row's somewhere in it.
        self.table_rows = torch.randperm(len(rows) + 2, generator=generator)[: len(rows)]
        self.block_tables = torch.full((len(rows) + 2, max(counts) + 2), HUGE, dtype=torch.int32)
        self.query_start = torch.tensor([0, *np.cumsum([n for n, _ in rows])], dtype=torch.int32)
        self.seq_lens = torch.tensor([length for _, length in rows], dtype=torch.int32)
        tokens = int(self.query_start[-1]) + padding
        fused = torch.full((tokens, heads + 2 * kv_heads + 1, dim), float("nan"), dtype=dtype)
        self.q, self.new_keys, self.new_values = fused[:, :-1].split([heads, kv_heads, kv_heads], dim=1)
        self.sequences = []
        for row, (n, length) in enumerate(rows):
            mine = torch.tensor([ids.pop() for _ in range(counts[row])], dtype=torch.int32)
            self.block_tables[self.table_rows[row], : len(mine)] = mine
            k, v = (randn(length, kv_heads, dim, dtype=dtype) for _ in range(2))
            queries = slice(*self.query_start[row : row + 2].tolist())
            self.q[queries] = randn(n, heads, dim, dtype=dtype)
            if n > 1 and n == length:
                self.new_keys[queries], self.new_values[queries] = k, v
            else:
                token = torch.arange(length)
                block, offset = mine[token // block_size].long(), token % block_size
                self.key_cache[block, :, :, offset] = key_words(k, dim)
                self.value_cache[block, :, offset] = v
            self.sequences.append((self.q[queries].double(), k.double(), v.double()))

    def tiles(self, pad=0):
        lengths = [n for n, _ in self.rows]
        parts = make_tiles(lengths, self.starts)
        paged, fresh = make_tiles(lengths, self.starts, *(len(part) + pad for part in parts))
        return Tiles(torch.from_numpy(paged).to(DEVICE), torch.from_numpy(fresh).to(DEVICE))

    def arguments(self):
        names = ("q", "key_cache", "value_cache", "block_tables", "query_start", "seq_lens", "table_rows")
        return {name: getattr(self, name).to(DEVICE) for name in names}

    def run(self, ragged, window=None, **options):
        """The result, in a wider tensor of NaN."""
        x = self.arguments()
        out = torch.full((*x["q"].shape[:2], x["q"].shape[2]), float("nan"), dtype=self.dtype, device=DEVICE)
        new = {name: getattr(self, name).to(DEVICE) for name in ("new_keys", "new_values")} if ragged else {}
        tiles = self.tiles(**options) if ragged else None
        attention.paged_attention(**x, scale=self.scale, out=out, sliding_window=window, tiles=tiles, **new)
        return out.cpu()

    def decode(self, config, window=None):
        x = self.arguments()
        out = torch.full_like(x["q"], float("nan")).contiguous()
        attention.decode(**x, scale=self.scale, out=out, sliding_window=window, config=config)
        return out.cpu()

    def exact(self, window=None):
        """The formula in float64, row after row."""
        results = []
        for q, k, v in self.sequences:
            group = q.shape[1] // k.shape[1]
            k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
            scores = torch.einsum("qhd,khd->hqk", q, k) * self.scale
            distance = torch.arange(len(k) - len(q), len(k)).unsqueeze(1) - torch.arange(len(k))
            hidden = (distance < 0) | (distance >= (window or len(k)))
            weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
            results.append(torch.einsum("hqk,khd->qhd", weights, v))
        return torch.cat(results)

    def forget(self, window):
        """Blocks that left the window of all queries go to someone else."""
        for row, (n, length) in enumerate(self.rows):
            gone = max(0, length - n + 1 - window) // self.block_size
            table = self.block_tables[self.table_rows[row]]
            mine = table[:gone].long()
            self.key_cache[mine], self.value_cache[mine] = float("nan"), float("nan")
            table[:gone] = HUGE


@pytest.fixture
def batch(randn, generator):
    return lambda shape, rows, dtype, **options: Batch(shape, rows, dtype, randn, generator, **options)


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request):
    return request.param


@pytest.fixture
def near(close, dtype):
    # bfloat16: scores of bfloat16 weights, each rounded once, over values of either sign.
    return lambda result, exact: close(result, exact, ulps=64 if dtype is torch.float32 else 4)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_decodes(shape, dtype, batch, near):
    b = batch(shape, DECODES, dtype)
    near(b.run(ragged=False), b.exact())


# In units of a share: shares that end within a head's setup, right behind it, and long after.
DIVISIONS = [(1, 1, 1), (1, 16, 1), (1, 16, 3), (2, 16, 2), (100, 1, 0)]


@pytest.mark.parametrize("min_tiles, per_sm, setup", DIVISIONS)
@pytest.mark.parametrize("block_n", [16, 128])
def test_every_division_of_the_work_gives_the_same(min_tiles, per_sm, setup, block_n, dtype, batch, near):
    b = batch((6, 2, 64, 16), DECODES, dtype)
    config = attention.DecodeConfig(
        block_n=block_n, num_stages=2, min_tiles=min_tiles, per_sm=per_sm, setup=setup
    )
    near(b.decode(config), b.exact())


# Lengths of which heads are shared by two programs, by a few, and by many.
SHARED = [
    pytest.param((3, 1, 64, 16), [(1, 1500)], 12, None, id="one head, many programs"),
    pytest.param((2, 1, 32, 16), [(1, 40), (1, 900), (1, 550), (1, 3)], 16, None, id="many, several heads"),
    pytest.param((6, 2, 32, 16), [(1, 90), (1, 70), (1, 100), (1, 5)], 3, None, id="two or three programs"),
    pytest.param((2, 2, 32, 16), [(1, 700), (1, 700)], 16, 450, id="window"),
]


@pytest.mark.parametrize("shape, rows, per_sm, window", SHARED)
def test_a_head_shared_by_programs(shape, rows, per_sm, window, dtype, batch, near):
    b = batch(shape, rows, dtype)
    config = attention.DecodeConfig(block_n=16, num_stages=2, per_sm=per_sm, min_tiles=1)
    near(b.decode(config, window), b.exact(window))


def test_heads_shared_among_rows_of_other_lengths_of_query(dtype, batch, near, monkeypatch):
    config = attention.DecodeConfig(block_n=16, num_stages=2, per_sm=12, min_tiles=1)
    monkeypatch.setattr(attention, "decode_config", lambda *_: config)
    b = batch((3, 1, 32, 16), [(1, 370), (3, 9), (0, 40), (1, 500), (2, 70), (1, 33)], dtype)
    near(b.run(ragged=True), b.exact())


def test_more_rows_than_one_small_block(dtype, batch, near):
    b = batch((2, 1, 32, 16), [(1, 1 + 7 * i % 40) for i in range(150)], dtype)
    near(b.run(ragged=False), b.exact())


@pytest.mark.parametrize("shape", [(3, 1, 64, 16), (2, 1, 80, 48), (1, 1, 128, 16)], ids=str)
def test_mixed_batch(shape, dtype, batch, near):
    b = batch(shape, MIXED, dtype, padding=5)
    result = b.run(ragged=True, pad=3)
    near(result[:-5], b.exact())
    assert result[-5:].isnan().all()


@pytest.mark.parametrize("window", scaled([1, 100], [1, 64, 100, 1000]))
def test_sliding_window(window, dtype, batch, near):
    b = batch((2, 1, 32, 16), MIXED, dtype)
    expected = b.exact(window)
    b.forget(window)
    near(b.run(ragged=True, window=window), expected)
    b = batch((6, 2, 64, 16), DECODES, dtype)
    expected = b.exact(window)
    b.forget(window)
    near(b.run(ragged=False, window=window), expected)


@pytest.mark.parametrize("block_size", [16, 48])
@pytest.mark.parametrize("window", [None, 30])
def test_prefill_however_it_is_cut(block_size, window, dtype, batch, near, monkeypatch):
    config = prefill.PrefillConfig(64, 32, 4, 2)
    monkeypatch.setattr(prefill, "prefill_config", lambda *_: config)
    rows = [(70, 70), (2, 2), (3, 100), (33, 129), (64, 64), (65, 65)]
    b = batch((2, 1, 32, block_size), rows, dtype, padding=3)
    expected = b.exact(window)
    if window:
        b.forget(window)
    near(b.run(ragged=True, window=window)[:-3], expected)


def test_large_scores_do_not_overflow(dtype, batch, close):
    b = batch((2, 2, 64, 16), [(1, 300), (20, 290), (33, 33)], dtype, scale=40.0)
    close(b.run(ragged=True), b.exact(), ulps=4000 if dtype is torch.float32 else 4)


def test_padding_rows_of_a_decode_graph_touch_nothing(dtype, batch, near):
    b = batch((6, 2, 64, 16), [(1, 90), (1, 1), (1, 1)], dtype)
    b.block_tables[b.table_rows[1:]] = 0  # the dummy slot's blocks hold anything
    near(b.run(ragged=False)[:1], b.exact()[:1])
    b.seq_lens[1:] = 0  # or has no length at all
    b.block_tables[b.table_rows[1:]] = HUGE
    result = b.run(ragged=False)
    near(result[:1], b.exact()[:1])
    assert result[1:].isnan().all()


def test_rows_without_length_lie_anywhere_among_others(dtype, batch, near):
    rows = [(1, 1), (1, 90), (1, 1), (1, 1), (1, 300), (1, 2), (1, 1)]
    b = batch((6, 2, 64, 16), rows, dtype)
    b.seq_lens[torch.tensor([0, 2, 3, 6])] = 0
    there = torch.tensor([1, 4, 5])
    near(b.run(ragged=False)[there], b.exact()[there])


def test_the_reference_takes_table_rows(batch, close):
    b = batch((6, 2, 64, 16), [(1, 90), (4, 70), (1, 3)], torch.float32)
    for op in (paged_attention, paged_attention_reference):
        x = b.arguments() if op is paged_attention_reference else b.arguments() | {"q": b.q.to("cpu")}
        x = {name: tensor.cpu() for name, tensor in x.items()}
        close(op(**x, scale=b.scale), b.exact(), ulps=64)


def test_tiles_cover_every_query_once_and_the_most_work_comes_first():
    lengths, starts = [300, 1, 0, 128, 129, 2], [0, 5, 0, 7, 1000, 0]
    paged, fresh = make_tiles(lengths, starts)
    assert paged.dtype == fresh.dtype == np.int32
    assert paged.tolist() == [[4, 128], [4, 0], [3, 0]]
    assert fresh.tolist() == [[0, 256], [0, 128], [0, 0], [5, 0]]
    padded, nothing = make_tiles(lengths, starts, 5, 4)
    assert padded.tolist() == [*paged.tolist(), [-1, -1], [-1, -1]] and nothing.tolist() == fresh.tolist()
    assert [len(part) for part in make_tiles([], [])] == [0, 0]
    with pytest.raises(ValueError, match=r"^num_fresh must be at least 4"):
        make_tiles(lengths, starts, None, 3)


# What `_decode`, `_combine` and `_prefill` are given, but for what a test fills in.
INTEGERS = ("num_rows", "window", "q_stride", "out_stride", "table_stride")
VARIANTS = [(28, 4, 128), (14, 2, 64), (9, 3, 80), (8, 1, 256)]
WINDOWED = VARIANTS[1]


def decode_case(shape, dtype, arch, ragged, window):
    heads, kv_heads, dim = shape
    config = attention.decode_config(dtype, dim, arch, rows=64)
    kind = "*fp32" if dtype is torch.float32 else "*bf16"
    common = dict(
        HK=kv_heads, GROUP=heads // kv_heads, D=dim, BLOCK_D=max(64, 1 << (dim - 1).bit_length()),
        RAGGED=ragged, PDL=arch >= 90,
    )  # fmt: skip
    pointers = dict.fromkeys(("q", "key_cache", "value_cache", "out"), kind)
    pointers |= {"parts": "*fp32", "stats": "*fp32", "table_rows": "*i64"}
    pointers |= dict.fromkeys(("begun", "arrivals", "tables", "query_start", "seq_lens"), "*i32")
    options = dict(num_warps=config.num_warps, num_stages=config.num_stages, launch_pdl=arch >= 90)
    cut = dict(BLOCK_M=16, BLOCK_N=config.block_n, BLOCK_B=128, BLOCK_SIZE=16, WINDOW=window)
    cut |= dict(MIN_TILES=config.min_tiles, SETUP=config.setup)
    given = pointers | dict.fromkeys(INTEGERS, "i32") | {"scale": "fp32"}
    for absent in ("begun", "arrivals"):  # rows are many, or few
        signature = {name: kind for name, kind in given.items() if name != absent}
        yield attention._decode, signature, common | cut | {"HAS_TABLE_ROWS": True, absent: None}, options
    names = ("out", "parts", "stats", "begun", "query_start")
    signature = {name: pointers[name] for name in names} | {"out_stride": "i32"}
    yield attention._combine, signature, common | dict(BLOCK_S=16), options | dict(num_warps=4)


def prefill_case(shape, dtype, arch, is_paged, window, config):
    heads, kv_heads, dim = shape
    kind = "*fp32" if dtype is torch.float32 else "*bf16"
    block_d = max(64, 1 << (dim - 1).bit_length())
    descriptors = config.descriptors and block_d == dim
    source = f"tensordesc<{kind[1:]}[{config.block_n},{dim}]>" if descriptors else kind
    signature = {"q": kind, "keys": source, "values": source, "out": kind} | dict.fromkeys(
        ("tiles", "query_start", "seq_lens", "tables"), "*i32"
    )
    signature |= {"table_rows": "*i64", "scale": "fp32"}
    integers = ("q_stride", "key_stride", "value_stride", "out_stride", "table_stride", "window")
    constants = dict(
        HK=kv_heads, GROUP=heads // kv_heads, D=dim, BLOCK_D=block_d, BLOCK_M=config.block_m,
        BLOCK_N=config.block_n, BLOCK_SIZE=16 if is_paged else 1, PER_TILE=QUERY_TILE // config.block_m,
        PAGED=is_paged, WINDOW=window, DESCRIPTORS=descriptors, HAS_TABLE_ROWS=is_paged,
    )  # fmt: skip
    options = dict(num_warps=config.num_warps, num_stages=config.num_stages)
    return prefill._prefill, signature | dict.fromkeys(integers, "i32"), constants, options


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", scaled([torch.bfloat16], [torch.float32, torch.bfloat16]), ids=str)
@pytest.mark.parametrize("shape", scaled(VARIANTS[:1], VARIANTS), ids=str)
def test_compiles_and_fits(shape, dtype, arch):
    window = shape == WINDOWED
    cases = list(decode_case(shape, dtype, arch, ragged=window, window=window))
    for is_paged in (False, True):
        config = prefill.prefill_config(is_paged, dtype, shape[2], arch)
        cases.append(prefill_case(shape, dtype, arch, is_paged, window, config))
    for kernel, signature, constants, options in cases:
        strides = [name for name in signature if name.endswith("_stride") and name != "table_stride"]
        compiled = compile_for(kernel, arch, signature, constants, options, strides)
        assert compiled.spilled <= 256, f"{compiled.name}: {compiled.spilled} bytes a thread"
