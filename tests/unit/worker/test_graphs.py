"""When a graph is captured, as far as that can be seen without a device."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gpu_worker.batch import Padding, Shape
from gpu_worker.graphs import PATIENCE, Graphs

PADDING = Padding.for_graphs(max_slots=8, max_tokens=512)


def batch(shape: Shape) -> Any:
    return SimpleNamespace(shape=shape)


def test_a_missing_graph_is_captured_when_its_shape_keeps_coming(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    nothing: Any = None
    graphs = Graphs(nothing, nothing, nothing, PADDING, 64, torch.device("cpu"))
    often, once = batch(PADDING.decodes(3)), batch(PADDING.decodes(1))
    for is_plain in (True, False):  # two graphs, each of which is missed by itself
        assert [graphs.takes(often, is_plain) for _ in range(PATIENCE)] == [False] * (PATIENCE - 1) + [True]
    assert not graphs.takes(once, True)
    exact = batch(Shape(9, 9, 9))
    assert not any(graphs.takes(exact, True) for _ in range(2 * PATIENCE))
