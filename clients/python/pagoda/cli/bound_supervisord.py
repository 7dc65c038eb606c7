"""supervisord, bound to its parent: when the process that started it is killed, it ends with all it runs."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

from supervisor import supervisord

PR_SET_PDEATHSIG = 1


def main() -> None:
    """Run supervisord with this process's arguments; the first is the parent's process id."""
    parent = int(sys.argv.pop(1))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it died before it could be watched
            sys.exit(1)
    supervisord.main()


if __name__ == "__main__":
    main()
