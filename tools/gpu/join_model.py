"""Makes the embedded model's folder of the two halves of its GGUF file: `join_model.py HALF HALF SUMS OUT`.

SUMS is the SHA256SUMS.json of a folder that `tools/get_model.py` made, whose conversion this is. The weights
must be the same byte for byte; a tokenizer that another version of its library wrote is only mentioned.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from pathlib import Path

from rich.progress import Progress

from tools.get_model import MARKER, SHA256, GetModelError, console, convert, file_sha256, is_complete

WEIGHTS = "model.safetensors"


def join(halves: list[Path], sums: Path, target: Path) -> None:
    """Join, check, convert, check again; the folder appears whole or not at all. Raises GetModelError."""
    data = b"".join(half.read_bytes() for half in halves)
    if (got := hashlib.sha256(data).hexdigest()) != SHA256:
        raise GetModelError(f"the joined file's sha256 is {got}, not {SHA256}")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        gguf_file, made = Path(scratch) / "joined.gguf", Path(scratch) / "model"
        gguf_file.write_bytes(data)
        made.mkdir()
        with Progress(console=console) as progress:
            convert(gguf_file, made, progress)
        found = {path.name: file_sha256(path) for path in sorted(made.iterdir())}
        wanted = json.loads(sums.read_text())
        if found[WEIGHTS] != wanted[WEIGHTS]:
            raise GetModelError(f"{WEIGHTS} is not the one that {sums} tells of")
        for name in wanted:
            if found.get(name) != wanted[name]:
                console.print(f"{name} differs from the one that {sums} tells of")
        (made / MARKER).write_text(json.dumps(found, indent=2) + "\n")
        made.rename(target)


def main() -> int:
    """Make the folder unless it is there; returns the exit code."""
    *halves, sums, target = map(Path, sys.argv[1:])
    try:
        if not is_complete(target):
            join(halves, sums, target)
    except (GetModelError, OSError) as error:
        console.print(f"error: {error}", highlight=False)
        return 1
    console.print(f"{target}: ready")
    return 0


if __name__ == "__main__":
    sys.exit(main())
