"""The walls of the house: what a tier may import, and how large a room may grow."""

from __future__ import annotations

import ast
import io
import subprocess
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TIERS = ("scheduler_svc", "gateway_svc", "gpu_worker", "hf_backend", "kernels")
NEVER = {
    "scheduler_svc": {
        *("torch", "transformers", "tokenizers", "gpu_worker", "gateway_svc", "hf_backend", "kernels"),
    },
    "gateway_svc": {"torch", "scheduler_svc", "gpu_worker", "hf_backend", "kernels"},
    "gpu_worker": {"scheduler_svc", "gateway_svc", "hf_backend", "transformers"},
    "hf_backend": {"scheduler_svc", "gateway_svc"},
    "kernels": {"scheduler_svc", "gateway_svc", "gpu_worker", "hf_backend", "transformers"},
}
NEVER_IN_CORE = {
    "grpc",
    "time",
    "random",
    "asyncio",
    "os",
    "socket",
    "threading",
    "datetime",
    "uuid",
    "pagoda",
}
MAX_FILE, MAX_FUNCTION, MAX_ENGINE = 450, 80, 8600  # docs/adr/0012
# Triton source and its launches, which docs/adr/0005 counts like the C of kernels/cpu: not at all.
UNCOUNTED = ROOT / "kernels" / "cuda"


def sources() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "*.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    return [ROOT / name for name in listed if "_pb2" not in name and (ROOT / name).exists()]


def imported(tree: ast.AST) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("tier", TIERS)
def test_a_tier_imports_only_what_it_may_know(tier: str) -> None:
    for path in (p for p in sources() if p.relative_to(ROOT).parts[0] == tier):
        names = imported(ast.parse(path.read_text()))
        forbidden = NEVER[tier] | (NEVER_IN_CORE if "scheduler_svc/core" in str(path) else set())
        assert not names & forbidden, f"{path.relative_to(ROOT)} imports {sorted(names & forbidden)}"


def test_files_and_functions_stay_readable() -> None:
    for path in sources():
        text, name = path.read_text(), path.relative_to(ROOT)
        if name.parts[0] == "tests":
            continue
        assert len(text.splitlines()) <= MAX_FILE, f"{name} has {len(text.splitlines())} lines"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                assert length <= MAX_FUNCTION, f"{name}:{node.lineno} {node.name} has {length} lines"


def code_lines(path: Path) -> int:
    """Lines that hold code: no blank ones, comments or docstrings (docs/adr/0005)."""
    text = path.read_text()
    documented: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                documented |= set(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    layout = (
        tokenize.COMMENT,
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
        tokenize.ENDMARKER,
    )
    held: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in layout:
            held |= set(range(token.start[0], token.end[0] + 1))
    return len(held - documented)


def test_what_counts_as_a_line(tmp_path: Path) -> None:
    path = tmp_path / "lines.py"
    path.write_text(
        '"""A docstring."""\n\nimport torch  # counted\n\n# a comment\n\n\n'
        'def double(\n    x,\n):  # three lines\n    """A\n    docstring."""\n    return 2 * x  # counted\n'
    )
    assert code_lines(path) == 5


def test_scheduler_worker_and_kernels_fit_together() -> None:
    tiers = ("scheduler_svc", "gpu_worker", "kernels")
    counted = [p for p in sources() if p.relative_to(ROOT).parts[0] in tiers and UNCOUNTED not in p.parents]
    lines = {str(p.relative_to(ROOT)): code_lines(p) for p in counted}
    total = sum(lines.values())
    assert total <= MAX_ENGINE, (
        f"{total} lines; the largest: {sorted(lines.items(), key=lambda i: -i[1])[:5]}"
    )
