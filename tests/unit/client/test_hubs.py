"""Where models are found, and how they are downloaded: real folder layouts, the hubs' own packages."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pagoda import hubs, models
from pagoda.errors import InvalidRequest
from pagoda.swift.where import folder_of
from tests.support.hub_server import COMMIT, hub_server

FILES = {
    "config.json": b"{}",
    "tokenizer.json": b"{}",
    "model.safetensors": b"x" * 1000,
    "pytorch_model.bin": b"y" * 2000,
}
NOWHERE = "http://127.0.0.1:9"  # refuses connections


@pytest.fixture(autouse=True)
def _own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every cache is in the test's folder, and no hub is in reach."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "ms"))
    monkeypatch.setenv("PAGODA_CACHE", str(tmp_path / "pagoda"))
    monkeypatch.setenv("HF_ENDPOINT", NOWHERE)
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", NOWHERE)


def model_at(folder: Path, *without: str) -> Path:
    """A complete model's files in `folder`, but for `without`."""
    folder.mkdir(parents=True)
    for name, data in FILES.items():
        if name not in without:
            (folder / name).write_bytes(data)
    return folder


@pytest.mark.parametrize(
    "layout",
    [
        "models/qwen--Qwen1.5-7B-Chat/snapshots/master",
        "models/qwen/Qwen1___5-7B-Chat",
        "models/qwen/Qwen1.5-7B-Chat",
        "hub/models/qwen/Qwen1___5-7B-Chat",
        "hub/qwen/Qwen1___5-7B-Chat",
        "hub/qwen/Qwen1.5-7B-Chat",
        "qwen/Qwen1___5-7B-Chat",
        "qwen/Qwen1.5-7B-Chat",
    ],
)
def test_every_layout_of_a_modelscope_cache(tmp_path: Path, layout: str) -> None:
    folder = model_at(tmp_path / "ms" / layout)
    assert folder_of("qwen1half-7b-chat") == folder
    assert models.resolve("qwen/Qwen1.5-7B-Chat") == folder


def test_a_hugging_face_cache_and_its_revisions(tmp_path: Path) -> None:
    repo = tmp_path / "hf" / "hub" / "models--Qwen--Qwen2-7B-Instruct"
    old, new = model_at(repo / "snapshots" / "aaa"), model_at(repo / "snapshots" / "bbb")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("bbb")
    (repo / "refs" / "v1").write_text("aaa\n")
    assert folder_of("qwen2-7b-instruct") == new
    assert hubs.find("Qwen/Qwen2-7B-Instruct", "v1") == hubs.find("Qwen/Qwen2-7B-Instruct", "aaa") == old
    assert hubs.find("Qwen/Qwen2-7B-Instruct", "v2") is None


def test_only_complete_copies_count(tmp_path: Path) -> None:
    for missing in ("config.json", "tokenizer.json", "model.safetensors"):
        assert not hubs.is_complete(model_at(tmp_path / missing, missing))
    folder = model_at(tmp_path / "sharded", "model.safetensors")
    parts = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    index = {"weight_map": dict(zip("ab", parts, strict=True))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / parts[0]).write_bytes(b"")
    assert not hubs.is_complete(folder)
    (folder / parts[1]).write_bytes(b"")
    assert hubs.is_complete(folder)


def test_a_path_and_the_own_cache_come_first(tmp_path: Path) -> None:
    model_at(tmp_path / "ms" / "qwen" / "Qwen-7B-Chat")
    own = model_at(tmp_path / "pagoda" / "models" / "qwen-7b-chat")
    given = model_at(tmp_path / "given")
    assert folder_of("qwen-7b-chat") == own
    assert folder_of("qwen-7b-chat", str(given)) == given


def test_a_name_that_nobody_knows_lists_the_known_ones() -> None:
    with pytest.raises(InvalidRequest, match=r"no-such-type.*qwen-7b-chat.*smollm2-135m-instruct"):
        folder_of("no-such-type")
    with pytest.raises(FileNotFoundError, match="/no/such/folder"):
        folder_of("qwen-7b-chat", "/no/such/folder")


def in_a_process(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python: the hubs' packages read their addresses when they are imported."""
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120
    )


def test_without_a_hub_the_error_says_where_files_belong(tmp_path: Path) -> None:
    done = in_a_process("from pagoda.swift.where import folder_of; folder_of('qwen1half-7b-chat')")
    error = done.stderr[done.stderr.index("FileNotFoundError: ") :]
    assert "ModelScope: ConnectionRefusedError" in error and "Hugging Face: ConnectionRefusedError" in error
    assert f"  {tmp_path}/pagoda/models/qwen1half-7b-chat\n" in error
    places = [line.strip() for line in error.splitlines() if line.startswith("  /")]
    for place in places:  # what it advises works
        folder = model_at(Path(place))
        assert folder_of("qwen1half-7b-chat") == folder
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    assert len(places) == 3


@pytest.mark.parametrize(("hub", "where"), [("ModelScope", "ms"), ("Hugging Face", "hf/hub")])
def test_a_download_by_the_hubs_own_package(tmp_path: Path, hub: str, where: str) -> None:
    with hub_server(FILES) as server:
        code = f"from pagoda import hubs; print(hubs.download({{{hub!r}: 'some/Model.1'}}))"
        done = in_a_process(code, HF_ENDPOINT=server.url, MODELSCOPE_ENDPOINT=server.url)
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.strip())
    assert folder == hubs.find("some/Model.1")
    assert (folder / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    assert not (folder / "pytorch_model.bin").exists(), "the same weights, in a form that is not read"
    assert f"downloading some/Model.1 from {hub} into {tmp_path}/{where}: 0.0 GB" in done.stderr
    assert "100%" in done.stderr, "a progress bar"
    assert COMMIT in done.stdout or hub == "ModelScope"


def test_a_model_without_safetensors_is_not_taken_for_one(tmp_path: Path) -> None:
    with hub_server({n: d for n, d in FILES.items() if n != "model.safetensors"}) as server:
        code = "from pagoda import hubs; hubs.download({'Hugging Face': 'a/b'})"
        done = in_a_process(code, HF_ENDPOINT=server.url)
    assert "a/b has no safetensors with a configuration and a tokenizer" in done.stderr


def test_a_disk_without_room_is_refused_before_anything_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = hubs.Hub(
        "Big",
        "json",
        lambda: tmp_path / "not" / "there",
        "BIG_CACHE",
        lambda *_: 10**18,
        lambda *_: "fetched",
    )
    monkeypatch.setattr(hubs, "HUBS", (hub,))
    with pytest.raises(hubs.DownloadError) as refused:
        hubs.download({"Big": "a/b"})
    for part in ("1000000000.0 GB are needed", f"{tmp_path}/not/there", "are free", "set BIG_CACHE"):
        assert part in str(refused.value)
    assert not (tmp_path / "not").exists()
    hubs.check_room(tmp_path / "not" / "there", 1, "BIG_CACHE")


def test_a_hub_whose_package_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hubs.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(hubs.DownloadError, match="the package modelscope is not installed"):
        hubs.download({"ModelScope": "a/b"})
