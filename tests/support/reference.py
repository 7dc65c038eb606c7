"""What transformers says: the reference that exactness tests compare Pagoda's token ids with.

Greedy: `generate` of transformers in fp32, one prompt at a time.  Sampled: the same, where a numpy sampler
of the tests' own (nothing of Pagoda's is imported) picks each token from transformers' logits.  A
continuation holds the end-of-text token where one was produced, and nothing after it.

Computing takes seconds a prompt, so answers are kept under `$PAGODA_CACHE/reference`, one line a prompt, in
a file named after the model's weights, the parameters and the library versions.  Whatever is missing is
computed when asked for.

    python -m tests.support.reference [--threads N] [--only greedy|sampled] [--prompts N]     # resumable
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers

from tests.support.data import Prompt, cache_root, model_folder, prompts
from tests.support.noise import gumbel

EXCUSED_MARGIN = 1e-3  # logits; two engines that round differently may order closer ones either way
EXCUSED_OF_100 = 2

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Params:
    """How a continuation is made; temperature 0 is greedy."""

    max_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0


GREEDY = Params()
SAMPLED = Params(temperature=0.8, top_p=0.95)


@dataclass(frozen=True)
class Answer:
    """A reference continuation; `closest` is the smallest gap between the two best logits of a step."""

    tokens: list[int]
    closest: float


@dataclass(frozen=True)
class Difference:
    """Where a continuation leaves the reference and how close the call was.

    `margin` is what lies between the two best (noise-added) logits at the first differing position;
    `among_two` says that the token produced there is one of the two.  `rest` is the largest amount by which
    a token behind that position falls short of the best logit given the tokens before it, so that what
    follows an excused token is still checked.  Where the continuation ends before it differs, `got` is None
    and nothing excuses it.
    """

    position: int
    got: int | None
    want: int | None
    margin: float
    among_two: bool
    rest: float

    @property
    def excused(self) -> bool:
        """Whether rounding explains it."""
        return self.among_two and self.margin <= EXCUSED_MARGIN and self.rest <= EXCUSED_MARGIN


def candidates(logits: npt.NDArray[np.float32], params: Params, seed: int, position: int) -> Floats:
    """What the next token is the argmax of: logits, noise added if sampled, -inf outside the nucleus.

    `position` counts output tokens from 0.
    """
    if params.temperature == 0:
        return logits.astype(np.float64)
    scaled = logits.astype(np.float64) / params.temperature
    weights = np.exp(scaled - scaled.max())
    order = np.argsort(-scaled, kind="stable")
    share = weights[order] / weights.sum()
    # A token stays while the more likely ones together have not reached top_p, so the best always does.
    outside = order[np.cumsum(share) - share >= params.top_p]
    noisy: Floats = scaled + gumbel(seed, position, len(scaled))
    noisy[outside] = -np.inf
    return noisy


def _two_best(values: Floats) -> tuple[int, int]:
    second, best = np.argpartition(values, -2)[-2:]
    return (int(best), int(second)) if values[best] >= values[second] else (int(second), int(best))


class _Picker(transformers.LogitsProcessor):
    """Makes `generate` take the tokens that `candidates` says, and notes how close each call was."""

    def __init__(self, params: Params, seed: int, prompt_len: int) -> None:
        self.params, self.seed, self.prompt_len = params, seed, prompt_len
        self.gaps: list[float] = []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        values = candidates(scores[0].numpy(), self.params, self.seed, input_ids.shape[1] - self.prompt_len)
        best, second = _two_best(values)
        self.gaps.append(float(values[best] - values[second]))
        if self.params.temperature == 0:
            return scores  # greedy is left to transformers entirely
        picked = torch.full_like(scores, -torch.inf)
        picked[0, best] = 0
        return picked  # type: ignore[return-value]


@functools.cache
def model() -> Any:
    """The test model in transformers, fp32."""
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(model_folder(), dtype=torch.float32)
    return loaded.eval()


@functools.cache
def _eos() -> int:
    eos: int = json.loads((model_folder() / "generation_config.json").read_text())["eos_token_id"]
    return eos


@functools.cache
def model_digest() -> str:
    """A digest of what decides the logits, tensors and config, whichever library version wrote the files."""
    digest = hashlib.sha256()
    config = json.loads((model_folder() / "config.json").read_text())
    config = {k: v for k, v in config.items() if k != "transformers_version" and not k.startswith("_")}
    digest.update(json.dumps(config, sort_keys=True).encode())
    for path in sorted(model_folder().glob("*.safetensors")):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            header.pop("__metadata__", None)
            digest.update(json.dumps(header, sort_keys=True).encode())
            while part := file.read(1 << 24):
                digest.update(part)
    return digest.hexdigest()


def _store(params: Params) -> Path:
    facts = [model_digest(), asdict(params), _eos(), torch.__version__, transformers.__version__]
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    return cache_root() / "reference" / f"{'sampled' if params.temperature else 'greedy'}-{key}.jsonl"


def _line_key(prompt: Prompt, params: Params) -> str:
    seed = prompt.seed if params.temperature else 0
    return hashlib.sha256(json.dumps([prompt.ids, seed]).encode()).hexdigest()[:24]


def _load(path: Path) -> dict[str, Answer]:
    known: dict[str, Answer] = {}
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
            known[row["prompt"]] = Answer(row["tokens"], row["closest"])
        except (ValueError, KeyError):
            continue  # the line that an interrupted run was writing: computed anew
    return known


def _compute(prompt: Prompt, params: Params) -> Answer:
    ids = torch.tensor([prompt.ids])
    picker = _Picker(params, prompt.seed, len(prompt.ids))
    with torch.inference_mode():
        out = model().generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=params.max_tokens,
            do_sample=False,
            logits_processor=[picker],
        )
    return Answer(out[0, len(prompt.ids) :].tolist(), round(min(picker.gaps), 7))


def answers(chosen: Sequence[Prompt], params: Params) -> Iterator[Answer]:
    """The reference continuation of each prompt in turn, from the cache where it is known."""
    path = _store(params)
    known = _load(path)
    for prompt in chosen:
        key = _line_key(prompt, params)
        if key not in known:
            known[key] = _compute(prompt, params)
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a") as file:  # one short append: runs side by side do not tear each other's lines
                file.write("\n" + json.dumps({"prompt": key, **asdict(known[key])}) + "\n")
        yield known[key]


def explain_difference(
    prompt: Prompt, got: Sequence[int], want: Sequence[int], params: Params = GREEDY
) -> Difference:
    """How close the call was where `got` first differs from `want`, by transformers' fp32 logits.

    Raises ValueError where the two are equal.
    """
    position = next(
        (i for i, (a, b) in enumerate(zip(got, want, strict=False)) if a != b), min(len(got), len(want))
    )
    if position == len(got) == len(want):
        raise ValueError("no difference to explain")
    want_token = want[position] if position < len(want) else None
    if position >= len(got):
        return Difference(position, None, want_token, 0.0, False, 0.0)
    ids = torch.tensor([[*prompt.ids, *got[:-1]]])
    with torch.inference_mode():
        logits = model()(ids, logits_to_keep=len(got) - position).logits[0].numpy()
    values = candidates(logits[0], params, prompt.seed, position)
    best, second = _two_best(values)
    rest = 0.0
    for i, token in enumerate(got[position + 1 :], 1):
        later = candidates(logits[i], params, prompt.seed, position + i)
        rest = max(rest, float(later.max() - later[token]))
    among_two = got[position] in (best, second)
    return Difference(
        position, got[position], want_token, float(values[best] - values[second]), among_two, rest
    )


def agree(
    chosen: Sequence[Prompt],
    got: Sequence[Sequence[int]],
    wants: Sequence[Sequence[int]],
    params: Params = GREEDY,
    allowed: int = EXCUSED_OF_100,
) -> list[tuple[int, Difference]]:
    """Assert that `got` equals `wants`, prompt by prompt; the excused differences, by index.

    Raises AssertionError, with all differences listed, where one is not explained by rounding or there are
    more than `allowed`.
    """
    if len(got) != len(chosen):
        raise AssertionError(f"{len(got)} continuations for {len(chosen)} prompts")
    found = [
        (i, explain_difference(prompt, tokens, want, params))
        for i, (prompt, tokens, want) in enumerate(zip(chosen, got, wants, strict=True))
        if list(tokens) != list(want)
    ]
    if len(found) > allowed or not all(difference.excused for _, difference in found):
        listed = "\n".join(
            f"  prompt {i} ({len(chosen[i].ids)} tokens): {difference}" for i, difference in found
        )
        raise AssertionError(
            f"{len(found)} of {len(chosen)} differ, at most {allowed} near ties allowed:\n{listed}"
        )
    return found


def compare(
    chosen: Sequence[Prompt],
    got: Sequence[Sequence[int]],
    params: Params = GREEDY,
    allowed: int = EXCUSED_OF_100,
) -> list[tuple[int, Difference]]:
    """`agree` with the reference's token ids."""
    return agree(chosen, got, [answer.tokens for answer in answers(chosen, params)], params, allowed)


