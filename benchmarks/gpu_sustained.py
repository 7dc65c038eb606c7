"""A layer's prefill while the chip is at its power limit, part by part.

    python -m benchmarks.gpu_sustained [--tokens 8192] [--seconds 3] [--out FILE]

A long prefill draws all the power that a card may draw, and its clock falls until it does not: figures of
short bursts do not hold there. So each case runs for seconds on end, one after the other without a pause,
and the first part of its time is not counted. Random layers of the Qwen2.5-7B shape, prompts of 1,024 tokens.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.gpu_facts import facts
from benchmarks.gpu_models import PRESETS
from benchmarks.gpu_watch import Watch
from kernels.attention import Tiles, cache_shape, make_tiles
from kernels.cuda import layer as cuda_layer
from kernels.layer import Layer, Step
from kernels.linear import PackedLinear

BF16 = torch.bfloat16
SHAPE = PRESETS["qwen2.5-7b"]
HIDDEN, INNER = SHAPE["hidden_size"], SHAPE["intermediate_size"]
HEADS, KV_HEADS = SHAPE["num_attention_heads"], SHAPE["num_key_value_heads"]
DIM = HIDDEN // HEADS
WIDTH = (HEADS + 2 * KV_HEADS) * DIM
PROMPT, BLOCK = 1024, 16
LAYERS = 6  # 2.8 GB, so that weights come from memory
SETTLING = 0.4  # the share of a case's time that is not counted
PER_PAUSE = 4  # forwards between two looks at the clock
FLOPS = 2 * (HIDDEN * WIDTH + HIDDEN * HIDDEN + 3 * HIDDEN * INNER)  # of the products, a token


def random_layers(tokens: int) -> list[Layer]:
    """Layers with caches for so many tokens."""

    def matrix(n: int, k: int, bias: bool = False) -> PackedLinear:
        data = torch.empty(n, k, dtype=BF16, device="cuda").normal_(0, 0.02)
        return PackedLinear((n, k), BF16, BF16, data, torch.zeros(n, device="cuda") if bias else None, False)

    ones = torch.ones(HIDDEN, dtype=BF16, device="cuda")
    layers = []
    for _ in range(LAYERS):
        shapes = cache_shape(tokens // BLOCK + 1, KV_HEADS, BLOCK, DIM, BF16, "cuda")
        caches = [torch.zeros(shape, dtype=BF16, device="cuda") for shape in shapes]
        qkv, o = matrix(WIDTH, HIDDEN, bias=True), matrix(HIDDEN, HIDDEN)
        gate_up, down = matrix(2 * INNER, HIDDEN), matrix(HIDDEN, INNER)
        layers.append(Layer(ones, qkv, o, ones, gate_up, down, *caches, HEADS, 1e-6, DIM**-0.5))
    return layers


def prompts(tokens: int) -> Step:
    """Whole prompts, of `PROMPT` tokens each."""
    count, at = tokens // PROMPT, torch.arange(PROMPT)
    tables = torch.arange(tokens // BLOCK, dtype=torch.int32).view(count, -1)
    slots = torch.cat([table[at // BLOCK].long() * BLOCK + at % BLOCK for table in tables])
    tiles = Tiles(*(torch.from_numpy(t).cuda() for t in make_tiles([PROMPT] * count, [0] * count)), False)
    return Step(
        torch.randn(PROMPT, DIM, device="cuda"), at.repeat(count).int().cuda(), slots.cuda(), tables.cuda(),
        torch.arange(0, tokens + 1, PROMPT, dtype=torch.int32).cuda(),
        torch.full((count,), PROMPT, dtype=torch.int32).cuda(), torch.arange(count).cuda(), tiles,
    )  # fmt: skip


class Products:
    """The four products of each layer and nothing else."""

    def __init__(self, layers: list[Layer], tokens: int) -> None:
        def rows(width: int, dtype: torch.dtype = BF16) -> torch.Tensor:
            return torch.empty(tokens, width, dtype=dtype, device="cuda").normal_()

        self._layers = layers
        self._x, self._activated, self._out = rows(HIDDEN), rows(INNER), rows(HIDDEN)
        self._qkv, self._gate_up = rows(WIDTH), rows(2 * INNER)
        self._sums = {dtype: rows(HIDDEN, dtype) for dtype in (BF16, torch.float32)}

    def run(self, residual: torch.dtype | None) -> None:
        """With o and down added to sums of this type, or with nothing added."""
        for layer in self._layers:
            torch.addmm(layer.qkv.bias_like_out, self._x, layer.qkv.data.t(), out=self._qkv)
            self._add(self._x, layer.o.data, residual)
            torch.mm(self._x, layer.gate_up.data.t(), out=self._gate_up)
            self._add(self._activated, layer.down.data, residual)

    def _add(self, x: torch.Tensor, weight: torch.Tensor, residual: torch.dtype | None) -> None:
        if residual is None:
            torch.mm(x, weight.t(), out=self._out)
        elif residual is BF16:
            self._sums[BF16].addmm_(x, weight.t())
        else:
            sums = self._sums[residual]
            torch.addmm(sums, x, weight.t(), out_dtype=residual, out=sums)


def sustained(
    name: str, run: Callable[[], None], tokens: int, seconds: float, watch: Watch
) -> dict[str, Any]:
    """Milliseconds a layer, and what the chip did meanwhile."""
    run()  # what is compiled by this is not timed
    torch.cuda.synchronize()
    marks: list[tuple[float, int]] = []
    start, count = time.time(), 0
    while time.time() - start < seconds:
        for _ in range(PER_PAUSE):
            run()
        torch.cuda.synchronize()
        count += PER_PAUSE
        marks.append((time.time(), count))
    counted = [mark for mark in marks if mark[0] - start > SETTLING * seconds]
    (began, first), (ended, last) = counted[0], counted[-1]
    ms = 1e3 * (ended - began) / max(1, last - first) / LAYERS
    clock, power = watch.means([(began, ended)])
    rate = FLOPS * tokens / ms / 1e9 if ms else float("nan")
    chip = f"{clock:.0f} MHz, {power:.0f} W" if clock and power else "no nvidia-smi"
    print(f"{name:38} {ms:7.3f} ms a layer, {rate:6.1f} TFLOP/s, {chip}", flush=True)
    return {"case": name, "ms": ms, "tflops": rate, "mhz": clock, "watt": power}


def main() -> None:
    """Measure and print."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--tokens", type=int, default=8192, help=f"a multiple of {PROMPT}")
    p.add_argument("--seconds", type=float, default=3.0, help="for each case")
    p.add_argument("--commit", default="", help="what is measured, where git cannot say")
    p.add_argument("--out", type=Path, help="JSON file")
    o = p.parse_args()
    rows: list[dict[str, Any]] = []

    def case(name: str, run: Callable[[], None]) -> None:
        rows.append(sustained(name, run, o.tokens, o.seconds, watch))

    with torch.inference_mode(), closing(Watch()) as watch:
        layers, step = random_layers(o.tokens), prompts(o.tokens)
        products, hidden = Products(layers, o.tokens), torch.randn(o.tokens, HIDDEN, device="cuda")

        def forward(dtype: torch.dtype) -> Callable[[], None]:
            return lambda: cuda_layer.forward_wide(layers, hidden.to(dtype, copy=True), step) and None

        case("products, to warm up", lambda: products.run(None))
        case("products", lambda: products.run(None))
        case("products, sums in bfloat16", lambda: products.run(BF16))
        case("products, sums in float32", lambda: products.run(torch.float32))
        case("all, sums in bfloat16", forward(BF16))
        case("all, sums in float32", forward(torch.float32))
        for left_out in ("paged_attention", "silu_and_mul", "rms_norm", "rope_and_cache"):
            with mock.patch.object(cuda_layer, left_out, lambda *_: None):
                case(f"without {left_out}", forward(torch.float32))
    if o.out:
        result = {"facts": facts(("torch", "triton"), o.commit), "tokens": o.tokens, "cases": rows}
        o.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
