"""The requests that Pagoda and its peers are measured with on a CPU: seeded token ids, nothing to download.

The same arguments give the same requests on every machine and Python version.  Ids lie in [1000, 40000),
clear of every special token; answers have a fixed length, so end-of-text is ignored.
"""

from __future__ import annotations

import random

LOWEST_ID, END_ID = 1000, 40000
NUM_CONCURRENT = 32
PROMPT_LEN = 128
SHARED_LEN, OWN_LEN = 512, 32

# Output tokens of each request, by kind of load.
MAX_TOKENS = {"one": 128, "many": 128, "shared": 64}


def prompts(kind: str, repeat: int) -> list[list[int]]:
    """The prompts of one run; every `repeat` has others, so that no prefix cache carries from run to run.

    "one" is a single prompt of 128 tokens, "many" 32 of them, and "shared" 32 prompts of 512 tokens in
    common and 32 of their own each.  Raises ValueError for another kind.
    """

    def ids(n: int, *seed: int) -> list[int]:
        # A string seeds by its SHA-512, which no version of Python has changed.
        drawn = random.Random(repr((kind, repeat, *seed)))
        return [drawn.randrange(LOWEST_ID, END_ID) for _ in range(n)]

    if kind == "one":
        return [ids(PROMPT_LEN)]
    if kind == "many":
        return [ids(PROMPT_LEN, i) for i in range(NUM_CONCURRENT)]
    if kind == "shared":
        head = ids(SHARED_LEN)
        return [head + ids(OWN_LEN, i) for i in range(NUM_CONCURRENT)]
    raise ValueError(f"kind is {kind!r}, not one of {', '.join(MAX_TOKENS)}")


def rate(kind: str, num_tokens: int, start: float, first: float, end: float) -> float:
    """Output tokens a second of one run, from the times (in seconds) of its start, first token and end.

    One stream is rated by the pace of its tokens after the first; loads of many by all their tokens over
    the whole time, prompts included.
    """
    return (num_tokens - 1) / (end - first) if kind == "one" else num_tokens / (end - start)
