"""Sampling, the reference and the fast form alike, against slow and literal formulas in float64."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kernels.cpu.build import library
from kernels.sample import Features, SamplingColumns, ended, sample, sample_reference
from tests.support.sampling import EVERYTHING, Row, expected_token, kept_tokens, processed, run

IMPLEMENTATIONS = [sample_reference, sample]
# Closer than this to a border, float32 and float64 may rightly decide differently.
NEAR = 1e-5

VOCAB = 11
token_ids = st.integers(0, VOCAB - 1)
# Steps of a quarter make ties common, and are exact in bfloat16.
logit = st.integers(-24, 24).map(lambda n: n / 4)


@st.composite
def any_row(draw):
    def maybe(strategy, off):
        return draw(st.one_of(st.just(off), strategy))

    return Row(
        draw(st.lists(logit, min_size=VOCAB, max_size=VOCAB)),
        draw(st.lists(token_ids, max_size=6)),
        draw(st.lists(token_ids, max_size=6)),
        temperature=maybe(st.sampled_from([0.25, 0.7, 1.0, 1.5, 10.0]), 0.0),
        top_k=maybe(st.integers(1, VOCAB + 3), 0),
        top_p=maybe(st.sampled_from([0.0, 0.1, 0.5, 0.9, 0.999]), 1.0),
        min_p=maybe(st.sampled_from([0.01, 0.2, 0.9, 1.0]), 0.0),
        presence=maybe(st.sampled_from([-1.0, 0.5, 2.0]), 0.0),
        frequency=maybe(st.sampled_from([-0.5, 0.25, 2.0]), 0.0),
        repetition=maybe(st.sampled_from([0.5, 1.25, 2.0]), 1.0),
        seed=draw(st.one_of(st.integers(0, 3), st.integers(0, 2**64 - 1))),
        min_tokens=maybe(st.integers(1, 7), 0),
        stop_ids=draw(st.lists(token_ids, max_size=4)),
        bias=draw(st.dictionaries(token_ids, logit, max_size=6)),
    )


@settings(max_examples=400, deadline=None)
@given(st.lists(any_row(), min_size=1, max_size=4), st.sampled_from([torch.float32, torch.bfloat16]))
def test_both_forms_equal_brute_force(rows, dtype):
    expected = [expected_token(row) for row in rows]
    assume(all(margin > NEAR for _, margin in expected))
    for implementation in IMPLEMENTATIONS:
        result = run(implementation, rows, dtype=dtype)
        assert result.token_ids.tolist() == [token for token, _ in expected]
        assert result.finite.all()


@settings(max_examples=100, deadline=None)
@given(st.lists(any_row(), min_size=2, max_size=5), st.randoms(use_true_random=False))
def test_a_row_does_not_depend_on_the_others(rows, random):
    for implementation in IMPLEMENTATIONS:
        together = run(implementation, rows).token_ids.tolist()
        order = random.sample(range(len(rows)), len(rows))
        shuffled = run(implementation, [rows[i] for i in order]).token_ids.tolist()
        assert shuffled == [together[i] for i in order]
        assert [run(implementation, [row]).token_ids.item() for row in rows] == together


def used_features(rows):
    return Features(
        any_random=any(row.temperature > 0 for row in rows),
        any_filter=any(row.top_k > 0 or row.top_p < 1 or row.min_p > 0 for row in rows),
        any_penalty=any(row.presence or row.frequency or row.repetition != 1 for row in rows),
        any_bias=any(row.bias for row in rows),
        any_min_tokens=any(row.min_tokens for row in rows),
    )


@settings(max_examples=100, deadline=None)
@given(st.lists(any_row(), min_size=1, max_size=3))
def test_features_change_the_work_and_not_the_tokens(rows):
    for implementation in IMPLEMENTATIONS:
        least = run(implementation, rows, used_features(rows))
        most = run(implementation, rows)
        assert torch.equal(least.token_ids, most.token_ids)
        assert least.logprobs is None
        assert most.logprobs is not None


def draws(implementation, logits, num_draws, over, **fields):
    """`num_draws` tokens drawn from the same logits, over as many seeds or over positions of one seed."""
    columns = SamplingColumns.allocate(num_draws, "cpu", max_stop_ids=1, max_bias=1)
    for name, value in fields.items():
        getattr(columns, name)[:] = value
    count = torch.arange(num_draws, dtype=torch.int32)
    columns.seed[:] = count * 7919 if over == "seeds" else 99
    num_tokens = count if over == "positions" else torch.zeros_like(count)
    batch = torch.tensor([logits]).expand(num_draws, -1).contiguous()
    tokens = torch.zeros((num_draws, 1), dtype=torch.int32)
    features = Features(any_random=True, any_filter=True)
    return implementation(
        batch, count.long(), columns, tokens, num_tokens, torch.zeros_like(count), len(logits), features
    ).token_ids


@pytest.mark.parametrize("over", ["seeds", "positions"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 1.0},
        {"temperature": 0.5},
        {"temperature": 2.5},
        {"temperature": 1.0, "top_k": 4},
        {"temperature": 1.3, "top_p": 0.8},
        {"temperature": 1.0, "min_p": 0.15},
        {"temperature": 1.5, "top_k": 6, "top_p": 0.7, "min_p": 0.02},
    ],
)
def test_frequencies_follow_the_distribution(fields, implementation, over):
    logits = [1.9, -0.3, 0.4, 2.2, -3.0, 0.9, 1.1, -1.2, 0.0, 1.6]
    num_draws = 20_000
    row = Row(logits, **fields)
    scaled = [score / row.temperature for score in logits]
    kept, _ = kept_tokens(row, scaled)
    weights = np.array([math.exp(score) if i in kept else 0.0 for i, score in enumerate(scaled)])
    expected = num_draws * weights / weights.sum()
    counts = np.bincount(
        draws(implementation, logits, num_draws, over, **fields).numpy(), minlength=len(logits)
    )
    assert not counts[expected == 0].any()
    likely = expected > 0
    statistic = ((counts[likely] - expected[likely]) ** 2 / expected[likely]).sum()
    freedom = likely.sum() - 1
    assert statistic < freedom + 4 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spread", [0.0, 0.3, 3.0, 12.0])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"top_k": 1},
        {"top_k": 50},
        {"top_k": 3000},
        {"top_p": 0.05},
        {"top_p": 0.95},
        {"min_p": 0.05},
        {"top_k": 200, "top_p": 0.9, "min_p": 0.001},
    ],
)
def test_both_forms_agree_on_large_vocabularies(fields, spread, dtype):
    generator = torch.Generator().manual_seed(3)
    logits = (torch.randn((6, 20_011), generator=generator) * spread).tolist()
    rows = [Row(row, temperature=0.8, seed=seed, **fields) for seed, row in enumerate(logits)]
    features = Features(any_random=True, any_filter=bool(fields), max_logprobs=7)
    expected = run(sample_reference, rows, features, dtype, vocab_size=20_000)
    result = run(sample, rows, features, dtype, vocab_size=20_000)
    assert torch.equal(result.token_ids, expected.token_ids)
    assert result.finite.all()
    assert torch.equal(result.logprobs.rank, expected.logprobs.rank)
    assert torch.equal(result.logprobs.top_ids, expected.logprobs.top_ids)
    assert torch.allclose(result.logprobs.top_logprobs, expected.logprobs.top_logprobs, atol=1e-5)
    assert torch.allclose(result.logprobs.token_logprob, expected.logprobs.token_logprob, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_penalties_by_hand(implementation):
    history = {"prompt": [0, 3], "output": [1, 1, 3]}
    # Repetition halves 0's and 1's, doubles 3's; 1 then loses 2 * 0.5 + 0.25, and 3 loses 0.5 + 0.25.
    logits = [3.0, 4.0, 0.8, -0.1, 0.7]
    row = Row(logits, **history, repetition=2.0, frequency=0.5, presence=0.25)
    assert processed(row) == [1.5, 0.75, 0.8, -0.95, 0.7]
    assert run(implementation, [row]).token_ids.tolist() == [0]
    row.bias = {0: -2.5, 4: 0.11}
    assert run(implementation, [row]).token_ids.tolist() == [4]
    row.bias = {0: -100.0, 4: -100.0, 2: -0.06}
    assert run(implementation, [row]).token_ids.tolist() == [1]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_ties_go_to_the_lowest_id(implementation):
    for size in (5, 64, 130, 3000):
        zeros = Row([-0.0] * 2 + [-1.0] * 2 + [0.0] * (size - 4))
        spikes = Row([0.0] * (size - 2) + [7.0, 7.0])
        moved = Row([0.0] * (size - 2) + [7.0, 7.0], bias={1: 7.0})
        result = run(implementation, [zeros, spikes, moved], Features(any_bias=True))
        assert result.token_ids.tolist() == [0, size - 2, 1]
        assert run(implementation, [zeros, spikes], Features()).token_ids.tolist() == [0, size - 2]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_filters_keep_all_that_tie_at_the_border(implementation):
    logits = [2.0, 1.0, 1.0, 1.0, -1.0]
    for fields in ({"top_k": 2}, {"top_p": 0.6}, {"min_p": math.exp(-1) * 0.999}):
        seen = set(draws(implementation, logits, 500, "seeds", temperature=1.0, **fields).tolist())
        assert seen == {0, 1, 2, 3}
    for fields in ({"top_k": 1}, {"top_p": 0.0}, {"top_p": 0.3}, {"min_p": 1.0}):
        assert set(draws(implementation, logits, 100, "seeds", temperature=1.0, **fields).tolist()) == {0}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_temperature_close_to_zero_is_greedy(implementation):
    rows = [
        Row([1.0, 1.5, 1.4], temperature=value, seed=seed)
        for seed in range(20)
        for value in (1e-6, 0.0, 2e-5)
    ]
    assert set(run(implementation, rows).token_ids.tolist()) == {1}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_that_are_not_finite(temperature, implementation, dtype):
    size = 1500
    values = [1.0 + i % 7 for i in range(size)]

    def row(place, value):
        return Row([*values[:place], value, *values[place + 1 :]], temperature=temperature)

    bad = [row(place, value) for place in (0, 70, size - 1) for value in (math.nan, -math.nan, math.inf)]
    good = [Row(values, temperature=temperature), row(3, -math.inf)]
    rows = [good[0], *bad, good[1], Row([-math.inf] * size, temperature=temperature)]
    for features in (Features(any_random=temperature > 0), EVERYTHING):
        result = run(implementation, rows, features, dtype)
        assert result.finite.tolist() == [True] + [False] * len(bad) + [True, False]
        alone = run(implementation, good, features, dtype)
        assert result.token_ids[[0, -2]].tolist() == alone.token_ids.tolist()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_row_with_nothing_left_to_draw_is_not_finite(implementation):
    row = Row([1.0, 2.0], min_tokens=1, stop_ids=[0, 1], temperature=1.0)
    assert run(implementation, [row, Row([1.0, 2.0])]).finite.tolist() == [False, True]


@pytest.mark.parametrize("padding", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("vocab_size", [3, 64, 100])
def test_the_padded_tail_is_not_looked_at(vocab_size, implementation, padding):
    values = [0.1 * (i % 9) for i in range(vocab_size)]
    fields = [{}, {"temperature": 1.0, "seed": 4}, {"temperature": 1.0, "top_k": 2}]
    # An id of the tail, in any list, is none of the vocabulary's.
    strange = {"bias": {vocab_size: 50.0}, "stop_ids": [vocab_size + 1], "min_tokens": 9, "repetition": 3.0}
    plain = [Row(values, **kinds) for kinds in fields]
    padded = [
        Row([*values, *[padding] * 28], **kinds, **strange, prompt=[vocab_size + 2]) for kinds in fields
    ]
    result = run(implementation, padded, vocab_size=vocab_size)
    expected = run(implementation, plain)
    assert result.finite.all()
    assert torch.equal(result.token_ids, expected.token_ids)
    assert torch.equal(result.logprobs.rank, expected.logprobs.rank)
    assert torch.equal(result.logprobs.top_ids, expected.logprobs.top_ids)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_min_tokens_holds_back_stop_ids(temperature, implementation):
    logits = [9.0, 8.0, 0.0, -1.0]
    for num_output, allowed in [(0, False), (2, False), (3, True)]:
        rows = [
            Row(
                logits,
                [2],
                [3] * num_output,
                stop_ids=[0, 1],
                min_tokens=3,
                temperature=temperature,
                seed=seed,
            )
            for seed in range(30)
        ]
        drawn = set(run(implementation, rows).token_ids.tolist())
        assert drawn <= ({0, 1} if allowed else {2, 3})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_logprobs_are_those_of_the_unmodified_logits(implementation, dtype):
    logits = [0.5, 2.0, -1.0, 2.0, 1.25, 0.5, -math.inf]
    row = Row(logits, output=[1], temperature=0.7, bias={4: 60.0}, repetition=1.5, top_k=1)
    result = run(implementation, [row, Row(logits)], dtype=dtype)
    total = math.log(sum(math.exp(value) for value in logits))
    assert result.token_ids.tolist() == [4, 1]
    assert result.logprobs.token_logprob.tolist() == pytest.approx([1.25 - total, 2.0 - total], abs=1e-5)
    assert result.logprobs.rank.tolist() == [3, 1]
    assert result.logprobs.top_ids.tolist() == [[1, 3, 4]] * 2
    assert result.logprobs.top_logprobs[0].tolist() == pytest.approx(
        [2.0 - total, 2.0 - total, 1.25 - total], abs=1e-5
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("asked", "given"), [(0, 0), (1, 1), (7, 5)])
def test_number_of_logprobs(asked, given, implementation):
    row = Row([0.25, -0.0, 0.0, -3.0, 0.0])
    logprobs = run(implementation, [row], Features(max_logprobs=asked)).logprobs
    assert logprobs.top_ids.tolist() == [[0, 1, 2, 4, 3][:given]]
    assert logprobs.top_logprobs.shape == (1, given)
    assert logprobs.token_logprob.shape == logprobs.rank.shape == (1,)


def test_columns_start_with_everything_off():
    columns = SamplingColumns.allocate(2, "cpu")
    assert columns.stop_ids.shape == (2, 64)
    assert columns.bias_ids.shape == columns.bias_values.shape == (2, 320)
    ints = torch.zeros(2, dtype=torch.int32)
    logits, slots, tokens = (
        torch.tensor([[0.0, 3.0], [2.0, 1.0]]),
        torch.tensor([1, 0]),
        torch.zeros((2, 4)).int(),
    )
    for implementation in IMPLEMENTATIONS:
        result = implementation(logits, slots, columns, tokens, ints, ints, 2, EVERYTHING)
        assert result.token_ids.tolist() == [1, 0]


def test_the_c_form_refuses_what_it_would_misread():
    columns = SamplingColumns.allocate(2, "cpu")
    ints = torch.zeros(2, dtype=torch.int32)
    good = [
        torch.zeros(2, 4),
        torch.tensor([0, 1]),
        columns,
        torch.zeros((2, 4)).int(),
        ints,
        ints,
        4,
        Features(),
    ]
    wrong = {0: torch.zeros(4, 2).T, 1: ints, 3: torch.zeros((2, 4)).long(), 4: ints.long(), 5: ints.float()}
    for place, value in wrong.items():
        if library() is not None:
            with pytest.raises(TypeError):
                sample(*good[:place], value, *good[place + 1 :])
    assert sample(*good).finite.all()


def test_ended():
    columns = SamplingColumns.allocate(4, "cpu", max_stop_ids=3)
    columns.stop_ids[0, :2] = torch.tensor([7, 9])
    columns.stop_ids[2, :1] = 7
    columns.min_tokens[2] = 3
    slots = torch.tensor([2, 0, 0, 0, 3])
    num_prompt = torch.full((4,), 5, dtype=torch.int32)

    def ends(num_tokens_after, last_position=10):
        after = torch.full((4,), num_tokens_after, dtype=torch.int32)
        last = torch.full((4,), last_position, dtype=torch.int32)
        drawn = torch.tensor([7, 7, 9, 8, 7], dtype=torch.int32)
        result = ended(drawn, slots, columns, after, num_prompt, last)
        assert result.dtype == torch.int8
        return result.tolist()

    assert ends(8) == [0, 1, 1, 0, 0]
    assert ends(9) == [1, 1, 1, 0, 0]
    assert ends(10) == [1, 1, 1, 2, 2]
    assert ends(8, last_position=8) == [2, 1, 1, 2, 2]
