"""What ranks do together in Triton: interpreted, by processes that wait for each other, and by one rank
after the other; or on the GPU there is, one after the other."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support import triton as support

pytest.importorskip("triton")

from kernels.cuda import draw, skinny
from kernels.cuda import ranks as module
from kernels.cuda import sample as cuda_sample
from kernels.cuda.meet import meet_kernel
from kernels.cuda.ranks import DeviceRanks, Shared
from kernels.ranks import Place
from kernels.sample import Features, sample_reference
from tests.support import rank_group
from tests.support.sampling import Row, run

DEVICE = torch.device(support.device())
DTYPES = [torch.float32] if support.interpreted() else [torch.float32, torch.bfloat16]
EPS = 1e-5
AHEAD = 1 << 20


class Member:
    """A rank's view of a group that exchanges nothing else."""

    def __init__(self, rank, size):
        self.rank, self.size = lambda: rank, lambda: size


def make_ranks(size, num_rows=16, width=40, dtype=torch.float32):
    """Ranks of one process, each of which finds that all others have come to any exchange already."""
    memory = []

    def shared(group, num_bytes, device):
        if not memory:
            memory.extend(torch.zeros(size, num_bytes, dtype=torch.uint8, device=device))
        return Shared(memory)

    ranks = [DeviceRanks(Member(r, size), DEVICE, num_rows, width, dtype, shared) for r in range(size)]
    for one in ranks:
        for flags in (flags_of(one), meetings_of(one)):
            flags[..., :] = AHEAD
            flags[..., one.rank] = 0
    return ranks


def flags_of(ranks):
    return ranks._own_flags[: module.PROGRAMS * ranks.size].view(module.PROGRAMS, ranks.size)


def meetings_of(ranks):
    """The second stream's flags."""
    return ranks._rooms[module._CARRIED].view(torch.int32)[: ranks.size]


@pytest.fixture
def carried(monkeypatch):
    """Sums of four rows are carried."""
    monkeypatch.setattr(module, "CARRIED_ROWS", 4)
    monkeypatch.setattr(module, "PIECE_ROWS", 1)
    monkeypatch.setattr(module, "LOCAL_PROGRAMS", 3)


def filled(ranks, place, rows, width, dtype, generator):
    """Each rank's part, with numbers in it."""
    parts = [one.part(place, rows, width, dtype) for one in ranks]
    return [part.copy_(torch.randn(rows, width, generator=generator)) for part in parts]


def in_order(parts):
    """The float32 sum in the order of ranks."""
    total = torch.zeros_like(parts[0], dtype=torch.float32)
    for part in parts:
        total += part.float()
    return total


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 5, 11])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_sum_is_added_in_the_order_of_ranks(size, rows, dtype, generator, monkeypatch):
    monkeypatch.setattr(module, "PROGRAMS", 4)
    ranks = make_ranks(size, dtype=dtype)
    for place in (Place.ATTENDED, Place.FED, Place.EMBEDDED):
        parts = filled(ranks, place, rows, 40, dtype, generator)
        before = [part.clone() for part in parts]
        for one, part in zip(ranks, parts, strict=True):
            assert torch.equal(one.summed(place, part), in_order(before).to(dtype))
            assert torch.equal(part, before[one.rank]), "others may still be reading it"
    for one in ranks:  # each program has counted its own exchanges, and told all the others
        programs = torch.arange(4, device=DEVICE)
        counts = torch.where(programs < rows, 3, 0).int()
        for other in ranks:
            told = counts if other is one else counts + AHEAD
            assert torch.equal(flags_of(other)[:, one.rank], told)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", ["skinny", "wide"])
