"""Models of the hubs: the caches that Hugging Face's and ModelScope's tools keep, and downloads into them.

A copy counts when it is complete: a download that was interrupted is taken up again, not served.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

TOKENIZERS = ("tokenizer.json", "qwen.tiktoken", "tokenizer.model", "vocab.json")
# Other forms of the same weights, which Pagoda does not read.
UNUSED = ["*.bin", "*.pt", "*.pth", "*.onnx", "*.h5", "*.msgpack", "*.gguf", "*.ot", "original/*", "onnx/*"]
SPARE_BYTES = 1 << 30  # left free on the disk, for whatever else runs there


class DownloadError(OSError):
    """A model cannot be downloaded; the message says why."""


def is_complete(folder: Path) -> bool:
    """Whether a folder holds a configuration, a tokenizer and every file of its weights."""
    if not (folder / "config.json").is_file() or not any((folder / name).is_file() for name in TOKENIZERS):
        return False
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        parts = set(json.loads(index.read_text())["weight_map"].values())
        return all((folder / part).is_file() for part in parts)
    return any(folder.glob("*.safetensors"))


def find(repo_id: str, revision: str | None = None) -> Path | None:
    """The folder of a complete copy in one of the caches, None when there is none."""
    candidates = [*_in_modelscope(repo_id, revision), *_in_huggingface(repo_id, revision)]
    return next((folder for folder in candidates if is_complete(folder)), None)


def huggingface_cache() -> Path:
    """Where Hugging Face's tools keep models."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if os.environ.get(name):
            return Path(os.environ[name]).expanduser()
    home = os.environ.get("HF_HOME") or _user_cache() / "huggingface"
    return Path(home).expanduser() / "hub"


def modelscope_cache() -> Path:
    """Where ModelScope's tools keep models: `MODELSCOPE_CACHE`, else a folder in the home."""
    return Path(os.environ.get("MODELSCOPE_CACHE") or Path.home() / ".cache" / "modelscope").expanduser()


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def _in_huggingface(repo_id: str, revision: str | None) -> Iterator[Path]:
    repo = huggingface_cache() / f"models--{repo_id.replace('/', '--')}"
    yield from _snapshots(repo, revision or "main", any_of_them=revision is None)


def _in_modelscope(repo_id: str, revision: str | None) -> Iterator[Path]:
    """Every layout that its releases have used; a dot in a name became ___ in some."""
    root, (owner, _, name) = modelscope_cache(), repo_id.partition("/")
    repo = root / "models" / f"{owner}--{name}"
    yield from _snapshots(repo, revision or "master", any_of_them=revision is None)
    for base in (root / "models", root / "hub" / "models", root / "hub", root):
        for spelling in dict.fromkeys((name.replace(".", "___"), name)):
            yield base / owner / spelling


def _snapshots(repo: Path, revision: str, any_of_them: bool) -> Iterator[Path]:
    ref = repo / "refs" / revision
    yield repo / "snapshots" / (ref.read_text().strip() if ref.is_file() else revision)
    if any_of_them and (repo / "snapshots").is_dir():
        yield from sorted((repo / "snapshots").iterdir(), key=lambda s: s.stat().st_mtime, reverse=True)


# ------------------------------------------------------------------------------------------- downloads


@dataclass(frozen=True)
class Hub:
    """A hub: its package, where it puts files, what a download takes in bytes, and the download."""

    name: str
    package: str
    cache: Callable[[], Path]
    cache_variable: str
    size: Callable[[str, str | None], int]
    fetch: Callable[[str, str | None], str]


def download(ids: dict[str, str], revision: str | None = None) -> Path:
    """Get a model from the first hub of `ids` (hub's name: id there) that can be reached; its folder.

    Says on standard error where the files go; the hub's package shows the progress.

    Raises:
        DownloadError: no hub gave it; the message has each one's reason.
    """
    reasons = []
    for hub in HUBS:
        if hub.name not in ids:
            continue
        if importlib.util.find_spec(hub.package) is None:
            reasons.append(f"{hub.name}: the package {hub.package} is not installed")
            continue
        try:
            return _from(hub, ids[hub.name], revision)
        except Exception as error:  # each package has its own tree of errors, and its HTTP client's
            reasons.append(f"{hub.name}: {_reason(error)}")
    raise DownloadError("; ".join(reasons))


def check_room(folder: Path, needed: int, cache_variable: str) -> None:
    """Refuse a download that the disk of `folder`, which need not exist yet, has no room for.

    Raises:
        DownloadError: with both sizes, and what to set to use another disk.
    """
    existing = next(p for p in (folder, *folder.resolve().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if needed + SPARE_BYTES > free:
        raise DownloadError(
            f"{_gb(needed)} are needed in {folder} and {_gb(SPARE_BYTES)} to spare, but {_gb(free)} are free;"
            f" set {cache_variable} to a folder on another disk"
        )


def _from(hub: Hub, repo_id: str, revision: str | None) -> Path:
    needed, folder = hub.size(repo_id, revision), hub.cache()
    check_room(folder, needed, hub.cache_variable)
    print(f"downloading {repo_id} from {hub.name} into {folder}: {_gb(needed)}", file=sys.stderr, flush=True)
    copy = Path(hub.fetch(repo_id, revision))
    if not is_complete(copy):
        raise DownloadError(f"{repo_id} has no safetensors with a configuration and a tokenizer (in {copy})")
    return copy


def _huggingface_size(repo_id: str, revision: str | None) -> int:
    from huggingface_hub import snapshot_download

    files = snapshot_download(repo_id, revision=revision, ignore_patterns=UNUSED, dry_run=True)
    return sum(file.file_size or 0 for file in files if file.will_download)


def _huggingface_fetch(repo_id: str, revision: str | None) -> str:
    from huggingface_hub import snapshot_download

    return snapshot_download(repo_id, revision=revision, ignore_patterns=UNUSED)


def _modelscope_size(repo_id: str, revision: str | None) -> int:
    from fnmatch import fnmatch

    from modelscope.hub.api import HubApi

    files = HubApi().get_model_files(repo_id, revision=revision, recursive=True)
    wanted = [file for file in files if not any(fnmatch(file["Path"], pattern) for pattern in UNUSED)]
    return sum(file.get("Size") or 0 for file in wanted)


def _modelscope_fetch(repo_id: str, revision: str | None) -> str:
    from modelscope import snapshot_download

    return str(snapshot_download(repo_id, revision=revision, ignore_file_pattern=UNUSED))


HUBS = (
    Hub(
        *("ModelScope", "modelscope", modelscope_cache, "MODELSCOPE_CACHE"),
        *(_modelscope_size, _modelscope_fetch),
    ),
    Hub(
        *("Hugging Face", "huggingface_hub", huggingface_cache, "HF_HOME"),
        *(_huggingface_size, _huggingface_fetch),
    ),
)


def _reason(error: BaseException) -> str:
    """The innermost cause, in one line: what lies around it repeats that something went wrong."""
    inner: BaseException | None = error
    while inner is not None:
        error = inner
        held = (error.__cause__, getattr(error, "reason", None), *error.args)
        inner = next((cause for cause in held if isinstance(cause, BaseException)), None)
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB"
