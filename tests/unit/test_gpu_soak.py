"""The long run sees what it is there to see: a lost block, a request that ends twice, memory that grows."""

import pytest

from benchmarks.gpu_soak_book import Book
from benchmarks.gpu_soak_checks import Memory, book_problems, growth_problems, idle_problems
from benchmarks.gpu_soak_load import End, Mix, Planned
from pagoda.v1 import scheduler_pb2 as pb

STOP, LENGTH, CANCELLED = pb.FINISH_REASON_STOP, pb.FINISH_REASON_LENGTH, pb.FINISH_REASON_CANCELLED
EPOCH = 7


def planned(max_tokens: int = 3, **more) -> Planned:
    request = pb.GenerateTokensRequest(request_id="one", prompt_token_ids=[5, 6, 7])
    return Planned(request, max_tokens=max_tokens, **more)


def columns(handle: int, *tokens: int, reason: int = 0, usage: int | None = None) -> pb.OutputColumns:
    """One row of a request's only sample and, with `usage`, its end."""
    out = pb.OutputColumns(handles=[handle], num_tokens=[len(tokens)], tokens=tokens)
    if reason:
        out.ended_rows.append(0)
        out.ended_reasons.append(pb.FinishReason.ValueType(reason))
    if usage is not None:
        out.usage_handles.append(handle)
        out.usages.add(prompt_tokens=3, completion_tokens=usage)
    return out


def after(plan: Planned, *messages: pb.OutputColumns) -> list[str]:
    """The problems that a book sees when these come for its first request."""
    book = Book(vocab_size=100)
    book.send(plan)
    for message in messages:
        book.take(message)
    return book.problems


# ------------------------------------------------------------------------------------------- the book


def test_a_request_that_ends_once_with_its_length_is_fine():
    assert after(planned(), columns(1, 10, 11), columns(1, 12, reason=LENGTH, usage=3)) == []


def test_a_request_that_ends_twice_is_seen():
    end = columns(1, 10, 11, 12, reason=LENGTH, usage=3)
    (first, second) = after(planned(), end, end)
    assert "3 tokens came for request 1, which had ended (length)" in first
    assert "an end came for request 1, which had ended (length)" in second


def test_an_end_for_a_request_that_nobody_sent_is_seen():
    assert "which is none" in after(planned(), columns(2, 10, reason=LENGTH, usage=1))[0]


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        (columns(1, 10, reason=LENGTH, usage=1), "has 1 tokens, not 3"),
        (columns(1, 10, 11, 12, usage=3), "never ended"),
        (columns(1, 10, 11, 12, reason=LENGTH, usage=4), "counts 4 output tokens, 3 came"),
        (columns(1, 10, reason=STOP, usage=1), "its last token is no stop id"),
        (columns(1, 10, reason=CANCELLED, usage=1), f"ended for reason {CANCELLED}"),
        (columns(1, 10, 11, 100, reason=LENGTH, usage=3), "token 100 is out of the vocabulary"),
    ],
)
def test_a_wrong_end_is_seen(message, problem):
    assert problem in after(planned(), message)[0]


def test_tokens_after_a_samples_end_are_seen():
    first = columns(1, 10, 11, 12, reason=LENGTH)
    assert "gained tokens after its end" in after(planned(), first, columns(1, 13))[0]


def test_stop_ids_end_a_sample_and_nothing_else_does():
    plan = planned(stops=frozenset([50]))
    assert after(plan, columns(1, 10, 50, reason=STOP, usage=2)) == []
    assert "went on after a stop id" in after(plan, columns(1, 50, 10, 11, reason=LENGTH, usage=3))[0]
    assert "says that its length ended it" in after(plan, columns(1, 10, 11, 50, reason=LENGTH, usage=3))[0]
    early = planned(stops=frozenset([50]), min_tokens=2)
    assert "stopped after 2 tokens" in after(early, columns(1, 10, 50, reason=STOP, usage=2))[0]


