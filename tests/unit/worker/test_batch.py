"""Blocks of batches: what is packed is found again, padding belongs to nobody, and sizes are bounded."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from gpu_worker.batch import ALIGNMENT, Padding, Shape, pack, padding_alone, unpack
from kernels.attention import make_tiles

PADDING_SLOT = 900
PADDING = Padding.for_graphs(max_slots=100, max_tokens=2048)
SHAPES = PADDING.shapes()
IOTA = torch.arange(2000, dtype=torch.int32)


@given(st.lists(st.tuples(st.integers(1, 300), st.integers(0, 400), st.booleans()), min_size=1, max_size=80))
def test_a_ragged_batch_is_found_again(rows: list[tuple[int, int, bool]]) -> None:
    lengths, starts = (np.array([row[i] for row in rows]) for i in (0, 1))
    slots = np.arange(len(rows)) * 3
    sampling = np.flatnonzero([samples for _, _, samples in rows])
    ends = np.cumsum(lengths)
    paged, fresh = make_tiles(lengths, starts)
    has_decodes = bool((lengths == 1).any())
    shape = PADDING.chunks(
        len(rows), int(ends[-1]), len(sampling), len(paged), len(fresh), has_decodes=has_decodes
    )
    assert shape.rows >= len(rows) and shape.tokens >= ends[-1] and shape.samples >= len(sampling)
    assert shape.has_decodes or not has_decodes
    assert shape.size <= PADDING.largest(len(rows), int(ends[-1]))
    assert all(start % ALIGNMENT == 0 for start, _, _ in shape.places().values())
    block = pack(
        shape, PADDING_SLOT, slots=slots, sample_slots=slots[sampling], sample_index=ends[sampling] - 1,
        lengths=lengths, paged=paged, fresh=fresh,
    )  # fmt: skip
    assert len(block) == shape.size and block[0] == -1
    inputs = unpack(torch.from_numpy(block), shape, IOTA)
    chunks = inputs.chunks
    assert chunks is not None
    n, total, r = len(rows), int(ends[-1]), len(sampling)
    assert inputs.slots[:n].tolist() == slots.tolist()
    assert set(inputs.slots[n:].tolist()) <= {PADDING_SLOT}
    assert inputs.sample_slots[:r].tolist() == slots[sampling].tolist()
    assert set(inputs.sample_slots[r:].tolist()) <= {PADDING_SLOT}
    assert chunks.sample_index[:r].tolist() == (ends[sampling] - 1).tolist()
    assert chunks.lengths[:n].tolist() == lengths.tolist() and not chunks.lengths[n:].any()
    assert chunks.query_start.tolist() == [0, *ends.tolist(), *[total] * (shape.rows - n)]
    assert chunks.row_of_token[:total].tolist() == [i for i, k in enumerate(lengths) for _ in range(k)]
    assert set(chunks.row_of_token[total:].tolist()) <= {-1}
    assert chunks.offsets[:total].tolist() == [j for k in lengths for j in range(k)]


@given(st.integers(1, 100))
def test_a_batch_of_decodes_is_found_again(count: int) -> None:
    shape = PADDING.decodes(count)
    assert shape in SHAPES and shape.rows >= count and shape == PADDING.decodes(shape.rows)
    inputs = unpack(torch.from_numpy(pack(shape, PADDING_SLOT, slots=range(count))), shape, IOTA)
    assert inputs.slots.tolist() == [*range(count), *[PADDING_SLOT] * (shape.rows - count)]
    assert inputs.sample_slots is inputs.slots and inputs.chunks is None
    assert inputs.query_start.tolist() == list(range(shape.rows + 1))


def test_batches_of_many_decodes_skip_sizes_that_products_have_no_good_tile_for() -> None:
    padding = Padding.for_graphs(max_slots=700, max_tokens=8192)
    assert [padding.decodes(n).rows for n in (257, 321, 385, 449, 513, 641)] == [320, 384, 512, 512, 640, 700]


def test_what_does_not_fit_is_exact() -> None:
    assert Padding().decodes(37) == Shape(37, 37, 37) and not Padding().shapes()
    for sizes in ((101, 500, 3, 1, 1), (5, 2049, 3, 1, 1), (5, 64, 3, 200, 1)):
        shape = PADDING.chunks(*sizes)
        assert shape == Shape(*sizes[:3], True, *sizes[3:]) and shape not in SHAPES


def test_whole_prompts_alone_have_shapes_of_their_own() -> None:
    alone = PADDING.chunks(2, 100, 2, 0, 2, has_decodes=False)
    assert alone in SHAPES and (alone.paged, alone.has_decodes) == (0, False)
    for paged, has_decodes in ((1, False), (0, True)):
        mixed = PADDING.chunks(2, 100, 2, paged, 2, has_decodes=has_decodes)
        assert mixed in SHAPES and mixed.paged > 0 and mixed.has_decodes


def test_forks_sample_more_than_there_are_rows() -> None:
    for rows, samples in ((3, 17), (10, 64), (60, 65), (5, 90)):
        shape = PADDING.chunks(rows, 500, samples, 0, 9, has_decodes=False)
        assert shape in SHAPES and shape.rows >= rows and shape.samples >= samples
    assert PADDING.chunks(60, 500, 101, 0, 1).samples == 101


def test_every_padded_shape_is_listed() -> None:
    assert len(set(SHAPES)) == len(SHAPES)
    for rows, tokens, has_decodes in ((1, 1, False), (3, 700, False), (40, 500, True), (100, 2048, True)):
        assert PADDING.chunks(rows, tokens, rows, 0, 1, has_decodes=has_decodes) in SHAPES


def test_padding_alone_is_nobodys() -> None:
    shape = PADDING.chunks(2, 100, 2, 1, 1)
    inputs = unpack(torch.from_numpy(padding_alone(shape, PADDING_SLOT)), shape, IOTA)
    assert inputs.chunks is not None
    assert set(inputs.slots.tolist()) == set(inputs.sample_slots.tolist()) == {PADDING_SLOT}
    assert set(inputs.chunks.row_of_token.tolist()) == {-1} and not inputs.chunks.query_start.any()
