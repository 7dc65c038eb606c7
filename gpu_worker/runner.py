"""One step on the device: gather, forward, sample, scatter, as many times as the step says."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from gpu_worker.kv_cache import KVCache
from gpu_worker.models.llama import Llama
from gpu_worker.slots import Rows
from gpu_worker.staging import Batch, Diff
from kernels.sample import Sampled, SampledLogprobs, sample


@dataclass
class StepOutputs:
    """What a step drew, still on the device; one entry an iteration, R sampling rows in each."""

    num_logprobs: list[int]
    """For each sampling row, -1 where it wants none."""
    drawn: list[torch.Tensor] = field(default_factory=list)
    """int32[2, R]: tokens and outcomes, see `Rows.accept`."""
    logprobs: list[SampledLogprobs | None] = field(default_factory=list)


class Runner:
    """The model, its KV memory and the rows, driven by staged steps. It never reads the device."""

    def __init__(self, model: Llama, cache: KVCache, rows: Rows) -> None:
        self._model, self._cache, self._rows = model, cache, rows

    def run(self, diff: Diff, batch: Batch) -> StepOutputs:
        """Apply a step and run its iterations."""
        outputs = StepOutputs(batch.num_logprobs)
        self._rows.apply(diff, self._cache.tensors)
        if not batch.num_tokens:
            return outputs
        for _ in range(batch.num_iterations):
            self._iterate(batch, outputs)
        return outputs

    def _iterate(self, batch: Batch, outputs: StepOutputs) -> None:
        rows = self._rows
        hidden, delta = self._model.forward(*rows.gather(batch, self._model.rotations))
        rows.advance(batch)
        if not batch.num_logprobs:  # only chunks that end before their prompts do
            return
        if batch.chunks is not None:
            index = batch.chunks.sample_index
            hidden, delta = hidden.index_select(0, index), delta.index_select(0, index)
        sampled = self._sample(self._model.logits(hidden, delta), batch)
        outputs.drawn.append(rows.accept(batch, sampled))
        outputs.logprobs.append(sampled.logprobs)

    def _sample(self, logits: torch.Tensor, batch: Batch) -> Sampled:
        rows = self._rows
        return sample(
            logits,
            batch.sample_slots,
            rows.columns,
            rows.tokens,
            rows.num_tokens,
            rows.num_prompt,
            self._model.vocab_size,
            batch.features,
        )
