"""The measured requests are the very ones that peers are measured with, on every machine and for ever."""

import hashlib
import json

import pytest

from benchmarks.workload import END_ID, LOWEST_ID, Request, fixed, redrawn, sharegpt_like, stop_ids

# SHA-256 of ids and lengths as JSON, taken from the script that the published figures of vLLM were made with.
SHAREGPT_LIKE = {
    (1000, 0): "4daea9f3f37ac658c0ad44b74f199e6f97b149bfbcb37b52a2822b4bc4621458",
    (64, 12345): "bc70db5b2364e788161255a54e5b237647d0f344660d6c1bfc2517911ad7c503",
    (512, 71): "938dd672e01bf05a60d250e381b4a660e25635c5a5d64587089d5ae193754811",
    (1, 3): "b876872499dda616cab544db222fe1f83c5e8f244c1b88588c0b374564c4d3f5",
    (0, 5): "4f53cda18c2baa0c0354bb5f9a3ecbe5ed12ab4d8e11ba873c2f11161202b945",
}
FIXED = {
    (1, 512, 257, 0): "0002545f151324e7cb6847d5ced583158a55063ceaf8d730d55dbc5ffcf8934b",
    (64, 512, 32, 12346): "8d3a23851eb517a0501422bd22186ea4e97294cf602a02eecfca866927adb303",
    (512, 1024, 128, 0): "225a80668d8d9002bb12839261052812b9dd33e8ed98afd717731f00ed1e72e9",
    (8, 1, 1, 9): "013eac74377d6fb85cd3d71e1d4984aaf2100f51939f61f86e597888b9e2847d",
}


def digest(requests: list[Request]) -> str:
    plain = [list(request) for request in requests]
    return hashlib.sha256(json.dumps(plain, separators=(",", ":")).encode()).hexdigest()


@pytest.mark.parametrize("arguments", SHAREGPT_LIKE)
def test_sharegpt_like_requests_are_the_peers(arguments):
    assert digest(sharegpt_like(*arguments)) == SHAREGPT_LIKE[arguments]


@pytest.mark.parametrize("arguments", FIXED)
def test_fixed_requests_are_the_peers(arguments):
    assert digest(fixed(*arguments)) == FIXED[arguments]


def test_lengths_and_ids_are_within_bounds():
    requests = sharegpt_like(1000)
    assert {4, 1024} <= {len(prompt) for prompt, _ in requests}
    assert all(4 <= len(prompt) <= 1024 and 4 <= answer_len <= 1024 for prompt, answer_len in requests)
    assert all(min(prompt) >= LOWEST_ID and max(prompt) < END_ID for prompt, _ in requests)


def test_redrawn_requests_keep_the_lengths_and_share_no_prompt():
    first = sharegpt_like(200)
    for seed in (1, 2):
        again = redrawn(first, seed)
        assert [(len(p), n) for p, n in again] == [(len(p), n) for p, n in first]
        assert not {tuple(p[:4]) for p, _ in again} & {tuple(p[:4]) for p, _ in first}
    assert redrawn(first, 1) == redrawn(first, 1) != redrawn(first, 2)


def test_stop_ids_are_different_ids_of_the_vocabulary():
    ids = stop_ids(760, 152064)
    assert len(set(ids)) == 760 and ids == sorted(ids) and ids[0] >= 0 and ids[-1] < 152064
    assert ids == stop_ids(760, 152064) != stop_ids(760, 152064, seed=1)
