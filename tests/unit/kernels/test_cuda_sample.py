"""Sampling in Triton against the plain torch reference: interpreted on small shapes, or on the GPU there is.

Random batches keep stale tokens behind each row's history, ids outside the vocabulary in every list, NaN in
the logits' padded tail and garbage in every buffer that comes from torch.empty.
"""

import math
from dataclasses import fields

import pytest
import torch

from tests.support import triton as support

pytest.importorskip("triton")

import triton
import triton.language as tl

from benchmarks.gpu_sample import chi_square_p, draw_counts, noise_error
from kernels import philox
from kernels.cuda import draw, edit, filter
from kernels.cuda import sample as cuda
from kernels.sample import Features, SamplingColumns, sample_reference
from tests.support.sampling import EVERYTHING, Row, run
from tests.support.scale import scaled

DEVICE = support.device()
ON_GPU = DEVICE == "cuda"
SEEDS = range(40 if ON_GPU else 6)
# On a GPU the shapes that serving has; in the interpreter more than one block, split and bisection step.
VOCAB = 32_000 if ON_GPU else 2_500
# The interpreter computes bfloat16 wrongly, but loads it rightly, which is all that is asked of it here.
DTYPES = (torch.float32, torch.bfloat16)
NEAR = 1e-4


@pytest.fixture(autouse=True)
def poisoned_scratch(monkeypatch):
    """Buffers hold garbage at first: no result may depend on it."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        buffer = empty(*args, **kwargs)
        return buffer.fill_(
            math.nan if buffer.is_floating_point() else 1 if buffer.dtype == torch.bool else 7
        )

    monkeypatch.setattr(torch, "empty", poisoned)


class Batch:
    """Random arguments of `sample`, but the vocabulary's size and the features."""

    def __init__(self, seed, num_rows, vocab_size, dtype=torch.float32, spread=3.0, history=40):
        self.generator = torch.Generator().manual_seed(seed)
        self.vocab_size, num_slots = vocab_size, num_rows + 2
        self.slots = torch.randperm(num_slots, generator=self.generator)[:num_rows]
        # Two rows in one slot, as padding rows of a graph are.
        self.slots[-1:] = self.slots[:1]
        self.tokens = self.integers(-3, vocab_size + 3, num_slots, history).int() // 5 * 5
        self.num_tokens = self.integers(0, history + 1, num_slots).int()
        self.num_prompt = (self.num_tokens * torch.rand(num_slots, generator=self.generator)).int()
        self.columns = SamplingColumns.allocate(num_slots, "cpu", max_stop_ids=6, max_bias=9)
        logits = torch.randn((num_rows, vocab_size + 13), generator=self.generator) * spread
        # Steps of an eighth: ties are common.
        self.logits = ((logits * 8).round() / 8).to(dtype)
        self.logits[:, vocab_size:] = math.nan

    def integers(self, low, high, *shape):
        return torch.randint(low, high, shape, generator=self.generator)

    def pick(self, name, *choices):
        column = getattr(self.columns, name)
        chosen = torch.tensor(choices, dtype=torch.float64)[self.integers(0, len(choices), len(column))]
        column.copy_(chosen)
        return self

    def randomise(self, features):
        """Settings of the features in some of the rows, and of no others."""
        columns, slots = self.columns, len(self.num_tokens)
        columns.seed.copy_(self.integers(-(2**63), 2**63 - 1, slots))
        if features.any_random:
            self.pick("temperature", 0.0, 0.3, 0.7, 1.0, 1.5, 10.0)
        if features.any_filter:
            self.pick("top_k", 0, 0, 1, 2, 50, 1000, self.vocab_size, 10**6)
            self.pick("top_p", 1.0, 0.0, 0.1, 0.5, 0.9, 0.999)
            self.pick("min_p", 0.0, 0.0, 0.01, 0.2, 1.0)
        if features.any_penalty:
            self.pick("presence", 0.0, -1.0, 0.5).pick("frequency", 0.0, -0.5, 0.3)
            self.pick("repetition", 1.0, 0.5, 1.3)
        if features.any_bias:
            columns.bias_ids.copy_(self.integers(-2, self.vocab_size + 2, slots, 9))
            columns.bias_ids[:, 5:8] = columns.bias_ids[:, 2:5]  # ids that stand twice
            columns.bias_values.copy_(torch.randn((slots, 9), generator=self.generator) * 9)
        if features.any_min_tokens:
            self.pick("min_tokens", 0, 3, 1000)
            columns.stop_ids.copy_(self.integers(-2, self.vocab_size + 2, slots, 6))
            # The ids that would be drawn, too.
            best = self.logits[:, : self.vocab_size].topk(min(2, self.vocab_size)).indices
            columns.stop_ids[self.slots, : best.shape[1]] = best.int()
        return self

    def run(self, form, features):
        """The result of a form of sampling, on the CPU."""
        device = "cpu" if form is sample_reference else DEVICE
        columns = SamplingColumns(
            **{f.name: getattr(self.columns, f.name).to(device) for f in fields(self.columns)}
        )
        state = (self.tokens.to(device), self.num_tokens.to(device), self.num_prompt.to(device))
        result = form(
            self.logits.to(device), self.slots.to(device), columns, *state, self.vocab_size, features
        )
        assert result.token_ids.dtype == torch.int32
        assert result.finite.dtype == torch.bool
        return result

    def check(self, features):
        """Both forms draw the same, where two noisy logits are not as good as equal."""
        result, expected = self.run(cuda.sample, features), self.run(sample_reference, features)
        token_ids = result.token_ids.cpu()
        assert result.finite.tolist() == expected.finite.tolist()
        assert ((token_ids >= 0) & (token_ids < self.vocab_size)).all()
        for row in (token_ids.ne(expected.token_ids) & expected.finite).nonzero().flatten().tolist():
            assert self.gap(row, token_ids[row].item(), expected.token_ids[row].item()) < NEAR
        return result

    def gap(self, row, token, other):
        """How far apart two tokens' noisy logits are, without edits."""
        slot = self.slots[row]
        temperature = self.columns.temperature[slot].item()
        assert temperature >= 1e-5, f"greedy row {row}: {token}, not {other}"
        position = (self.num_tokens - self.num_prompt)[slot]
        noise = philox.gumbel(
            philox.token_uniforms(self.columns.seed[slot].view(1), position.view(1), self.vocab_size)
        )[0]
        noisy = self.logits[row, : self.vocab_size].float() / temperature + noise
        return (noisy[token] - noisy[other]).abs().item()


