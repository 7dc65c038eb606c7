"""The embedded model, through the worker's own loader, rows and kernels, against transformers in float32."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tests.support.data import model_folder
from tests.unit.worker.harness import Device

NUM_NEW = 24
NEAR_TIE = 1e-3
QUESTIONS = [
    "What is the capital of France?",
    "写一首关于春天的诗。",
    "Write a Python function that returns the n-th prime number.",
    "List 12 animals that live in the sea, with one fact about each of them.",
]


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model_folder())
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
        )
        for question in QUESTIONS
    ]


@pytest.fixture(scope="module")
def device() -> Device:
    return Device(model_folder(), max_len=512, num_blocks=256)


@pytest.fixture(scope="module")
def reference():
    return AutoModelForCausalLM.from_pretrained(model_folder(), dtype=torch.float32).eval()


@torch.inference_mode()
def assert_greedy(reference, prompt: list[int], tokens: list[int]) -> None:
    """Each token is transformers' best, or one that lies within `NEAR_TIE` of it."""
    logits = reference(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
    chosen = logits.gather(1, torch.tensor(tokens).unsqueeze(1)).squeeze(1)
    assert (logits.amax(-1) - chosen < NEAR_TIE).all()


def test_greedy_batched(reference, prompts, device):
    for slot, prompt in enumerate(prompts):
        device.add(slot, prompt, stop_token_ids=[2])
    device.step({slot: len(prompt) for slot, prompt in enumerate(prompts)})
    device.decode(range(len(prompts)), NUM_NEW // 4, m=4)
    for slot, prompt in enumerate(prompts):
        tokens = device.sequences[slot].tokens[len(prompt) :]
        assert_greedy(reference, prompt, tokens)
        assert (tokens[-1] == 2) == (device.sequences[slot].ended == 1)
        assert len(tokens) == NUM_NEW + 1 or tokens[-1] == 2
    device_answer = device.sequences[0].tokens[len(prompts[0]) :]
    assert device_answer == [504, 3575, 282, 4649, 314, 7042, 30, 2]  # The capital of France is Paris.
    for slot in range(len(prompts)):
        device.release(slot)


def test_greedy_in_chunks(reference, prompts, device):
    prompt = prompts[3]
    sequence = device.add(5, prompt)
    for start in range(0, len(prompt), 10):
        device.step({5: min(10, len(prompt) - start)})
    device.decode([5], NUM_NEW)
    assert_greedy(reference, prompt, sequence.tokens[len(prompt) :])
    device.release(5)
