"""`tools/verify.py` runs rows once, remembers what passed, and keeps their figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tools import verify
from tools.verify import Row


def count(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.fixture
def rows(tmp_path: Path) -> list[Row]:
    note = f"open({str(tmp_path / 'ran')!r}, 'a').write('x\\n')"
    figures = "import json, os; json.dump({'a': {'b': 1.23456}}, open(os.environ['PAGODA_FIGURES'], 'w'))"
    return [
        Row("good", "a good row", f'python -c "{note}; {figures}"'),
        Row("bad", "a bad row", "python -c \"print('why'); raise SystemExit(3)\""),
    ]


def run(rows: list[Row], folder: Path, *argv: str) -> tuple[int, Any]:
    code = verify.main(argv, rows, folder / "state")
    return code, json.loads((folder / "state" / "figures.json").read_text())


def test_rows_run_and_their_figures_are_kept(
    rows: list[Row], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, report = run(rows, tmp_path)
    assert code == 1
    assert report["rows"]["good"]["status"] == "passed"
    assert report["rows"]["good"]["figures"] == {"a": {"b": 1.23456}}
    assert report["rows"]["bad"]["status"] == "failed"
    assert report["machine"]["cores"] >= 1 and report["commit"]
    printed = capsys.readouterr().out
    assert "why" in printed and "a.b=1.235" in printed


@pytest.mark.parametrize("count", [1, 2])
def test_figures_may_come_as_lines(tmp_path: Path, count: int) -> None:
    lines = [json.dumps({"row": "c", "figures": {"d": i}}) + "\n" for i in range(count)]
    (tmp_path / "lines").write_text("".join(lines))
    copy = f"import os, shutil; shutil.copy({str(tmp_path / 'lines')!r}, os.environ['PAGODA_FIGURES'])"
    check = "assert os.environ['PAGODA_FULL'] == '1'"
    code, report = run([Row("row", "a row", f'python -c "{copy}; {check}"')], tmp_path)
    assert code == 0
    assert report["rows"]["row"]["figures"] == {"c": [{"d": i} for i in range(count)]}


def test_what_passed_is_not_run_again_until_the_code_or_the_command_changes(
    rows: list[Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = tmp_path / "ran"
    run(rows, tmp_path)
    run(rows, tmp_path)
    assert count(ran) == 1
    run(rows, tmp_path, "--fresh", "--only", "good")
    assert count(ran) == 2
    monkeypatch.setattr(verify, "source_digest", lambda: "other code")
    run(rows, tmp_path, "--list")
    assert count(ran) == 2
    run(rows, tmp_path)
    assert count(ran) == 3


def test_only_runs_what_is_named_and_keeps_the_rest(rows: list[Row], tmp_path: Path) -> None:
    code, report = run(rows, tmp_path, "--only", "good")
    assert code == 0
    assert report["rows"]["bad"]["status"] == "not run"
    code, report = run(rows, tmp_path, "--only", "bad")
    assert code == 1
    assert report["rows"]["good"]["status"] == "passed"


def test_the_rows_have_names_of_their_own() -> None:
    assert len({row.name for row in verify.ROWS}) == len(verify.ROWS)
