"""Where models lie, and what a log line looks like."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pagoda import models


def test_the_cache_is_pagodas_own_or_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PAGODA_CACHE", str(tmp_path / "own"))
    assert models.cache_dir() == tmp_path / "own"
    monkeypatch.delenv("PAGODA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert models.cache_dir() == tmp_path / "xdg" / "pagoda"


def test_a_path_wins_over_a_name_in_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cached = tmp_path / "cache" / "models" / "m"
    cached.mkdir(parents=True)
    monkeypatch.setenv("PAGODA_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    assert models.resolve("m") == cached
    (tmp_path / "m").mkdir()
    assert models.resolve("m") == Path("m")


def test_a_model_that_is_nowhere_says_where_it_was_looked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PAGODA_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/models/m.*Hugging Face folder"):
        models.resolve("m")
    with pytest.raises(FileNotFoundError, match="make model"):
        models.resolve(models.EMBEDDED_MODEL)


def test_served_names() -> None:
    assert models.served_name("/models/Qwen3-0.6B") == "Qwen3-0.6B"
    assert models.served_name("/models/m.Q4_1.gguf") == "m.Q4_1"
    assert models.served_name("smollm2-135m-instruct") == "smollm2-135m-instruct"


def log(level: str, statement: str) -> subprocess.CompletedProcess[str]:
    code = f"from pagoda import logs; log = logs.setup('gateway', {level!r}); {statement}"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_a_log_line_is_one_json_object_on_standard_error() -> None:
    done = log("info", "log.debug('no'); log.info('request', request_id='r-1', tokens=3)")
    (line,) = done.stderr.splitlines()
    record = json.loads(line)
    assert (record["event"], record["service"], record["level"]) == ("request", "gateway", "info")
    assert (record["request_id"], record["tokens"]) == ("r-1", 3)
    assert record["timestamp"].endswith("Z")
    assert done.stdout == ""


def test_a_level_that_is_none_is_refused() -> None:
    done = log("loud", "")
    assert done.returncode == 1
    assert "--log-level: 'loud'" in done.stderr
