"""`pagoda generate`: one prompt, printed as it comes."""

from __future__ import annotations

import sys
import time
from typing import Any

from pagoda.client import Client
from pagoda.types import Chunk, Completion


def run(
    url: str, token: str | None, prompt: str, as_chat: bool, stats: bool, options: dict[str, Any]
) -> None:
    """Print the continuation of `prompt`, and figures to standard error when asked for."""
    text = sys.stdin.read() if prompt == "-" else prompt
    with Client(url, token) as client:
        begin = time.perf_counter()
        first = begin
        if as_chat:
            stream = client.stream_chat([{"role": "user", "content": text}], **options)
        else:
            stream = client.stream(text, **options)
        printer = _Printer(options.get("n", 1))
        with stream:
            for chunk in stream:
                first = time.perf_counter() if first == begin else first
                printer.take(chunk)
        if stats:
            print(_figures(stream.completion, first - begin, time.perf_counter() - first), file=sys.stderr)


class _Printer:
    """Prints samples one below the other, with a heading each where there are several.

    The first one that has not ended is printed as it comes; those behind it wait for their turn.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._waiting: list[list[Chunk]] = [[] for _ in range(count)]
        self._turn = 0
        self._headed = False

    def take(self, chunk: Chunk) -> None:
        """Print what may be printed now."""
        self._waiting[chunk.index].append(chunk)
        while self._turn < self._count and self._waiting[self._turn]:
            now = self._waiting[self._turn].pop(0)
            if self._count > 1 and not self._headed:
                self._headed = True
                score = "" if now.score is None else f" score {now.score:.4f}"
                print(f"[{now.index}]{score}")
            print(now.text, end="", flush=True)
            if now.finish_reason is not None:
                print()
                self._turn, self._headed = self._turn + 1, False


def _figures(completion: Completion, ttft: float, rest: float) -> str:
    samples = completion.samples
    num_tokens = sum(len(sample.token_ids) for sample in samples)
    rate = (num_tokens - len(samples)) / rest if num_tokens > len(samples) and rest > 0 else 0.0
    why = ", ".join(str(sample.finish_reason) for sample in samples)
    scores = [f"{sample.score:.4f}" for sample in samples if sample.score is not None]
    told = f"; scores {', '.join(scores)}" if scores else ""
    return f"{num_tokens} tokens, first after {ttft * 1000:.0f} ms, then {rate:.1f} tokens/s ({why}{told})"
