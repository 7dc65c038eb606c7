"""Sampling as slow and literal formulas, in float64 and on Python's integers, one row at a time."""

import math

import numpy as np
import torch

from kernels.sample import Features, Sampled, SamplingColumns

EVERYTHING = Features(
    any_random=True, any_filter=True, any_penalty=True, any_bias=True, any_min_tokens=True, max_logprobs=3
)
SCALARS = ("temperature", "top_k", "top_p", "min_p", "presence", "frequency", "repetition", "min_tokens")
SCALARS += ("num_logprobs",)


class Row:
    """One row's request, history and logits; what is not given is off."""

    def __init__(self, logits, prompt=(), output=(), **fields):
        self.logits = list(logits)
        self.prompt, self.output = list(prompt), list(output)
        self.temperature = fields.pop("temperature", 0.0)
        self.top_k = fields.pop("top_k", 0)
        self.top_p = fields.pop("top_p", 1.0)
        self.min_p = fields.pop("min_p", 0.0)
        self.presence = fields.pop("presence", 0.0)
        self.frequency = fields.pop("frequency", 0.0)
        self.repetition = fields.pop("repetition", 1.0)
        self.seed = fields.pop("seed", 0)
        self.min_tokens = fields.pop("min_tokens", 0)
        self.stop_ids = fields.pop("stop_ids", [])
        self.bias = fields.pop("bias", {})
        self.num_logprobs = fields.pop("num_logprobs", 0)
        assert not fields


def signed(seed):
    return seed - 2**64 if seed >= 2**63 else seed


def run(implementation, rows, features=EVERYTHING, dtype=torch.float32, vocab_size=None) -> Sampled:
    """Sample the rows in one batch, in slots that are neither in order nor next to each other."""
    num_slots = 2 * len(rows) + 1
    slots = [2 * (len(rows) - index) for index in range(len(rows))]
    columns = SamplingColumns.allocate(num_slots, "cpu", max_stop_ids=4, max_bias=6)
    length = max(len(row.prompt) + len(row.output) for row in rows) + 3
    # What lies behind a row's end must not count, so it is a valid token.
    tokens = torch.zeros((num_slots, length), dtype=torch.int32)
    num_tokens = torch.zeros(num_slots, dtype=torch.int32)
    num_prompt = torch.zeros(num_slots, dtype=torch.int32)
    for slot, row in zip(slots, rows, strict=True):
        for name in SCALARS:
            getattr(columns, name)[slot] = getattr(row, name)
        columns.seed[slot] = signed(row.seed)
        columns.stop_ids[slot, : len(row.stop_ids)] = torch.tensor(row.stop_ids, dtype=torch.int32)
        for place, (token_id, value) in enumerate(row.bias.items()):
            columns.bias_ids[slot, place], columns.bias_values[slot, place] = token_id, value
        history = row.prompt + row.output
        tokens[slot, : len(history)] = torch.tensor(history, dtype=torch.int32)
        num_tokens[slot], num_prompt[slot] = len(history), len(row.prompt)
    logits = torch.tensor([row.logits for row in rows], dtype=dtype)
    before = logits.clone()
    size = vocab_size or logits.shape[1]
    result = implementation(
        logits, torch.tensor(slots), columns, tokens, num_tokens, num_prompt, size, features
    )
    assert torch.equal(logits.nan_to_num(), before.nan_to_num())
    assert result.token_ids.dtype == torch.int32
    assert result.finite.dtype == torch.bool
    assert ((result.token_ids >= 0) & (result.token_ids < size)).all()
    return result


def processed(row):
    """Logits after bias, penalties and min_tokens."""
    scores = [float(logit) for logit in row.logits]
    for token_id, value in row.bias.items():
        scores[token_id] += value
    for token_id in set(row.prompt + row.output):
        score = scores[token_id]
        scores[token_id] = score / row.repetition if score > 0 else score * row.repetition
    for token_id in set(row.output):
        scores[token_id] -= row.frequency * row.output.count(token_id) + row.presence
    if len(row.output) < row.min_tokens:
        for token_id in row.stop_ids:
            scores[token_id] = -math.inf
    return scores


def kept_tokens(row, scaled):
    """Ids that the filters keep, and how close the nearest one that is not just on a border comes to it."""
    margins = [1.0]

    def note(distance):
        if distance != 0:
            margins.append(abs(distance))

    kept = set(range(len(scaled)))
    if row.min_p > 0:
        border = max(scaled) + math.log(row.min_p)
        kept = {i for i in kept if scaled[i] >= border}
        for score in scaled:
            note(score - border)
    if row.top_k > 0:
        border = sorted(scaled, reverse=True)[min(row.top_k, len(scaled)) - 1]
        kept = {i for i in kept if scaled[i] >= border}
        for score in scaled:
            note(score - border if math.isfinite(border) else 1.0)
    if row.top_p < 1:
        best = max(scaled)
        weight = {i: math.exp(scaled[i] - best) for i in kept}
        total = sum(weight.values())
        better = {i: sum(weight[j] for j in kept if scaled[j] > scaled[i]) / total for i in kept}
        for share in better.values():
            margins.append(abs(share - float(np.float32(row.top_p))))
        kept = {i for i in kept if better[i] < row.top_p or scaled[i] == best}
    return kept, min(margins)


def gumbel_noise(seed, position, token_id):
    """The noise of one token, on Python's integers and in float64."""
    c0, c1, c2, c3, k0, k1 = token_id // 4, position, 0, 0, seed % 2**32, seed // 2**32
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c0, 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c2, 2**32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return -math.log(-math.log(((c0, c1, c2, c3)[token_id % 4] // 512 + 0.5) / 2**23))


def expected_token(row):
    """The token to be drawn, and how close the decision is."""
    scores = processed(row)
    if row.temperature == 0:
        kept, margin = set(range(len(scores))), 1.0
    else:
        scaled = [score / row.temperature for score in scores]
        kept, margin = kept_tokens(row, scaled)
        scores = [score + gumbel_noise(row.seed, len(row.output), i) for i, score in enumerate(scaled)]
    order = sorted(kept, key=lambda i: (-scores[i], i))
    if len(order) > 1 and scores[order[0]] != scores[order[1]]:
        margin = min(margin, scores[order[0]] - scores[order[1]])
    return order[0], margin