def flags(*names):
    return Features(**{f"any_{name}": True for name in names})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    "features",
    [
        Features(),
        flags("random"),
        flags("random", "filter"),
        flags("penalty"),
        flags("random", "bias"),
        flags("min_tokens"),
        flags("random", "filter", "penalty", "bias", "min_tokens"),
    ],
    ids=["greedy", "random", "filter", "penalty", "bias", "min_tokens", "all"],
)
def test_random_batches_equal_the_reference(features, seed, dtype):
    vocab_size = (VOCAB, 1, 5, 300, 1024, 1500)[seed % 6]
    batch = Batch(seed, 4, vocab_size, dtype, spread=(0.0, 0.3, 3.0, 12.0)[seed % 4])
    batch.randomise(features)
    if seed % 3 == 1:
        batch.logits[seed % 4, seed % vocab_size] = (math.nan, math.inf, -math.inf, -math.nan)[seed % 4]
    if seed % 5 == 2:
        batch.logits[1] = -math.inf
    batch.check(features)


@pytest.mark.parametrize("spread", scaled([0.3, 12.0], [0.0, 0.3, 3.0, 12.0]))
def test_filters_over_a_vocabulary(spread):
    kinds = [
        {"top_k": 1},
        {"top_k": 50},
        {"top_k": 2000},
        {"top_p": 0.05},
        {"top_p": 0.95},
        {"min_p": 0.05},
        {"top_k": 200, "top_p": 0.9, "min_p": 0.001},
        {"top_k": 200, "min_p": 0.5},
    ]
    batch = Batch(3, len(kinds), VOCAB, spread=spread)
    batch.slots = torch.arange(len(kinds))
    batch.columns.temperature[:] = 0.8
    for slot, kind in enumerate(kinds):
        for name, value in kind.items():
            getattr(batch.columns, name)[slot] = value
    for seed in range(20 if ON_GPU else 2):
        batch.columns.seed[:] = seed
        batch.check(flags("random", "filter"))


