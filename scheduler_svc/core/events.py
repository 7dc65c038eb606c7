"""What comes into the core and what goes out: the record that replay reads.

Every input is a value of one of the `Event` types; every output a `Plan` or an `Outputs`. They are
`msgspec` structs, so a run is recorded by writing them down and replayed by reading them back
(`scheduler_svc/record.py`). Nothing here holds a clock, a socket or a proto.

Times are seconds of a monotonic clock, chosen by the caller. Durations end in `_us`.
"""

from __future__ import annotations

from enum import IntEnum

import msgspec


class Finish(IntEnum):
    """Why a sample ended. Values equal `pagoda.v1.FinishReason`."""

    STOP = 1
    LENGTH = 2
    CANCELLED = 3
    ERROR = 4


class RowEnd(IntEnum):
    """Why a device row took its last token. Values equal `pagoda.internal.v1.RowEnd`."""

    STOP = 1
    LENGTH = 2
    NAN = 3


class Sampling(msgspec.Struct, frozen=True, array_like=True):
    """How tokens are drawn. `None` is "off"; ranges are checked before a `Sampling` is made."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0  # sample i draws with (seed + i) mod 2^64
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()  # EOS included unless the request ignores it
    num_logprobs: int | None = None
    num_prompt_logprobs: int | None = None
    grammar: str | None = None  # which only a worker reads
    beam_width: int | None = None  # beams that a search keeps, instead of drawing
    length_penalty: float = 1.0
    early_stopping: int = 1  # `core.beams.EarlyStopping`
    await_verdicts: bool = False  # the session says which candidates end


# ---------------------------------------------------------------------------------- what comes in


class WorkerAttached(msgspec.Struct, frozen=True, array_like=True, tag="worker_attached"):
    """A worker group is complete and empty, and may be given work."""

    worker: str
    epoch: int
    num_blocks: int
    block_size: int
    max_slots: int
    max_model_len: int
    max_batched_tokens: int
    max_horizon: int
    max_inflight: int
    num_host_blocks: int = 0
    block_bytes: int = 0  # of one block over all layers


class WorkerLost(msgspec.Struct, frozen=True, array_like=True, tag="worker_lost"):
    """A worker group's session ended. Its steps in flight will never be answered."""

    worker: str


class Resumed(msgspec.Struct, frozen=True, array_like=True):
    """One sample's output that the caller already has."""

    tokens: tuple[int, ...]
    finished: bool = False


class RequestArrived(msgspec.Struct, frozen=True, array_like=True, tag="request_arrived"):
    """A request, checked for ranges. `key` is unique for the life of the core.

    `session` names the stream its outputs go to and `handle` the caller's name for it there.
    """

    key: int
    session: int
    handle: int
    request_id: str
    prompt: tuple[int, ...]
    n: int
    max_tokens: int
    sampling: Sampling
    priority: int = 0
    cache_salt: str = ""
    resume: tuple[Resumed, ...] = ()
    traceparent: str = ""  # for its rows, when it is traced


class RequestStopped(msgspec.Struct, frozen=True, array_like=True, tag="request_stopped"):
    """The caller wants no more of a request (`index` None) or of one sample."""

    key: int
    index: int | None
    reason: Finish  # STOP for a stop string, CANCELLED otherwise


class VerdictGiven(msgspec.Struct, frozen=True, array_like=True, tag="verdict_given"):
    """The session says which candidates of a search's step end, by their places."""

    key: int
    step: int
    stopped: tuple[int, ...]


class LogprobEntry(msgspec.Struct, frozen=True, array_like=True):
    """One token's logprob, rank (1 is best, 0 not known) and alternatives, best first."""

    logprob: float
    rank: int
    top_ids: tuple[int, ...]
    top_logprobs: tuple[float, ...]


class PromptLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Entries for some of a prompt's tokens, one behind the other.

    `of` is whose they are: a row of a step's batch where they come in, a request's handle where they go out.
    """

    of: int
    entries: tuple[LogprobEntry, ...]


class StepDone(msgspec.Struct, frozen=True, array_like=True, tag="step_done"):
    """The result of one step, in columns over its sampling rows (see `StepResult` on the wire)."""

    worker: str
    epoch: int
    step_id: int
    tokens: list[int]
    num_sampled: list[int]  # empty: every sampling row has num_iterations tokens
    ended_rows: list[int]
    ended_reasons: list[int]
    logprobs: tuple[LogprobEntry, ...] = ()
    device_us: int = 0
    idle_us: int = 0
    prompts: tuple[PromptLogprobs, ...] = ()
    swap_us: int = 0  # a part of device_us
    beam_parents: list[int] = []
    beam_tokens: list[int] = []
    beam_scores: list[float] = []
    beam_tops: tuple[LogprobEntry, ...] = ()  # of the beam rows that asked: alternatives, without a token


Event = WorkerAttached | WorkerLost | RequestArrived | RequestStopped | VerdictGiven | StepDone


# ---------------------------------------------------------------------------------- what goes out


class NewRow(msgspec.Struct, frozen=True, array_like=True):
    """A sequence entering a slot; a fork (`parent_slot`) copies its parent's row on the device."""

    slot: int
    parent_slot: int | None
    tokens: tuple[int, ...]
    num_prompt_tokens: int
    num_computed: int
    blocks: tuple[int, ...]
    last_position: int
    sampling: Sampling  # with the sample's own seed
    traceparent: str = ""


class Plan(msgspec.Struct, array_like=True):
    """One step for one worker, in the order in which it is applied (see `Step` on the wire).

    `slots` and `num_tokens` are the batch; `num_tokens` is empty when every row has one token.
    """

    worker: str
    epoch: int
    step_id: int
    num_iterations: int
    released_slots: list[int] = []
    copy_src_blocks: list[int] = []
    copy_dst_blocks: list[int] = []
    new_rows: list[NewRow] = []
    append_slots: list[int] = []
    append_blocks: list[int] = []
    replace_slots: list[int] = []
    replace_indexes: list[int] = []
    replace_blocks: list[int] = []
    slots: list[int] = []
    num_tokens: list[int] = []
    swap_out_device_blocks: list[int] = []
    swap_out_host_blocks: list[int] = []
    swap_in_host_blocks: list[int] = []
    swap_in_device_blocks: list[int] = []
    beam_slots: list[int] = []
    beam_parent_slots: list[int] = []
    beam_tokens: list[int] = []
    beam_rows: list[int] = []
    beam_scores: list[float] = []
    beam_counts: list[int] = []
    beam_widths: list[int] = []


class BeamCandidates(msgspec.Struct, frozen=True, array_like=True):
    """What may go on a search that awaits a verdict (see `BeamCandidates` on the wire)."""

    handle: int
    step: int
    parents: list[int]
    token_ids: list[int]


class SessionOutput(msgspec.Struct, array_like=True):
    """What one session gets from one `apply`: columns, one row a sample (see `OutputColumns`)."""

    handles: list[int] = []
    indexes: list[int] = []  # empty when all are 0
    num_tokens: list[int] = []  # empty when all are 1
    tokens: list[int] = []
    ended_rows: list[int] = []
    ended_reasons: list[int] = []
    logprob_rows: list[int] = []
    logprobs: list[LogprobEntry] = []
    ended: list[RequestEnd] = []  # requests of which every sample has ended
    prompts: list[PromptLogprobs] = []  # each goes on where the last one of its request ended
    score_rows: list[int] = []
    scores: list[float] = []
    candidates: list[BeamCandidates] = []


class RequestEnd(msgspec.Struct, frozen=True, array_like=True):
    """A request is over: its counts, its times for the metrics and the log line."""

    key: int
    handle: int
    request_id: str
    reason: Finish  # of the last sample to end
    reasons: tuple[int, ...]  # of each sample
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    num_preemptions: int
    num_replays: int
    arrived: float
    first_scheduled: float | None
    first_token: float | None
    last_token: float | None
    ended: float
    failure: str = ""  # why, when reason is ERROR
    pauses: tuple[tuple[str, float], ...] = ()  # when it was preempted, worker_lost, resumed


class Outputs(msgspec.Struct, array_like=True):
    """What one `apply` brought, by session."""

    sessions: dict[int, SessionOutput] = {}
