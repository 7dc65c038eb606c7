"""n, best_of and beam search in a body: how many samples are drawn or searched for, and how many are told.

The fields are vLLM's as it had them: with `use_beam_search`, `best_of` is the number of beams.
"""

from __future__ import annotations

from gateway_svc.errors import InvalidField
from gateway_svc.gateway import best_of
from gateway_svc.generation import Best
from gateway_svc.openai.schema import MAX_BEAM_WIDTH, SamplingBody
from pagoda.v1 import scheduler_pb2 as pb

_EARLY_STOPPING = {
    False: pb.EARLY_STOPPING_HEURISTIC,
    True: pb.EARLY_STOPPING_FIRST,
    "never": pb.EARLY_STOPPING_NEVER,
}


def num_sequences(body: SamplingBody) -> int:
    """Sequences that run for each prompt.

    Raises:
        InvalidField: the fields contradict each other.
    """
    if _searches(body):
        return _beam_width(body)
    if body.best_of is None:
        return body.n
    if body.best_of < body.n:
        raise InvalidField("best_of", f"is {body.best_of}; must be at least n, {body.n}")
    if body.best_of > body.n and body.stream:
        problem = f"is {body.best_of}; a stream cannot tell which {body.n} are the best before all have ended"
        raise InvalidField("best_of", f"{problem}. Leave out stream, or best_of")
    return body.best_of


def fill_group(sampling: pb.SamplingParams, body: SamplingBody) -> Best | None:
    """Let the samples be drawn or searched for; how many of them are told if not all. Raises InvalidField."""
    number = num_sequences(body)
    if not _searches(body):
        return best_of(sampling, number)
    sampling.beam_width = number
    if body.length_penalty is not None:
        sampling.length_penalty = body.length_penalty
    if body.early_stopping is not None:
        sampling.early_stopping = _EARLY_STOPPING[body.early_stopping]
    return None


def _searches(body: SamplingBody) -> bool:
    """Whether this is a beam search. Raises InvalidField where it is none, but has options of one."""
    if body.use_beam_search or (body.use_beam_search is None and body.beam_width is not None):
        return True
    for name, neutral in (("beam_width", None), ("length_penalty", 1.0), ("early_stopping", False)):
        if getattr(body, name) not in (None, neutral):
            raise InvalidField(name, "is for beam search; leave it out, or set use_beam_search to true")
    return False


def _beam_width(body: SamplingBody) -> int:
    """How many beams a search has: beam_width, else best_of, else n."""
    if None not in (body.beam_width, body.best_of) and body.beam_width != body.best_of:
        problem = f"is {body.best_of}, but beam_width is {body.beam_width}; leave one of them out"
        raise InvalidField("best_of", problem)
    fields = {"beam_width": body.beam_width, "best_of": body.best_of, "n": body.n}
    field, width = next((name, value) for name, value in fields.items() if value is not None)
    if width > MAX_BEAM_WIDTH:
        raise InvalidField(field, f"makes {width} beams; at most {MAX_BEAM_WIDTH}")
    if body.n > width:
        raise InvalidField("n", f"is {body.n}; must be at most {field}, the {width} beams of the search")
    return width
