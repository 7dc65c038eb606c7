"""What transformers' `generate(num_beams=...)` finds, over a model that is a function and over the real one.

A search's path does not depend on how its results are rated nor on when it ends. So `Recorded` lets the real
model run one search that never ends early, keeps what it said of each history, and answers every other way to
end from that: each answer is `generate`'s own, over a model that only repeats.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers
from transformers.modeling_outputs import CausalLMOutputWithPast

from tests.support import reference
from tests.support.beam_reference import FIRST, HEURISTIC, NEVER, Model, Result

WAYS = {HEURISTIC: False, FIRST: True, NEVER: "never"}


@dataclass(frozen=True)
class Settings:
    """How a search goes; see `SamplingParams` of the wire."""

    width: int
    n: int
    max_tokens: int
    stops: tuple[int, ...] = ()
    min_tokens: int = 0
    length_penalty: float = 1.0
    early_stopping: int = HEURISTIC


class Told(transformers.LlamaForCausalLM):
    """Repeats what it is told of each history, float32."""

    def __init__(self, model: Model, vocab_size: int) -> None:
        small = dict.fromkeys(("hidden_size", "intermediate_size", "num_hidden_layers"), 2)
        heads = dict.fromkeys(("num_attention_heads", "num_key_value_heads"), 1)
        super().__init__(transformers.LlamaConfig(vocab_size=vocab_size, **small, **heads))
        self.tell = model

    def forward(self, input_ids: torch.Tensor, **_: Any) -> CausalLMOutputWithPast:
        rows = [torch.as_tensor(self.tell(tuple(ids)), dtype=torch.float32) for ids in input_ids.tolist()]
        return CausalLMOutputWithPast(logits=torch.stack(rows)[:, None])


@torch.inference_mode()
def search(model: Any, prompt: Sequence[int], settings: Settings, **options: Any) -> list[Result]:
    """The results of transformers' search, best first, without their padding."""
    ids = torch.tensor([list(prompt)])
    if settings.min_tokens:
        options["min_new_tokens"] = settings.min_tokens
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), num_beams=settings.width, do_sample=False,
        num_return_sequences=settings.n, max_new_tokens=settings.max_tokens,
        eos_token_id=list(settings.stops) or None, pad_token_id=0, length_penalty=settings.length_penalty,
        early_stopping=WAYS[settings.early_stopping], return_dict_in_generate=True, output_scores=True,
        **options,
    )  # fmt: skip
    results = []
    outputs = out.sequences[:, len(prompt) :].tolist()
    for row, score in zip(outputs, out.sequences_scores.tolist(), strict=True):
        ends = [i for i, token in enumerate(row) if token in settings.stops]
        tokens = row[: ends[0] + 1 if ends else settings.max_tokens]
        results.append(Result(tuple(tokens), score, bool(ends)))
    return results


def over(model: Model, vocab_size: int, prompt: Sequence[int], settings: Settings) -> list[Result]:
    """`search` over a model that is a function."""
    told = Told(model, vocab_size)
    told.generation_config.eos_token_id = None
    return search(told, prompt, settings, use_cache=False)


@functools.cache
@torch.inference_mode()
def real(history: tuple[int, ...]) -> np.ndarray:
    """The real model's logprobs after any history; slow."""
    logits = reference.model()(torch.tensor([list(history)]), logits_to_keep=1).logits[0, -1]
    return torch.log_softmax(logits, -1).double().numpy()


class Recorded(transformers.LogitsProcessor):
    """The real model's logprobs along one search, as a `Model`."""

    def __init__(self, prompt: Sequence[int], width: int, stops: tuple[int, ...], max_tokens: int) -> None:
        self.known: dict[tuple[int, ...], np.ndarray] = {}
        # With such a penalty a beam that goes on seems better than any result.
        settings = Settings(width, 1, max_tokens, stops, length_penalty=5.0, early_stopping=NEVER)
        search(reference.model(), prompt, settings, logits_processor=[self])

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        for ids, row in zip(input_ids.tolist(), scores, strict=True):
            self.known[tuple(ids)] = row.numpy().copy()
        return scores

    def model(self, history: tuple[int, ...]) -> np.ndarray:
        """Raises KeyError for a history off the search's path."""
        return self.known[history]
