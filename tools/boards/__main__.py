"""Write every board's file: python -m tools.boards [--check]."""

from __future__ import annotations

import sys

from tools.boards import BOARDS, FOLDER, render


def main() -> int:
    """Write the files, or with --check compare them; the exit status."""
    stale = []
    for name in BOARDS:
        path, text = FOLDER / f"{name}.json", render(name)
        if "--check" in sys.argv[1:]:
            stale += [name] if not path.exists() or path.read_text() != text else []
        else:
            path.write_text(text)
    if stale:
        print(f"not what tools/boards gives: {', '.join(stale)}; run `make boards`", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
