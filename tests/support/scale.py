"""How long the long tests run: a fixed slice in `make test`, all of it in `make verify`."""

from __future__ import annotations

import os
from typing import TypeVar

T = TypeVar("T")
FULL = os.environ.get("PAGODA_FULL") == "1"


def scaled(quick: T, full: T) -> T:
    """`full` when PAGODA_FULL=1, as `make verify` sets it; else `quick`."""
    return full if FULL else quick