@pytest.mark.parametrize("size", [2, 3])
def test_a_sum_with_what_follows_it(size, form, dtype, generator, monkeypatch):
    monkeypatch.setattr(module, "PROGRAMS", 3)
    ranks, rows, width = make_ranks(size, dtype=dtype), 7, 36
    parts = filled(ranks, Place.FED, rows, width, torch.float32 if form == "skinny" else dtype, generator)
    weight = torch.randn(width, generator=generator).to(DEVICE, dtype)
    start = torch.randn(rows, width, generator=generator).to(DEVICE)
    results = []
    for one, part in zip(ranks, parts, strict=True):
        hidden, out = start.clone(), torch.full((rows, width), math.nan, dtype=dtype, device=DEVICE)
        squares = torch.full((1, 16), math.nan, device=DEVICE) if form == "skinny" else None
        one.add(Place.FED, part, hidden, weight, EPS, out, squares)
        results.append((hidden, out, squares))
    exact = in_order(parts).double() + start.double()
    for hidden, out, squares in results:
        torch.testing.assert_close(hidden.double(), exact, rtol=1e-6, atol=1e-6)
        scale = (exact.pow(2).mean(-1, keepdim=True) + EPS).rsqrt() if squares is None else 1.0
        loose = {} if dtype is torch.bfloat16 else {"rtol": 2e-6, "atol": 2e-6}
        torch.testing.assert_close(out, (exact * scale * weight.double()).to(dtype), **loose)
        if squares is not None:
            torch.testing.assert_close(squares[0, :rows].double(), exact.pow(2).sum(-1), rtol=1e-6, atol=0)
            assert squares[0, rows:].isnan().all()
    for found in results[1:]:
        for one, other in zip(found, results[0], strict=True):
            assert one is None or torch.equal(one.nan_to_num(9.0), other.nan_to_num(9.0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [4, 7, 16])
def test_a_sum_that_is_carried_equals_one_that_is_not(rows, dtype, generator, carried):
    ranks, width = make_ranks(2, dtype=dtype), 36
    weight = torch.randn(width, generator=generator).to(DEVICE, dtype)
    for turn, place in enumerate((Place.ATTENDED, Place.FED, Place.ATTENDED)):
        parts = filled(ranks, place, rows, width, dtype, generator)
        before = [part.clone() for part in parts]
        start = torch.randn(rows, width, generator=generator).to(DEVICE)
        for one, part in zip(ranks, parts, strict=True):
            whole, cut = start.clone(), start.clone()
            expected, out = torch.empty_like(part), torch.full_like(part, math.nan)
            one.add(place, part, whole, weight, EPS, expected)
            pieces = one.pieces(rows)
            assert [i for piece in pieces for i in range(rows)[piece]] == list(range(rows))
            brought = [one.bring(place, part, piece) for piece in pieces]
            for i, piece in enumerate(brought):
                one.add_brought(piece, cut, weight, EPS, out)
                done = piece.rows.stop
                assert torch.equal(cut[:done], whole[:done]) and torch.equal(out[:done], expected[:done])
                assert i or (torch.equal(cut[done:], start[done:]) and out[done:].isnan().all())
            assert torch.equal(part, before[one.rank]), "others may still be reading it"
            assert meetings_of(one)[one.rank] == 2 * turn + 2  # two pieces each time
            assert meetings_of(ranks[1 - one.rank])[one.rank] == AHEAD + 2 * turn + 2


def test_what_is_carried(carried, monkeypatch):
    pair = make_ranks(2)
    assert pair[0].pieces(3) == [] and len(pair[0].pieces(4)) == 2
    assert make_ranks(1)[0].pieces(16) == make_ranks(3)[0].pieces(16) == make_ranks(2, 3)[0].pieces(16) == []
    monkeypatch.undo()
    (one, _) = make_ranks(2, 8192, 1)
    assert one.pieces(4095) == []
    assert one.pieces(8192) == [slice(0, 28 * 128), slice(28 * 128, 8192)]
    assert one.pieces(4100) == [slice(0, 14 * 128), slice(14 * 128, 4100)]


def test_a_sum_into_a_wider_type(generator):
    ranks = make_ranks(2, dtype=torch.bfloat16)
    parts = filled(ranks, Place.FED, 3, 40, torch.bfloat16, generator)
    out = torch.empty(3, 40, device=DEVICE)
    assert ranks[1].summed(Place.FED, parts[1], out) is out
    assert torch.equal(out, in_order(parts))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("room", [1, 32 << 20], ids=["pieces", "whole"])
def test_columns_side_by_side(room, dtype, generator, monkeypatch):
    monkeypatch.setattr(module, "GATHER_BYTES", max(room, 24 * dtype.itemsize * 2))
    monkeypatch.setattr(module, "GATHER_BLOCK", 16)
    monkeypatch.setattr(module, "PROGRAMS", 2)
    size, rows = 3, 5
    wide = [torch.randn(rows, 32, generator=generator).to(DEVICE, dtype) for _ in range(size)]
    columns = [one[:, :24] for one in wide]
    for turn in range(rows if room == 1 else 1):  # as many rows as there is room for, as nobody else goes on
        ranks = make_ranks(size, dtype=dtype)
        some = [one[2 * turn : 2 * turn + 2] if room == 1 else one for one in columns]
        for _ in range(2):  # the second time, the first ones also find what the last ones brought
            found = [one.gathered(mine) for one, mine in zip(ranks, some, strict=True)]
        assert all(torch.equal(one, torch.cat(some, dim=1)) for one in found)


def test_rooms_are_as_large_as_was_asked_for():
    (one,) = make_ranks(1, num_rows=128, width=64, dtype=torch.bfloat16)
    assert one.part(Place.ATTENDED, 128, 64, torch.bfloat16).shape == (128, 64)
    assert one.part(Place.FED, 64, 64, torch.float32).is_contiguous()
    with pytest.raises(ValueError, match="rows of 64 take"):
        one.part(Place.EMBEDDED, 1000, 64, torch.bfloat16)
    starts = [one.part(place, 128, 1, torch.bfloat16).data_ptr() for place in Place]
    assert len(set(starts)) == len(Place) and all(start % 16 == 0 for start in starts)


def test_who_is_quiet_waits_for_nobody_and_touches_nothing(carried):
    ranks = make_ranks(2)
    for one in ranks:
        flags_of(one)[:] = meetings_of(one)[:] = 0  # nobody ever comes
        one.quiet = True
    kept = [[room.clone() for room in one._rooms] for one in ranks]
    one = ranks[0]
    part = one.part(Place.FED, 5, 40, torch.float32).fill_(2.0)
    assert torch.equal(one.summed(Place.FED, part), torch.full_like(part, 4.0))
    assert one.gathered(part).shape == (5, 80)
    hidden, weight = torch.ones_like(part), torch.ones(40, device=DEVICE)
    for brought in [one.bring(Place.FED, part, piece) for piece in one.pieces(5)]:
        one.add_brought(brought, hidden, weight, EPS, torch.empty_like(part))
    assert torch.equal(hidden, torch.full_like(part, 5.0))
    assert drawn(ranks[:1], [Row([1.0, 2.0] * 64)], Features())[0].shape == (1,)
    for one, before in zip(ranks, kept, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one._rooms, before, strict=True))


