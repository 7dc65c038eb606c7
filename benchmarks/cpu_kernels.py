"""Times the CPU kernels in the shape of a whole model: decode at batch 1 and 32, prefill of 32 prompts.

Weights are random, of SmolLM2-135M's shape. The headline runs all layers in one call; each operation's share
is taken from calls of the single ones. Beside the matrix products stand the same products by torch alone.

    python benchmarks/cpu_kernels.py [--dtype bfloat16] [--threads 2] [--context 200]
"""

import argparse
import collections
import time

import torch

from kernels import cpu
from kernels.attention import cache_shape, paged_attention
from kernels.cpu.memory import empty
from kernels.layer import Layer, LayerStack, Step
from kernels.linear import embedding, linear, pack, silu_and_mul_linear
from kernels.norm import rms_norm
from kernels.rope import rope_and_cache

LAYERS, HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, DIM, VOCABULARY = 30, 576, 1536, 9, 3, 64, 49152
QKV = (HEADS + 2 * KV_HEADS) * DIM
BLOCK = 16


class Model:
    """Random weights, a paged cache, and the forward pass."""

    def __init__(self, dtype: torch.dtype, max_rows: int, max_context: int) -> None:
        def weight(n: int, k: int) -> torch.Tensor:
            return torch.randn(n, k, dtype=dtype) * k**-0.5

        self.norm = torch.ones(HIDDEN, dtype=dtype)
        blocks_a_row = -(-max_context // BLOCK)
        shapes = cache_shape(max_rows * blocks_a_row, KV_HEADS, BLOCK, DIM, dtype)
        self.layers = [
            Layer(
                input_norm=self.norm,
                qkv=pack(weight(QKV, HIDDEN)),
                o=pack(weight(HIDDEN, HEADS * DIM)),
                post_norm=self.norm,
                gate_up=pack(weight(2 * INTERMEDIATE, HIDDEN)),
                down=pack(weight(HIDDEN, INTERMEDIATE)),
                key_cache=empty(shapes[0], dtype).zero_(),
                value_cache=empty(shapes[1], dtype).zero_(),
                num_heads=HEADS,
                eps=1e-5,
                scale=DIM**-0.5,
            )
            for _ in range(LAYERS)
        ]
        self.stack = LayerStack(self.layers)
        self.head = pack(weight(VOCABULARY, HIDDEN), out_dtype=torch.float32)
        order = torch.randperm(max_rows * blocks_a_row, dtype=torch.int32)
        self.block_tables = order.view(max_rows, blocks_a_row)
        angles = torch.outer(torch.arange(max_context), 1e5 ** -(torch.arange(0, DIM, 2) / DIM))
        self.cos_sin = torch.cat((angles.cos(), angles.sin()), dim=1)

    def step(self, rows: int, context: int, queries: int) -> Step:
        """An iteration of `queries` new tokens for each row, which then has `context` tokens."""
        positions = torch.arange(context - queries, context, dtype=torch.int32).repeat(rows)
        tables = self.block_tables[:rows]
        row = torch.arange(rows).repeat_interleave(queries)
        return Step(
            cos_sin=self.cos_sin,
            positions=positions,
            slot_mapping=tables[row, positions // BLOCK].long() * BLOCK + positions % BLOCK,
            block_tables=tables,
            query_start=torch.arange(0, rows * queries + 1, queries, dtype=torch.int32),
            seq_lens=torch.full((rows,), context, dtype=torch.int32),
        )

    def forward(self, ids: torch.Tensor, step: Step) -> torch.Tensor:
        """Logits of each row's last token."""
        hidden = embedding(ids, self.head)
        hidden, delta = self.stack.forward(hidden, step)
        return linear(self.last(rms_norm(delta, self.norm, 1e-5, hidden), step), self.head)

    def forward_by_operation(self, ids: torch.Tensor, step: Step, call) -> torch.Tensor:
        """The same; `call(name, function, *arguments)` runs every operation."""
        residual = call("embedding", embedding, ids, self.head)
        tokens = len(residual)
        x = call("norm", rms_norm, residual, self.norm, 1e-5)
        normed, attended = torch.empty_like(x), x.new_empty(tokens, HEADS, DIM)
        qkv, gate_up = x.new_empty(tokens, QKV), x.new_empty(tokens, 2 * INTERMEDIATE)
        q, k, v = qkv.view(tokens, -1, DIM).split([HEADS, KV_HEADS, KV_HEADS], dim=1)
        rows = (step.block_tables, step.query_start, step.seq_lens, DIM**-0.5, attended)
        for layer in self.layers:
            caches = (layer.key_cache, layer.value_cache)
            call("qkv", linear, x, layer.qkv, qkv)
            call("rope", rope_and_cache, q, k, v, step.cos_sin, step.positions, *caches, step.slot_mapping)
            call("attention", paged_attention, q, *caches, *rows)
            call("o", linear, attended.view(tokens, -1), layer.o, x)
            call("norm", rms_norm, x, self.norm, 1e-5, residual, normed)
            call("gate_up", linear, normed, layer.gate_up, gate_up)
            call("silu+down", silu_and_mul_linear, gate_up, layer.down, normed)
            call("norm", rms_norm, normed, self.norm, 1e-5, residual, x)
        return call("head", linear, self.last(x, step), self.head)

    @staticmethod
    def last(x: torch.Tensor, step: Step) -> torch.Tensor:
        return x if len(x) == len(step.seq_lens) else x[step.query_start[1:].long() - 1]


def timed(seconds: dict[str, float]):
    """A `call` that adds each operation's time to `seconds`."""

    def call(name, function, *arguments):
        start = time.perf_counter()
        result = function(*arguments)
        seconds[name] += time.perf_counter() - start
        return result

    return call


def best_time(run, repeats: int) -> float:
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def measure(model: Model, title: str, rows: int, context: int, queries: int, repeats: int) -> None:
    step = model.step(rows, context, queries)
    tokens = rows * queries
    ids = torch.randint(VOCABULARY, (tokens,))
    seconds = best_time(lambda: model.forward(ids, step), repeats)
    print(f"{title}: {seconds * 1e3:.2f} ms, {tokens / seconds:.0f} tokens/s")
    passes = []
    for _ in range(repeats):
        passes.append(collections.defaultdict(float))
        model.forward_by_operation(ids, step, timed(passes[-1]))
    best = min(passes, key=lambda shares: sum(shares.values()))
    total = sum(best.values())
    shares = "  ".join(f"{name} {100 * t / total:.1f}%" for name, t in best.items())
    print(f"    by operation {total * 1e3:.2f} ms: {shares}")
    first = model.layers[0]
    weights = {
        "qkv": first.qkv,
        "o": first.o,
        "gate_up": first.gate_up,
        "down": first.down,
        "head": model.head,
    }
    for name, packed in weights.items():
        measure_linear(model, name, packed.weight(), rows if name == "head" else tokens, max(3, repeats // 4))


def measure_linear(model: Model, name: str, weight: torch.Tensor, rows: int, repeats: int) -> None:
    """One projection of all layers in turn, so that weights come from memory as they do in a model."""
    ours = [getattr(layer, name) for layer in model.layers] if name != "head" else [model.head]
    plain = [weight.clone() for _ in ours]
    x = torch.randn(rows, weight.shape[1], dtype=weight.dtype)

    def run_torch():
        for w in plain:
            torch.nn.functional.linear(x, w)

    def run_ours():
        for packed in ours:
            linear(x, packed)

    seconds, torch_seconds = best_time(run_ours, repeats), best_time(run_torch, repeats)
    work = 2e-9 * rows * weight.numel() * len(ours)
    gigabytes = 1e-9 * weight.nbytes * len(ours)
    print(
        f"    {name:8} {seconds / len(ours) * 1e6:8.0f} us {work / seconds:5.0f} GFLOP/s"
        f" {gigabytes / seconds:5.1f} GB/s   torch {torch_seconds / len(ours) * 1e6:8.0f} us"
        f" {work / torch_seconds:5.0f} GFLOP/s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--threads", type=int, default=cpu.threads())
    parser.add_argument("--context", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=20)
    arguments = parser.parse_args()
    cpu.set_threads(arguments.threads)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    model = Model(getattr(torch, arguments.dtype), 32, max(arguments.context, 128))
    built = "C library" if cpu.library() is not None else "references"
    print(f"{arguments.dtype}, {arguments.threads} threads, {built}")
    measure(model, "decode, batch 1", 1, arguments.context, 1, arguments.repeats)
    measure(model, "decode, batch 32", 32, arguments.context, 1, arguments.repeats)
    measure(model, "prefill, 32 x 128", 32, 128, 128, max(2, arguments.repeats // 8))


if __name__ == "__main__":
    main()
