"""The measured requests never change: figures from different days and machines stay comparable."""

import hashlib
import itertools

import pytest

from benchmarks.workload_cpu import MAX_TOKENS, prompts, rate

GOLDEN = {
    "one": ([15591, 23754, 3724, 14843], [22393, 35484, 21469, 2247], "4b840af6603719e8", "540056f666495e56"),
    "many": ([23755, 6684, 4274, 8886], [8896, 30985, 39315, 26343], "40851a691f2c90ee", "3db73c8e02cec093"),
    "shared": (
        [15817, 28892, 16521, 35040],
        [9971, 25899, 26144, 33003],
        "a5facfcb402fb830",
        "52bf9f7ccc9efe4b",
    ),
}


@pytest.mark.parametrize("kind", MAX_TOKENS)
def test_golden_requests(kind):
    head, tail, *digests = GOLDEN[kind]
    made = [prompts(kind, repeat) for repeat in (0, 1)]
    assert (made[0][0][:4], made[0][-1][-4:]) == (head, tail)
    assert [hashlib.sha256(repr(p).encode()).hexdigest()[:16] for p in made] == digests


def test_shapes():
    assert [len(p) for p in prompts("one", 0)] == [128]
    assert [len(p) for p in prompts("many", 0)] == [128] * 32
    shared = prompts("shared", 0)
    assert [len(p) for p in shared] == [544] * 32
    assert len({tuple(p[:512]) for p in shared}) == 1
    assert len({tuple(p[512:]) for p in shared}) == 32


def test_repeats_share_nothing():
    runs = [{tuple(p[:16]) for p in prompts("many", repeat)} for repeat in (-1, 0, 1, 2)]
    assert all(not a & b for a, b in itertools.combinations(runs, 2))


def test_an_unknown_kind_is_an_error():
    with pytest.raises(ValueError, match="kind is 'two', not one of one, many, shared"):
        prompts("two", 0)


def test_one_stream_is_rated_by_its_pace_and_many_by_the_whole_time():
    assert rate("one", 128, start=0.0, first=1.0, end=2.0) == 127
    assert rate("many", 4096, start=0.0, first=1.0, end=2.0) == 2048