def on_device(logits, slots, columns, tokens, num_tokens, num_prompt, vocab_size, features):
    """`sample` in Triton for tensors of the CPU."""
    batch = Batch.__new__(Batch)
    batch.logits, batch.slots, batch.columns, batch.vocab_size = logits, slots, columns, vocab_size
    batch.tokens, batch.num_tokens, batch.num_prompt = tokens, num_tokens, num_prompt
    result = batch.run(cuda.sample, features)
    return type(result)(result.token_ids.cpu(), result.finite.cpu(), result.logprobs)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_that_are_not_finite(temperature):
    size = 1500
    values = [1.0 + i % 7 for i in range(size)]

    def row(place, value):
        return Row([*values[:place], value, *values[place + 1 :]], temperature=temperature)

    bad = [row(place, value) for place in (0, 70, size - 1) for value in (math.nan, -math.nan, math.inf)]
    good = [Row(values, temperature=temperature), row(3, -math.inf)]
    rows = [good[0], *bad, good[1], Row([-math.inf] * size, temperature=temperature)]
    for features in (Features(any_random=temperature > 0), EVERYTHING):
        result, expected = run(on_device, rows, features), run(sample_reference, good, features)
        assert result.finite.tolist() == [True] + [False] * len(bad) + [True, False]
        assert result.token_ids[[0, -2]].tolist() == expected.token_ids.tolist()
    nothing_left = Row([1.0, 2.0], min_tokens=1, stop_ids=[0, 1], temperature=temperature)
    assert run(on_device, [nothing_left, Row([1.0, 2.0])]).finite.tolist() == [False, True]


def test_ties_go_to_the_lowest_id():
    for size in (5, 64, 130, 3000):
        zeros = Row([-0.0] * 2 + [-1.0] * 2 + [0.0] * (size - 4))
        spikes = Row([0.0] * (size - 2) + [7.0, 7.0])
        moved = Row([0.0] * (size - 2) + [7.0, 7.0], bias={1: 7.0})
        result = run(on_device, [zeros, spikes, moved], Features(any_bias=True))
        assert result.token_ids.tolist() == [0, size - 2, 1]
        assert run(on_device, [zeros, spikes], Features()).token_ids.tolist() == [0, size - 2]


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({"top_k": 2}, {0, 1, 2, 3}),
        ({"top_p": 0.6}, {0, 1, 2, 3}),
        ({"min_p": math.exp(-1) * 0.999}, {0, 1, 2, 3}),
        ({"top_k": 1}, {0}),
        ({"top_p": 0.0}, {0}),
        ({"top_p": 0.3}, {0}),
        ({"min_p": 1.0}, {0}),
    ],
)
def test_filters_keep_all_that_tie_at_the_border(fields, kept):
    rows = [
        Row([2.0, 1.0, 1.0, 1.0, -1.0], temperature=1.0, seed=seed, **fields)
        for seed in range(400 if ON_GPU else 8)
    ]
    drawn = set(run(on_device, rows, flags("random", "filter")).token_ids.tolist())
    assert drawn == kept if ON_GPU else drawn <= kept


def test_logprobs_are_the_references():
    features = Features(any_penalty=True, max_logprobs=4)
    batch = Batch(2, 3, 400).randomise(features)
    result, expected = (batch.run(form, features) for form in (cuda.sample, sample_reference))
    for field in fields(expected.logprobs):
        mine, theirs = getattr(result.logprobs, field.name), getattr(expected.logprobs, field.name)
        assert torch.allclose(mine.cpu().double(), theirs.double(), atol=1e-5), field.name


