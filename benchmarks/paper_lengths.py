"""Lengths of requests as in the paper's two traces, and the arithmetic of what they allow.

The paper states means (in OPT's tokens) and no spread: Alpaca 19.31 in and 58.45 out, ShareGPT 161.31 in and
337.99 out. Drawn lengths are log-normal with the spread of real text (standard deviation over mean), clipped
to what the paper's model takes and scaled to these means, in and out drawn apart. Real text comes in two
forms: as it is, and stretched to the paper's means.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

Lengths = npt.NDArray[np.int64]

SHORTEST, LONGEST_PROMPT, LONGEST_OUTPUT = 4, 1024, 1024  # the longest together are the context of OPT


@dataclass(frozen=True)
class Setting:
    """A trace as the paper states it; spreads are those of real text (`benchmarks.paper` prints them)."""

    name: str
    mean_in: float
    mean_out: float
    spread_in: float
    spread_out: float


ALPACA = Setting("Alpaca", 19.31, 58.45, 0.79, 0.91)
SHAREGPT = Setting("ShareGPT", 161.31, 337.99, 1.12, 1.08)


@dataclass(frozen=True)
class Trace:
    """Requests by their lengths: request i has `prompts[i]` tokens in and `outputs[i]` out."""

    name: str
    prompts: Lengths
    outputs: Lengths

    def __len__(self) -> int:
        return len(self.prompts)

    def spreads(self) -> tuple[float, float]:
        """Standard deviation over mean, in and out."""
        mean_in, mean_out = self.means()
        return float(self.prompts.std() / mean_in), float(self.outputs.std() / mean_out)

    def means(self) -> tuple[float, float]:
        """Mean tokens in and out."""
        return float(self.prompts.mean()), float(self.outputs.mean())

    def first(self, n: int) -> Trace:
        """Its first `n` requests."""
        return Trace(self.name, self.prompts[:n], self.outputs[:n])


def _bounded(lengths: npt.NDArray[np.float64], longest: int) -> Lengths:
    return np.clip(np.rint(lengths), SHORTEST, longest).astype(np.int64)


def stretched(lengths: npt.NDArray[np.float64], mean: float, longest: int) -> Lengths:
    """Whole lengths of SHORTEST to `longest` in the proportions of `lengths`, with this mean within 0.5 %.

    Raises ValueError when no factor reaches it.
    """
    low, high = 1e-6, 1e6
    for _ in range(100):
        factor = (low * high) ** 0.5
        if _bounded(lengths * factor, longest).mean() < mean:
            low = factor
        else:
            high = factor
    found = _bounded(lengths * high, longest)
    if abs(found.mean() / mean - 1) > 0.005:
        raise ValueError(f"these lengths cannot have a mean of {mean} within {SHORTEST} to {longest}")
    return found


def drawn(setting: Setting, n: int, seed: int = 0) -> Trace:
    """`n` requests with the paper's means and the spread of real text."""
    # One from each of n equal shares of the distribution, in random order: small loads are no lottery.
    normal = NormalDist()
    shares = np.array([normal.inv_cdf((i + 0.5) / n) for i in range(n)])
    # The bit generator is named, because numpy may change which one is the default.
    order = np.random.Generator(np.random.PCG64(seed))
    draws = np.array([order.permutation(shares) for _ in range(2)])
    sigmas = np.sqrt(np.log1p(np.square([setting.spread_in, setting.spread_out])))
    lengths_in, lengths_out = np.exp(sigmas[:, None] * draws)
    return Trace(
        f"{setting.name}, drawn",
        stretched(lengths_in, setting.mean_in, LONGEST_PROMPT),
        stretched(lengths_out, setting.mean_out, LONGEST_OUTPUT),
    )


def real(setting: Setting, prompts: Lengths, outputs: Lengths, n: int, seed: int = 0) -> list[Trace]:
    """`n` of these measured pairs, as they are and stretched to the paper's means."""
    chosen = np.random.Generator(np.random.PCG64(seed)).permutation(len(prompts))[:n]
    prompts, outputs = prompts[chosen], outputs[chosen]
    longer = stretched(prompts.astype(float), setting.mean_in, LONGEST_PROMPT)
    longer_out = stretched(outputs.astype(float), setting.mean_out, LONGEST_OUTPUT)
    return [
        Trace(f"{setting.name}, real text", prompts, outputs),
        Trace(f"{setting.name}, real text stretched", longer, longer_out),
    ]


# ------------------------------------------------------------------------------------- what they allow
#
# A request of p tokens in and o out takes o steps: the prompt's, which ends with the first output token, and
# o - 1 decodes. In step j, counted from 0, the KV of p + j tokens is held.


def _block_steps(trace: Trace, block_size: int) -> tuple[Lengths, Lengths]:
    """Of each request: blocks of one sample, and full blocks of its prompt, both summed over its steps."""

    def below(y: Lengths) -> Lengths:
        # Blocks that hold x tokens, summed over x = 0 to y - 1.
        full, rest = np.divmod(np.maximum(y - 1, 0), block_size)
        return block_size * full * (full + 1) // 2 + rest * (full + 1)

    one = below(trace.prompts + trace.outputs) - below(trace.prompts)
    return one, trace.prompts // block_size * trace.outputs


def parallel_saving(trace: Trace, n: int, block_size: int = 16) -> float:
    """Share of the blocks that n samples of each prompt save by sharing its full blocks, over all steps.

    The block at the prompt's end is shared in the prompt's own step only, when it is not full: the samples
    write on in it, each in a copy. That step's further saving is left out here (one step in o).
    """
    one, full = _block_steps(trace, block_size)
    return float((n - 1) * full.sum() / (n * one.sum()))


def most_beams_save(trace: Trace, width: int, block_size: int = 16) -> float:
    """Share of the blocks that `width` beams save if they always share all but the block that each writes.

    Beams are one row in the prompt's own step, which is left out.
    """
    one, _ = _block_steps(Trace(trace.name, trace.prompts + 1, trace.outputs - 1), block_size)
    steps = (trace.outputs - 1).sum()
    return float((width - 1) * (one.sum() - steps) / (width * one.sum()))


def mean_tokens(trace: Trace) -> float:
    """KV tokens of a running request, averaged over all running requests at all steps."""
    o = trace.outputs
    return float((trace.prompts * o + o * (o - 1) // 2).sum() / o.sum())


def ceiling(trace: Trace, num_slots: int) -> float:
    """Requests that run at once when every slot holds a token that is known: no allocator runs more."""
    return num_slots / mean_tokens(trace)
