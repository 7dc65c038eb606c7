"""Sampling on a CUDA device: right first, then how long it takes.

    python -m benchmarks.gpu_sample [--out FILE]

Checks the noise of every uniform against float64, batches of all features against the plain torch reference,
that nothing synchronises, and 200,000 draws from three rows against their softmax. Then times CUDA graphs
that hold calls over rotating logits (more bytes than L2 holds), without and with noise, filters and
penalties, and a few cuts of the work. Takes less than a minute; exits with 1 when a check failed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl

from kernels import philox
from kernels.cuda import draw
from kernels.cuda.draw import gumbel_noise
from kernels.cuda.sample import sample
from kernels.sample import GREEDY_BELOW, Features, SamplingColumns, sample_reference

VOCAB = 152_064
SIZES = (1, 8, 64, 256, 1024)
KINDS = {
    "greedy": Features(),
    "random": Features(any_random=True),
    "filtered": Features(any_random=True, any_filter=True),
    "penalised": Features(any_random=True, any_penalty=True),
}
MIXES = (
    ("greedy",),
    ("random",),
    ("greedy", "random"),
    ("filtered",),
    ("greedy", "filtered"),
    ("random", "penalised"),
    ("greedy", "random", "filtered", "penalised", "edited"),
)
# Tokens of a block, warps, programs.
CUTS = ((1024, 4, 2112), (1024, 4, 1056), (2048, 4, 1056), (2048, 8, 1056), (4096, 8, 1056))
L2_BYTES = 50 << 20
NEAR = 1e-4
"""Two noisy logits that are closer may change places."""


@triton.jit
def noise_kernel(words, out, BLOCK: tl.constexpr):
    """Noise of int32 words, float32."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    word = tl.load(words + place).to(tl.uint32, bitcast=True)
    tl.store(out + place, gumbel_noise(word))


