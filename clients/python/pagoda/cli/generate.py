"""`pagoda generate`: one prompt, printed as it comes."""

from __future__ import annotations

import sys
import time
from typing import Any

from pagoda.client import Client


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
        with stream:
            for chunk in stream:
                first = time.perf_counter() if first == begin else first
                print(chunk.text, end="", flush=True)
        print()
        if stats:
            print(_figures(stream.completion, first - begin, time.perf_counter() - first), file=sys.stderr)


def _figures(completion: Any, ttft: float, rest: float) -> str:
    num_tokens = len(completion.token_ids)
    rate = (num_tokens - 1) / rest if num_tokens > 1 and rest > 0 else 0.0
    why = completion.finish_reason
    return f"{num_tokens} tokens, first after {ttft * 1000:.0f} ms, then {rate:.1f} tokens/s ({why})"
