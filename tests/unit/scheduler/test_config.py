"""The scheduler's configuration: what the core gets of it, and addresses that are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from scheduler_svc.config import SchedulerSettings


def test_defaults_are_the_designs() -> None:
    settings = SchedulerSettings.load([])
    assert settings.listen == "127.0.0.1:50051"
    assert (settings.metrics_host, settings.metrics_port) == ("127.0.0.1", 9401)
    core = settings.core()
    assert (core.max_inflight, core.horizon_us, core.prefix_cache) == (2, 8000, True)


def test_flags_reach_the_core() -> None:
    settings = SchedulerSettings.load(
        ["--max-inflight", "1", "--horizon-ms", "0", "--no-prefix-cache", "--max-batched-tokens", "60",
         "--record", "run.rec", "--max-waiting", "100000"]
    )  # fmt: skip
    core = settings.core()
    assert (core.max_inflight, core.horizon_us, core.prefix_cache) == (1, 0, False)
    assert core.max_batched_tokens == 60
    assert settings.record == Path("run.rec")
    assert settings.max_waiting == 100000


@pytest.mark.parametrize(
    "flags",
    [["--max-inflight", "0"], ["--horizon-ms", "-1"], ["--metrics-port", "70000"], ["--max-waiting", "0"]],
)
def test_values_out_of_range_name_the_flag(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        SchedulerSettings.load(flags)
    assert stopped.value.code == 2
    assert flags[0] in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--listen", "0.0.0.0:50051"], ["--metrics-host", "0.0.0.0"]])
def test_an_open_address_needs_a_token_or_insecure(
    flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        SchedulerSettings.load(flags).check()
    assert flags[0] in capsys.readouterr().err
    SchedulerSettings.load([*flags, "--insecure"]).check()
    SchedulerSettings.load([*flags, "--token", "secret"]).check()