def drawn(ranks, rows, features, size=2):
    """Tokens and whether they are good, by each of some ranks. Logits behind the vocabulary are NaN."""
    found = {}

    def form(logits, slots, columns, tokens, num_tokens, num_prompt, vocab, features):
        width = math.ceil(vocab / size / 64) * 64
        padded = torch.full((len(logits), size * width), math.nan)
        padded[:, :vocab] = logits[:, :vocab]
        moved = [t.to(DEVICE) for t in (slots, tokens, num_tokens, num_prompt)]
        here = type(columns)(**{name: getattr(columns, name).to(DEVICE) for name in vars(columns)})
        for turn in range(2):  # the second time, the first ones also find what the last ones brought
            for one in ranks:
                if turn and not one.quiet:
                    flags_of(one)[:, one.rank] = 0
                part = padded.chunk(size, dim=1)[one.rank].to(DEVICE)
                result = cuda_sample.sample(part, moved[0], here, *moved[1:], vocab, features, ranks=one)
                found[one.rank] = result.token_ids.cpu(), result.finite.cpu()
        return type(result)(*found[one.rank], None)

    run(form, rows, features)
    for tokens, finite in found.values():
        assert torch.equal(tokens, found[0][0]) and torch.equal(finite, found[0][1])
    return found[0]


def some_rows(number, vocab, temperature, seed, generator):
    """Logits in steps of an eighth: ties are common, within a rank and between them."""
    logits = (torch.randn(number, vocab, generator=generator) * 8).round() / 8
    return [
        Row(one.tolist(), temperature=temperature * (i % 3), seed=seed + i, output=[1] * (i % 4))
        for i, one in enumerate(logits)
    ]


FILTERED = Features(any_random=True, any_filter=True, any_penalty=True)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("features", [Features(), Features(any_random=True)], ids=["greedy", "random"])
@pytest.mark.parametrize("vocab", [300, 70, 5])
def test_draws_equal_the_references(vocab, features, size, generator, monkeypatch):
    monkeypatch.setattr(draw, "RANK_PROGRAMS", 4)
    for seed in range(3):
        rows = some_rows(9, vocab, 0.7 if features.any_random else 0.0, 100 * seed, generator)
        tokens, finite = drawn(make_ranks(size), rows, features, size)
        assert finite.all() and torch.equal(tokens, run(sample_reference, rows, features).token_ids)


