"""The calls of ms-swift's vLLM guide, answered by Pagoda: change one import, keep the program.

    from pagoda.swift import (
        ModelType, get_vllm_engine, get_default_template_type, get_template, inference_vllm
    )

`get_vllm_engine` starts a private cluster of Pagoda's three services, or joins the one that `PAGODA_URL`
names. See docs/swift.md. Names are loaded when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pagoda.swift.engine import Engine, get_vllm_engine
    from pagoda.swift.generation import VllmGenerationConfig
    from pagoda.swift.inference import inference_stream_vllm, inference_vllm
    from pagoda.swift.table import ModelType
    from pagoda.swift.templates import Template, get_default_template_type, get_template

__all__ = [
    "Engine",
    "ModelType",
    "Template",
    "VllmGenerationConfig",
    "get_default_template_type",
    "get_template",
    "get_vllm_engine",
    "inference_stream_vllm",
    "inference_vllm",
]

_HOMES = {
    **dict.fromkeys(("Engine", "get_vllm_engine"), "engine"),
    "VllmGenerationConfig": "generation",
    **dict.fromkeys(("inference_stream_vllm", "inference_vllm"), "inference"),
    "ModelType": "table",
    **dict.fromkeys(("Template", "get_default_template_type", "get_template"), "templates"),
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"pagoda.swift.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'pagoda.swift' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
