"""Models that the tests of this folder share, made once a session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from gpu_worker import graphs
from gpu_worker.batch import Padding
from tests.unit.worker import harness


@pytest.fixture(scope="session", autouse=True)
def _one_torch_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], tuple[transformers.PreTrainedModel, Path]]:
    """Makes a tiny model of a kind: transformers' own, and its folder."""
    made: dict[str, tuple[transformers.PreTrainedModel, Path]] = {}

    def make(kind: str) -> tuple[transformers.PreTrainedModel, Path]:
        if kind not in made:
            model = harness.reference_model(kind)
            made[kind] = model, harness.save(model, tmp_path_factory.mktemp(kind))
        return made[kind]

    return make


PADDING = Padding(rows=(4, 8), chunk_rows=(8,), chunk_tokens=(32, 64, 128), lean_rows=4, spare_tiles=8)
PLACES = ["cpu", "cpu padded", *(["cuda", "cuda graphs"] if torch.cuda.is_available() else [])]


@pytest.fixture(params=PLACES)
def device(
    tiny: Callable[[str], tuple[transformers.PreTrainedModel, Path]],
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> harness.Device:
    """A fresh hand-driven worker with a tiny Llama."""
    place, _, how = request.param.partition(" ")
    monkeypatch.setattr(graphs, "PATIENCE", 1)
    return harness.Device(tiny("llama")[1], padding=PADDING if how else None, place=torch.device(place))