@pytest.mark.parametrize("programs", [1, 40, 10**6])
def test_the_cut_of_the_work_changes_nothing(programs, monkeypatch):
    features = flags("random", "filter", "penalty", "bias", "min_tokens")
    batch = Batch(5, 3, VOCAB).randomise(features)
    before = batch.run(cuda.sample, features).token_ids
    monkeypatch.setattr(draw, "PROGRAMS", programs)
    assert torch.equal(batch.run(cuda.sample, features).token_ids, before)


def test_rows_in_groups(monkeypatch):
    features = flags("random", "filter", "penalty")
    batch = Batch(6, 19, 200).randomise(features)
    before = batch.run(cuda.sample, features).token_ids
    monkeypatch.setattr(cuda, "GROUP_BYTES", 1)
    assert torch.equal(batch.run(cuda.sample, features).token_ids, before)


def test_no_rows():
    batch = Batch(1, 1, 20)
    batch.logits, batch.slots = batch.logits[:0], batch.slots[:0]
    assert len(batch.run(cuda.sample, EVERYTHING).token_ids) == 0


@triton.jit
def words_kernel(call, position, key0, key1, out, BLOCK: tl.constexpr):
    """Words int32 [4, BLOCK] of calls int32 [BLOCK]."""
    lanes = tl.arange(0, BLOCK)
    words4 = draw.philox_words(
        tl.load(call + lanes).to(tl.uint32, bitcast=True),
        tl.load(position).to(tl.uint32, bitcast=True),
        tl.load(key0).to(tl.uint32, bitcast=True),
        tl.load(key1).to(tl.uint32, bitcast=True),
    )
    for j in tl.static_range(4):
        tl.store(out + j * BLOCK + lanes, words4[j].to(tl.int32, bitcast=True))


@pytest.mark.parametrize(
    ("position", "key"),
    [(0, (0, 0)), (7, (0xA4093822, 0x299F31D0)), (131_071, (2**32 - 1, 2**32 - 1)), (2**32 - 1, (1, 0))],
)
def test_words_are_philoxs_bit_for_bit(position, key):
    calls = torch.cat((torch.arange(60), torch.tensor([37_983, 2**31 - 1, 2**31, 2**32 - 1])))

    def int32(values):
        return torch.as_tensor(values).to(torch.int32).to(DEVICE).reshape(-1)

    out = torch.zeros((4, 64), dtype=torch.int32, device=DEVICE)
    words_kernel[(1,)](int32(calls), int32(position), int32(key[0]), int32(key[1]), out, BLOCK=64)
    words = out.cpu().to(torch.int64) & philox.MASK32
    zero = torch.zeros_like(calls)
    expected = philox.philox4x32(
        (calls, zero + position, zero, zero), (torch.tensor(key[0]), torch.tensor(key[1]))
    )
    assert torch.equal(words, torch.stack(expected))
    if position == 0:
        assert words[:, 0].tolist() == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def test_noise_is_accurate_up_to_both_ends():
    assert noise_error(DEVICE, 1 if ON_GPU else 1024) < 1e-6


