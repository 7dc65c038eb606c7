"""The rows' kernels in Triton beside the plain torch ones, on random states of rows."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch

from tests.support.triton import ARCHS, compile_for, device

from kernels import rows  # isort: skip
from kernels.blocks import copy_blocks_reference  # isort: skip
from kernels.cuda import blocks as cuda_blocks  # isort: skip
from kernels.cuda import rows as cuda_rows  # isort: skip

SLOTS, MAX_LEN, BLOCK_SIZE, STOPS = 20, 64, 16, 130
I32, I64 = torch.int32, torch.int64


def clone(state: rows.RowState, place: str) -> rows.RowState:
    """A deep copy of a state on a device; what are views of one matrix stay so."""
    made = rows.RowState.allocate(SLOTS, MAX_LEN, BLOCK_SIZE, STOPS, 4, torch.device(place))
    for name in ("tokens", "block_tables", "counters", "integers", "floats", "done"):
        getattr(made, name).copy_(getattr(state, name))
    for name in ("seed", "stop_ids"):
        getattr(made.columns, name).copy_(getattr(state.columns, name))
    return made


def random_state(seed: int) -> rows.RowState:
    """Rows in every condition: done, full, with many stop ids and with none."""
    torch.manual_seed(seed)
    state = rows.RowState.allocate(SLOTS, MAX_LEN, BLOCK_SIZE, STOPS, 4, torch.device("cpu"))
    state.tokens.random_(0, 50)
    state.block_tables.random_(0, 99)
    prompt = torch.randint(1, 20, (SLOTS,), dtype=I32)
    length = prompt + torch.randint(0, 40, (SLOTS,), dtype=I32)
    state.num_prompt[:SLOTS], state.num_tokens[:SLOTS] = prompt, length
    state.num_computed[:SLOTS] = length - 1
    state.last_position[:SLOTS] = (length + torch.randint(1, 4, (SLOTS,), dtype=I32)).clamp(max=MAX_LEN)
    state.integers[1, :SLOTS].random_(0, 30)
    state.done[:SLOTS] = torch.rand(SLOTS) < 0.3
    for slot in range(SLOTS):
        count = int(torch.randint(0, STOPS + 1, ()))
        state.columns.stop_ids[slot, :count] = torch.randint(0, 50, (count,), dtype=I32)
    return state


def same(expected: rows.RowState, got: rows.RowState) -> None:
    for name in ("tokens", "block_tables", "counters", "integers", "floats", "done"):
        torch.testing.assert_close(
            getattr(got, name).cpu(), getattr(expected, name), rtol=0, atol=0, msg=name
        )
    torch.testing.assert_close(got.columns.stop_ids.cpu(), expected.columns.stop_ids, rtol=0, atol=0)
    torch.testing.assert_close(got.columns.seed.cpu(), expected.columns.seed, rtol=0, atol=0)


def staged(num_rows: int, num_entries: int) -> rows.Changes:
    """Random rows that enter, forks and rows that fill their slots among them, and entries of others."""
    source = torch.randint(0, 50, (4000,), dtype=I32)
    slots = torch.randperm(SLOTS)
    records, place, longest = 12, 600, 0
    for i, slot in enumerate(slots[:num_rows].tolist()):
        num_stops, num_tokens, num_blocks = ((0, 0, 0), (STOPS, MAX_LEN, 4), (7, 33, 3), (1, 1, 0))[i % 4]
        numbers = torch.randint(0, 40, (6,)).tolist()
        values = (slot, place, num_stops, num_blocks, 2**64 - 1 - i, num_tokens, *numbers)
        rows.RECORD.pack_into(
            source.numpy(), 4 * (records + i * rows.RECORD_WORDS), *values, *torch.rand(6).tolist()
        )
        place, longest = place + num_stops + num_tokens + num_blocks, max(longest, num_tokens)
    width = MAX_LEN // BLOCK_SIZE
    free = (slots[num_rows:, None] * width + torch.arange(width)).view(-1)
    source[2000 : 2000 + num_entries] = free[torch.randperm(len(free))[:num_entries]]
    return rows.Changes(source, records, num_rows, longest, 2000, num_entries)


@pytest.mark.parametrize(("num_rows", "num_entries"), [(5, 0), (0, 9), (1, 1), (4, 60), (11, 30)])
def test_change(num_rows: int, num_entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_rows, "SPAN", 32)  # tokens, stop ids and entries take several programs
    expected = random_state(num_rows)
    got = clone(expected, device())
    changes = staged(num_rows, num_entries)
    rows.change(expected, changes)
    cuda_rows.change(got, replace(changes, source=changes.source.to(device())))
    same(expected, got)


def test_change_writes_what_was_staged() -> None:
    state = random_state(0)
    before = clone(state, "cpu")
    source = torch.tensor(
        [7, 7, 7, 7, *[0] * rows.RECORD_WORDS, 11, 12, 21, 22, 23, 31, 9, 14, 41, 42], dtype=I32
    )
    record = (3, 24, 2, 1, 2**63 + 5, 3, 2, 1, 60, 4, 5, 6, 0.5, 1.0, 0.25, -1.0, 2.0, 1.5)
    rows.RECORD.pack_into(source.numpy(), 4 * 4, *record)
    rows.change(state, rows.Changes(source, 4, 1, 3, 30, 2))
    assert state.counters[:, 3].tolist() == [3, 2, 1, 60]
    assert state.integers[:, 3].tolist() == [4, 5, 6]
    assert state.floats[:, 3].tolist() == [0.5, 1.0, 0.25, -1.0, 2.0, 1.5]
    assert state.columns.seed[3].item() == 5 - 2**63
    assert state.columns.stop_ids[3].tolist() == [11, 12] + [-1] * (STOPS - 2)
    assert state.tokens[3, :3].tolist() == [21, 22, 23]
    assert state.block_tables[3, 0].item() == 31
    assert not state.done[3]
    assert state.block_tables.view(-1)[[9, 14]].tolist() == [41, 42]
    kept = [slot for slot in range(SLOTS + 1) if slot != 3]
    for name in ("tokens", "done"):
        assert torch.equal(getattr(state, name)[kept], getattr(before, name)[kept])
    assert torch.equal(state.numbers[:, kept], before.numbers[:, kept])
    assert torch.equal(state.tokens[3, 3:], before.tokens[3, 3:])
    changed = (state.block_tables != before.block_tables).view(-1).nonzero().flatten().tolist()
    assert set(changed) <= {9, 14, 3 * 4}


def padded(slots: torch.Tensor, size: int) -> torch.Tensor:
    return torch.cat((slots, torch.full((size - len(slots),), SLOTS)))


@pytest.mark.parametrize("seed", range(6))
def test_gather_decodes_and_accept(seed: int) -> None:
    expected = random_state(seed)
    got = clone(expected, device())
    slots = padded(torch.randperm(SLOTS)[: 3 + 3 * seed], 24)
    iteration = torch.tensor([0], dtype=I32)
    there = iteration.to(device(), copy=True)
    a = rows.gather_decodes(expected, slots, iteration)
    b = cuda_rows.gather_decodes(got, slots.to(device()), there)
    a.seq_lens[expected.done[slots]] = 0
    for part in fields(a):
        torch.testing.assert_close(
            getattr(b, part.name).cpu(), getattr(a, part.name), rtol=0, atol=0, msg=part.name
        )
    assert iteration.item() == there.item() == 1
    tokens = torch.randint(0, 50, (24,), dtype=I32)
    finite = torch.rand(24) < 0.8
    drawn = torch.full((3, 2, 24), -77, dtype=I32)
    drawn_there = drawn.to(device(), copy=True)
    rows.accept(expected, slots, tokens, finite, iteration, drawn)
    cuda_rows.accept(got, slots.to(device()), tokens.to(device()), finite.to(device()), there, drawn_there)
    torch.testing.assert_close(drawn_there.cpu(), drawn, rtol=0, atol=0)
    same(expected, got)


def masks_of(state: rows.RowState, place: str) -> rows.Masks:
    """A mask for each row but some, every other one for as many tokens as its row has."""
    of_slot = torch.randperm(SLOTS + 1, generator=torch.Generator().manual_seed(5)).to(I32)
    due = torch.zeros(SLOTS + 1, dtype=I32)
    due[of_slot.long()] = state.num_tokens.cpu() + torch.arange(SLOTS + 1, dtype=I32) % 2
    of_slot[::5] = rows.FREE
    told = torch.full((SLOTS + 1,), -77, dtype=torch.int64)
    return rows.Masks(of_slot.to(place), torch.zeros(0), due.to(place), told.to(place))


def test_hold_and_note() -> None:
    expected = random_state(3)
    got = clone(expected, device())
    slots = padded(torch.randperm(SLOTS)[:14], 16)
    masks, masks_there = masks_of(expected, "cpu"), masks_of(expected, device())
    before, live = expected.num_computed.clone(), ~expected.done[slots]
    takers, of_row = rows.hold(expected, slots, masks)
    for a, b in zip((takers, of_row), cuda_rows.hold(got, slots.to(device()), masks_there), strict=True):
        torch.testing.assert_close(b.cpu(), a, rtol=0, atol=0)
    same(expected, got)
    held = live & (masks.of_slot[slots] != rows.FREE) & (slots % 2 == 1)
    assert held.any() and torch.equal(takers != slots, held)
    assert torch.equal(of_row != rows.FREE, live & (masks.of_slot[slots] != rows.FREE) & ~held)
    before[slots[held]] -= 1
    assert torch.equal(expected.num_computed, before)

    tokens = torch.randint(0, 50, (16,), dtype=I32)
    for state in (expected, got):
        state.done[slots[of_row != rows.FREE][0]] = True  # it took its last token
    rows.note(expected, slots, of_row, tokens, masks)
    cuda_rows.note(got, slots.to(device()), of_row.to(device()), tokens.to(device()), masks_there)
    torch.testing.assert_close(masks_there.drawn.cpu(), masks.drawn, rtol=0, atol=0)
    for slot, mask, token in zip(slots.tolist(), of_row.tolist(), tokens.tolist(), strict=True):
        if mask != rows.FREE:
            value = int(masks.drawn[mask])
            assert value >> 32 == expected.num_tokens[slot] and value & 0x7FFFFFFF == token
            assert bool(value >> 31 & 1) == bool(expected.done[slot])
    assert (masks.drawn == -77).sum() == SLOTS + 1 - (of_row != rows.FREE).sum()


@pytest.mark.parametrize("seed", range(6))
def test_gather_chunks(seed: int) -> None:
    expected = random_state(seed)
    slots = torch.randperm(SLOTS)[: 4 + seed]
    expected.num_computed[slots] //= 3
    got = clone(expected, device())
    room = expected.num_tokens[slots] - expected.num_computed[slots]
    lengths = (torch.rand(len(slots)) * room).to(I32).clamp(min=1)
    size, total = len(slots) + 3, int(lengths.sum()) + 5
    row_of_token = torch.full((total,), -1, dtype=I32)
    offsets = torch.zeros(total, dtype=I32)
    row_of_token[: total - 5] = torch.arange(len(slots), dtype=I32).repeat_interleave(lengths)
    offsets[: total - 5] = torch.cat([torch.arange(int(n), dtype=I32) for n in lengths])
    lengths = torch.cat((lengths, torch.zeros(3, dtype=I32)))
    parts = padded(slots, size), lengths, row_of_token, offsets
    there = torch.tensor([-1], dtype=I32, device=device())
    a = rows.gather_chunks(expected, *parts, torch.tensor([-1], dtype=I32))
    b = cuda_rows.gather_chunks(got, *(p.to(device()) for p in parts), there)
    for part in fields(a):
        torch.testing.assert_close(
            getattr(b, part.name).cpu(), getattr(a, part.name), rtol=0, atol=0, msg=part.name
        )
    same(expected, got)


def test_copy_blocks() -> None:
    torch.manual_seed(0)
    pool = torch.randn(6, 10, 3, 16, 8)
    there = pool.to(device(), copy=True)
    src, dst = torch.tensor([1, 4, 4]), torch.tensor([0, 7, 9])
    copy_blocks_reference(list(pool), src, dst)
    cuda_blocks.copy_blocks(list(there), src.to(device()), dst.to(device()), list(there))
    torch.testing.assert_close(there.cpu(), pool, rtol=0, atol=0)
    with pytest.raises(ValueError, match="one pool"):
        cuda_blocks.copy_blocks([pool[0], pool[3], pool[4]], src, dst, list(pool[:3]))


def test_blocks_go_to_host_memory_and_back() -> None:
    """The host's pool has other blocks, and on a GPU the kernel reads and writes it where it is."""
    torch.manual_seed(0)
    pool = torch.randn(6, 10, 3 * 16 * 8).view(torch.uint8)
    there = pool.to(device(), copy=True)
    host = torch.zeros(6, 4, pool.shape[2], dtype=torch.uint8, pin_memory=device() == "cuda")
    blocks, places = torch.tensor([9, 2, 5]).to(device()), torch.tensor([3, 0, 1]).to(device())
    cuda_blocks.copy_blocks(list(there), blocks, places, list(host))
    expected = torch.zeros_like(host)
    copy_blocks_reference(list(pool), blocks.cpu(), places.cpu(), list(expected))
    if device() == "cuda":
        torch.cuda.synchronize()
    assert torch.equal(host, expected) and torch.equal(host[:, 3], pool[:, 9])
    there.zero_()
    cuda_blocks.copy_blocks(list(host), places, blocks, list(there))
    assert torch.equal(there[:, [9, 2, 5]].cpu(), pool[:, [9, 2, 5]])
    assert not there[:, [0, 1, 3, 4, 6, 7, 8]].any()


