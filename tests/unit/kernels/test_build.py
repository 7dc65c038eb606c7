"""How the C library comes to be, and what happens where it cannot."""

import os
import shutil
import subprocess
import sys
import threading

import pytest
import torch

from kernels import cpu
from kernels.cpu import build
from kernels.linear import linear, pack

USES_A_KERNEL = """
import torch
from kernels import cpu
from kernels.activation import silu_and_mul
assert torch.allclose(silu_and_mul(torch.tensor([[2.0, 3.0]])), torch.tensor([[5.2847824]]))
print(cpu.library() is not None, cpu.threads())
"""


def run(code=USES_A_KERNEL, **changes):
    environment = os.environ | {"PYTHONPATH": str(build.SOURCE_DIR.parent.parent), "PAGODA_CPU_KERNELS": "1"}
    environment |= {name: str(value) for name, value in changes.items()}
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_without_a_compiler_it_warns_once_and_runs_on_the_references(tmp_path):
    output, errors = run(PAGODA_CACHE=tmp_path, CC="/no/such/compiler").communicate()
    assert output.split() == ["False", "1"]
    assert errors.count("RuntimeWarning") == 1 and "/no/such/compiler" in errors


def test_a_compiler_that_fails_is_quoted(tmp_path):
    output, errors = run(PAGODA_CACHE=tmp_path, CC="false").communicate()
    assert output.split()[0] == "False" and "false -std" in errors


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "kernels").write_text("in the way")
    output, errors = run(PAGODA_CACHE=tmp_path).communicate()
    assert output.split()[0] == "False" and "RuntimeWarning" in errors


def test_references_on_request_without_a_warning(tmp_path):
    output, errors = run(PAGODA_CACHE=tmp_path, PAGODA_CPU_KERNELS=0).communicate()
    assert output.split()[0] == "False" and not errors


def test_several_processes_may_build_at_once(tmp_path):
    processes = [run(PAGODA_CACHE=tmp_path, PAGODA_CPU_FLAGS="-O0") for _ in range(3)]
    outputs = [process.communicate() for process in processes]
    expected = str(shutil.which("gcc") is not None)
    assert all(output.split()[0] == expected for output, _ in outputs), outputs
    if shutil.which("gcc"):
        assert [path.suffix for path in (tmp_path / "kernels").iterdir()] == [".so"]


def test_sources_and_flags_decide_the_name(monkeypatch, tmp_path):
    names = {build._digest(["gcc"], flags) for flags in ([], ["-O2"], ["-O2"])}
    assert len(names) == 2
    shutil.copytree(build.SOURCE_DIR, tmp_path / "cpu")
    monkeypatch.setattr(build, "SOURCE_DIR", tmp_path / "cpu")
    assert build._digest(["gcc"], []) in names
    (tmp_path / "cpu" / "linear.c").write_text("int changed;")
    assert build._digest(["gcc"], []) not in names


def test_thread_counts():
    before = cpu.threads()
    try:
        for n in (3, 1, before):
            cpu.set_threads(n)
            assert cpu.threads() == (n if cpu.library() is not None else 1)
        with pytest.raises(ValueError, match=r"^n must"):
            cpu.set_threads(0)
    finally:
        cpu.set_threads(before)


def test_kernels_may_be_called_from_several_threads(randn):
    packed, x = pack(randn(300, 200)), randn(40, 200)
    expected, wrong = linear(x, packed), []

    def work():
        for _ in range(200):
            if not torch.equal(linear(x, packed), expected):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_kernels_work_in_a_forked_child(tmp_path):
    code = """
import os, torch
from kernels import cpu
from kernels.linear import linear, pack
torch.set_num_threads(1)
cpu.set_threads(3)
packed, x = pack(torch.randn(300, 200)), torch.randn(40, 200)
expected = linear(x, packed)
child = os.fork()
if child == 0:
    os._exit(0 if all(torch.equal(linear(x, packed), expected) for _ in range(100)) else 1)
assert os.waitpid(child, 0)[1] == 0 and torch.equal(linear(x, packed), expected)
"""
    process = run(code)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors


def test_native_bf16_is_known():
    assert cpu.bf16_is_native() in (True, False)