def noise_error(device: str, step: int = 1) -> float:
    """Greatest error of the noise, against float64, relative to its size or 1.

    Args:
        device: where to compute it.
        step: a power of two up to 1024; every `step`-th of the 2^23 uniforms is looked at, the last one down.
    """
    count = 2**23 - 1 - torch.arange(0, 2**23, step, device=device, dtype=torch.int64)
    words = count << 9
    signed = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
    out = torch.empty(len(words), device=device)
    noise_kernel[(len(words) // 1024,)](signed, out, BLOCK=1024)
    uniform = (count.double() + 0.5) * 2.0**-23
    exact = -torch.log(-torch.log1p(uniform - 1.0))
    return ((out.double() - exact).abs() / exact.abs().clamp(min=1.0)).max().item()


def chi_square_p(counts: torch.Tensor, probabilities: torch.Tensor, likeliest: int = 100) -> float:
    """Probability of counts at least this far off, over the likeliest ids and all others as one."""
    order = probabilities.double().argsort(descending=True)[:likeliest]
    number = counts.sum().double()

    def with_rest(values: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
        values = values.double()[order]
        return torch.cat((values, (total - values.sum()).reshape(1)))

    seen = with_rest(counts, number)
    expected = with_rest(probabilities, probabilities.double().sum()) * number
    statistic = ((seen - expected) ** 2 / expected).sum()
    return torch.special.gammaincc(torch.tensor(likeliest / 2).double(), statistic.cpu() / 2).item()


def draw_counts(row: torch.Tensor, num_draws: int, batch: int, seed: int) -> torch.Tensor:
    """How often each token of a row of logits is drawn at temperature 1, over slots with their own seeds."""
    columns = SamplingColumns.allocate(batch, row.device)
    columns.temperature.fill_(1.0)
    slots = torch.arange(batch, device=row.device)
    tokens = torch.zeros((batch, 1), dtype=torch.int32, device=row.device)
    zero = torch.zeros(batch, dtype=torch.int32, device=row.device)
    counts = torch.zeros(len(row), dtype=torch.int64, device=row.device)
    logits = row.expand(batch, -1)
    for first in range(0, num_draws, batch):
        columns.seed.copy_(slots + seed)
        # The output position changes, too.
        position = zero + first // batch
        drawn = sample(
            logits, slots, columns, tokens, position, zero, len(row), Features(any_random=True)
        ).token_ids
        counts += torch.bincount(drawn[: num_draws - first].long(), minlength=len(row))
    return counts


class Batch:
    """R rows of `kernels.sample.sample`'s arguments, with random settings, history and slots."""

    def __init__(
        self, num_rows: int, vocab_size: int, kinds: Iterable[str], history: int, seed: int = 1
    ) -> None:
        generator = torch.Generator("cuda").manual_seed(seed)
        self.vocab_size, num_slots = vocab_size, num_rows + 3

        def pick(*choices: float) -> torch.Tensor:
            index = torch.randint(len(choices), (num_slots,), generator=generator, device="cuda")
            return torch.tensor(choices, device="cuda")[index]

        self.columns = columns = SamplingColumns.allocate(num_slots, "cuda")
        kinds = set(kinds)
        columns.seed.copy_(torch.randint(2**62, (num_slots,), generator=generator, device="cuda"))
        if kinds & {"random", "filtered", "penalised"}:
            columns.temperature.copy_(
                pick(0.6, 0.8, 1.0, 1.3) if "greedy" not in kinds else pick(0, 0.7, 1, 1.5)
            )
        if "filtered" in kinds:
            columns.top_k.copy_(pick(0, 20, 50, 4000))
            columns.top_p.copy_(pick(1.0, 0.8, 0.95, 0.999))
            columns.min_p.copy_(pick(0.0, 0.0, 0.02, 0.1))
        if "penalised" in kinds:
            columns.presence.copy_(pick(0.0, 0.7))
            columns.frequency.copy_(pick(0.0, 0.3))
            columns.repetition.copy_(pick(1.0, 1.1, 1.7))
        if "edited" in kinds:
            shape = (num_slots, 40)
            columns.bias_ids[:, :40] = self._ids(shape, generator)
            columns.bias_values[:, :40] = torch.randn(shape, generator=generator, device="cuda")
            columns.stop_ids[:, :40] = self._ids(shape, generator)
            columns.min_tokens.copy_(pick(0, 1, history))
        self.slots = torch.randperm(num_slots, generator=generator, device="cuda")[:num_rows]
        self.tokens = self._ids((num_slots, history + 100), generator)
        self.num_tokens = torch.full((num_slots,), history, dtype=torch.int32, device="cuda")
        self.num_prompt = torch.full_like(self.num_tokens, history // 2)

    def _ids(self, shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
        # Few ids, so that many repeat.
        ids = torch.randint(self.vocab_size, shape, generator=generator, device="cuda")
        return (ids // 97 * 97).to(torch.int32)

    def __call__(self, form: Callable[..., Any], logits: torch.Tensor, features: Features) -> Any:
        """The sampling function's result for these rows."""
        state = (self.tokens, self.num_tokens, self.num_prompt)
        return form(logits, self.slots, self.columns, *state, self.vocab_size, features)


def disagreements(batch: Batch, logits: torch.Tensor, features: Features) -> list[str]:
    """Where `sample` differs from the reference, without what closeness excuses."""
    result, expected = batch(sample, logits, features), batch(sample_reference, logits, features)
    found = []
    if not torch.equal(result.finite, expected.finite):
        found.append(f"finite: {result.finite.ne(expected.finite).sum().item()} rows")
    rows = (result.token_ids.ne(expected.token_ids) & expected.finite).nonzero().flatten().tolist()
    position = batch.num_tokens - batch.num_prompt
    for row in rows:
        slot = batch.slots[row]
        heat = batch.columns.temperature[slot].item()
        ids = torch.stack((result.token_ids[row], expected.token_ids[row])).long()
        if heat < GREEDY_BELOW or features.any_penalty or features.any_bias:
            found.append(f"row {row}: tokens {ids.tolist()}")
            continue
        uniforms = philox.token_uniforms(
            batch.columns.seed[slot : slot + 1], position[slot : slot + 1], batch.vocab_size
        )
        noisy = logits[row, ids].double() / heat + philox.gumbel(uniforms)[0, ids].double()
        if (gap := (noisy[0] - noisy[1]).abs().item()) > NEAR:
            found.append(f"row {row}: tokens {ids.tolist()}, {gap:.2e} apart")
    if expected.logprobs is not None:
        for field in fields(expected.logprobs):
            mine, theirs = getattr(result.logprobs, field.name), getattr(expected.logprobs, field.name)
            same = result.token_ids.eq(expected.token_ids) & expected.finite
            if not torch.equal(mine[same], theirs[same]):
                found.append(f"logprobs: {field.name}")
    return found


def check_noise() -> dict[str, Any]:
    """The noise of all uniforms."""
    error = noise_error("cuda")
    return {"error": error, "ok": error < 1e-6}


def check_mix(mix: tuple[str, ...], dtype: torch.dtype, num_rows: int) -> dict[str, Any]:
    """A batch of rows with these traits against the reference, with an infinity and a padded tail."""
    features = Features(
        any_random=mix != ("greedy",),
        any_filter="filtered" in mix,
        any_penalty="penalised" in mix,
        any_bias="edited" in mix,
        any_min_tokens="edited" in mix,
        max_logprobs=5 if "edited" in mix else -1,
    )
    width, vocab_size = (VOCAB, VOCAB - 399) if num_rows == 3 else (32_768, 32_000)
    spread = torch.linspace(0.1, 8, num_rows, device="cuda").unsqueeze(1)
    logits = torch.randn((num_rows, width), device="cuda") * spread
    logits[:, vocab_size:] = float("nan")
    logits[num_rows // 2, 77] = float("inf")
    wrong = disagreements(Batch(num_rows, vocab_size, mix, 300), logits.to(dtype), features)
    return {"wrong": wrong, "ok": not wrong}


def check_distribution(index: int) -> dict[str, Any]:
    """200,000 draws from a row."""
    generator = torch.Generator("cuda").manual_seed(index)
    row = torch.randn(VOCAB, generator=generator, device="cuda") * (2.0, 3.0, 5.0)[index]
    counts = draw_counts(row, 200_000, 1000, seed=index * 10_000)
    p = chi_square_p(counts, row.double().softmax(-1))
    return {"p": p, "ok": p > 0.001 and counts.sum().item() == 200_000}


def check_no_sync() -> dict[str, Any]:
    """All features at once, with synchronisations forbidden, and then in a graph whose inputs change."""
    features = Features(True, True, True, True, True, 20)
    batch = Batch(8, VOCAB, ("greedy", "random", "filtered", "penalised", "edited"), 300)
    logits = torch.randn((8, VOCAB), device="cuda") * 3
    batch(sample, logits, features)
    torch.cuda.set_sync_debug_mode("error")
    try:
        batch(sample, logits, features)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = batch(sample, logits, features)
    logits.normal_().mul_(4)
    batch.num_tokens += 7
    graph.replay()
    expected = batch(sample, logits, features)
    same = torch.equal(result.token_ids, expected.token_ids)
    return {"ok": same and torch.equal(result.logprobs.top_ids, expected.logprobs.top_ids)}


def checks() -> dict[str, dict[str, Any]]:
    """Every check by name; one that fails does not stop the others."""
    todo: dict[str, Callable[[], dict[str, Any]]] = {
        "noise": check_noise,
        "no synchronisation": check_no_sync,
    }
    for mix, dtype, num_rows in itertools.product(MIXES, (torch.float32, torch.bfloat16), (3, 40)):
        name = f"{'+'.join(mix)} {str(dtype)[6:]} {num_rows} rows"
        todo[name] = partial(check_mix, mix, dtype, num_rows)
    todo |= {f"chi-square, row {index}": partial(check_distribution, index) for index in range(3)}
    results = {}
    for name, run in todo.items():
        try:
            results[name] = run()
        except Exception as error:
            results[name] = {"error": f"{type(error).__name__}: {error}"[-600:], "ok": False}
        figures = {key: value for key, value in results[name].items() if key != "ok" and value}
        print("ok   " if results[name]["ok"] else "WRONG", name, figures or "", flush=True)
    return results


def microseconds(
    batch: Batch, logits: list[torch.Tensor], features: Features, budget_ms: float = 60.0
) -> float:
    """Median time of one call, of graphs that go through all the logits."""
    for _ in range(2):
        batch(sample, logits[0], features)
    graph = torch.cuda.CUDAGraph()
    calls = max(len(logits), 8)
    with torch.cuda.graph(graph):
        for i in range(calls):
            batch(sample, logits[i % len(logits)], features)
    times = []
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    graph.replay()
    while len(times) < 3 or (sum(times) * calls / 1000 < budget_ms and len(times) < 30):
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / calls)
    return statistics.median(times)


def rotating_logits(num_rows: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Logits of several batches, together more than L2 holds unless 32 batches are less."""
    size = num_rows * VOCAB * dtype.itemsize
    number = min(32, max(1, -(-3 * L2_BYTES // size)))
    return [torch.randn((num_rows, VOCAB), device="cuda").mul_(3).to(dtype) for _ in range(number)]


def timings() -> list[dict[str, Any]]:
    """A line for each batch size, dtype and kind, and of each cut of the work where they differ most."""
    lines: list[dict[str, Any]] = []

    def note(what: dict[str, Any], run: Callable[[], float]) -> None:
        try:
            what["us"] = round(run(), 2)
        except Exception as error:
            what["error"] = f"{type(error).__name__}: {error}"[-300:]
        lines.append(what)
        print("  ".join(f"{key} {value}" for key, value in what.items()), flush=True)

    for num_rows, dtype in [*((size, torch.float32) for size in SIZES), (64, torch.bfloat16)]:
        logits = rotating_logits(num_rows, dtype)
        for kind, features in KINDS.items():
            batch = Batch(num_rows, VOCAB, (kind,), 1000)
            what = {"rows": num_rows, "dtype": str(dtype)[6:], "kind": kind}
            note(what, partial(microseconds, batch, logits, features))
    before = draw.BLOCK, draw.NUM_WARPS, draw.PROGRAMS
    try:
        for num_rows in (1, 64, 256):
            logits = rotating_logits(num_rows, torch.float32)
            for cut, kind in itertools.product(CUTS, ("greedy", "random")):
                draw.BLOCK, draw.NUM_WARPS, draw.PROGRAMS = cut
                batch = Batch(num_rows, VOCAB, (kind,), 1000)
                what = {"rows": num_rows, "kind": kind, "block": cut[0], "warps": cut[1], "programs": cut[2]}
                note(what, partial(microseconds, batch, logits, KINDS[kind], 20.0))
    finally:
        draw.BLOCK, draw.NUM_WARPS, draw.PROGRAMS = before
    return lines


def main() -> int:
    """Run it all; 1 when a check failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    options = parser.parse_args()
    begin = time.monotonic()
    report: dict[str, Any] = {"device": torch.cuda.get_device_name(), "checks": checks()}
    print(f"checks took {time.monotonic() - begin:.1f} s", flush=True)
    report["timings"] = timings()
    report["seconds"] = round(time.monotonic() - begin, 1)
    print(f"took {report['seconds']} s")
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    return 0 if all(result["ok"] for result in report["checks"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