@pytest.mark.parametrize("arch", ARCHS)
def test_they_compile(arch: int) -> None:
    i32, i64, u8 = "*i32", "*i64", "*u8"
    cases = {
        cuda_rows._change_kernel: (
            [i32, *["i32"] * 4, i32, i32, i32, u8, i32, i32, *["i32"] * 4],
            {"SPAN": cuda_rows.SPAN},
        ),
        cuda_rows._gather_decodes_kernel: (
            [i64, i32, u8, i32, i32, i32, i32, i32, i64, i32, "i32", "i32", "i32"],
            {"BLOCK_SIZE": 16, "BLOCK": cuda_rows.BLOCK},
        ),
        cuda_rows._start_chunks_kernel: (
            [i64, i32, i32, u8, i32, i32, i32, "i32"],
            {"BLOCK": cuda_rows.BLOCK},
        ),
        cuda_rows._gather_chunks_kernel: (
            [i64, i32, i32, i32, i32, i32, i32, i32, i64, "i32", "i32", "i32"],
            {"BLOCK_SIZE": 16, "BLOCK": cuda_rows.BLOCK},
        ),
        cuda_rows._hold_kernel: (
            [i64, i32, i32, u8, i32, i32, i64, i32, "i32", "i32"],
            {"BLOCK": cuda_rows.BLOCK},
        ),
        cuda_rows._note_kernel: ([i64, i32, i32, u8, i32, i64, "i32"], {"BLOCK": cuda_rows.BLOCK}),
        cuda_rows._accept_kernel: (
            [i64, i32, u8, i32, i32, i32, i32, i32, i32, i32, i32, u8, "i32", "i32", "i32"],
            {"STOPS": cuda_rows.STOPS, "BLOCK": cuda_rows.ACCEPT_BLOCK},
        ),
        cuda_blocks._copy_blocks_kernel: ([*[i64] * 4, *["i32"] * 3], {"WORDS": cuda_blocks.WORDS}),
    }
    for kernel, (types, constants) in cases.items():
        names = [name for name in kernel.arg_names if name not in constants]
        compiled = compile_for(kernel, arch, dict(zip(names, types, strict=True)), constants)
        assert compiled.spilled == 0
