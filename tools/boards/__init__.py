"""Grafana's boards, built from Python: `make boards` writes deploy/grafana/dashboards.

Built with Grafana's foundation SDK, for its classic dashboard model. One module a board says what the board
asks; `queries` how questions are put to Prometheus and `panels` how answers are shown.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from grafana_foundation_sdk.cog.encoder import JSONEncoder

from tools.boards import latency, memory, overview, scheduler, worker

FOLDER = Path(__file__).resolve().parents[2] / "deploy" / "grafana" / "dashboards"
BOARDS = {
    board.__name__.rpartition(".")[2]: board for board in (overview, latency, memory, scheduler, worker)
}


def render(name: str) -> str:
    """The text of a board's file."""
    board = BOARDS[name].board().build()
    for i, panel in enumerate(board.panels or [], 1):
        panel.id_val = i
    return json.dumps(board, cls=JSONEncoder, indent=1, sort_keys=True) + "\n"


def load(name: str) -> dict[str, Any]:
    """A board as it is checked in."""
    board: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text())
    return board


def panels(board: dict[str, Any]) -> list[dict[str, Any]]:
    """The panels of a loaded board that show something, in their order; rows are titles only."""
    return [panel for panel in board["panels"] if panel["type"] != "row"]
