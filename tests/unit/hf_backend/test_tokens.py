"""Greedy tokens through the worker's rows, pages and runner equal transformers' own `generate`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from gpu_worker.batch import Padding
from hf_backend import attention
from tests.support.other_models import KINDS
from tests.unit.hf_backend.conftest import Other
from tests.unit.worker.harness import Device, prompt, reference_logits

PADDING = Padding(rows=(4, 8), chunk_rows=(8,), chunk_tokens=(32, 64, 128), lean_rows=4, spare_tiles=8)


def generated(model: Any, start: Sequence[int], count: int) -> list[int]:
    ids = torch.tensor([list(start)])
    mask = torch.ones_like(ids)
    out = model.generate(ids, attention_mask=mask, max_new_tokens=count, do_sample=False)
    return list(map(int, out[0, len(start) :]))


def serve(device: Device) -> list[tuple[int, list[int]]]:
    """Rows that enter, run in chunks, share a prefix, fork and leave; prompts' lengths and tokens."""
    first, second, third = prompt(40, 1), prompt(25, 2), prompt(9, 3)
    a = device.add(5, first)
    device.step({5: 17})
    b = device.add(1, second)
    device.step({5: 23, 1: 10})
    c = device.add(7, third)
    device.grow(a, 41)
    device.step({1: 15, 5: 1, 7: 9})
    device.decode([7, 5, 1], 3)
    device.decode([1, 7, 5], 2, m=3)
    # The first two blocks of the first prompt are there already.
    shared = [*first[:32], *prompt(7, 4)]
    d = device.add(0, shared, num_computed=32, blocks=a.blocks[:2])
    device.grow(b, b.num_computed + 1)
    device.step({0: 7, 1: 1})
    device.decode([0, 1], 5)
    return [(40, a.tokens), (25, b.tokens), (9, c.tokens), (39, d.tokens)]


@pytest.mark.parametrize("kind", KINDS)
def test_the_tokens_of_generate(other: Other, kind: str) -> None:
    model, folder = other(kind)
    device = Device(folder, model_impl="auto")
    assert device.model._is_flat == KINDS[kind][2]
    for length, tokens in serve(device):
        assert tokens[length:] == generated(model, tokens[:length], len(tokens) - length)


@pytest.mark.parametrize("kind", ["gpt2", "gemma3", "falcon_alibi"])
def test_padded_batches(other: Other, kind: str) -> None:
    """Rows and tokens that pad batches on a GPU change nothing."""
    model, folder = other(kind)
    for length, tokens in serve(Device(folder, padding=PADDING, model_impl="auto")):
        assert tokens[length:] == generated(model, tokens[:length], len(tokens) - length)


@pytest.mark.parametrize("kind", ["gpt2", "bloom"])
def test_sequences_shorter_than_the_trial(other: Other, kind: str) -> None:
    model, folder = other(kind)
    device = Device(folder, model_impl="auto", max_len=12)
    assert device.model._is_flat == KINDS[kind][2]
    assert device.generate(0, prompt(6), 5) == generated(model, prompt(6), 5)


@pytest.mark.parametrize("kind", ["phi3", "falcon"])
def test_forks_copies_of_blocks_and_ends(other: Other, kind: str) -> None:
    model, folder = other(kind)
    start = prompt(21)
    want = generated(model, start, 9)
    device = Device(folder, model_impl="auto")
    device.add(1, start)
    device.fork(5, parent=1, stop_token_ids=[want[4]])
    device.step({1: 21, 5: 0})
    child, block = device.sequences[5], device.free.pop()
    device.pending.copy_src_blocks.append(child.blocks[1])
    device.pending.copy_dst_blocks.append(block)
    device.pending.replace_slots.append(5)
    device.pending.replace_indexes.append(1)
    device.pending.replace_blocks.append(block)
    child.blocks[1] = block
    device.decode([1, 5], 8)
    assert device.sequences[1].tokens[21:] == want
    assert child.ended and child.tokens[21:] == want[: want.index(want[4]) + 1]


@pytest.mark.parametrize("scores", [1 << 26, 500])
def test_flat_logits_are_transformers(other: Other, scores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many scores are computed at a time."""
    monkeypatch.setattr(attention, "SCORES", scores)
    model, folder = other("gemma2")
    device = Device(folder, model_impl="auto")
    sequence = device.add(0, prompt(30))
    device.step({0: 30})
    device.decode([0], 10)
    expected = reference_logits(model, sequence.tokens)[29:-1]
    torch.testing.assert_close(torch.cat(device.logits), expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["opt", "gemma3", "falcon_new"])
def test_bfloat16_stays_close(other: Other, kind: str) -> None:
    model, folder = other(kind)
    device = Device(folder, dtype=torch.bfloat16, model_impl="auto")
    device.add(0, prompt(40))
    device.step({0: 40})
    expected = reference_logits(model, prompt(40))[-1]
    assert (device.logits[0][0] - expected).abs().max() / expected.abs().max() < 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_logprobs_of_prompts(other: Other, kind: str) -> None:
    """A prompt longer than a slice of logits, in chunks and beside another row: once for each token."""
    model, folder = other(kind)
    device = Device(folder, model_impl="auto")
    tokens = prompt(100)
    device.add(0, tokens, num_prompt_logprobs=0)
    device.add(1, prompt(30, 1))
    results = [device.step(chunks) for chunks in ({0: 80}, {1: 30, 0: 20})]
    told = [value for result in results for value in result.prompt_logprobs.token_logprobs]
    expected = reference_logits(model, tokens)[:-1].log_softmax(-1)
    own = expected.gather(1, torch.tensor(tokens[1:]).unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(torch.tensor(told), own, atol=1e-4, rtol=0)
