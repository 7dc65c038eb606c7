"""From what the device drew to a `StepResult`: the one place where device values are read."""

from __future__ import annotations

import numpy as np
import torch

from gpu_worker.runner import StepOutputs
from gpu_worker.slots import GOES_ON, NAN, WAS_DONE
from pagoda.internal.v1 import worker_pb2

MAX_UINT32 = 2**32 - 1


def collect(epoch: int, step_id: int, outputs: StepOutputs) -> worker_pb2.StepResult:
    """Wait for a step's values and put them into columns. The times are the caller's to fill in."""
    result = worker_pb2.StepResult(epoch=epoch, step_id=step_id)
    if not outputs.drawn:
        return result
    drawn = outputs.drawn[0].unsqueeze(0) if len(outputs.drawn) == 1 else torch.stack(outputs.drawn)
    values = drawn.cpu().numpy()
    tokens, outcomes = values[:, 0], values[:, 1]  # [m, R] each
    taken = (outcomes != WAS_DONE) & (outcomes != NAN)
    result.tokens.extend(tokens.T[taken.T].tolist())
    if not taken.all():
        result.num_sampled.extend(taken.sum(axis=0).tolist())
    reasons = outcomes.max(axis=0)  # a row ends at most once, and is done from then on
    ended = np.flatnonzero(reasons > GOES_ON)
    if len(ended):
        result.ended_rows.extend(ended.tolist())
        result.ended_reasons.extend(reasons[ended].tolist())
    if max(outputs.num_logprobs) >= 0:
        _add_logprobs(result.logprobs, outputs, taken)
    return result


def _add_logprobs(columns: worker_pb2.LogprobColumns, outputs: StepOutputs, taken: np.ndarray) -> None:
    """One entry for each token of the rows that asked, row by row as the tokens stand in the result."""
    iterations = [
        (p.token_logprob.tolist(), p.rank.tolist(), p.top_ids.tolist(), p.top_logprobs.tolist())
        for p in outputs.logprobs
        if p is not None
    ]
    for row, wanted in enumerate(outputs.num_logprobs):
        if wanted < 0:
            continue
        for (logprob, rank, ids, values), is_taken in zip(iterations, taken[:, row].tolist(), strict=True):
            if is_taken:
                columns.token_logprobs.append(logprob[row])
                columns.ranks.append(rank[row])
                columns.top_ids.extend(ids[row][:wanted])
                columns.top_logprobs.extend(values[row][:wanted])
                columns.num_top.append(len(ids[row][:wanted]))


def microseconds(seconds: float) -> int:
    """A duration as the wire carries it."""
    return min(MAX_UINT32, max(0, round(seconds * 1e6)))
