"""Pagoda's Python SDK.

    import pagoda

    with pagoda.Client("127.0.0.1:8001") as client:
        print(client.chat([{"role": "user", "content": "What is the capital of France?"}]).text)

Names are loaded when they are first used, so that importing `pagoda.v1`, the generated messages, pulls in
nothing but protobuf.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pagoda.aio import AsyncClient, AsyncStream
    from pagoda.client import Client, Stream
    from pagoda.errors import (
        AlreadyExists,
        Cancelled,
        DeadlineExceeded,
        InvalidRequest,
        NotFound,
        Overloaded,
        PagodaError,
        ServerError,
        Unauthenticated,
        Unavailable,
    )
    from pagoda.types import Chunk, Completion, Model, Sample, TokenLogprob, Usage

__version__ = "0.1.0"
__all__ = [
    "AlreadyExists",
    "AsyncClient",
    "AsyncStream",
    "Cancelled",
    "Chunk",
    "Client",
    "Completion",
    "DeadlineExceeded",
    "InvalidRequest",
    "Model",
    "NotFound",
    "Overloaded",
    "PagodaError",
    "Sample",
    "ServerError",
    "Stream",
    "TokenLogprob",
    "Unauthenticated",
    "Unavailable",
    "Usage",
]

_HOMES = {
    "AsyncClient": "pagoda.aio",
    "AsyncStream": "pagoda.aio",
    "Client": "pagoda.client",
    "Stream": "pagoda.client",
    **dict.fromkeys(("Chunk", "Completion", "Model", "Sample", "TokenLogprob", "Usage"), "pagoda.types"),
}


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module(_HOMES.get(name, "pagoda.errors")), name)
    raise AttributeError(f"module 'pagoda' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
