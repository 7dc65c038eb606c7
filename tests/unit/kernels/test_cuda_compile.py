"""Triton without a GPU: kernels run in the interpreter, compile for every card, and are compiled ahead."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from tests.support.triton import ARCHS, CompileError, compile_for, device

triton = pytest.importorskip("triton")
from tests.support import sample_kernels  # noqa: E402 - imports triton

ROOT = Path(__file__).parents[3]
TYPES = {"x": "*fp32", "out": "*fp32", "width": "i32", "factor": "fp32"}


def test_a_kernel_runs():
    x = torch.rand(3, 100, device=device()) + 0.5
    out = torch.empty_like(x)
    sample_kernels.scale_rows[(3,)](x, out, 100, 3.0, BLOCK=32, TWICE=True)
    torch.testing.assert_close(out, x / x.sum(1, keepdim=True) * 6.0)


@pytest.mark.parametrize("arch", ARCHS)
def test_a_kernel_compiles(arch):
    compiled = compile_for(
        sample_kernels.scale_rows, arch, TYPES, {"BLOCK": 1024}, {"num_warps": 8}, divisible=["width"]
    )
    assert (compiled.name, compiled.arch, compiled.num_warps) == ("scale_rows", arch, 8)
    assert f".target sm_{arch}" in compiled.asm["ptx"]
    assert "ld.global.v4" in compiled.asm["ptx"], "whole vectors, from pointers that are aligned"
    assert 0 < compiled.registers <= 255 and compiled.spilled == 0


def test_what_does_not_compile_is_named():
    with pytest.raises(CompileError, match=r"(?s)broken for sm_90: .*no_such_name"):
        compile_for(sample_kernels.broken, 90, {"x": "*fp32"})
    with pytest.raises(CompileError, match=r"without type or value: \['factor', 'BLOCK'\]"):
        compile_for(sample_kernels.scale_rows, 90, {k: v for k, v in TYPES.items() if k != "factor"})


def test_a_block_that_does_not_fit_its_card():
    call = sample_kernels.too_much_shared, {"x": "*fp32", "out": "*fp32"}, {"N": 128}, {"num_warps": 8}
    assert compile_for(call[0], 80, *call[1:]).shared > 99 << 10
    with pytest.raises(CompileError, match=r"shared memory; sm_86 has 101376"):
        compile_for(call[0], 86, *call[1:])


AHEAD = """
    import json, sys, time
    import triton
    from kernels.cuda import compile
    from tests.support.sample_kernels import broken, scale_rows
    from triton.runtime.driver import driver

    class Absent(compile._AbsentDevice):
        def get_current_stream(self, device):
            return 0

    driver.set_active(Absent(90))
    hits = []
    triton.knobs.compilation.listener = lambda *, src, cache_hit, **_: hits.append((src.name, cache_hit))
    warmer = compile.warmer(90, "a model", 2)
    report = {"cold": warmer is not None}
    floats = triton.runtime.jit.MockTensor(sys.modules["torch"].float32)
    with_bad = sys.argv[1] == "bad"
    if warmer:
        with warmer.rehearsal():
            for block in (32, 64, 32):
                scale_rows[(3,)](floats, floats, 96, 3.0, BLOCK=block, num_warps=2)
            scale_rows[(3,)](floats, floats, 1, 1.0, BLOCK=32, TWICE=True)
            if with_bad:
                broken[(1,)](floats)
            ones = torch.ones(10**6)
            report["zeros"] = not any(
                bool(t.any()) for t in (torch.empty(10**6), torch.empty_like(ones), ones.new_empty(10**6))
            )
        report["rehearsed"] = list(hits)
        report["errors"] = warmer.finish(timeout=120)
    for block in (32, 64):
        scale_rows.warmup(floats, floats, 96, 3.0, BLOCK=block, num_warps=2, grid=(3,))
    scale_rows.warmup(floats, floats, 1, 1.0, BLOCK=32, TWICE=True, grid=(3,))
    report["hits"] = hits
    print(json.dumps(report))
"""


def ahead(cache: Path, kind: str) -> dict:
    env = {**os.environ, "PAGODA_CACHE": str(cache), "TRITON_INTERPRET": "0"}
    env.pop("TRITON_CACHE_DIR", None)
    done = subprocess.run(
        [sys.executable, "-c", "import torch\n" + textwrap.dedent(AHEAD), kind],
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_kernels_are_compiled_ahead_once(tmp_path):
    """Rehearsed launches compile nothing here; later ones find everything; so does the next process."""
    first = ahead(tmp_path, "good")
    assert first["cold"] and not first["rehearsed"] and not first["errors"] and first["zeros"]
    assert first["hits"] == [["scale_rows", True]] * 3
    assert list((tmp_path / "triton").glob("complete-*"))
    second = ahead(tmp_path, "good")
    assert not second["cold"] and second["hits"] == [["scale_rows", True]] * 3


def test_a_kernel_that_fails_is_named_and_the_others_are_there(tmp_path):
    first = ahead(tmp_path, "bad")
    assert len(first["errors"]) == 1 and first["errors"][0].startswith("broken: ")
    assert first["hits"] == [["scale_rows", True]] * 3
    assert not list((tmp_path / "triton").glob("complete-*")), "the next start tries again"


def launched(tree: ast.AST) -> set[str]:
    """What stands as `name[grid](...)` or in `launch(name, ...)`, with or without its module."""
    found = set()
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        if isinstance(call.func, ast.Subscript):
            found.add(ast.unparse(call.func.value).split(".")[-1])
        elif ast.unparse(call.func) == "launch":
            found.add(ast.unparse(call.args[0]).split(".")[-1])
    return found


def test_no_kernel_was_forgotten():
    """Each kernel that is launched is compiled for every card by some test of this folder."""
    trees = [ast.parse(path.read_text()) for path in (ROOT / "kernels" / "cuda").glob("*.py")]
    functions = {
        node.name
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
        and any("triton.jit" in ast.unparse(d) for d in node.decorator_list)
    }
    kernels = functions & set().union(*map(launched, trees))
    assert {"draw_kernel", "linear_kernel", "_decode", "_prefill", "silu_and_mul_kernel"} < kernels
    sources = [path.read_text() for path in Path(__file__).parent.glob("*.py")]
    tests = "".join(source for source in sources if "compile_for(" in source and "ARCHS)" in source)
    assert not [name for name in kernels if not re.search(rf"\b{name}\b", tests)]
