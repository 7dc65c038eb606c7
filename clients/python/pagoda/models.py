"""Where models lie on this machine: a name or a path becomes a folder or a GGUF file."""

from __future__ import annotations

import os
from pathlib import Path

from pagoda import hubs

EMBEDDED_MODEL = "smollm2-135m-instruct"


def cache_dir() -> Path:
    """Pagoda's cache: `PAGODA_CACHE`, else `pagoda` in the user's cache folder."""
    if "PAGODA_CACHE" in os.environ:
        return Path(os.environ["PAGODA_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "pagoda"


def resolve(model: str) -> Path:
    """The folder (safetensors, config, tokenizer) or GGUF file that `model` names.

    A path is taken as it is; a name is looked up under `cache_dir() / "models"`, and one like `owner/name`
    also in the caches of Hugging Face and ModelScope.

    Raises:
        FileNotFoundError: nothing is there; the message says where it was looked for and what to do.
    """
    path = Path(model).expanduser()
    if path.exists():
        return path
    cached = cache_dir() / "models" / model
    if cached.exists():
        return cached
    if model.count("/") == 1 and (downloaded := hubs.find(model)):
        return downloaded
    hint = "Run `make model` to get it." if model == EMBEDDED_MODEL else "Put a Hugging Face folder there."
    raise FileNotFoundError(f"model {model!r}: neither {path} nor {cached} exists. {hint}")


def served_name(model: str) -> str:
    """The name a model is served under when none is given: the last part of its path."""
    path = Path(model)
    return path.stem if path.suffix == ".gguf" else path.name
