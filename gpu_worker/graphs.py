"""CUDA graphs of whole iterations, one for each padded shape: captured once, replayed for every step.

A launch from Python costs the host about ten times what it costs the device; a graph is one launch for
everything between the staged block and the drawn tokens. Its inputs are a block at a fixed place (see
`gpu_worker.batch`), everything else it reads stays where it is: weights, KV memory and rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum, auto

import torch

from gpu_worker.batch import Inputs, Padding, Shape, padding_alone, unpack
from gpu_worker.slots import Rows
from gpu_worker.staging import Batch
from kernels.ranks import Ranks, alone

# Graphs without which a worker is not ready.
NUM_FIRST = 4
# A batch whose graph is missing runs without until its shape has come so often: capturing takes several times
# as long as a step, and under load others wait for it.
PATIENCE = 3

Compute = Callable[[Inputs, torch.Tensor], torch.Tensor]
Draw = Callable[[torch.Tensor, Inputs, Shape], None]


class Part(Enum):
    """What of an iteration a graph holds."""

    LOGITS = auto()  # all before sampling
    WHOLE = auto()
    MASKED = auto()  # the whole, within the masks of grammars


DRAWING = (Part.WHOLE, Part.MASKED)


@dataclass(frozen=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    inputs: Inputs
    logits: torch.Tensor


class Graphs:
    """Captured iterations by shape, sharing one pool of memory, one block of inputs and one of logits."""

    def __init__(
        self,
        compute: Compute,
        draws: Mapping[Part, Draw],
        rows: Rows,
        padding: Padding,
        num_logits: int,
        device: torch.device,
        ranks: Ranks | None = None,
    ) -> None:
        """`compute` goes from inputs to logits, `num_logits` of a row; `draws` sample from them where no row
        asks for more than a temperature, a seed and a grammar; `padding` says which shapes will come."""
        self._compute, self._draws, self._rows, self._ranks = compute, draws, rows, ranks
        self._captured: dict[tuple[Shape, Part], _Captured] = {}
        self._pool = torch.cuda.graph_pool_handle()
        shapes = padding.shapes()
        self._shapes = frozenset(shapes)
        self._missed: Counter[tuple[Shape, Part]] = Counter()
        size = max((shape.size for shape in shapes), default=0)
        self._block = torch.zeros(size, dtype=torch.int32, device=device)
        # Were each graph's its own, those of a hundred graphs would take as much memory as a model.
        most = max((shape.samples for shape in shapes), default=0)
        self._logits = torch.empty(most, num_logits, dtype=torch.float32, device=device)
        # The first are those without which nothing should be served. Then the largest first: what they leave
        # in the pool, the smaller ones use again.
        rest = sorted(shapes[NUM_FIRST:], key=lambda s: s.tokens, reverse=True)
        self._wanted = [*shapes[:NUM_FIRST], *rest]

    @property
    def num_wanted(self) -> int:
        """Shapes that are still to be captured ahead of their use."""
        return len(self._wanted)

    def capture_next(self) -> Shape | None:
        """Capture the next shape, the smallest decodes first; None when all are there."""
        while self._wanted:
            shape = self._wanted.pop(0)
            if (shape, Part.WHOLE) not in self._captured:
                self.capture(shape)
                return shape
        return None

    def takes(self, batch: Batch, part: Part) -> bool:
        """Whether a graph is to run this part of a batch: it is there, or worth its capture by now."""
        key = batch.shape, part
        if key in self._captured:
            return True
        if batch.shape not in self._shapes:
            return False
        self._missed[key] += 1
        return self._missed[key] >= PATIENCE

    def load(self, batch: Batch) -> Inputs:
        """Put a batch where the graphs of its shape read it."""
        return self._load(batch, Part.LOGITS).inputs

    def replay(self, batch: Batch, part: Part) -> None:
        """Run all iterations of a batch, sampling included."""
        graph = self._load(batch, part).graph
        for _ in range(batch.num_iterations):
            graph.replay()

    def replay_logits(self, shape: Shape) -> torch.Tensor:
        """Run one iteration of the loaded batch up to its logits, which hold good until the next replay."""
        captured = self._captured[shape, Part.LOGITS]
        captured.graph.replay()
        return captured.logits

    def _load(self, batch: Batch, part: Part) -> _Captured:
        if (batch.shape, part) not in self._captured:
            self.capture(batch.shape, part)
        self._block[: batch.shape.size].copy_(batch.block, non_blocking=True)
        return self._captured[batch.shape, part]

    def capture(self, shape: Shape, part: Part = Part.WHOLE) -> None:
        """Capture a shape now, or anew, over padding alone, which changes no row."""
        rows = self._rows
        block = self._block[: shape.size]
        inputs = unpack(block, shape, rows.iota)

        def iteration() -> torch.Tensor:
            logits = self._compute(inputs, self._logits[: shape.samples])
            if part in self._draws:
                self._draws[part](logits, inputs, shape)
            return logits

        # Once outside the capture: kernels are compiled and libraries make their workspaces there.
        block.copy_(torch.from_numpy(padding_alone(shape, rows.state.padding_slot)))
        with alone(self._ranks):
            iteration()
        torch.cuda.current_stream().synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            logits = iteration()
        self._captured[shape, part] = _Captured(graph, inputs, logits)
