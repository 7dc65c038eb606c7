"""`make monitoring`: where it finds the services, what it tells Prometheus, and how it ends."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from pagoda.cli.cluster import ClusterSpec, programs_of, supervisor_config, with_ports
from tests.support.cluster import free_port
from tests.support.cluster_sched import wait_until
from tests.support.monitored import answers
from tools import monitoring


def describe(run_dir: Path, workers: int) -> monitoring.Targets:
    """Leave a cluster's description in `run_dir`, as its supervisor does; where its services would be."""
    spec = with_ports(
        ClusterSpec(workers=workers, http_port=0, grpc_port=0, scheduler_port=0, metrics_port=0)
    )
    config = supervisor_config(programs_of(spec), run_dir, run_dir / "socket")
    (run_dir / "supervisord.conf").write_text(config)
    tiers = ["scheduler", *["worker"] * workers, "gateway"]
    return list(zip(tiers, [*spec.more_metrics_ports, spec.metrics_port], strict=True))


def scraped(port: int) -> set[tuple[str, str]]:
    """Tier and address of what the Prometheus on `port` scrapes."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/v1/targets", timeout=10) as reply:
        active = json.load(reply)["data"]["activeTargets"]
    return {(target["labels"]["tier"], target["labels"]["instance"]) for target in active}


def addresses(targets: monitoring.Targets) -> set[tuple[str, str]]:
    return {(tier, f"127.0.0.1:{port}") for tier, port in targets}


def test_the_usual_ports_are_those_of_the_targets_file() -> None:
    text = (monitoring.CONFIG / "targets" / "pagoda.yml").read_text()
    for _, port in monitoring.usual_targets(1):
        assert f'"127.0.0.1:{port}"' in text
    assert monitoring.usual_targets(2)[2:] == [("worker", 9402), ("worker", 9403)]


def test_services_are_found_where_the_cluster_runs(tmp_path: Path) -> None:
    assert monitoring.targets_of(tmp_path) == []
    wanted = describe(tmp_path, 2)
    assert sorted(monitoring.targets_of(tmp_path)) == sorted(wanted)


def test_a_token_is_for_prometheus_alone(tmp_path: Path) -> None:
    config = monitoring.write_config(tmp_path, monitoring.usual_targets(1), "secret")
    assert (tmp_path / "token").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "token").read_text() == "secret" and "secret" not in config.read_text()
    checked = subprocess.run(
        [monitoring.find("promtool"), "check", "config", config], capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stderr
    assert "    authorization:\n      credentials_file: token\n" in config.read_text()


def test_it_says_how_to_get_prometheus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitoring, "UNPACKED", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(monitoring.MonitoringError, match=r"make prometheus.*apt-get install prometheus"):
        monitoring.find("prometheus")


def test_a_taken_port_is_named() -> None:
    port = free_port()
    with subprocess.Popen(
        [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1"], stderr=subprocess.DEVNULL
    ) as other:
        try:
            wait_until(lambda: _refuses(port), 30, "the port is taken")
            with pytest.raises(monitoring.MonitoringError, match=f":{port}.*PROMETHEUS_PORT"):
                monitoring.check_free(port)
        finally:
            other.terminate()


def _refuses(port: int) -> bool:
    try:
        monitoring.check_free(port)
    except monitoring.MonitoringError:
        return True
    return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_follows_the_cluster_and_ends_when_told(tmp_path: Path, number: signal.Signals) -> None:
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "tools/monitoring.py", "--run-dir", str(tmp_path), "--port", str(port)],
        cwd=monitoring.ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        wait_until(lambda: process.poll() is not None or answers(port), 60, "Prometheus answers")
        usual = addresses(monitoring.usual_targets(1))
        wait_until(lambda: scraped(port) == usual, 60, "the usual ports are scraped")
        wanted = addresses(describe(tmp_path, 2))
        wait_until(lambda: scraped(port) == wanted, 60, "the cluster that came is scraped")
    finally:
        process.send_signal(number)
        said, _ = process.communicate(timeout=30)
    assert process.returncode == 0 and said.endswith("stopped\n"), said
    assert not answers(port)