def test_filtered_draws_equal_the_references(generator):
    rows = some_rows(4, 150, 0.7, 0, generator)
    for row in rows:
        row.top_k, row.frequency = 7, 0.5
    tokens, finite = drawn(make_ranks(2), rows, FILTERED)
    assert finite.all() and torch.equal(tokens, run(sample_reference, rows, FILTERED).token_ids)


def test_ties_and_what_is_not_finite():
    vocab = 200  # ids 128 and on are the second rank's
    values = [1.0 + i % 7 for i in range(vocab)]

    def row(*changes, base=values):
        return Row([dict(changes).get(i, value) for i, value in enumerate(base)])

    tied, later = row((100, 50.0), (130, 50.0)), row((130, 50.0), (199, 50.0))
    bad = [row((place, value)) for place in (3, 127, 128, 199) for value in (math.nan, math.inf)]
    nothing = row(base=[-math.inf] * vocab)
    only = row((150, -3.0), base=[-math.inf] * vocab)
    rows = [tied, *bad, later, nothing, only]
    tokens, finite = drawn(make_ranks(2), rows, Features())
    assert finite.tolist() == [True, *[False] * len(bad), True, False, True]
    assert tokens[finite].tolist() == [100, 130, 150]


# -- processes that wait for each other ----------------------------------------------------------------------

ON_A_CPU = pytest.mark.skipif(not support.interpreted(), reason="processes share the memory of a CPU")


@pytest.fixture(scope="module", params=[2, 3])
def processes(request, tmp_path_factory):
    """What each of some ranks found, see `tests.support.rank_group`."""
    size, folder = request.param, tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", rank_group.__name__]
    root = Path(__file__).parents[3]
    started = [subprocess.Popen([*command, str(r), str(size), str(folder)], cwd=root) for r in range(size)]
    try:
        assert not any(process.wait(120) for process in started)
    finally:
        for process in started:
            process.kill()
            process.wait()
    return [torch.load(folder / f"found-{r}") for r in range(size)]


@ON_A_CPU
def test_all_processes_find_the_same(processes):
    for other in processes[1:]:
        assert processes[0].keys() == other.keys()
        for name, found in processes[0].items():
            assert torch.equal(found, other[name]), name


@ON_A_CPU
def test_a_stack_over_processes(processes):
    if len(processes) == 2:
        every = rank_group.states(0, 1, None, None)
        for wanted in (False, True):
            every[f"carried {wanted}"] = every[f"forward_wide {wanted}"]
        for name, alone in every.items():
            torch.testing.assert_close(processes[0][name], alone, rtol=1e-5, atol=1e-5)


@ON_A_CPU
def test_rounds_of_sums_draws_and_gathers(processes):
    size, found = len(processes), processes[0]
    for turn in range(rank_group.ROUNDS):
        rows = len(found[f"sum {turn}"])
        generator = torch.Generator().manual_seed(turn)
        parts = torch.randn(size, rows, rank_group.HIDDEN, generator=generator)
        # Many rows of more than two ranks are summed by the group, in an order of its own.
        exact = {"rtol": 0, "atol": 0} if size == 2 or rows <= 4 else {}
        torch.testing.assert_close(found[f"sum {turn}"], in_order(parts), **exact)
        if size == 2 and rows >= rank_group.CARRIED_ROWS:
            assert torch.equal(found[f"carried {turn}"], in_order(2 * parts))
        expected = rank_group.draws(0, 1, turn, lambda *a: sample_reference(*a[:-1]), None)
        assert torch.equal(found[f"host draw {turn}"], expected)
        for again in range(turn % 3):
            assert torch.equal(found[f"draw {turn} {again}"], expected)
            columns = torch.arange(rows * 8.0).view(rows, 8) + 1000 * again
            gathered = torch.cat([columns + 100 * r for r in range(size)], dim=1)
            assert torch.equal(found[f"gather {turn} {again}"], gathered)


# -- compiled for every card, at the sizes that are served ---------------------------------------------------