def test_what_a_stop_crosses_on_its_way_is_fine_and_what_comes_after_it_is_seen():
    book = Book(vocab_size=100)
    book.send(planned())
    assert book.stop(1)
    assert not book.stop(1)
    book.send(planned())
    book.take(columns(1, 10))
    assert book.problems == []
    book.take(columns(2, 10))  # sent after the stop, which has been read then
    book.take(columns(1, 11))
    assert "though its stop had been read" in book.problems[0]


def test_a_stopped_request_counts_once_however_the_race_ends():
    book = Book(vocab_size=100)
    for _ in range(2):
        book.send(planned(end=End.CANCELLED))
    assert book.stop(1) and book.stop(2)
    book.take(columns(1, 10, 11, 12, reason=LENGTH, usage=3))
    book.settle()
    assert book.problems == []
    assert book.ended == {"ended before its stop was read": 1, End.CANCELLED.value: 1}
    book.take(columns(2, reason=CANCELLED, usage=0))
    assert book.problems


def test_refusals_must_name_their_field():
    plan = planned(end=End.REFUSED, code=3, field="sampling.n")
    refused = pb.RequestFailure(handle=1, code=3, field="sampling.n")
    assert after(plan, pb.OutputColumns(failures=[refused])) == []
    assert "should have been refused" in after(plan, columns(1, 10, reason=LENGTH, usage=1))[0]
    refused.field = "sampling.top_k"
    assert "was refused for" in after(plan, pb.OutputColumns(failures=[refused]))[0]
    assert "request 1 failed" in after(planned(), pb.OutputColumns(failures=[refused]))[0]


def test_logprobs_come_with_each_token_and_for_nobody_else():
    entry = pb.TokenLogprob(logprob=-1.0, rank=1, top_ids=[10], top_logprobs=[-1.0])
    message = columns(1, 10, reason=LENGTH, usage=1)
    message.logprobs.append(entry)
    message.logprob_rows.append(0)
    assert after(planned(1, num_logprobs=1), message) == []
    assert "1 alternatives of 2" in after(planned(1, num_logprobs=2), message)[0]
    assert "did not ask for" in after(planned(1), message)[0]
    assert "got 0 logprobs" in after(planned(1, num_logprobs=1), columns(1, 10, reason=LENGTH, usage=1))[0]


# -------------------------------------------------------------------------------------------- the load


def mix(seed: int = 3) -> Mix:
    return Mix(seed=seed, vocab_size=1000, max_model_len=4096, eos=(2,), max_stop_ids=16)


def test_the_same_seed_draws_the_same_requests_of_every_kind():
    one, same, other = ([m.draw() for _ in range(3000)] for m in (mix(), mix(), mix(4)))
    assert [p.request for p in one] == [p.request for p in same]
    assert [p.request for p in one] != [p.request for p in other]
    assert {p.end for p in one} == set(End)
    assert 0.08 < sum(p.end is End.CANCELLED for p in one) / len(one) < 0.15
    assert (
        {1, 2, 3, 4} <= {p.n for p in one} and any(p.twice for p in one) and any(p.num_resumed for p in one)
    )
    lengths = [len(p.request.prompt_token_ids) for p in one if p.end is not End.REFUSED]
    assert min(lengths) <= 16 and max(lengths) == 2000


# ------------------------------------------------------------------------------------------ the checks


def snapshot() -> pb.Snapshot:
    """At rest: 6 blocks, of which 2 are cached."""
    worker = pb.WorkerSnapshot(
        name="w0", epoch=EPOCH, num_blocks=6, num_free_blocks=4, num_cached_blocks=2, max_slots=4,
        ref_counts=[0] * 6, cached_blocks=[3, 5],
    )  # fmt: skip
    return pb.Snapshot(workers=[worker])


def busy() -> pb.Snapshot:
    """Two rows that share block 5, which is cached too; block 3 is cached and idle, 4 is free."""
    now = snapshot()
    worker = now.workers[0]
    worker.ref_counts[:] = [1, 1, 1, 0, 0, 2]
    worker.num_free_blocks, worker.num_cached_blocks, worker.num_slots_used = 1, 1, 2
    for slot, blocks in ((0, [5, 0]), (2, [5, 1, 2])):
        sample = pb.SampleSnapshot(slot=slot, blocks=blocks)
        now.requests.add(request_id=f"r{slot}", worker="w0", samples=[sample])
    now.num_running = 2
    return now


