"""Random numbers without state: Philox4x32-10 keyed by (seed, output position, token id).

A draw depends on nothing but these three, so a request that is resumed, replayed or moved to another
worker draws what it would have drawn, and ranks that must agree do.

The contract, which every implementation (torch here, C in `kernels/cpu/sample.c`, others) keeps bit for bit:

- key     = (seed mod 2^32, seed div 2^32), the seed taken as an unsigned 64-bit number
- counter = (token_id div 4, output_position, 0, 0)
- word    = output word number (token_id mod 4), a 32-bit unsigned number w
- uniform = (floor(w / 2^9) + 0.5) / 2^23: 2^23 evenly spaced numbers from 2^-24 to 1 - 2^-24, all of them
  exact in float32, so that neither rounding mode nor fused arithmetic can change one
- noise   = -log(-log(uniform)), in float32, between -2.82 and 16.64

The inner logarithm needs full *relative* accuracy close to 1: the largest noise comes from there, and an
approximation with a fixed absolute error (as fast GPU logarithms are) would turn it into infinity.
With 23 bits, a token less likely than about 2^-25 of the likeliest is drawn more rarely than it should be.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011, and the
known-answer tests of its Random123 library.
"""

from __future__ import annotations

import torch

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
MASK32 = 0xFFFFFFFF

Words4 = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def philox4x32(counter: Words4, key: tuple[torch.Tensor, torch.Tensor]) -> Words4:
    """Four random words for each counter.

    Args:
        counter: four int64 tensors of values in [0, 2^32), of shapes that broadcast.
        key: two such tensors.

    Returns:
        Four int64 tensors of values in [0, 2^32), of the broadcast shape.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        # The products fill 64 bits and wrap into int64's sign; masking after the arithmetic shift
        # drops the sign's copies, so both halves come out as the unsigned product's.
        product0 = c0 * MULTIPLIERS[0]
        product1 = c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((product1 >> 32) & MASK32) ^ c1 ^ k0,
            product1 & MASK32,
            ((product0 >> 32) & MASK32) ^ c3 ^ k1,
            product0 & MASK32,
        )
        k0 = (k0 + WEYL[0]) & MASK32
        k1 = (k1 + WEYL[1]) & MASK32
    return c0, c1, c2, c3


def word_to_uniform(words: torch.Tensor) -> torch.Tensor:
    """Map 32-bit words (int64, values in [0, 2^32)) to float32 in the open interval (0, 1), exactly."""
    return ((words >> 9).to(torch.float32) + 0.5) * 2.0**-23


def token_uniforms(seeds: torch.Tensor, positions: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """The uniform of every token of the vocabulary, for each row.

    Args:
        seeds: int64[R], the 64-bit seeds in two's complement.
        positions: integer[R], output positions: 0 for the first token after the prompt.
        vocab_size: how many token ids there are.

    Returns:
        float32[R, vocab_size] on the seeds' device.
    """
    calls = torch.arange((vocab_size + 3) // 4, dtype=torch.int64, device=seeds.device).unsqueeze(0)
    zero = torch.zeros_like(calls)
    key = ((seeds & MASK32).unsqueeze(1), ((seeds >> 32) & MASK32).unsqueeze(1))
    position = (positions.to(torch.int64) & MASK32).unsqueeze(1)
    words = torch.stack(philox4x32((calls, position, zero, zero), key), dim=-1)
    return word_to_uniform(words.flatten(1)[:, :vocab_size])


def gumbel(uniforms: torch.Tensor) -> torch.Tensor:
    """Gumbel noise of float32 uniforms: argmax(logits + noise) is a draw from softmax(logits)."""
    return -torch.log(-torch.log(uniforms))
