import pytest
import torch

from kernels import cpu
from kernels.attention import cache_shape, key_words, paged_attention, paged_attention_reference

BOTH = pytest.mark.parametrize("op", [paged_attention, paged_attention_reference])
SHAPES = [(9, 3, 64, 16), (7, 1, 80, 8), (2, 2, 96, 32), (8, 1, 128, 16), (14, 2, 64, 24), (16, 1, 34, 8)]
MIXED = [(1, 1), (5, 5), (1, 200), (64, 64), (3, 17), (1, 16), (0, 4), (40, 300), (1, 600)]


class Paged:
    """Sequences in a paged cache whose unused slots and blocks are NaN, and the exact attention over them."""

    def __init__(self, shape, rows, dtype, randn, generator):
        self.num_heads, self.num_kv_heads, self.dim, self.block_size = shape
        self.scale = self.dim**-0.5
        counts = [-(-length // self.block_size) for _, length in rows]
        blocks = torch.randperm(sum(counts) + 5, generator=generator, dtype=torch.int32).tolist()
        shapes = cache_shape(len(blocks), self.num_kv_heads, self.block_size, self.dim, dtype)
        self.key_cache, self.value_cache = (torch.full(s, float("nan"), dtype=dtype) for s in shapes)
        # Behind a row's own entries, a table leads far outside of memory.
        self.block_tables = torch.full((len(rows), max(counts) + 2), 2**30, dtype=torch.int32)
        self.query_start = torch.tensor([0, *torch.tensor([n for n, _ in rows]).cumsum(0)], dtype=torch.int32)
        self.seq_lens = torch.tensor([length for _, length in rows], dtype=torch.int32)
        self.q = randn(int(self.query_start[-1]), self.num_heads, self.dim, dtype=dtype)
        self.keys, self.values = [], []
        for row, (_, length) in enumerate(rows):
            mine = torch.tensor([blocks.pop() for _ in range(counts[row])], dtype=torch.int32)
            self.block_tables[row, : len(mine)] = mine
            k, v = (randn(length, self.num_kv_heads, self.dim, dtype=dtype) for _ in range(2))
            token = torch.arange(length)
            block, offset = mine[token // self.block_size].long(), token % self.block_size
            self.key_cache[block, :, :, offset] = key_words(k, self.key_cache.shape[-1])
            self.value_cache[block, :, offset] = v
            self.keys.append(k)
            self.values.append(v)

    def run(self, op=paged_attention, rows=slice(None), **options):
        start, end = self.query_start[rows][0], self.query_start[1:][rows][-1]
        starts = torch.cat((self.query_start[:-1][rows], end.unsqueeze(0))) - start
        tables, lengths = self.block_tables[rows], self.seq_lens[rows]
        q = self.q[start:end]
        return op(q, self.key_cache, self.value_cache, tables, starts, lengths, self.scale, **options)

    def exact(self, window=None):
        results = []
        for row, (k, v) in enumerate(zip(self.keys, self.values, strict=True)):
            q = self.q[self.query_start[row] : self.query_start[row + 1]].double()
            group = self.num_heads // self.num_kv_heads
            k, v = (x.double().repeat_interleave(group, dim=1) for x in (k, v))
            scores = torch.einsum("qhd,khd->hqk", q, k) * self.scale
            distance = torch.arange(len(k) - len(q), len(k)).unsqueeze(1) - torch.arange(len(k))
            hidden = (distance < 0) | (distance >= (window or len(k)))
            results.append(
                torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)
            )
        return torch.cat(results)


@pytest.fixture
def paged(randn, generator):
    return lambda shape, rows, dtype: Paged(shape, rows, dtype, randn, generator)


@BOTH
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_mixed_batch_matches_the_formula(op, shape, dtype, threads, paged, close):
    batch = paged(shape, MIXED, dtype)
    close(batch.run(op), batch.exact(), ulps=64 if dtype is torch.float32 else 2)


@BOTH
@pytest.mark.parametrize("window", [1, 7, 100, 300, 1000])
def test_sliding_window(op, window, dtype, threads, paged, close):
    batch = paged((6, 2, 64, 16), MIXED, dtype)
    close(batch.run(op, sliding_window=window), batch.exact(window), ulps=64 if dtype is torch.float32 else 2)


def test_blocks_that_left_the_window_are_not_read(dtype, threads, paged, close):
    batch = paged((6, 2, 64, 16), [(1, 500), (20, 700)], dtype)
    expected = batch.exact(50)
    batch.value_cache[batch.block_tables[0, : 450 // 16].long()] = float("nan")
    batch.value_cache[batch.block_tables[1, : 630 // 16].long()] = float("nan")
    close(batch.run(sliding_window=50), expected, ulps=64 if dtype is torch.float32 else 2)


@pytest.mark.parametrize("length", [1, 15, 16, 17, 255, 256, 257, 512, 1100])
def test_one_row_at_every_edge_of_a_part(length, dtype, threads, paged, close):
    batch = paged((9, 3, 64, 16), [(1, length)], dtype)
    close(batch.run(), batch.exact(), ulps=64 if dtype is torch.float32 else 2)


@pytest.mark.parametrize("block_size", [2, 8, 16, 24])
@pytest.mark.parametrize("length", [1, 5, 8, 20, 24])
def test_nothing_beside_a_rows_blocks_is_read(block_size, length, dtype, threads, paged, close):
    batch = paged((9, 3, 64, block_size), [(1, length)], dtype)
    close(batch.run(), batch.exact(), ulps=64 if dtype is torch.float32 else 2)
    batch.block_tables[0, : max(0, length - 4) // block_size] = 2**30  # out of the window
    close(batch.run(sliding_window=4), batch.exact(4), ulps=64 if dtype is torch.float32 else 2)


def test_a_long_prompt(dtype, threads, paged, close):
    batch = paged((3, 1, 64, 16), [(530, 530)], dtype)
    close(batch.run(), batch.exact(), ulps=64 if dtype is torch.float32 else 2)


def test_a_row_does_not_depend_on_its_batch(dtype, threads, paged):
    if cpu.library() is None:
        return  # torch makes no such promise
    batch = paged((9, 3, 64, 16), [(1, 700), *MIXED, *MIXED], dtype)
    whole = batch.run()
    for row in range(len(batch.seq_lens)):
        start, end = batch.query_start[row], batch.query_start[row + 1]
        if start < end:
            assert torch.equal(batch.run(rows=slice(row, row + 1)), whole[start:end])


def test_a_prompt_in_chunks_equals_the_whole(dtype, paged):
    if cpu.library() is None:
        return  # torch makes no such promise
    batch = paged((9, 3, 64, 16), [(300, 300)], dtype)
    whole = batch.run()
    batch.query_start[1], batch.seq_lens[0] = 123, 123
    assert torch.equal(batch.run(), whole[:123])


def test_strided_queries_and_output(dtype, paged, randn):
    batch = paged((6, 2, 32, 16), [(1, 40), (9, 9)], dtype)
    expected = batch.run()
    qkv = randn(10, 400, dtype=dtype)
    qkv[:, 50:242] = batch.q.flatten(1)
    batch.q = qkv[:, 50:242].unflatten(1, (6, 32))
    out = torch.full((10, 300), 5.0, dtype=dtype)
    batch.run(out=out[:, 20:212].unflatten(1, (6, 32)))
    assert torch.equal(out[:, 20:212], expected.flatten(1))
    assert (out[:, :20] == 5).all() and (out[:, 212:] == 5).all()


def test_large_scores_do_not_overflow(dtype, paged, close):
    batch = paged((2, 2, 64, 16), [(1, 300), (20, 290)], dtype)
    batch.scale = 40.0
    close(batch.run(), batch.exact(), ulps=2000 if dtype is torch.float32 else 2)


def test_errors_name_the_argument(paged, randn):
    def call(**changes):
        batch = paged((4, 2, 16, 8), [(1, 9), (2, 4)], torch.float32)
        names = ("q", "key_cache", "value_cache", "block_tables", "query_start", "seq_lens", "scale")
        paged_attention(**{name: getattr(batch, name) for name in names} | changes)

    call()
    for name, bad in {
        "q": randn(3, 5, 16),
        "key_cache": randn(5, 2, 8, 16, 1),
        "value_cache": randn(5, 2, 8, 18),
        "block_tables": torch.zeros(3, 4, dtype=torch.int32),
        "query_start": torch.zeros(2, dtype=torch.int32),
        "seq_lens": torch.zeros(2, dtype=torch.int64),
        "sliding_window": 0,
        "out": randn(3, 4, 17),
    }.items():
        with pytest.raises(ValueError, match=f"^{name} must"):
            call(**{name: bad})
    with pytest.raises(ValueError, match=r"^dtype must"):
        cache_shape(1, 1, 16, 64, torch.float16)
    with pytest.raises(ValueError, match=r"^head_dim must"):
        cache_shape(1, 1, 16, 63, torch.float32)
