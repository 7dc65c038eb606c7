"""The sampling noise, written a second time from its description, in numpy and float64.

Philox4x32-10 (Salmon et al., 2011) with the request's 64-bit seed as key (low word, high word) and the
counter (token_id // 4, output_position, 0, 0); token_id % 4 picks the word.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
WORD = 0xFFFFFFFF

Words = npt.NDArray[np.uint64]


def philox(counter: Words, seed: int) -> Words:
    """The four output words of each counter; `counter` and the result are (n, 4), 32 bits a value."""
    c0, c1, c2, c3 = (counter[:, i].astype(np.uint64) for i in range(4))
    k0, k1 = seed & WORD, seed >> 32 & WORD
    low, shift = np.uint64(WORD), np.uint64(32)
    for _ in range(ROUNDS):
        p0, p1 = c0 * np.uint64(MULTIPLIERS[0]), c2 * np.uint64(MULTIPLIERS[1])
        c0, c1, c2, c3 = (
            (p1 >> shift) ^ c1 ^ np.uint64(k0),
            p1 & low,
            (p0 >> shift) ^ c3 ^ np.uint64(k1),
            p0 & low,
        )
        k0, k1 = k0 + WEYL[0] & WORD, k1 + WEYL[1] & WORD
    return np.stack([c0, c1, c2, c3], axis=1)


def uniforms(seed: int, position: int, vocab_size: int) -> npt.NDArray[np.float64]:
    """A number in (0, 1) for each token id: the middles of 2**23 equal parts, by the word's upper 23 bits."""
    calls = np.arange(-(-vocab_size // 4), dtype=np.uint64)
    zeros = np.zeros_like(calls)
    words = philox(np.stack([calls, zeros + np.uint64(position), zeros, zeros], axis=1), seed)
    parts = (words.reshape(-1)[:vocab_size] >> np.uint64(9)).astype(np.float64)
    return (parts + 0.5) / 2**23


def gumbel(seed: int, position: int, vocab_size: int) -> npt.NDArray[np.float64]:
    """The noise of each token id: the argmax of logits plus noise is a draw from their softmax."""
    noise: npt.NDArray[np.float64] = -np.log(-np.log(uniforms(seed, position, vocab_size)))
    return noise
