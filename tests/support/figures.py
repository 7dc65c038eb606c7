"""What the long tests measured: one JSON line a figure, for whoever writes the table."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def record(row: str, **figures: Any) -> None:
    """Print the figures of a row of the table, and append them to the file that $PAGODA_FIGURES names."""
    line = json.dumps({"row": row, "figures": figures}, ensure_ascii=False)
    print(line)
    if path := os.environ.get("PAGODA_FIGURES"):
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(line + "\n")
