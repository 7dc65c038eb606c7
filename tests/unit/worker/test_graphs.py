"""When a graph is captured, as far as that can be seen without a device."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gpu_worker.batch import Inputs, Padding, Shape
from gpu_worker.graphs import PATIENCE, Graphs, Part

PADDING = Padding.for_graphs(max_slots=8, max_tokens=512)


def batch(shape: Shape) -> Any:
    return SimpleNamespace(shape=shape)


def test_a_missing_graph_is_captured_when_its_shape_keeps_coming(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    nothing: Any = None
    graphs = Graphs(nothing, nothing, nothing, PADDING, 64, torch.device("cpu"))
    often, once = batch(PADDING.decodes(3)), batch(PADDING.decodes(1))
    for part in Part:  # graphs of their own, each of which is missed by itself
        assert [graphs.takes(often, part) for _ in range(PATIENCE)] == [False] * (PATIENCE - 1) + [True]
    assert not graphs.takes(once, Part.WHOLE)
    exact = batch(Shape(9, 9, 9))
    assert not any(graphs.takes(exact, Part.WHOLE) for _ in range(2 * PATIENCE))


def test_all_graphs_write_their_logits_to_one_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits that each graph held for itself took gigabytes, more with every shape that was captured."""
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", lambda *_, **__: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(synchronize=lambda: None))
    asked: list[torch.Tensor] = []

    def compute(inputs: Inputs, out: torch.Tensor) -> torch.Tensor:
        assert out.shape == (len(inputs.sample_slots), 64) and out.dtype == torch.float32
        asked.append(out)
        return out

    rows: Any = SimpleNamespace(iota=torch.arange(10), state=SimpleNamespace(padding_slot=8))
    graphs = Graphs(compute, {}, rows, PADDING, 64, torch.device("cpu"))
    while graphs.capture_next() is not None:
        pass
    assert {len(out) for out in asked} == {shape.samples for shape in PADDING.shapes()}
    assert len({out.data_ptr() for out in asked}) == 1
