"""`make verify`: every row of the acceptance table in full, each by a command that anyone can run alone.

    python tools/verify.py [--list] [--only ROW ...] [--fresh]

A row passes when its command ends with 0. PAGODA_FULL=1 tells its tests to run in full. The file that
`{json}` in the command and PAGODA_FIGURES name takes its figures: one JSON object, or a line
`{"row": ..., "figures": {...}}` for each. What has passed is not run again until the code or the command
changes; `--fresh` runs it all the same. State, logs and `figures.json` lie in .verify/.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
CODE = (".py", ".c", ".h", ".proto", ".toml", ".go", ".ts", ".cc", ".java", ".json", ".yml", ".js", ".html")
MAX_SHOWN = 4


@dataclass(frozen=True)
class Row:
    """One row of the table: `command` runs in the repository's root, `python` is this one."""

    name: str
    title: str
    command: str


def _test(path: str) -> str:
    return f"python -m pytest -q -s {path}"


ROWS: tuple[Row, ...] = (
    Row("allocator", "allocator: 200,000 operations", _test("tests/property/test_blocks.py")),
    Row("groups", "blocks of groups: 500,000 operations", _test("tests/property/test_group_blocks.py")),
    Row("replay", "a record of 500 requests replays", _test("tests/replay")),
    Row("scheduler-cost", "scheduler cost of a step", "python -m benchmarks.scheduler --json {json}"),
    Row("wire", "256 decodes on the wire", _test("tests/unit/scheduler/test_codec.py")),
    Row("run-ahead", "worker idle between steps", "python -m benchmarks.run_ahead --json {json}"),
    Row(
        "front-door",
        "chunks and tokens a second at the door",
        "python -m benchmarks.front_door --json {json}",
    ),
    Row("cancel", "a disconnect frees slot and blocks", _test("tests/e2e/test_cancel.py")),
    Row("bad-input", "bad input in HTTP and gRPC", _test("tests/e2e/test_bad_input.py")),
    Row("real-clients", "openai SDK and buf curl", _test("tests/e2e/test_real_clients.py")),
    Row("safe-by-default", "ports on loopback", _test("tests/e2e/test_safe_defaults.py")),
    Row("two-workers", "two workers of one thread", _test("tests/e2e/test_two_workers.py")),
    Row("worker-death", "kill -9 under 50 streams", _test("tests/e2e/test_worker_death.py")),
    Row("cpu-speed", "CPU speed beside peers", "python -m benchmarks.cpu --json {json}"),
    Row("exactness", "100 prompts equal transformers", _test("tests/e2e/test_exactness.py")),
    Row("beams", "40 prompts of beam searches", "python -m benchmarks.beams --json {json}"),
    Row("beams-disturbed", "the same, preempted and killed", _test("tests/e2e/test_beams.py")),
    Row("streams", "200 streams, 10 minutes", _test("tests/e2e/test_streams.py")),
    Row("listings", "programs written for ms-swift", _test("tests/e2e/test_swift.py")),
    Row("languages", "4 clients, 100 chats each", "make test-clients"),
    Row("structured", "500 random JSON schemas hold", "python -m benchmarks.structured --json {json}"),
    Row("memory", "the paper's memory figures", "python -m benchmarks.paper --json {json}"),
    Row("page", "the page at /ui in a browser", _test("tests/e2e/test_ui.py")),
    Row("tracing", "one trace a request", _test("tests/e2e/test_tracing.py")),
    Row("dashboards", "every panel and rule, live", _test("tests/e2e/test_monitoring.py")),
)


