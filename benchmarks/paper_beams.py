"""Which beam goes on from which: dynamics of beam search measured on real text, and replayed.

How many blocks beams share is decided by their genealogy alone: at every step, from which hypothesis each of
the `width` best comes. Measured here as transformers' beam search chooses (the best 2 x width continuations
by the sum of logprobs, the first `width` of them go on), with SmolLM2-135M-Instruct in fp32 on questions of
each setting's text, in the chat template. End-of-text is not taken, because the paper's requests, too, have
the length of their trace. No text is kept, only parents: one digit a beam, best beam first.

    # some minutes each on two cores
    python -m benchmarks.paper_beams --text ShareGPT --lengths 32 48 64 96 128 --steps 192
    python -m benchmarks.paper_beams --text Alpaca --lengths 37 41 45 50 56 --steps 128
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

WIDTHS = (2, 4, 6)
RESULTS = Path(__file__).parent / "results" / "paper-beam-dynamics.json"

Parents = tuple[int, ...]


@dataclass(frozen=True)
class Dynamics:
    """Measured genealogies of one width: for each prompt, the parents at each step after the first."""

    width: int
    traces: tuple[tuple[Parents, ...], ...]

    @classmethod
    def load(cls, text: str, width: int, path: Path = RESULTS) -> Dynamics:
        """What was measured for this width on `text`, Alpaca or ShareGPT."""
        measured = json.loads(path.read_text(encoding="utf-8"))[text][str(width)]
        return cls(width, tuple(tuple(tuple(map(int, step)) for step in trace.split()) for trace in measured))

    def replay(self, seed: int) -> Iterator[Parents]:
        """Parents without end: measured traces one after another, whole, in an order drawn from `seed`.

        Traces stay whole because what happens at one step depends on the steps before it.
        """
        order = random.Random(seed)
        while True:
            yield from order.choice(self.traces)


def ideal_saving(dynamics: Dynamics, prompt: int, output: int, block_size: int, seed: int) -> tuple[int, int]:
    """(blocks of all beams without sharing, blocks with it), summed over the steps of one request.

    Counted from the genealogy alone, with no scheduler: two beams share a block when they have the same
    ancestor at its last position, or, for the block being written, when they are the same beam still.
    """
    width, parents = dynamics.width, dynamics.replay(seed)
    # Of each beam, its blocks by an identity: a number that is new whenever a block begins or is copied.
    fresh = iter(range(1 << 62))
    head = [next(fresh) for _ in range(prompt // block_size)]
    tails: list[list[int]] = [[*head] for _ in range(width)]
    alone = shared = 0
    for position in range(prompt, prompt + output - 1):
        if position > prompt:
            tails = [list(tails[parent]) for parent in next(parents)]
        for tail in tails:
            # A beam that writes has its last block to itself: a new one, or its copy of its parent's.
            del tail[position // block_size :]
            tail.append(next(fresh))
        alone += sum(len(tail) for tail in tails)
        shared += len({block for tail in tails for block in tail})
    return alone, shared


def measure(model: Any, prompts: list[list[int]], steps: int, stop_id: int) -> dict[int, list[list[Parents]]]:
    """Beam search of every width after each of these prompts, which have one length, in one batch.

    For each width and prompt, the parents at each of `steps` steps after the first.
    """
    import torch

    searches = [(width, number) for number in range(len(prompts)) for width in WIDTHS]
    found: dict[int, list[list[Parents]]] = {width: [[] for _ in prompts] for width in WIDTHS}
    with torch.inference_mode():
        out = model(torch.tensor(prompts), use_cache=True)
        cache = out.past_key_values
        logprobs = out.logits[:, -1].float().log_softmax(-1)
        logprobs[:, stop_id] = -torch.inf
        best = [logprobs[number].topk(width) for width, number in searches]
        scores, tokens = [b.values for b in best], torch.cat([b.indices for b in best])
        cache.reorder_cache(torch.tensor([number for width, number in searches for _ in range(width)]))
        for _ in range(steps):
            out = model(tokens[:, None], cache=cache, use_cache=True)
            logprobs = out.logits[:, -1].float().log_softmax(-1)
            logprobs[:, stop_id] = -torch.inf
            rows, drawn, first = [], [], 0
            for search, (width, number) in enumerate(searches):
                continued = scores[search][:, None] + logprobs[first : first + width]
                scores[search], flat = continued.flatten().topk(width)
                parents = flat // logprobs.shape[1]
                found[width][number].append(tuple(parents.tolist()))
                rows.append(first + parents)
                drawn.append(flat % logprobs.shape[1])
                first += width
            tokens = torch.cat(drawn)
            cache.reorder_cache(torch.cat(rows))
    return found


def main() -> None:
    """Measure and write the parents."""
    import torch
    from transformers import AutoModelForCausalLM

    from benchmarks.paper_text import alpaca_pairs, sharegpt_pairs
    from tests.support.data import chat_ids, model_folder, tokenizer

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--text", choices=("Alpaca", "ShareGPT"), required=True)
    parser.add_argument("--lengths", type=int, nargs="+", required=True, help="tokens of the prompts")
    parser.add_argument("--prompts", type=int, default=2, help="prompts of each length")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--json", type=Path, default=RESULTS, help="a file that is there is added to")
    given = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(model_folder(), dtype=torch.float32).eval()
    questions = [question for question, _ in (alpaca_pairs if given.text == "Alpaca" else sharegpt_pairs)()]
    random.Random("pagoda: prompts of the beam dynamics").shuffle(questions)
    every = json.loads(given.json.read_text(encoding="utf-8")) if given.json.is_file() else {}
    found = every.setdefault(given.text, {str(width): [] for width in WIDTHS})
    for length in given.lengths:
        chats = (chat_ids([{"role": "user", "content": question}]) for question in questions)
        prompts = list(islice((ids for ids in chats if len(ids) == length), given.prompts))
        print(f"{len(prompts)} prompts of {length} tokens", flush=True)
        for width, traces in measure(model, prompts, given.steps, tokenizer().eos_token_id).items():
            found[str(width)] += [" ".join("".join(map(str, step)) for step in trace) for trace in traces]
        given.json.write_text(json.dumps(every, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