def _fill(kind: str, chosen: Sequence[Prompt], params: Params) -> Iterable[str]:
    """Compute what is missing, saying how it goes; a line for each near tie of the reference itself."""
    start = time.monotonic()
    for i, answer in enumerate(answers(chosen, params)):
        size = f"{len(chosen[i].ids)} + {len(answer.tokens)} tokens"
        print(
            f"{kind} {i + 1}/{len(chosen)}: {size}, {time.monotonic() - start:.0f} s",
            file=sys.stderr,
            flush=True,
        )
        if answer.closest <= EXCUSED_MARGIN:
            yield f"{kind}: prompt {i} comes within {answer.closest:.1e} of another token"


def main() -> None:
    """Compute every reference that is not in the cache yet."""
    parser = argparse.ArgumentParser(description="compute the references of the exactness tests")
    parser.add_argument("--threads", type=int, default=1, help="of torch (1)")
    parser.add_argument("--only", choices=("greedy", "sampled"), help="one of the two references")
    parser.add_argument("--prompts", type=int, default=100, help="the first N of the set (100)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    near: list[str] = []
    for kind, params in (("greedy", GREEDY), ("sampled", SAMPLED)):
        if options.only in (None, kind):
            near += _fill(kind, prompts(options.prompts), params)
    print("\n".join(near) or "no near ties")


if __name__ == "__main__":
    main()