class Runner:
    """Runs rows and remembers in `folder` what has passed."""

    def __init__(self, rows: Sequence[Row], folder: Path, console: Console) -> None:
        self._rows, self._folder, self._console = rows, folder, console
        for part in ("figures", "logs"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        self._state_file = folder / "state.json"
        self._state: dict[str, Any] = _read(self._state_file)
        self._source = source_digest()

    def run(self, fresh: bool) -> bool:
        """Run what has not passed with this code; whether every row has passed."""
        for number, row in enumerate(self._rows, 1):
            if self._passed(row) and not fresh:
                self._console.print(f"{number}/{len(self._rows)} {row.name}: passed already")
                continue
            self._console.print(f"{number}/{len(self._rows)} {row.name}: {row.command}", soft_wrap=True)
            self._run_one(row)
            self._console.print(
                f"    {self._state[row.name]['status']}, {self._state[row.name]['seconds']:.0f} s"
            )
            self.write_figures()
        return all(self._passed(row) for row in self._rows)

    def write_figures(self) -> None:
        """Write figures.json from what is known of all rows."""
        rows = {}
        for row in self._rows:
            known = dict(self._state.get(row.name, {"status": "not run"}))
            known.pop("source", None)
            rows[row.name] = {"title": row.title, **known, "figures": self._figures(row)}
        report = {"machine": machine(), "commit": _git("rev-parse", "HEAD").strip(), "rows": rows}
        (self._folder / "figures.json").write_text(json.dumps(report, indent=2) + "\n")

    def table(self) -> Table:
        """What is known of all rows."""
        table = Table("row", "status", "s", "figures", title="acceptance")
        for row in self._rows:
            known = self._state.get(row.name, {})
            status = known.get("status", "not run")
            if status == "passed" and not self._passed(row):
                status = "passed, with other code"
            shown = [f"{key}={value}" for key, value in _flat(self._figures(row))][:MAX_SHOWN]
            seconds = f"{known['seconds']:.0f}" if known else ""
            table.add_row(row.title, status, seconds, ", ".join(shown))
        return table

    def _run_one(self, row: Row) -> None:
        figures, log = (
            self._folder / "figures" / f"{row.name}.json",
            self._folder / "logs" / f"{row.name}.log",
        )
        figures.unlink(missing_ok=True)
        argv = [part.replace("{json}", str(figures)) for part in shlex.split(row.command)]
        argv[0] = sys.executable if argv[0] == "python" else argv[0]
        begin = time.monotonic()
        with open(log, "w") as out, self._console.status(f"{row.name}: its output goes to {log}"):
            environment = {**os.environ, "PAGODA_FIGURES": str(figures), "PAGODA_FULL": "1"}
            done = subprocess.run(
                argv, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, env=environment, check=False
            )
        if done.returncode:
            self._console.print("\n".join(log.read_text().splitlines()[-15:]), markup=False, highlight=False)
        self._state[row.name] = {
            "status": "failed" if done.returncode else "passed",
            "seconds": round(time.monotonic() - begin, 1),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": row.command,
            "source": self._source,
        }
        self._state_file.write_text(json.dumps(self._state, indent=2) + "\n")

    def _passed(self, row: Row) -> bool:
        known = self._state.get(row.name, {})
        same = known.get("source") == self._source and known.get("command") == row.command
        return bool(same and known["status"] == "passed")

    def _figures(self, row: Row) -> Any:
        return _read_figures(self._folder / "figures" / f"{row.name}.json")


def source_digest() -> str:
    """A hash of all code in the working tree: a row's result holds for one of them."""
    digest = hashlib.blake2b(digest_size=8)
    for name in sorted(_git("ls-files", "-co", "--exclude-standard").splitlines()):
        path = ROOT / name
        if path.suffix in CODE and path.is_file():
            digest.update(name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
    }


def _flat(figures: Any, before: str = "") -> list[tuple[str, Any]]:
    """The single values of nested figures, each with its path."""
    if not isinstance(figures, dict):
        return [(before, round(figures, 3) if isinstance(figures, float) else figures)]
    return [
        pair for key, value in figures.items() for pair in _flat(value, f"{before}.{key}" if before else key)
    ]


def _read(path: Path) -> Any:
    return json.loads(path.read_text()) if path.exists() else {}


def _read_figures(path: Path) -> Any:
    """One JSON document, as benchmarks write it, or a line a figure, as `tests/support/figures.py` does."""
    try:
        whole = _read(path)
        lines = [whole] if set(whole) == {"row", "figures"} else []
    except json.JSONDecodeError:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
    if not lines:
        return whole
    figures: dict[str, list[Any]] = {}
    for line in lines:
        figures.setdefault(line["row"], []).append(line["figures"])
    return figures


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def main(
    argv: Sequence[str] | None = None, rows: Sequence[Row] = ROWS, folder: Path = ROOT / ".verify"
) -> int:
    """The command; its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--list", action="store_true", help="show what is known, run nothing")
    parser.add_argument("--only", nargs="+", choices=[row.name for row in rows], help="run these rows alone")
    parser.add_argument("--fresh", action="store_true", help="run again what has passed")
    given = parser.parse_args(argv)
    console = Console()
    if not given.list:
        chosen = [row for row in rows if not given.only or row.name in given.only]
        passed = Runner(chosen, folder, console).run(given.fresh)
    everything = Runner(rows, folder, console)
    everything.write_figures()
    console.print(everything.table())
    return 0 if given.list or passed else 1


if __name__ == "__main__":
    sys.exit(main())
