"""Plans, results and outputs cross the wire unchanged, and a step of decodes stays small."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagoda.checksum import step_checksum
from pagoda.internal.v1 import worker_pb2 as wire
from pagoda.v1 import scheduler_pb2 as pb
from scheduler_svc import codec
from scheduler_svc.codec import BadResult, decode_result, encode_output, encode_step, merge_outputs
from scheduler_svc.core.events import (
    Finish,
    LogprobEntry,
    NewRow,
    Plan,
    PromptLogprobs,
    RequestEnd,
    Sampling,
    SessionOutput,
)
from scheduler_svc.core.worker import Flight
from scheduler_svc.errors import QueueFull

VOCAB = 49152
MAX_BYTES = 1536


def plan(**changes: Any) -> Plan:
    columns: dict[str, Any] = {name: [] for name in codec.PLAN_COLUMNS}
    fields = {"worker": "w0", "epoch": 3, "step_id": 70_000, "num_iterations": 1, "new_rows": [], **columns}
    return Plan(**{**fields, **changes})


def end(handle: int, **changes: Any) -> RequestEnd:
    fields: dict[str, Any] = {
        "key": 1, "handle": handle, "request_id": "r", "reason": Finish.STOP, "reasons": (1,),
        "prompt_tokens": 10, "cached_tokens": 4, "completion_tokens": 7, "num_preemptions": 0,
        "num_replays": 0, "arrived": 0.0, "first_scheduled": 0.0, "first_token": 0.0, "last_token": 0.0,
        "ended": 0.0,
    }  # fmt: skip
    return RequestEnd(**{**fields, **changes})


# -------------------------------------------------------------------------------------------- steps


def test_every_column_of_a_plan_arrives() -> None:
    columns = {name: [10 * i, 10 * i + 1] for i, name in enumerate(codec.PLAN_COLUMNS, 1)}
    step = wire.AttachResponse.FromString(encode_step(plan(num_iterations=4, **columns))).step
    assert (step.epoch, step.step_id, step.num_iterations) == (3, 70_000, 4)
    for name, column in columns.items():
        assert list(getattr(step, name)) == column


def test_the_columns_are_those_of_plan_and_step() -> None:
    scalars = {"worker", "epoch", "step_id", "num_iterations", "new_rows"}
    assert set(codec.PLAN_COLUMNS) == set(Plan.__struct_fields__) - scalars
    assert set(wire.Step.DESCRIPTOR.fields_by_name) == set(Plan.__struct_fields__) - {"worker"}


def test_a_new_row_arrives() -> None:
    sampling = Sampling(
        temperature=0.5,
        top_k=4,
        top_p=0.25,
        min_p=0.125,
        presence_penalty=1,
        frequency_penalty=-1,
        repetition_penalty=2,
        logit_bias=((4, 1.5), (9, -2)),
        seed=1 << 63,
        min_tokens=3,
        stop_token_ids=(2, 8),
        num_logprobs=0,
        grammar="start: /x/",
    )
    new = NewRow(5, None, (1, 2, 3), 2, 1, (7, 9), 30, sampling, "00-a-b-01")
    row = wire.AttachResponse.FromString(encode_step(plan(new_rows=[new], slots=[5]))).step.new_rows[0]
    assert not row.HasField("parent_slot")
    assert (row.slot, list(row.tokens), row.num_prompt_tokens, row.num_computed) == (5, [1, 2, 3], 2, 1)
    assert (list(row.blocks), row.last_position, row.traceparent) == ([7, 9], 30, "00-a-b-01")
    got = row.sampling
    assert (got.temperature, got.top_k, got.top_p, got.min_p) == (0.5, 4, 0.25, 0.125)
    assert (got.presence_penalty, got.frequency_penalty, got.repetition_penalty) == (1, -1, 2)
    assert (list(got.bias_token_ids), list(got.bias_values)) == ([4, 9], [1.5, -2])
    assert (got.seed, got.min_tokens, list(got.stop_token_ids)) == (1 << 63, 3, [2, 8])
    assert got.HasField("num_logprobs") and got.num_logprobs == 0
    assert got.grammar == "start: /x/"


def test_what_is_off_is_absent() -> None:
    new = NewRow(5, 0, (), 2, 0, (), 30, Sampling(temperature=0.0))
    row = wire.AttachResponse.FromString(encode_step(plan(new_rows=[new], slots=[5]))).step.new_rows[0]
    assert row.HasField("parent_slot") and row.parent_slot == 0
    for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "num_logprobs"):
        assert not row.sampling.HasField(name)


# ------------------------------------------------------------------------------------------ results


def decode(num_sampling: int, num_iterations: int = 1, **fields: Any) -> Any:
    rows: list[Any] = [None] * num_sampling
    return decode_result("w0", wire.StepResult(**fields), Flight(0, num_iterations, rows), VOCAB)


def test_a_result_arrives() -> None:
    logprobs = wire.LogprobColumns(
        token_logprobs=[-0.5, -1.5], num_top=[2, 0], top_ids=[4, 5], top_logprobs=[-0.25, -4], ranks=[2, 1]
    )
    done = decode(
        3,
        2,
        epoch=3,
        step_id=9,
        tokens=[1, 2, 3],
        num_sampled=[2, 0, 1],
        ended_rows=[0, 2],
        ended_reasons=[1, 3],
        logprobs=logprobs,
        device_us=70,
        idle_us=5,
    )
    assert (done.worker, done.epoch, done.step_id) == ("w0", 3, 9)
    assert (done.tokens, done.num_sampled) == ([1, 2, 3], [2, 0, 1])
    assert (done.ended_rows, done.ended_reasons) == ([0, 2], [1, 3])
    assert (done.device_us, done.idle_us) == (70, 5)
    assert done.logprobs == (LogprobEntry(-0.5, 2, (4, 5), (-0.25, -4)), LogprobEntry(-1.5, 1, (), ()))


@pytest.mark.parametrize(
    "fields",
    [
        {"tokens": [1]},  # two rows, one token
        {"tokens": [1, 2, 3]},
        {"tokens": [1, 2], "num_sampled": [1, 0]},
        {"tokens": [1, 2], "num_sampled": [1, 1, 0]},
        {"tokens": [1, 2], "num_sampled": [2, 0]},  # more than there were iterations
        {"tokens": [1, VOCAB]},
        {"tokens": [1, 2], "ended_rows": [0]},
        {"tokens": [1, 2], "ended_rows": [2], "ended_reasons": [1]},
        {"tokens": [1, 2], "ended_rows": [1, 0], "ended_reasons": [1, 1]},
        {"tokens": [1, 2], "ended_rows": [0], "ended_reasons": [0]},
        {"tokens": [1, 2], "ended_rows": [0], "ended_reasons": [9]},
        {"tokens": [1, 2], "logprobs": {"token_logprobs": [-1.0], "num_top": [0]}},
        {"tokens": [1, 2], "logprobs": {"token_logprobs": [-1.0], "num_top": [1], "ranks": [1]}},
        {"tokens": [1, 2], "logprobs": {"token_logprobs": [0] * 3, "num_top": [0] * 3, "ranks": [1] * 3}},
    ],
)
def test_a_result_that_cannot_be_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(BadResult):
        decode(2, **fields)


def decode_prompts(due: dict[int, int], came: dict[int, int], num_entries: int) -> tuple[PromptLogprobs, ...]:
    """An answer of no sampling rows and so many logprobs of prompts, of which row by row so many are due."""
    flight = Flight(0, 1, [])
    flight.prompts = {row: (None, range(5, 5 + count)) for row, count in due.items()}  # type: ignore[misc]
    values = list(range(num_entries))
    columns = wire.LogprobColumns(token_logprobs=values, ranks=[1] * num_entries, num_top=[0] * num_entries)
    result = wire.StepResult(
        prompt_rows=list(came), num_prompt_logprobs=list(came.values()), prompt_logprobs=columns
    )
    return decode_result("w0", result, flight, VOCAB).prompts


def test_logprobs_of_prompts_arrive() -> None:
    zero, one, two = (LogprobEntry(value, 1, (), ()) for value in range(3))
    expected = (PromptLogprobs(1, (zero, one)), PromptLogprobs(4, (two,)))
    assert decode_prompts({1: 2, 4: 1}, {1: 2, 4: 1}, 3) == expected
    assert decode_prompts({}, {}, 0) == ()


@pytest.mark.parametrize(
    ("came", "num_entries"),
    [({}, 0), ({1: 2}, 2), ({1: 2, 4: 1}, 2), ({1: 1, 4: 2}, 3), ({1: 2, 3: 1}, 3), ({1: 2, 4: 1, 5: 1}, 4)],
)
def test_logprobs_of_prompts_that_are_not_due_are_refused(came: dict[int, int], num_entries: int) -> None:
    with pytest.raises(BadResult, match="logprobs of prompts"):
        decode_prompts({1: 2, 4: 1}, came, num_entries)
    with pytest.raises(BadResult, match="logprobs of prompts"):
        decode_prompts({}, {0: 1}, 1)


def test_checksums_tell_apart_what_was_drawn() -> None:
    def checksum(**columns: Any) -> int:
        return step_checksum(wire.StepResult(epoch=1, step_id=1, device_us=5, **columns))

    columns: dict[str, list[int]] = {
        "tokens": [1, 2, 3], "num_sampled": [2, 1], "beam_parents": [0, 1], "beam_tokens": [7, 8],
    }  # fmt: skip
    assert checksum(**columns) == step_checksum(wire.StepResult(**columns)), "times are each rank's own"
    for name, column in columns.items():
        assert checksum(**{**columns, name: column[::-1]}) != checksum(**columns), name
    assert checksum() == 0
    assert checksum(tokens=[1]) == 0x99F8B879, "CRC-32 of 01 00 00 00"


# --------------------------------------------------------------------------------------------- size


def test_256_decodes_are_small_both_ways() -> None:
    """With the blocks, ends and releases of the benchmark's load, late in a session's life."""
    drawn = random.Random(1)
    slots = list(range(256))
    appends = drawn.sample(slots, 16)
    down = encode_step(
        plan(
            epoch=12,
            step_id=10_000_000,
            slots=slots,
            released_slots=[17, 200],
            append_slots=appends,
            append_blocks=drawn.sample(range(30_000), 16),
        )
    )
    assert len(down) <= MAX_BYTES
    tokens = [drawn.randrange(VOCAB) for _ in slots]
    result = wire.StepResult(
        epoch=12,
        step_id=10_000_000,
        tokens=tokens,
        num_sampled=[1] * 256,
        ended_rows=[17, 200],
        ended_reasons=[wire.ROW_END_STOP, wire.ROW_END_LENGTH],
        device_us=8000,
        idle_us=3,
    )
    up = wire.AttachRequest(result=result).SerializeToString()
    assert len(up) <= MAX_BYTES


# ------------------------------------------------------------------------------------------ outputs


def test_an_output_arrives_as_it_is() -> None:
    output = SessionOutput(
        handles=[7, 8, 8],
        indexes=[0, 0, 1],
        num_tokens=[2, 1, 0],
        tokens=[1, 2, 3],
        ended_rows=[2],
        ended_reasons=[3],
        logprob_rows=[1],
        logprobs=[LogprobEntry(-0.5, 1, (3, 4), (-0.5, -2))],
        prompts=[
            PromptLogprobs(7, (LogprobEntry(-1, 2, (6,), (-0.25,)), LogprobEntry(-2, 3, (), ()))),
            PromptLogprobs(5, (LogprobEntry(-4, 1, (), ()),)),
        ],
    )
    failure = QueueFull(10).failure(99)
    columns = pb.SessionResponse.FromString(encode_output([output], [end(8)], [failure])).output
    assert list(columns.handles) == [7, 8, 8] and list(columns.indexes) == [0, 0, 1]
    assert list(columns.num_tokens) == [2, 1, 0] and list(columns.tokens) == [1, 2, 3]
    assert list(columns.ended_rows) == [2] and list(columns.ended_reasons) == [pb.FINISH_REASON_CANCELLED]
    assert list(columns.logprob_rows) == [1]
    assert columns.logprobs[0] == pb.TokenLogprob(
        logprob=-0.5, rank=1, top_ids=[3, 4], top_logprobs=[-0.5, -2]
    )
    assert list(columns.prompt_handles) == [7, 5] and list(columns.num_prompt_logprobs) == [2, 1]
    assert list(columns.prompt_logprobs) == [
        pb.TokenLogprob(logprob=-1, rank=2, top_ids=[6], top_logprobs=[-0.25]),
        pb.TokenLogprob(logprob=-2, rank=3),
        pb.TokenLogprob(logprob=-4, rank=1),
    ]
    assert list(columns.usage_handles) == [8]
    assert columns.usages[0] == pb.Usage(prompt_tokens=10, cached_tokens=4, completion_tokens=7)
    assert columns.failures[0].handle == 99 and columns.failures[0].retry_after_ms == 1000


ROWS = st.tuples(st.integers(1, 4), st.integers(0, 1))


@st.composite
def outputs(draw: st.DrawFn) -> list[SessionOutput]:
    """What a few steps may bring: a sample gains nothing after its end."""
    ended: set[tuple[int, int]] = set()
    made = []
    for _ in range(draw(st.integers(1, 4))):
        rows = draw(st.lists(ROWS.filter(lambda row: row not in ended), unique=True, max_size=5))
        counts = [draw(st.integers(0, 3)) for _ in rows]
        tokens = draw(st.lists(st.integers(0, 99), min_size=sum(counts), max_size=sum(counts)))
        with_logprobs = [i for i, (handle, _) in enumerate(rows) if handle % 2]
        entries = [LogprobEntry(-float(t), 1, (), ()) for t in range(sum(counts[i] for i in with_logprobs))]
        ends = [i for i in range(len(rows)) if draw(st.booleans())]
        ended.update(rows[i] for i in ends)
        made.append(
            SessionOutput(
                handles=[handle for handle, _ in rows],
                indexes=[index for _, index in rows],
                num_tokens=counts,
                tokens=tokens,
                ended_rows=ends,
                ended_reasons=[1] * len(ends),
                logprob_rows=with_logprobs,
                logprobs=entries,
            )
        )
    return made


def by_sample(made: list[SessionOutput]) -> dict[Any, Any]:
    """What each sample got over all of `made`."""
    got: dict[Any, Any] = {}
    for output in made:
        for key, row in codec.split_rows(output):
            tokens, reasons, entries = got.setdefault(key, ([], [], []))
            tokens += row.tokens
            reasons += [] if row.reason is None else [row.reason]
            entries += row.logprobs or []
    return got


@given(outputs())
def test_merged_outputs_say_the_same_in_one_row_a_sample(made: list[SessionOutput]) -> None:
    merged = merge_outputs(made)
    samples = list(zip(merged.handles, merged.indexes, strict=True))
    assert len(samples) == len(set(samples))
    assert by_sample([merged]) == by_sample(made)


def test_outputs_of_one_step_may_leave_columns_out() -> None:
    told = [PromptLogprobs(handle, (LogprobEntry(-1, 1, (), ()),)) for handle in (3, 9, 3)]
    lean = SessionOutput(handles=[1, 2], tokens=[5, 6], prompts=told[:1])
    more = SessionOutput(handles=[2, 3], tokens=[7, 8], prompts=told[1:])
    merged = merge_outputs([lean, more])
    assert merged == SessionOutput(
        handles=[1, 2, 3], indexes=[0, 0, 0], num_tokens=[1, 2, 1], tokens=[5, 6, 7, 8], prompts=told
    )
    assert msgspec.structs.asdict(lean)["num_tokens"] == [], "what was merged is left as it was"
