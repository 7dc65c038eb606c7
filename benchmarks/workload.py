"""The requests that Pagoda and its peers are measured with on a GPU: seeded token ids, nothing to download.

A request is a pair: the prompt's token ids and how many tokens the answer has. The same arguments give the
same requests on every machine. Ids lie in [1000, 120000): inside the vocabulary of every model measured here
and clear of its special tokens. Answers have a fixed length, so end-of-text is ignored.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

LOWEST_ID, END_ID = 1000, 120000
SHORTEST, LONGEST = 4, 1024
# Of log-normal lengths: clipped to [SHORTEST, LONGEST] their means are 220 for prompts and 200 for answers.
PROMPT_MU, ANSWER_MU, SIGMA = 4.883, 4.775, 1.10

Request = tuple[list[int], int]


def _generator(seed: int) -> np.random.Generator:
    # The bit generator is named, because numpy may change which one is the default.
    return np.random.Generator(np.random.PCG64(seed))


def _prompts(generator: np.random.Generator, lengths: Iterable[int]) -> list[list[int]]:
    return [generator.integers(LOWEST_ID, END_ID, length).tolist() for length in lengths]


def _lengths(generator: np.random.Generator, n: int, mu: float) -> list[int]:
    drawn = np.rint(generator.lognormal(mu, SIGMA, n))
    return np.clip(drawn, SHORTEST, LONGEST).astype(int).tolist()


def sharegpt_like(n: int, seed: int = 0) -> list[Request]:
    """`n` requests with lengths like ShareGPT's: 220 tokens in and 200 out on average, each 4 to 1,024."""
    generator = _generator(seed)
    prompt_lengths = _lengths(generator, n, PROMPT_MU)
    answer_lengths = _lengths(generator, n, ANSWER_MU)
    return list(zip(_prompts(generator, prompt_lengths), answer_lengths, strict=True))


def fixed(n: int, prompt_len: int, answer_len: int, seed: int = 0) -> list[Request]:
    """`n` requests of one length."""
    return [(prompt, answer_len) for prompt in _prompts(_generator(seed), [prompt_len] * n)]


def redrawn(requests: Sequence[Request], seed: int) -> list[Request]:
    """Requests of the same lengths with other prompts, for a repeat that must find nothing in a cache."""
    prompts = _prompts(_generator(seed), (len(prompt) for prompt, _ in requests))
    return [(prompt, answer_len) for prompt, (_, answer_len) in zip(prompts, requests, strict=True)]


def stop_ids(n: int, vocab_size: int, seed: int = 0) -> list[int]:
    """`n` different ids below `vocab_size`, sorted; uniform draws meet one in `vocab_size / n` tokens."""
    return sorted(_generator(seed).choice(vocab_size, n, replace=False).tolist())
