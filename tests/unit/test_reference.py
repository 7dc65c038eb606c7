"""The independent reference: known answers of its noise, its nucleus, and what it excuses."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from kernels import philox as kernel
from tests.support import reference
from tests.support.data import Prompt
from tests.support.noise import philox, uniforms
from tests.support.reference import SAMPLED, Params, candidates

# The known-answer tests of the Random123 library: counter, key (high word first in the seed), output.
KNOWN = [
    ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        0x299F31D0A4093822,
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "seed", "words"), KNOWN)
def test_philox_known_answers(counter, seed, words):
    assert tuple(philox(np.array([counter], dtype=np.uint64), seed)[0]) == words


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1, 2**63 - 1, 0x123456789ABCDEF])
@pytest.mark.parametrize("position", [0, 1, 63, 8191])
def test_the_kernel_draws_the_same_numbers(seed, position):
    drawn = kernel.token_uniforms(torch.tensor([seed]), torch.tensor([position]), 1001)[0]
    assert np.array_equal(drawn.double().numpy(), uniforms(seed, position, 1001))


def test_nothing_is_drawn_from_outside_the_nucleus():
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], dtype=np.float32))
    for top_p, inside in ((0.4, 1), (0.6, 2), (0.9, 3), (0.97, 4)):
        values = candidates(logits, Params(temperature=1.0, top_p=top_p), 7, 0)
        assert np.isfinite(values).tolist() == [True] * inside + [False] * (4 - inside)


def test_draws_follow_the_distribution():
    logits = np.log(np.array([0.6, 0.3, 0.1], dtype=np.float32))
    plain = Params(temperature=1.0)
    drawn = [int(candidates(logits, plain, seed, seed % 5).argmax()) for seed in range(4000)]
    # 5 standard deviations of a share of 4,000 draws are below 0.04
    assert np.allclose(np.bincount(drawn, minlength=3) / 4000, [0.6, 0.3, 0.1], atol=0.04)


def test_a_seed_and_a_position_decide_the_draw():
    logits = np.zeros(500, dtype=np.float32)
    drawn = {(s, p): int(candidates(logits, SAMPLED, s, p).argmax()) for s in range(3) for p in range(3)}
    assert drawn == {(s, p): int(candidates(logits, SAMPLED, s, p).argmax()) for s, p in drawn}
    assert len(set(drawn.values())) > 5


class FakeModel:
    """Answers with given logits, one row a position, as transformers does when asked for the last few."""

    def __init__(self, rows):
        self.rows = torch.tensor(rows, dtype=torch.float32)

    def __call__(self, ids, logits_to_keep):
        return SimpleNamespace(logits=self.rows[None, -logits_to_keep:])


PROMPT = Prompt((5, 6), "plain", "en", 0)
# Position 0: token 1 by far; position 1: tokens 2 and 3 within 5e-4; position 2: token 0 by far.
ROWS = [[0.0, 9.0, 0.0, 0.0], [0.0, 1.0, 4.0005, 4.0], [9.0, 0.0, 0.0, 1.0]]


@pytest.fixture
def fake_model(monkeypatch):
    monkeypatch.setattr(reference, "model", lambda: FakeModel(ROWS))
    known = [reference.Answer([1, 2, 0], 5e-4)]
    monkeypatch.setattr(reference, "answers", lambda chosen, params: known * len(chosen))


@pytest.mark.parametrize(
    ("got", "position", "excused"),
    [
        ([1, 3, 0], 1, True),
        ([1, 1, 0], 1, False),  # neither of the two best
        ([3, 2, 0], 0, False),  # not a near tie
        ([1, 3, 3], 1, False),  # excused, then wrong
        ([1, 2], 2, False),  # ends early
    ],
)
def test_only_a_near_tie_excuses_a_difference(fake_model, got, position, excused):
    difference = reference.explain_difference(PROMPT, got, [1, 2, 0])
    assert (difference.position, difference.excused) == (position, excused)


def test_explaining_no_difference_is_an_error(fake_model):
    with pytest.raises(ValueError, match="no difference"):
        reference.explain_difference(PROMPT, [1, 2, 0], [1, 2, 0])


def test_compare_lists_what_it_excuses_and_allows_no_more(fake_model):
    same, near = [1, 2, 0], [1, 3, 0]
    assert reference.compare([PROMPT] * 2, [same, same]) == []
    assert [i for i, _ in reference.compare([PROMPT] * 3, [near, same, near])] == [0, 2]
    with pytest.raises(AssertionError, match="3 of 3 differ, at most 2"):
        reference.compare([PROMPT] * 3, [near] * 3)
    with pytest.raises(AssertionError, match="1 of 1 differ"):
        reference.compare([PROMPT], [[3, 2, 0]])
