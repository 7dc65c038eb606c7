"""The program behind the GPU table's row of logits, on the CPU with the embedded model."""

import json
import sys

import pytest
import torch

from benchmarks import gpu_logits
from benchmarks.gpu_logits import NUM_DECODES, Errors
from tests.support.data import model_folder, prompts

pytestmark = pytest.mark.timeout(300)


def test_float32_logits_equal_transformers(tmp_path, monkeypatch):
    short = [list(prompt.ids) for prompt in prompts() if len(prompt.ids) < 60][:2]
    (tmp_path / "prompts.json").write_text(json.dumps(short))
    out = tmp_path / "logits.json"
    flags = ["--model", str(model_folder()), "--prompts", str(tmp_path / "prompts.json"), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["gpu_logits", *flags, "--device", "cpu", "--dtype", "float32"])
    assert gpu_logits.main() == 0
    row = json.loads(out.read_text())
    assert row["rows"] == 2 * (1 + NUM_DECODES) and row["passed"]
    errors = row["errors"]
    assert 0 < errors["median"] <= errors["p99"] <= errors["max"] < 1e-4
    assert errors["other_argmax"] == errors["near_ties"] == errors["above_bound"] == 0
    assert row["transformers"]["max"] < 1e-6  # float32 beside itself


def test_errors_are_spread_over_rows_and_argmaxes_are_excused_by_ties_alone():
    want = torch.zeros(9, 50)
    want[:, 0], want[:, 1] = 10.0, 9.9
    got = want.clone()
    got[3, 1] += 0.11  # a near tie falls the other way
    got[5, 40] += 0.05
    errors = Errors()
    errors.add(got, want)
    assert errors.passed and (errors.near_ties, errors.other_argmax) == (1, 0)
    figures = errors.figures()
    assert (
        figures["max"] == pytest.approx(0.011, rel=1e-4)
        and figures["median"] == 0 == figures["max_of_prefill"]
    )
    assert [(w["prompt"], w["decodes"]) for w in figures["worst"][:2]] == [(0, 3), (0, 5)]
    want[:, 1] = 5.0
    got = want.clone()
    got[0, 2] = 10.1
    errors.add(got, want)
    assert errors.other_argmax == 0 and not errors.passed  # the error is larger than the margin
    assert errors.figures()["above_bound"] == 1
    got[0] = want[0]
    got[0, 7] = float("nan")
    errors.add(got, want)
    assert errors.figures()["max"] == float("inf")
