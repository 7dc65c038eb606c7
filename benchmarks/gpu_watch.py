"""Clock and power of the GPU while something runs."""

from __future__ import annotations

import os
import statistics
import subprocess
import threading
from collections.abc import Sequence
from datetime import datetime

QUERY = "--query-gpu=timestamp,clocks.sm,power.draw"


def parse_sample(line: str) -> tuple[float, float, float] | None:
    """Seconds since the epoch, MHz and W from a line of nvidia-smi for QUERY; None if it is none."""
    cells = [cell.strip() for cell in line.split(",")]
    try:
        when = datetime.strptime(cells[0], "%Y/%m/%d %H:%M:%S.%f")  # the host's time zone
        return when.timestamp(), float(cells[1]), float(cells[2])
    except (ValueError, IndexError):
        return None


class Watch:
    """nvidia-smi in the background; where there is none, every mean is None.

    Attributes:
        samples: seconds since the epoch, MHz of the multiprocessors and W, every 0.1 s. The power is the
            device's own mean over about a second.
    """

    def __init__(self) -> None:
        self.samples: list[tuple[float, float, float]] = []
        device = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0] or "0"
        command = ["nvidia-smi", f"--id={device}", QUERY, "--format=csv,noheader,nounits", "-lms", "100"]
        self.process: subprocess.Popen[str] | None = None
        try:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        except OSError:
            return
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process is not None and self.process.stdout is not None
        for line in self.process.stdout:
            sample = parse_sample(line)
            if sample is not None:
                self.samples.append(sample)

    def means(self, spans: Sequence[tuple[float, float]]) -> tuple[float | None, float | None]:
        """MHz and W within these spans (seconds since the epoch, start and end)."""
        inside = [s for s in list(self.samples) if any(start <= s[0] <= end for start, end in spans)]
        if not inside:
            return None, None
        return statistics.fmean(s[1] for s in inside), statistics.fmean(s[2] for s in inside)

    def close(self) -> None:
        """End nvidia-smi."""
        if self.process is not None:
            self.process.terminate()
            self.process.wait()
