"""Tiny models of other architectures, made once a session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.other_models import other_model

Other = Callable[[str], tuple[Any, Path]]


@pytest.fixture(scope="session", autouse=True)
def _one_torch_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def other(tmp_path_factory: pytest.TempPathFactory) -> Other:
    """Makes a tiny model of a kind: transformers' own, which ends at no token, and its folder."""
    made: dict[str, tuple[Any, Path]] = {}

    def make(kind: str) -> tuple[Any, Path]:
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            model = other_model(kind, folder)
            model.generation_config.eos_token_id = None
            made[kind] = model, folder
        return made[kind]

    return make
