"""A model on several ranks, a thread each, gives the logits of one rank and of transformers, in float32."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from gpu_worker.kv_cache import KVCache
from gpu_worker.models.llama import Llama
from gpu_worker.models.loader import open_model
from kernels.layer import Step
from kernels.ranks import Ranks
from tests.support.data import model_folder
from tests.support.thread_ranks import on_ranks
from tests.unit.worker.harness import CPU, KINDS, prompt, reference_logits

BLOCK, BLOCKS_A_ROW = 16, 8
TOLERANCE = {"atol": 2e-4, "rtol": 1e-4}


@dataclass
class Rows:
    """Sequences with blocks of their own, and how many of their tokens are in the cache."""

    tokens: list[list[int]]
    done: list[int]

    def step(self, model: Llama, counts: list[int]) -> tuple[torch.Tensor, Step]:
        """The next `counts` tokens of each sequence."""
        spans = [range(first, first + n) for first, n in zip(self.done, counts, strict=True)]
        ids = [self.tokens[row][i] for row, span in enumerate(spans) for i in span]
        slots = [row * BLOCKS_A_ROW * BLOCK + i for row, span in enumerate(spans) for i in span]
        self.done = [span.stop for span in spans]
        return torch.tensor(ids, dtype=torch.int32), Step(
            cos_sin=model.rotations,
            positions=torch.tensor([i for span in spans for i in span], dtype=torch.int32),
            slot_mapping=torch.tensor(slots),
            block_tables=torch.arange(len(spans) * BLOCKS_A_ROW, dtype=torch.int32).view(len(spans), -1),
            query_start=torch.tensor([sum(counts[:i]) for i in range(len(counts) + 1)], dtype=torch.int32),
            seq_lens=torch.tensor(self.done, dtype=torch.int32),
        )


def run(
    path: Path, tokens: list[list[int]], ranks: Ranks | None = None, load_format: str = "auto"
) -> torch.Tensor:
    """float32[tokens, vocabulary]: logits after each token of each row, in chunks and then one at a time."""
    files = open_model(path, load_format, 3)
    shard = files.shard(ranks.rank, ranks.size) if ranks else files.shard(0, 1)
    cache = KVCache(shard.local, len(tokens) * BLOCKS_A_ROW, BLOCK, torch.float32, CPU)
    model = Llama(
        files.config, files.weights(), cache, dtype=torch.float32, device=CPU, vocab_size=files.vocab_size,
        max_len=BLOCK * BLOCKS_A_ROW, ranks=ranks,
    )  # fmt: skip
    rows, found = Rows(tokens, [0] * len(tokens)), [list[torch.Tensor]() for _ in tokens]
    shortest = min(map(len, tokens))
    first = [len(row) - shortest + shortest // 2 for row in tokens]
    for counts in (first, *[[1] * len(tokens)] * (shortest - shortest // 2)):
        logits = model.logits(*model.forward(*rows.step(model, counts)))
        assert logits.shape[1] == model.num_logits
        logits = logits if ranks is None else ranks.gathered(logits)
        for row, part in enumerate(logits[:, : files.vocab_size].split(counts)):
            found[row].append(part.clone())
    return torch.cat([part for row in found for part in row])


def assert_the_same(
    path: Path, size: int, tokens: list[list[int]], load_format: str = "auto"
) -> torch.Tensor:
    """Every rank has the same logits bit for bit, which are a single rank's within rounding."""
    with torch.inference_mode():
        alone = run(path, tokens, load_format=load_format)
    first, *others = on_ranks(size, lambda ranks: run(path, tokens, ranks, load_format))
    assert all(torch.equal(first, other) for other in others)
    torch.testing.assert_close(first, alone, **TOLERANCE)
    assert torch.equal(first.argmax(-1), alone.argmax(-1))
    return first


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_logits_of_every_family(tiny, kind, size) -> None:
    """4 heads and 2 KV heads: split evenly, on two ranks of three, and each on two ranks."""
    reference, folder = tiny(kind)
    tokens = [prompt(40, 1), prompt(23, 2)]
    found = assert_the_same(folder, size, tokens)
    expected = torch.cat([reference_logits(reference, row) for row in tokens])
    torch.testing.assert_close(found, expected, **TOLERANCE)


def test_random_weights(tiny) -> None:
    assert_the_same(tiny("qwen2")[1], 2, [prompt(20)], "dummy")


@pytest.mark.parametrize("size", [2, 4])
def test_smollm2(size) -> None:
    """9 heads and 3 KV heads: of two ranks' four KV heads the last is zeros, of four ranks the last one."""
    reference = AutoModelForCausalLM.from_pretrained(model_folder(), dtype=torch.float32).eval()
    tokens = [[1, *prompt(24, 1)], [1, *prompt(13, 2)]]
    found = assert_the_same(model_folder(), size, tokens)
    expected = torch.cat([reference_logits(reference, row) for row in tokens])
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=1e-4)