COMMON = {"flags": "*i64", "own_flags": "*i32", "rank": "i32", "quiet": "i32"}
SUM = COMMON | {"parts": "*i64", "first": "i32", "end": "i32", "eps": "fp32"}
GATHER = COMMON | dict.fromkeys(("total", "width", "stride"), "i32") | {"rooms": "*i64"}
COMBINE = COMMON | {
    "rooms": "*i64", "own": "*i32", "values": "*fp32", "tokens": "*i32", "token_ids": "*i32",
    "finite": "*i1", "num_splits": "i32", "num_rows": "i32",
}  # fmt: skip
HIDDEN = {"hidden": "*fp32", "weight": "*bf16", "out": "*bf16"}
SUM_FORMS = {
    "skinny": ({"own": "*bf16", "squares": "*fp32"} | HIDDEN, {}),
    "wide": ({"own": "*bf16"} | HIDDEN, {"squares": None}),
    "plain": ({"own": "*bf16", "out": "*bf16"}, {"hidden": None, "weight": None, "squares": None}),
}


@pytest.mark.parametrize("arch", support.ARCHS)
def test_kernels_compile_for(arch):
    overlaps = {"launch_pdl": True} if arch >= 90 else {}
    calls = []
    for size, width in ((2, 3584), (8, 8192)):
        shape = {
            "SIZE": size, "DIM": width, "BLOCK": 1 << (width - 1).bit_length(), "OVERLAPS": arch >= 90
        }  # fmt: skip
        warps = {"num_warps": module.warps_of(width)}
        for types, constants in SUM_FORMS.values():
            calls.append((module.sum_kernel, SUM | types, shape | constants, overlaps | warps, []))
    local = shape | {"SIZE": 2, "OVERLAPS": False} | SUM_FORMS["wide"][1]
    calls.append((module.sum_kernel, SUM | SUM_FORMS["wide"][0], local, warps, []))
    calls.append((meet_kernel, COMMON, {"SIZE": 2}, {"num_warps": 1}, []))
    shape = {"SIZE": 2, "BLOCK": module.GATHER_BLOCK, "OVERLAPS": arch >= 90}
    types = GATHER | dict.fromkeys(("own", "columns", "out"), "*fp32")
    calls.append((module.gather_kernel, types, shape, overlaps, ["total", "width", "stride"]))
    calls.append((draw.combine_ranks_kernel, COMBINE, {"SIZE": 2}, {"num_warps": 1}, []))
    for kernel, types, constants, options, divisible in calls:
        compiled = support.compile_for(kernel, arch, types, constants, options, divisible)
        ptx = compiled.asm["ptx"]
        assert compiled.spilled == 0
        assert "sys.release" in ptx and "sys.acquire" in ptx
        launches_early = "launch_pdl" in options
        assert ptx.count("griddepcontrol.wait") == ptx.count("griddepcontrol.launch") == launches_early
        if kernel is meet_kernel:  # it fits beside what leaves a few KiB of registers and of shared memory
            assert compiled.shared <= 16 and compiled.registers <= 32
        elif kernel is not draw.combine_ranks_kernel:
            assert "ld.global.cg.v4.b32" in ptx


@pytest.mark.parametrize("arch", support.ARCHS)
@pytest.mark.parametrize("split", [1, 3])
def test_products_that_write_to_all_ranks_compile_for(arch, split):
    pointers = dict.fromkeys(("x", "weight", "out"), "*bf16") | {"remotes": "*i64"}
    pointers |= {"partial": "*fp32", "arrivals": "*i32"}
    integers = dict.fromkeys(("M", "N", "K", "count", "stride_x", "stride_out"), "i32")
    constants = {
        "bias": None, "squares": None, "PARTS": 1, "BM": 64, "BN": 32, "BK": 128, "SPLIT": split,
        "WHOLE": True, "SWAP": False, "SPAN": 256 if arch >= 90 else 0, "OVERLAPS": arch >= 90, "RANKS": 2,
    }  # fmt: skip
    options = {"num_stages": 3} | ({"launch_pdl": True} if arch >= 90 else {})
    types = pointers | integers | {"eps": "fp32"}
    divisible = ["N", "K", "stride_x", "stride_out"]
    compiled = support.compile_for(skinny.linear_kernel, arch, types, constants, options, divisible)
    assert compiled.spilled == 0
    assert compiled.asm["ptx"].count("ld.global.b64") >= 2, "where the ranks' memory is"
