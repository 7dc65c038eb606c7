"""Logs: what several processes write to one place stays a line each."""

from __future__ import annotations

import json
import os
import subprocess
import sys

NUM_LINES = 3000
PROGRAM = f"""
import sys
from pagoda import logs
log = logs.setup("test")
for number in range({NUM_LINES}):
    log.info("line", writer=int(sys.argv[1]), number=number)
"""


def test_processes_that_share_a_pipe_write_whole_lines() -> None:
    """As the ranks of a group do. Python does not buffer there: a line is one write."""
    reader, writer = os.pipe()
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    writers = [
        subprocess.Popen([sys.executable, "-c", PROGRAM, str(i)], stderr=writer, env=environment)
        for i in range(2)
    ]
    os.close(writer)
    with os.fdopen(reader) as lines:
        seen = [json.loads(line) for line in lines]
    assert [process.wait() for process in writers] == [0, 0]
    for i in range(2):
        assert [entry["number"] for entry in seen if entry["writer"] == i] == list(range(NUM_LINES))
