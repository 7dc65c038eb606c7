"""Where a model type's files are: on this machine, or fetched from a hub."""

from __future__ import annotations

from pathlib import Path

from pagoda import hubs, models
from pagoda.swift.table import MODELS, entry_of, unknown


def folder_of(
    model_type: str,
    model_id_or_path: str | None = None,
    revision: str | None = None,
    may_download: bool = True,
) -> Path:
    """The model's folder or GGUF file: a path, Pagoda's cache, a hub's cache, or a download, in this order.

    Raises:
        InvalidRequest: `model_type` is not in the table and names no model on this machine either.
        FileNotFoundError: the model is not here and cannot be downloaded; says where it may be put.
    """
    named = model_id_or_path or model_type
    ids = _ids(model_type, model_id_or_path)
    try:
        if revision is None or named not in ids.values():  # else only that revision will do
            return models.resolve(named)
    except FileNotFoundError:
        if not ids and model_id_or_path:
            raise
    if not ids:
        raise unknown("model_type", model_type, list(MODELS))
    for repo_id in dict.fromkeys(ids.values()):
        if (folder := hubs.find(repo_id, revision)) is not None:
            return folder
    try:
        if not may_download:
            raise hubs.DownloadError("it is not looked for at the hubs")
        return hubs.download(ids, revision)
    except hubs.DownloadError as error:
        raise FileNotFoundError(_advice(named, ids, error)) from error


def _ids(model_type: str, model_id_or_path: str | None) -> dict[str, str]:
    """The model's id at each hub."""
    if model_id_or_path is not None:
        is_id = model_id_or_path.count("/") == 1 and not model_id_or_path.startswith(("/", ".", "~"))
        return dict.fromkeys(("ModelScope", "Hugging Face"), model_id_or_path) if is_id else {}
    entry = entry_of(model_type)
    return {"ModelScope": entry.modelscope, "Hugging Face": entry.huggingface} if entry else {}


def _advice(named: str, ids: dict[str, str], error: hubs.DownloadError) -> str:
    """What to do about a model that is neither here nor to be had."""
    owner, _, name = ids["ModelScope"].partition("/")
    places = [
        models.cache_dir() / "models" / named,
        hubs.modelscope_cache() / "models" / owner / name.replace(".", "___"),
        hubs.huggingface_cache() / f"models--{ids['Hugging Face'].replace('/', '--')}" / "snapshots" / "main",
    ]
    return (
        f"{named!r} is not on this machine and was not downloaded ({error}). Put its folder (config.json, "
        "the *.safetensors and the tokenizer's files) in one of these places, or give its path as "
        "model_id_or_path:\n" + "\n".join(f"  {place}" for place in places)
    )
