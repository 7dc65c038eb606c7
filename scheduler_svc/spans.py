"""The spans of a request in the tokens tier, made from its times when it has ended."""

from __future__ import annotations

from itertools import pairwise

from pagoda.tracing import Attributes, Record, Tracing
from scheduler_svc.core.events import RequestEnd


def record_end(tracing: Tracing, traceparent: str, num_resumed: int, end: RequestEnd) -> None:
    """Send the spans: queue, prefill and decode as far as the request came, and each of its pauses.

    `num_resumed` output tokens are the caller's, from an attempt before this one.
    """
    times = [end.arrived, end.first_scheduled, end.first_token]
    begun = [time for time in times if time is not None]
    attributes: Attributes = {
        "gen_ai.request.id": end.request_id,
        "gen_ai.usage.input_tokens": end.prompt_tokens,
        "gen_ai.usage.output_tokens": end.completion_tokens,
        "gen_ai.usage.cache_read.input_tokens": end.cached_tokens,
        "pagoda.finish_reason": end.reason.name.lower(),
        "pagoda.num_preemptions": end.num_preemptions,
        "pagoda.num_replays": end.num_replays,
        "pagoda.num_resumed_tokens": num_resumed,
    }
    phases = zip(("queue", "prefill", "decode"), pairwise([*begun, end.ended]), strict=False)
    records = [Record(name, start, until, attributes) for name, (start, until) in phases]
    records[-1] = records[-1]._replace(error=end.failure)
    pauses = pairwise([*end.pauses, ("resumed", end.ended)])
    records += [
        Record(why, start, until, attributes) for (why, start), (_, until) in pauses if why != "resumed"
    ]
    tracing.record(traceparent, records)
