"""Flag > environment > file > default, unknown keys, and what may be listened on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import ClassVar

import pytest
from pydantic import Field

from pagoda.settings import ServiceSettings, check_listen


class Settings(ServiceSettings):
    """A service with one setting of each kind."""

    section: ClassVar[str] = "scheduler"
    listen: str = "127.0.0.1:50051"
    max_inflight: int = Field(2, ge=1, le=8)
    horizon_ms: float = 8.0
    prefix_cache: bool = True
    record: str | None = None


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in list(os.environ):
        if name.startswith("PAGODA_"):
            monkeypatch.delenv(name)


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    path = tmp_path / "pagoda.toml"
    path.write_text(
        '[scheduler]\nmax-inflight = 3\nhorizon_ms = 4\ntoken = "from file"\n[worker]\nblock_size = 8\n'
    )
    return path


def refusal(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        Settings.load(list(argv))
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_defaults() -> None:
    settings = Settings.load([])
    assert (settings.max_inflight, settings.horizon_ms, settings.prefix_cache, settings.token) == (
        2,
        8.0,
        True,
        "",
    )


def test_defaults_of_the_caller() -> None:
    assert Settings.load([], max_inflight=5).max_inflight == 5


def test_each_source_beats_the_one_below(toml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ["--config", str(toml)]
    assert Settings.load(config).max_inflight == 3
    monkeypatch.setenv("PAGODA_SCHEDULER_MAX_INFLIGHT", "4")
    assert Settings.load(config).max_inflight == 4
    assert Settings.load([*config, "--max-inflight", "5"]).max_inflight == 5
    assert Settings.load(config).horizon_ms == 4


def test_config_file_from_the_environment_and_with_an_equals_sign(
    toml: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert Settings.load([f"--config={toml}"]).max_inflight == 3
    monkeypatch.setenv("PAGODA_CONFIG", str(toml))
    assert Settings.load([]).max_inflight == 3


def test_a_false_flag_beats_a_true_variable_and_the_other_way_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAGODA_SCHEDULER_PREFIX_CACHE", "false")
    assert Settings.load([]).prefix_cache is False
    assert Settings.load(["--prefix-cache"]).prefix_cache is True
    monkeypatch.setenv("PAGODA_SCHEDULER_PREFIX_CACHE", "true")
    assert Settings.load(["--no-prefix-cache"]).prefix_cache is False


def test_the_common_token_beats_the_file_and_loses_to_the_services_own(
    toml: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ["--config", str(toml)]
    assert Settings.load(config).token == "from file"
    monkeypatch.setenv("PAGODA_TOKEN", "common")
    assert Settings.load(config).token == "common"
    monkeypatch.setenv("PAGODA_SCHEDULER_TOKEN", "own")
    assert Settings.load(config).token == "own"
    assert Settings.load([*config, "--token", "flag"]).token == "flag"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--max-inflite", "3"], "unrecognized arguments: --max-inflite"),
        (["--max-inf", "3"], "unrecognized arguments: --max-inf"),
        (["--max-inflight", "0"], "--max-inflight: Input should be greater than or equal to 1"),
        (["--max-inflight", "many"], "--max-inflight: Input should be a valid integer"),
        (["--log-level", "loud"], "--log-level"),
        (["--config"], "--config needs a value"),
        (["--config", "/nowhere/pagoda.toml"], "cannot read /nowhere/pagoda.toml: No such file or directory"),
    ],
)
def test_bad_flags(capsys: pytest.CaptureFixture[str], argv: list[str], said: str) -> None:
    assert said in refusal(capsys, *argv)


def test_unknown_variable(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAGODA_SCHEDULER_MAX_INFLITE", "3")
    assert "PAGODA_SCHEDULER_MAX_INFLITE is not a setting" in refusal(capsys)


def test_another_services_variable_is_none_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAGODA_WORKER_BLOCK_SIZE", "8")
    Settings.load([])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[scheduler]\nmax_inflite = 3", "[scheduler] has no setting 'max_inflite'"),
        ("[schedular]\nmax_inflight = 3", "'schedular' is not a section"),
        ("max_inflight = 3", "'max_inflight' is not a section"),
        ("[scheduler", "pagoda.toml"),
        ("[scheduler]\nmax_inflight = 99", "--max-inflight: Input should be less than or equal to 8"),
    ],
)
def test_bad_files(capsys: pytest.CaptureFixture[str], toml: Path, content: str, said: str) -> None:
    toml.write_text(content)
    assert said in refusal(capsys, "--config", str(toml))


def test_print_config_shows_what_counts_without_the_token(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        Settings.load(["--print-config", "--max-inflight", "3", "--token", "secret"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert json.loads(printed)["max_inflight"] == 3
    assert "secret" not in printed


def test_help_names_the_file_and_the_variables(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        Settings.load(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--max-inflight" in text
    assert "--config FILE" in text
    assert "PAGODA_SCHEDULER_" in text


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1:8000", "localhost:8000", "127.0.0.1", "[::1]:8000", "::1", "unix:/run/p.sock", "127.3.2.1:1"],
)
def test_loopback_is_served_without_a_token(address: str) -> None:
    check_listen("gateway", address, token="", insecure=False)


@pytest.mark.parametrize(
    "address",
    [
        "0.0.0.0:8000",
        "0.0.0.0",
        ":8000",
        "",
        "[::]:8000",
        "::",
        "10.0.0.1:80",
        "127.0.0.1.example:80",
        "host:80",
    ],
)
def test_other_addresses_want_a_token_or_insecure(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    check_listen("gateway", address, token="secret", insecure=False)
    check_listen("gateway", address, token="", insecure=True)
    with pytest.raises(SystemExit) as stopped:
        check_listen("gateway", address, token="", insecure=False)
    assert stopped.value.code == 2
    assert "--insecure" in capsys.readouterr().err
