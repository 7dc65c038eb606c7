"""One step on the device: gather, forward, sample, scatter, as many times as the step says."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial

import torch

from gpu_worker.batch import Inputs, Padding, Shape, padding_alone, unpack
from gpu_worker.beams import Beams
from gpu_worker.grammar import Grammars
from gpu_worker.graphs import DRAWING, NUM_FIRST, Draw, Graphs, Part
from gpu_worker.host_pool import HostPool, Moment
from gpu_worker.kv_cache import KVCache
from gpu_worker.models.decoder import Decoder, whole
from gpu_worker.prompt_logprobs import Wanted, report, with_told
from gpu_worker.slots import Rows
from gpu_worker.staging import Batch, Diff, Limits
from kernels.beams import candidates
from kernels.ranks import Ranks, alone
from kernels.rows import Masks, accept, fork, hold, note
from kernels.sample import Features, SampledLogprobs, allow, raw_logprobs, sample


@dataclass
class StepOutputs:
    """What a step drew; one entry an iteration, R sampling rows in each."""

    num_logprobs: list[int]
    """For each sampling row, -1 where it wants none."""
    drawn: torch.Tensor | None = None
    """int32[m, 2, R] in host memory: tokens and outcomes, see `kernels.rows.accept`; None without rows that
    sample."""
    logprobs: list[SampledLogprobs] = field(default_factory=list)
    """On the device."""
    found: torch.Tensor | None = None
    """Candidates of searches, int32[3, E] in host memory; see `kernels.beams.candidates`."""
    alternatives: tuple[list[int], torch.Tensor, torch.Tensor] | None = None
    """For each beam -1 where it wants none, and what is there for all, on the device."""
    prompts: tuple[Wanted, SampledLogprobs] | None = None
    """Prompt tokens that were to be reported on, and their logprobs, on the device."""
    swaps: tuple[Moment, Moment] | None = None
    """When its swaps began and ended."""


class Runner:
    """The model, its KV memory and the rows, driven by staged steps. It never reads the device.

    Attributes:
        grammars: which tokens rows may draw, where they follow a grammar.
        padding: to what sizes batches are to be padded.
        graphs: captured iterations; None without any padding, as on a CPU.
    """

    def __init__(
        self,
        model: Decoder,
        cache: KVCache,
        rows: Rows,
        limits: Limits,
        num_buffers: int,
        padding: Padding | None = None,
        host: HostPool | None = None,
    ) -> None:
        """`num_buffers` is one more than the steps that may be in flight; `padding` asks for graphs."""
        self._host = host
        self._model, self._cache, self._rows = model, cache, rows
        device = rows.state.tokens.device
        on_device = device.type != "cpu"
        size = 2 * limits.max_horizon * limits.max_slots
        # Results leave the device through a ring, so that a step may be read while the next one runs.
        self._drawn = torch.zeros(size, dtype=torch.int32, device=device)
        self._ring = [
            torch.empty(size, dtype=torch.int32, pin_memory=True) if on_device else None
            for _ in range(num_buffers if on_device else 1)
        ]
        self._turn = 0
        self.grammars = Grammars(model.vocab_size, limits.max_slots, device)
        self.padding = padding or Padding()
        self.graphs: Graphs | None = None
        if padding is not None:
            draws: dict[Part, Draw] = {part: partial(self._draw_part, part) for part in DRAWING}
            sizes = self.padding, model.num_logits, device
            self.graphs = Graphs(self._compute, draws, rows, *sizes, model.ranks)

    def capture_first(self) -> None:
        """Capture the graphs without which nothing should be served."""
        if self.graphs is not None:
            for _ in range(NUM_FIRST):
                self.graphs.capture_next()

    def rehearse(self, shape: Shape) -> None:
        """Run an iteration over padding alone, outside any graph: it changes nothing, compiles what it needs
        and takes the memory that a real one takes."""
        block = torch.from_numpy(padding_alone(shape, self._rows.state.padding_slot))
        inputs = unpack(block.to(self._drawn.device), shape, self._rows.iota)
        with alone(self._model.ranks):
            logits = self._compute(inputs)
            for part in DRAWING:
                self._draw_part(part, logits, inputs, shape)

    def rehearse_diff(self) -> None:
        """Change nothing in every way in which a step may change rows and blocks."""
        self._rows.rehearse(self._cache.tensors)

    def run(self, diff: Diff, batch: Batch) -> StepOutputs:
        """Apply a step and run its iterations."""
        outputs = StepOutputs(batch.num_logprobs)
        if self._host is not None and (diff.swap_out or diff.swap_in):
            begun = self._host.out(diff.swap_out)
            self._rows.apply(diff, self._cache.tensors)
            outputs.swaps = begun, self._host.back(diff.swap_in)
        else:
            self._rows.apply(diff, self._cache.tensors)
        if not batch.shape.tokens:
            return outputs
        part = Part.LOGITS
        if batch.features == Features(any_random=batch.features.any_random) and batch.beams is None:
            part = Part.MASKED if batch.constrained else Part.WHOLE
        self.grammars.begin(batch.constrained)
        graphs = self.graphs if batch.forks is None and batch.prompts is None else None
        if graphs is not None and not graphs.takes(batch, part):
            graphs = None
        drawn = self._drawn_view(batch.num_drawing, batch.num_iterations)
        if graphs is not None and part is not Part.LOGITS:
            graphs.replay(batch, part)
        else:  # a graph is cut before sampling where rows use more than one knows how to draw
            inputs = graphs.load(batch) if graphs else unpack(batch.block, batch.shape, self._rows.iota)
            for i in range(batch.num_iterations):
                if graphs is None:
                    logits = self._advance(inputs, batch, outputs)
                else:
                    logits = graphs.replay_logits(batch.shape)
                if logits is not None and batch.draws:
                    self._draw_as_asked(i, logits, inputs, batch, drawn, outputs)
        if batch.num_logprobs:
            outputs.drawn = self._leave(drawn)[:, :, : len(batch.num_logprobs)]
        return outputs

    def _drawn_view(self, num_rows: int, num_iterations: int) -> torch.Tensor:
        return self._drawn[: num_iterations * 2 * num_rows].view(num_iterations, 2, num_rows)

    def _leave(self, drawn: torch.Tensor) -> torch.Tensor:
        """A copy in host memory, there when the work queued so far is done."""
        self._turn = (self._turn + 1) % len(self._ring)
        target = self._ring[self._turn]
        if target is None:
            return drawn.clone()
        return target[: drawn.numel()].view(drawn.shape).copy_(drawn, non_blocking=True)

    def _advance(self, inputs: Inputs, batch: Batch, outputs: StepOutputs) -> torch.Tensor | None:
        """An iteration outside any graph, up to its logits; None where nobody draws from them."""
        if batch.prompts is None:
            hidden = self._forward(inputs, batch.table_width)
        else:
            every = self._forward(with_told(inputs, batch.prompts), batch.table_width)
            hidden, logprobs = report(self._model, self._rows.state.tokens, *every, batch.prompts)
            outputs.prompts = batch.prompts, logprobs
        if batch.forks is not None:
            fork(self._rows.state, *batch.forks)
        return self._model.logits(*hidden) if batch.draws else None

    def _forward(self, inputs: Inputs, table_width: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self._model.forward(*self._rows.gather(inputs, self._model.rotations, table_width))

    def _compute(self, inputs: Inputs, out: torch.Tensor | None = None) -> torch.Tensor:
        """Inputs to logits, `out` where given: what a graph captures."""
        return self._model.logits(*self._forward(inputs, self._rows.state.block_tables.shape[1]), out)

    def _draw_part(self, part: Part, logits: torch.Tensor, inputs: Inputs, shape: Shape) -> None:
        """Logits to tokens in the rows: what a graph of this part captures after that."""
        drawn = self._drawn_view(shape.samples, len(self._drawn) // (2 * shape.samples))
        masks, ranks = None, self._model.ranks
        if part is Part.MASKED:
            logits, masks, ranks = whole(self._model, logits), self._masks(), None
        self._draw(logits, inputs, Features(any_random=True), drawn, StepOutputs([]), masks, ranks)

    def _draw_as_asked(
        self, i: int, logits: torch.Tensor, inputs: Inputs, batch: Batch, drawn: torch.Tensor,
        outputs: StepOutputs,
    ) -> None:  # fmt: skip
        """Iteration `i` from logits to tokens; logprobs are the model's own, whatever a grammar allows.

        Ranks exchange what they do in a graph of the same batch: not all of them need have it.
        """
        if batch.beams is None and not batch.constrained:
            ranks = self._model.ranks
            self._draw(logits, inputs, batch.features, drawn, outputs, ranks=ranks)
            return
        logits = whole(self._model, logits)
        if batch.beams is not None:
            self._find(logits, batch.beams, outputs)
        if batch.drawing is not None:
            if not batch.num_logprobs:
                return
            places, slots = batch.drawing
            logits, inputs = logits.index_select(0, places), replace(inputs, sample_slots=slots)
        if not batch.constrained:
            self._draw(logits, inputs, batch.features, drawn, outputs)
            return
        most = batch.features.max_logprobs
        allowed = logits if most < 0 else logits.clone()
        self.grammars.settle()
        features = replace(batch.features, max_logprobs=-1)
        self._draw(allowed, inputs, features, drawn, outputs, self._masks())
        if most >= 0:
            raw = logits[:, : self._model.vocab_size].float()
            outputs.logprobs.append(raw_logprobs(raw, drawn[i, 0], most))

    def _masks(self) -> Masks:
        """Those of grammars. A row that one rank's host is late for sits the iteration out on all."""
        masks, ranks = self.grammars.masks, self._model.ranks
        if ranks is None:
            return masks
        ready = masks.num_tokens.to(self._drawn.device, non_blocking=True)
        told = ranks.gathered(ready.view(torch.float32).unsqueeze(0)).view(torch.int32)
        return replace(masks, num_tokens=told.view(ranks.size, -1).amin(0))

    def _find(self, logits: torch.Tensor, beams: Beams, outputs: StepOutputs) -> None:
        """The candidates of a step's searches."""
        rows = beams.slots, beams.scores, self._rows.state, self._model.vocab_size
        found, tops = candidates(
            logits.index_select(0, beams.rows), *rows, beams.features, beams.num_stops, beams.searches
        )
        # Pinned memory is torch's, which uses none again before the copy into it is done.
        outputs.found = torch.empty(found.shape, dtype=found.dtype, pin_memory=found.is_cuda)
        outputs.found.copy_(found, non_blocking=True)
        if tops is not None:
            outputs.alternatives = beams.num_logprobs, *tops

    def _draw(
        self, logits: torch.Tensor, inputs: Inputs, features: Features, drawn: torch.Tensor,
        outputs: StepOutputs, masks: Masks | None = None, ranks: Ranks | None = None,
    ) -> None:  # fmt: skip
        """Logits, with `ranks` this rank's share of them, to tokens in the rows."""
        state = self._rows.state
        slots = takers = inputs.sample_slots
        if masks is not None:
            takers, of_row = hold(state, slots, masks)
            allow(logits, of_row, masks.bits)
        history = state.tokens, state.num_tokens, state.num_prompt
        sampled = sample(logits, slots, state.columns, *history, self._model.vocab_size, features, ranks)
        accept(state, takers, sampled.token_ids, sampled.finite, inputs.iteration, drawn)
        if masks is not None:
            note(state, slots, of_row, sampled.token_ids, masks)
        if sampled.logprobs is not None:
            outputs.logprobs.append(sampled.logprobs)
