"""The decoder that the worker runs: transformers' modules over its pages, in one of two ways.

Flat: all rows' tokens in one sequence, where attention goes through transformers' interface to ours. Row by
row, for models whose attention does not go through it or needs what ours cannot do (ALiBi, biases, masks of
their own): each row alone, its past read from the pages as transformers' cache.

Which of them is right for a model is tried before it is served: both have to give what the modules give by
themselves.
"""

from __future__ import annotations

import inspect
from typing import Any

import structlog
import torch

import kernels.cpu
from gpu_worker.kv_cache import KVCache
from gpu_worker.models.config import ModelConfig, ModelError
from hf_backend import attention
from hf_backend.pages import Pages, Row, paged_cache
from kernels.layer import Step

# How far logits may be from the modules' own, as a share of the largest.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}
# The trial: two rows and how their tokens are cut, between blocks out of order.
TRIAL_BLOCK = 16
TRIAL = (((3, 1), (13, 7, 1)), ((2, 0), (5, 4, 1)))


class TransformersModel:
    """See `gpu_worker.models.decoder.Decoder`; logits come out of the forward, so that every scaling and cap
    that a model has at its end is its own."""

    def __init__(
        self,
        config: ModelConfig,
        module: Any,
        cache: KVCache,
        *,
        dtype: torch.dtype,
        device: torch.device,
        vocab_size: int,
        max_len: int,
    ) -> None:
        """Move the modules to the device and find out how they run over pages.

        Raises:
            ModelError: they give other logits there than by themselves.
        """
        if device.type == "cpu":
            torch.set_num_threads(kernels.cpu.threads())  # it is torch that multiplies
        self.config, self.vocab_size, self.num_logits = config, vocab_size, config.vocab_size
        self.rotations, self.ranks = torch.zeros(0, device=device), None
        self._module, self._dtype, self._device = module.to(device), dtype, device
        names = inspect.signature(module.forward).parameters
        self._cache_name = "cache" if "cache" in names else "past_key_values"
        self._takes_positions = "position_ids" in names
        self._keeps_some_logits = "logits_to_keep" in names
        self._is_flat = False
        self._choose(min(sum(TRIAL[0][1]), max_len))
        self.use(cache)

    def use(self, cache: KVCache) -> None:
        """Read and write this cache from now on."""
        self._layers = [Pages(*pair) for pair in cache.layers]

    def forward(self, token_ids: torch.Tensor, step: Step) -> tuple[torch.Tensor, torch.Tensor]:
        """Run T tokens (int32[T]) and write their keys and values.

        Returns:
            float32[R, num_logits] of the wanted tokens, and nothing to add: [R, 0].
        """
        logits = self._flat(token_ids, step) if self._is_flat else self._row_by_row(token_ids, step)
        return logits, logits.new_empty(len(logits), 0)

    def logits(
        self, hidden: torch.Tensor, delta: torch.Tensor, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """What `forward` returned first, in `out` where given."""
        return hidden if out is None else out.copy_(hidden)

    def _flat(self, token_ids: torch.Tensor, step: Step) -> torch.Tensor:
        row = Row(step.slot_mapping)
        with attention.attending(attention.Batch(step, row)):
            return self._call(token_ids, step.positions, row, step.wanted)

    def _row_by_row(self, token_ids: torch.Tensor, step: Step) -> torch.Tensor:
        wanted = range(len(token_ids)) if step.wanted is None else step.wanted.tolist()
        logits = torch.zeros(len(wanted), self.num_logits, device=self._device)
        tables = step.block_tables if step.table_rows is None else step.block_tables[step.table_rows]
        starts = step.query_start.tolist()
        for i, length in enumerate(step.seq_lens.tolist()):
            first, end = starts[i], starts[i + 1]
            if first == end:
                continue
            row = Row(step.slot_mapping[first:end], tables[i], length)
            of = [place for place, token in enumerate(wanted) if first <= token < end]
            kept = torch.tensor([wanted[place] - first for place in of], device=self._device).long()
            logits[of] = self._call(token_ids[first:end], step.positions[first:end], row, kept)
        return logits

    def _call(
        self, token_ids: torch.Tensor, positions: torch.Tensor, row: Row, wanted: torch.Tensor | None
    ) -> torch.Tensor:
        """float32 logits of the wanted tokens, of all where that is None."""
        options: dict[str, Any] = {self._cache_name: paged_cache(self._layers, row)}
        if self._takes_positions:
            options["position_ids"] = positions.long().unsqueeze(0)
        if wanted is not None and self._keeps_some_logits:
            options["logits_to_keep"] = wanted
        logits = self._module(token_ids.long().unsqueeze(0), use_cache=True, **options).logits[0]
        if wanted is not None and not self._keeps_some_logits:
            logits = logits.index_select(0, wanted)
        return logits.float()

    @torch.inference_mode()
    def _choose(self, length: int) -> None:
        """Flat where that is right, else row by row where that is."""
        by_itself = self._module.config._attn_implementation
        rows = [torch.arange(min(sum(cut), length)) * 7 % self.config.vocab_size for _, cut in TRIAL]
        rows = [row.to(self._device) for row in rows]
        expected = [self._module(row.unsqueeze(0), use_cache=False).logits[0].float() for row in rows]
        reasons = []
        for self._is_flat, name in ((True, attention.NAME), (False, by_itself)):
            self._module.set_attn_implementation(name)
            if self._module.config._attn_implementation != name:
                reasons.append("its attention does not go through transformers' interface")
                continue
            try:
                reason = self._differs(rows, expected)
            except Exception as error:  # what a model's own code says of objects that it does not expect
                reason = f"{type(error).__name__}: {error}"
            if reason is None:
                how = "flat batches, paged attention" if self._is_flat else "row by row"
                log = structlog.get_logger().bind(service="worker")
                log.info("transformers runs the model", how=how, because=reasons)
                return
            reasons.append(reason)
        raise ModelError(
            f"{self.config.family}: transformers' modules do not give their own logits over pages: "
            f"flat: {reasons[0]}; row by row: {reasons[1]}"
        )

    def _differs(self, rows: list[torch.Tensor], expected: list[torch.Tensor]) -> str | None:
        """Run the trial; how its logits differ from those expected."""
        self.use(KVCache(self.config, 4, TRIAL_BLOCK, self._dtype, self._device))
        done = [0 for _ in rows]
        got: list[list[torch.Tensor]] = [[] for _ in rows]
        for turn in range(len(TRIAL[0][1])):
            counts = [
                min(cut[turn], len(row) - n) for (_, cut), row, n in zip(TRIAL, rows, done, strict=True)
            ]
            if not any(counts):
                break
            parts = [row[n : n + count] for row, n, count in zip(rows, done, counts, strict=True)]
            logits, _ = self.forward(torch.cat(parts).int(), self._trial_step(done, counts))
            for i, part in enumerate(logits.split(counts)):
                got[i].append(part)
                done[i] += counts[i]
        for parts, of in zip(got, expected, strict=True):
            error = float((torch.cat(parts) - of).abs().max() / of.abs().max())
            if not error <= TOLERANCE[self._dtype]:
                return f"logits differ by {error:.2g} of the largest"
        return None

    def _trial_step(self, done: list[int], counts: list[int]) -> Step:
        def tensor(values: Any, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.tensor(values, dtype=dtype, device=self._device)

        places: list[int] = []
        positions: list[int] = []
        starts = [0]
        for (blocks, _), n, count in zip(TRIAL, done, counts, strict=True):
            positions += range(n, n + count)
            places += [blocks[p // TRIAL_BLOCK] * TRIAL_BLOCK + p % TRIAL_BLOCK for p in range(n, n + count)]
            starts.append(starts[-1] + count)
        return Step(
            cos_sin=self.rotations,
            positions=tensor(positions),
            slot_mapping=tensor(places, torch.int64),
            block_tables=tensor([blocks for blocks, _ in TRIAL]),
            query_start=tensor(starts),
            seq_lens=tensor([n + count for n, count in zip(done, counts, strict=True)]),
        )
