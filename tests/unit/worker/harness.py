"""Tiny random models, and a hand-driven worker: what the tests of this folder stand on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from gpu_worker.batch import Padding
from gpu_worker.host_pool import HostPool, host_memory
from gpu_worker.kv_cache import KVCache
from gpu_worker.models.llama import Llama
from gpu_worker.models.loader import open_model
from gpu_worker.output import collect
from gpu_worker.runner import Runner, StepOutputs
from gpu_worker.slots import Rows
from gpu_worker.staging import Limits, Stager
from pagoda.internal.v1 import worker_pb2

VOCAB = 200
CPU = torch.device("cpu")
NUM_BUFFERS = 8

SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"tie_word_embeddings": False}),
    "llama_tied": ("Llama", {"tie_word_embeddings": True}),
    "llama_biased": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama3_rope": ("Llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama_linear_rope": (
        "Llama",
        {"rope_parameters": {**LLAMA3_ROPE, "rope_type": "linear", "factor": 4.0}},
    ),
    "mistral_window": ("Mistral", {"sliding_window": 12, "head_dim": 16}),
    "mistral_full": ("Mistral", {"sliding_window": None, "head_dim": 32}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2_window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
}


def reference_model(kind: str) -> transformers.PreTrainedModel:
    """A tiny random model of transformers, float32, with every weight (norms and biases too) random."""
    name, extra = KINDS[kind]
    torch.manual_seed(sorted(KINDS).index(kind))
    config = getattr(transformers, f"{name}Config")(**{**SHAPE, **extra})
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def save(model: transformers.PreTrainedModel, folder: Path, **options: Any) -> Path:
    """The model as a Hugging Face folder."""
    model.save_pretrained(folder, **options)
    return folder


@dataclass
class Sequence_:
    """What the hand-driven scheduler knows of one row."""

    slot: int
    tokens: list[int]
    blocks: list[int]
    num_computed: int
    ended: int = 0
    logprobs: list[Any] = field(default_factory=list)


def limits(**changes: int) -> Limits:
    """Small limits, with changes."""
    values = {
        "max_slots": 8,
        "max_len": 128,
        "block_size": 16,
        "num_blocks": 128,
        "max_batched_tokens": 512,
        "max_horizon": 8,
    }
    return Limits(**{**values, **changes})


class Device:
    """A model with its rows, and the smallest scheduler that can drive them."""

    def __init__(
        self,
        path: Path,
        dtype: torch.dtype = torch.float32,
        padding: Padding | None = None,
        place: torch.device = CPU,
        model_impl: str = "native",
        **changes: int,
    ) -> None:
        """With `padding`, batches are padded; a CUDA device runs such ones from graphs."""
        self.limits = limits(**changes)
        self.files = open_model(path, "auto", 0, model_impl, dtype)
        self.cache = KVCache(self.files.config, self.limits.num_blocks, self.limits.block_size, dtype, place)
        self.model = (self.files.build or Llama)(
            self.files.config,
            self.files.weights(),
            self.cache,
            dtype=dtype,
            device=place,
            vocab_size=self.files.vocab_size,
            max_len=self.limits.max_len,
        )
        self.place = place
        self.rows = Rows(self.limits, place)
        self.stager = Stager(self.limits, place, NUM_BUFFERS, padding)
        graphs = padding if place.type == "cuda" else None
        swapped = host_memory(*self.cache.pool.shape[::2], self.limits.num_host_blocks, place)
        host = HostPool(self.cache, swapped)
        self.runner = Runner(self.model, self.cache, self.rows, self.limits, NUM_BUFFERS, graphs, host)
        self.logits: list[torch.Tensor] = []
        draw = self.runner._draw

        def recorded(logits: torch.Tensor, *rest: Any, **more: Any) -> None:
            if place.type == "cpu" or not torch.cuda.is_current_stream_capturing():
                self.logits.append(logits.to(CPU, copy=True))
            draw(logits, *rest, **more)

        self.runner._draw = recorded  # type: ignore[method-assign]
        self.free = list(range(self.limits.num_blocks))
        self.sequences: dict[int, Sequence_] = {}
        self.step_id = 0
        self.pending = worker_pb2.Step()

    # -------------------------------------------------------------------------------- planning

    def add(
        self,
        slot: int,
        tokens: Sequence[int],
        *,
        num_prompt: int | None = None,
        num_computed: int = 0,
        blocks: Sequence[int] = (),
        last_position: int | None = None,
        **sampling: Any,
    ) -> Sequence_:
        """Put a sequence into a slot with the next step; `blocks` are those that it shares."""
        sequence = Sequence_(slot, list(tokens), list(blocks), num_computed)
        self.grow(sequence, len(tokens), append=False)
        self.sequences[slot] = sequence
        self.pending.new_rows.add(
            slot=slot,
            tokens=tokens,
            num_prompt_tokens=len(tokens) if num_prompt is None else num_prompt,
            num_computed=num_computed,
            blocks=sequence.blocks,
            last_position=self.limits.max_len if last_position is None else last_position,
            sampling=worker_pb2.RowSampling(**sampling),
        )
        return sequence

    def fork(self, slot: int, parent: int, **sampling: Any) -> None:
        """Make a slot a copy of `parent` with the next step, in which it samples its first token."""
        self.pending.new_rows.add(
            slot=slot,
            parent_slot=parent,
            num_prompt_tokens=len(self.sequences[parent].tokens),
            last_position=self.limits.max_len,
            sampling=worker_pb2.RowSampling(**sampling),
        )

    def grow(self, sequence: Sequence_, num_tokens: int, append: bool = True) -> None:
        """Give a sequence blocks for `num_tokens` tokens."""
        while len(sequence.blocks) * self.limits.block_size < num_tokens:
            block = self.free.pop()
            sequence.blocks.append(block)
            if append:
                self.pending.append_slots.append(sequence.slot)
                self.pending.append_blocks.append(block)

    def release(self, slot: int) -> None:
        """Free a slot and its blocks with the next step."""
        self.pending.released_slots.append(slot)
        self.free.extend(self.sequences.pop(slot).blocks)

    def launch(self, chunks: dict[int, int], m: int = 1) -> tuple[list[int], StepOutputs]:
        """Run one step over slots, each with its number of tokens, and read nothing.

        Returns:
            The sampling slots in order, and the outputs for `read`.
        """
        step, self.pending = self.pending, worker_pb2.Step()
        step.epoch, step.step_id, step.num_iterations = 1, self.step_id, m
        self.step_id += 1
        parents = {row.slot: row.parent_slot for row in step.new_rows if row.HasField("parent_slot")}
        sampling = []
        for slot, count in chunks.items():
            if slot in parents:
                sampling.append(slot)
                continue
            sequence = self.sequences[slot]
            sequence.num_computed += count + m - 1
            if sequence.num_computed >= len(sequence.tokens):
                sampling.append(slot)
        if any(count != 1 for count in chunks.values()):
            step.num_tokens.extend(chunks.values())
        step.slots.extend(chunks)
        with torch.inference_mode():
            staged = self.stager.stage(step)
            self.runner.grammars.change(step.released_slots, self.runner.grammars.prepare(step))
            outputs = self.runner.run(*staged)
        for slot, parent in parents.items():
            source = self.sequences[parent]
            self.sequences[slot] = Sequence_(
                slot, list(source.tokens), list(source.blocks), source.num_computed
            )
        return sampling, outputs

    def read(self, sampling: list[int], outputs: StepOutputs) -> worker_pb2.StepResult:
        """Take a step's result and append its tokens to the sequences."""
        if self.place.type == "cuda":
            torch.cuda.synchronize()
        result = collect(1, 0, outputs)
        iterations = 0 if outputs.drawn is None else len(outputs.drawn)
        counts = list(result.num_sampled) or [iterations] * len(sampling)
        assert len(counts) == len(sampling) and sum(counts) == len(result.tokens)
        tokens = iter(result.tokens)
        for slot, count in zip(sampling, counts, strict=True):
            self.sequences[slot].tokens.extend(next(tokens) for _ in range(count))
        for row, reason in zip(result.ended_rows, result.ended_reasons, strict=True):
            self.sequences[sampling[row]].ended = reason
        return result

    def step(self, chunks: dict[int, int], m: int = 1) -> worker_pb2.StepResult:
        """`launch` and `read`."""
        return self.read(*self.launch(chunks, m))

    def decode(self, slots: Sequence[int], num_steps: int, m: int = 1) -> None:
        """Decode steps over slots, growing their blocks as needed."""
        for _ in range(num_steps):
            for slot in slots:
                self.grow(self.sequences[slot], self.sequences[slot].num_computed + m)
            self.step(dict.fromkeys(slots, 1), m)

    def generate(self, slot: int, prompt: Sequence[int], num_new: int, **sampling: Any) -> list[int]:
        """Prefill one prompt at once, decode, free the slot; the new tokens."""
        sequence = self.add(slot, prompt, **sampling)
        self.step({slot: len(prompt) - sequence.num_computed})
        self.decode([slot], num_new - 1)
        self.release(slot)
        return sequence.tokens[len(prompt) :]


def prompt(length: int, seed: int = 0) -> list[int]:
    """Random token ids."""
    generator = torch.Generator().manual_seed(seed * 1000 + length)
    return torch.randint(3, VOCAB, (length,), generator=generator).tolist()


@torch.inference_mode()
def reference_logits(model: transformers.PreTrainedModel, tokens: Sequence[int]) -> torch.Tensor:
    """float32[len(tokens), vocab]: transformers' logits after each token."""
    return model(torch.tensor([list(tokens)])).logits[0].float()
