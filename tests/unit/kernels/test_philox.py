"""Philox4x32-10 against its published answers, and our keying against plain integers."""

import ctypes
import math

import numpy as np
import pytest
import torch

from kernels import philox
from kernels.cpu.build import library

# Random123's kat_vectors file, philox4x32 with 10 rounds: counter, key, words.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]

# (seed, output position, token id) and the 32-bit word that belongs to it.
GOLDEN_WORDS = [
    (0, 0, 0, 0x6627E8D5),
    (0, 0, 1, 0xE169C58D),
    (0, 0, 2, 0xBC57AC4C),
    (0, 0, 3, 0x9B00DBD8),
    (0, 0, 4, 0xF8E4CCA4),
    (1, 0, 0, 0xE3E80670),
    (1 << 32, 0, 0, 0xFDDE3E0B),
    (0, 1, 0, 0x6AD0C5EC),
    (0x299F31D0A4093822, 7, 49_151, 0x0D481F9C),
    (2**64 - 1, 131_071, 151_935, 0x42B28A2D),
]


def words_of(text):
    return [int(word, 16) for word in text.split()]


def philox_by_integers(counter, key):
    """The paper's round function, on Python's integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c0, 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c2, 2**32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [c0, c1, c2, c3]


def signed(seed):
    return seed - 2**64 if seed >= 2**63 else seed


def uniforms(seed, position, vocab_size):
    return philox.token_uniforms(torch.tensor([signed(seed)]), torch.tensor([position]), vocab_size)[0]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_known_answers(counter, key, expected):
    result = philox.philox4x32(
        tuple(torch.tensor([word]) for word in words_of(counter)),
        tuple(torch.tensor([word]) for word in words_of(key)),
    )
    assert [int(word) for word in result] == words_of(expected)
    assert philox_by_integers(words_of(counter), words_of(key)) == words_of(expected)


@pytest.mark.parametrize(("seed", "position", "token_id", "word"), GOLDEN_WORDS)
def test_golden_keying(seed, position, token_id, word):
    expected = np.float32((word >> 9) + 0.5) * np.float32(2**-23)
    assert uniforms(seed, position, token_id + 1)[token_id].item() == expected
    words = philox_by_integers((token_id // 4, position, 0, 0), (seed % 2**32, seed // 2**32))
    assert words[token_id % 4] == word


def test_uniforms_are_exact_and_within_the_open_interval():
    words = torch.tensor([0, 511, 512, 2**31 - 1, 2**31, 2**32 - 512, 2**32 - 1])
    result = philox.word_to_uniform(words)
    assert result.dtype == torch.float32
    assert result.tolist() == [(2 * (word // 512) + 1) / 2**24 for word in words.tolist()]
    assert result[0].item() == 2**-24
    assert result[-1].item() == 1 - 2**-24


def test_noise_is_finite_at_both_ends():
    ends = philox.gumbel(philox.word_to_uniform(torch.tensor([0, 2**32 - 1])))
    exact = [-math.log(-math.log(2**-24)), -math.log(-math.log1p(-(2**-24)))]
    assert ends.tolist() == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("vocab_size", [1, 3, 4, 5, 63, 64, 65, 1000])
def test_a_token_has_the_same_uniform_in_any_vocabulary_and_batch(vocab_size):
    seeds = torch.tensor([5, signed(2**64 - 3), 1 << 40])
    positions = torch.tensor([0, 9, 100_000], dtype=torch.int32)
    batch = philox.token_uniforms(seeds, positions, vocab_size)
    assert batch.shape == (3, vocab_size)
    for row, (seed, position) in enumerate(zip(seeds.tolist(), positions.tolist(), strict=True)):
        assert torch.equal(batch[row], uniforms(seed % 2**64, position, 2000)[:vocab_size])


@pytest.mark.parametrize(
    ("seed", "position", "vocab_size"), [(0, 0, 4096), (2**64 - 1, 77, 1001), (0x299F31D0A4093822, 2**20, 63)]
)
def test_the_c_form_agrees_bit_for_bit(seed, position, vocab_size):
    expected = uniforms(seed, position, vocab_size)
    result = torch.zeros(vocab_size + 8)
    if (lib := library()) is not None:
        address = ctypes.c_void_p(result.data_ptr())
        lib.pagoda_token_uniforms(ctypes.c_int64(signed(seed)), position, vocab_size, address)
        assert torch.equal(result[:vocab_size], expected)
    assert not result[vocab_size:].any()


def test_uniforms_fill_the_interval_evenly():
    draws = np.concatenate([uniforms(seed, 3, 50_000).numpy() for seed in range(8)])
    counts, _ = np.histogram(draws, bins=100, range=(0, 1))
    expected = len(draws) / 100
    statistic = ((counts - expected) ** 2 / expected).sum()
    # 99 degrees of freedom: mean 99, deviation 14.
    assert statistic < 99 + 4 * math.sqrt(2 * 99)


def test_neighbouring_keys_are_not_correlated():
    base = uniforms(12, 34, 20_000).numpy()
    others = (uniforms(13, 34, 20_000), uniforms(12, 35, 20_000), uniforms(12 + 2**32, 34, 20_000))
    for other in (*(other.numpy() for other in others), np.roll(base, 1), np.roll(base, 4)):
        assert abs(np.corrcoef(base, other)[0, 1]) < 4 / math.sqrt(20_000)