def test_books_that_balance():
    assert idle_problems(snapshot(), EPOCH) == []
    assert book_problems(busy()) == []


def test_a_leaked_block_is_seen_at_rest():
    now = snapshot()
    now.workers[0].num_free_blocks = 3
    now.workers[0].ref_counts[0] = 1
    assert any("block 0 has 1, 0 tables hold it" in problem for problem in idle_problems(now, EPOCH))
    assert any("5 of 6 blocks are free or cached" in problem for problem in idle_problems(now, EPOCH))
    now.workers[0].ref_counts[0] = 0
    assert any("1 of 6 blocks are lost" in problem for problem in idle_problems(now, EPOCH))


def test_a_block_that_two_rows_hold_and_one_is_counted_for_is_seen_under_load():
    now = busy()
    now.workers[0].ref_counts[5] = 1
    assert any("block 5 has 1, 2 tables hold it" in problem for problem in book_problems(now))


def test_slots_and_caches_that_do_not_add_up_are_seen():
    now = busy()
    now.requests[1].samples[0].slot = 0
    assert any("2 rows hold 1 slots" in problem for problem in book_problems(now))
    now = snapshot()
    now.workers[0].num_slots_used = 1
    assert any("1 slots used" in problem for problem in idle_problems(now, EPOCH))
    now = snapshot()
    now.workers[0].cached_blocks.append(1)
    assert any("3 blocks that nobody holds can be hit, 2 are counted" in p for p in idle_problems(now, EPOCH))


def test_requests_that_are_left_and_workers_that_were_lost_are_seen():
    now = snapshot()
    now.num_waiting = 1
    assert any("1 wait" in problem for problem in idle_problems(now, EPOCH))
    assert any("there was one worker" in problem for problem in idle_problems(snapshot(), EPOCH - 1))
    assert idle_problems(pb.Snapshot(), EPOCH)


def looks(device: list[float], scheduler: list[float], worker: list[float] | None = None) -> list[Memory]:
    return [
        Memory(2000 + 4500 * i, 10.0 * i, on_device, {"scheduler": mib, "worker": of_worker})
        for i, (on_device, mib, of_worker) in enumerate(
            zip(device, scheduler, worker or [900.0] * 5, strict=True)
        )
    ]


def test_memory_that_settles_is_fine_and_memory_that_grows_is_seen():
    flat = [45.0, 47.0, 46.0, 48.0, 47.0]
    assert growth_problems(looks([9000, 9100, 9120, 9120, 9121], flat)) == []
    assert growth_problems(looks([9000] * 5, flat)) == []
    assert "the device" in growth_problems(looks([9000, 9050, 9100, 9150, 9200], flat))[0]
    assert "the device" in growth_problems(looks([9000, 9400, 9400, 9400, 9400], flat))[0]
    leaking = [45.0 + 4500 * i * 8 / 5 / 1024 for i in range(5)]  # one request in five stays, with 8 KiB
    worse = [45.0 + 1.1 * (mib - 45.0) for mib in leaking]
    assert growth_problems(looks([9000] * 5, leaking)) == []
    assert "the scheduler grew by 31 MiB" in growth_problems(looks([9000] * 5, worse))[0]


def test_a_worker_may_capture_graphs_for_a_while_and_not_for_ever():
    device, flat = [9000.0] * 5, [45.0] * 5
    assert growth_problems(looks(device, flat, [1065, 1211, 1272, 1278, 1280])) == []
    problem = growth_problems(looks(device, flat, [1065, 1100, 1140, 1180, 1220]))
    assert len(problem) == 1 and "the worker grew by 80 MiB in the last 9000 requests" in problem[0]
    problem = growth_problems(looks(device, flat, [1065, 1365, 1366, 1366, 1366]))
    assert len(problem) == 1 and "the worker grew by 301 MiB in the last 18000 requests" in problem[0]
