"""Logits through the real rows, blocks and runner equal transformers', in float32."""

from __future__ import annotations

import pytest
import torch

from tests.unit.worker.harness import KINDS, Device, prompt, reference_logits

TOLERANCE = {"atol": 2e-4, "rtol": 1e-4}


@pytest.mark.parametrize("kind", KINDS)
def test_prefill_and_decode(tiny, kind):
    reference, folder = tiny(kind)
    device = Device(folder)
    sequence = device.add(3, prompt(45))
    device.step({3: 45})
    device.decode([3], 12)
    expected = reference_logits(reference, sequence.tokens)
    torch.testing.assert_close(torch.cat(device.logits), expected[44:-1], **TOLERANCE)
    assert sequence.tokens[45:] == expected[44:-1].argmax(-1).tolist()


@pytest.mark.parametrize("kind", ["llama3_rope", "mistral_window", "qwen3"])
@pytest.mark.parametrize("sizes", [[7, 1, 20, 17], [44, 1], [8, 8, 8, 8, 13]])
def test_chunks_of_a_prompt(tiny, kind, sizes):
    reference, folder = tiny(kind)
    device = Device(folder)
    sequence = device.add(0, prompt(45))
    for size in sizes:
        device.step({0: size})
    device.decode([0], 4)
    expected = reference_logits(reference, sequence.tokens)
    assert len(device.logits) == 5  # chunks that end before the prompt does sample nothing
    torch.testing.assert_close(torch.cat(device.logits), expected[44:-1], **TOLERANCE)


@pytest.mark.parametrize("kind", ["llama", "mistral_window", "qwen2"])
def test_mixed_batches(tiny, kind):
    """Decodes, whole prompts and chunks in one step, entering and leaving at different times."""
    reference, folder = tiny(kind)
    device = Device(folder)
    first, second, third = prompt(30, 1), prompt(50, 2), prompt(9, 3)
    a = device.add(5, first)
    device.step({5: 30})
    b = device.add(1, second)
    device.grow(a, 32)
    device.step({5: 1, 1: 20})
    c = device.add(7, third)
    device.grow(a, 33)
    device.step({1: 30, 5: 1, 7: 9})
    device.decode([7, 5, 1], 3)
    for sequence, start in ((a, first), (b, second), (c, third)):
        expected = reference_logits(reference, sequence.tokens)[len(start) - 1 : -1].argmax(-1)
        assert sequence.tokens[len(start) :] == expected.tolist()


def test_bfloat16_stays_close(tiny):
    reference, folder = tiny("llama")
    device = Device(folder, dtype=torch.bfloat16)
    device.add(0, prompt(40))
    device.step({0: 40})
    expected = reference_logits(reference, prompt(40))[-1]
    error = (device.logits[0][0] - expected).abs().max() / expected.abs().max()
    assert error < 0.05


def test_padded_vocabulary_is_cut(tiny, tmp_path):
    """Ids beyond the tokenizer's are padding: no logit exists for them."""
    _, folder = tiny("llama")
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    vocabulary = {f"t{i}": i for i in range(150)}
    (tmp_path / "tokenizer.json").write_text(
        __import__("json").dumps({"model": {"vocab": vocabulary}, "added_tokens": [{"id": 152}]})
    )
    device = Device(tmp_path)
    device.add(0, [3, 4, 5])
    device.step({0: 3})
    assert device.files.vocab_size == 153
    assert device.logits[0].shape == (1, 153)