def test_draws_follow_the_softmax():
    """200,000 draws from each of three rows at T = 1, chi-square over the 100 likeliest ids and the rest."""
    vocab_size, num_draws, batch, likeliest = (50_000, 200_000, 1000, 100) if ON_GPU else (16, 90, 30, 5)
    for index, spread in enumerate((0.5, 2.0, 4.0)):
        row = torch.randn(vocab_size, generator=torch.Generator().manual_seed(index)) * spread
        counts = draw_counts(row.to(DEVICE), num_draws, batch, seed=1000 * index).cpu()
        assert counts.sum() == num_draws
        assert chi_square_p(counts, row.double().softmax(-1), likeliest) > 0.001


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
def test_a_graph_draws_from_what_its_inputs_hold_then():
    features = Features(True, True, True, True, True, 5)
    batch = Batch(8, 6, VOCAB).randomise(features)
    columns = SamplingColumns(
        **{f.name: getattr(batch.columns, f.name).cuda() for f in fields(batch.columns)}
    )
    logits, num_tokens = batch.logits.cuda(), batch.num_tokens.cuda()
    rest = (batch.tokens.cuda(), num_tokens, batch.num_prompt.cuda(), VOCAB, features)
    slots = batch.slots.cuda()
    cuda.sample(logits, slots, columns, *rest)
    torch.cuda.set_sync_debug_mode("error")
    try:
        cuda.sample(logits, slots, columns, *rest)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = cuda.sample(logits, slots, columns, *rest)
    for _ in range(3):
        logits[:, :VOCAB].normal_()
        num_tokens.add_(1).clamp_(max=40)
        graph.replay()
        expected = cuda.sample(logits, slots, columns, *rest)
        assert torch.equal(result.token_ids, expected.token_ids)
        assert torch.equal(result.logprobs.top_ids, expected.logprobs.top_ids)


POINTERS = {"slots": "*i64", "seeds": "*i64", "totals": "*i64", "finite": "*i1"} | dict.fromkeys(
    (
        "num_tokens",
        "num_prompt",
        "tokens",
        "token_ids",
        "top_k",
        "bias_ids",
        "stop_ids",
        "min_tokens",
        "counts",
    ),
    "*i32",
)
FLOATS = ("temperature", "thresholds", "values", "repetition", "frequency", "presence", "bias_values")
POINTERS |= dict.fromkeys((*FLOATS, "top_p", "log_min_p", "maxima", "copies"), "*fp32")
DIVISIBLE = {
    "stride",
    "width",
    "split_size",
    "logits_stride",
    "scores_stride",
    "logits_width",
    "copies_stride",
}
EDITS = {
    "BIAS": True,
    "PENALTY": True,
    "STOP": True,
    "BIAS_LANES": 512,
    "STOP_LANES": 64,
    "BLOCK": edit.BLOCK,
}
BORDER = {"num_warps": filter.BORDER_WARPS}
KERNELS = [
    *(
        (
            draw.draw_kernel,
            {"RANDOM": random, "FILTERED": filtered, "BLOCK": draw.BLOCK},
            {"num_warps": draw.NUM_WARPS},
        )
        for random, filtered in ((False, False), (True, False), (True, True))
    ),
    (draw.combine_kernel, {}, {"num_warps": 1}),
    (edit.count_kernel, {"BLOCK": edit.BLOCK}, {}),
    (edit.edit_kernel, EDITS, {"enable_fp_fusion": False}),
    (filter.survey_kernel, {"BLOCK": filter.SURVEY_BLOCK}, {}),
    (filter.copy_kernel, {"BLOCK": filter.COPY_BLOCK}, {}),
    (filter.border_kernel, {"BLOCK": filter.BORDER_BLOCK}, BORDER),
]


@pytest.mark.parametrize("arch", support.ARCHS)
@pytest.mark.parametrize("index", range(len(KERNELS)))
def test_kernels_compile_for(index, arch):
    kernel, constants, options = KERNELS[index]
    code = getattr(kernel, "fn", kernel).__code__
    names = [name for name in code.co_varnames[: code.co_argcount] if name not in constants]
    for logits in scaled(("*fp32",), ("*fp32", "*bf16")):
        types = POINTERS | {"logits": logits, "scores": "*fp32" if "logits" in names else logits}
        signature = {name: types.get(name, "i32") for name in names}
        if {"logits", "scores"}.isdisjoint(names) and logits == "*bf16":
            continue
        divisible = sorted(DIVISIBLE & set(names))
        compiled = support.compile_for(kernel, arch, signature, constants, options, divisible)
        assert compiled.spilled == 0
        if kernel is draw.draw_kernel:
            # The hardware's logarithm has no relative accuracy near 1; wide loads are what the pass lives on.
            assert "lg2.approx" not in compiled.asm["ptx"]
            assert "ld.global.v4.b32" in compiled.asm["ptx"]
