"""Services and a client that several modules ask for, each for itself."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from tests.support.cluster import Cluster, cluster


@pytest.fixture(scope="module")
def running() -> Iterator[Cluster]:
    """All three services, exact enough for a known answer."""
    with cluster(dtype="float32", worker_args=("--num-blocks", "512"), gateway_args=()) as services:
        yield services


@pytest.fixture(scope="module")
def sdk(running: Cluster) -> Iterator[openai.OpenAI]:
    """OpenAI's SDK as its users set it up for another server."""
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        yield client
