"""`pagoda chat`: a conversation in the terminal."""

from __future__ import annotations

import sys
from typing import Any

from pagoda.client import Client
from pagoda.errors import PagodaError

HELP = "/reset forgets the conversation, /exit or Ctrl-D ends, Ctrl-C stops an answer"


def run(url: str, token: str | None, system: str, options: dict[str, Any]) -> None:
    """Talk until the user ends it. Raises PagodaError when the server cannot be reached at the start."""
    with Client(url, token) as client:
        name = options["model"] or client.models()[0].name
        print(f"{name} at {url}. {HELP}", file=sys.stderr)
        opening = [{"role": "system", "content": system}] if system else []
        messages = list(opening)
        while (line := _ask()) is not None:
            if line in ("/exit", "/quit"):
                break
            if line == "/reset":
                messages = list(opening)
                print("forgotten", file=sys.stderr)
            elif line.startswith("/"):
                print(HELP, file=sys.stderr)
            elif line:
                messages.append({"role": "user", "content": line})
                answer = _answer(client, messages, options)
                if answer:
                    messages.append({"role": "assistant", "content": answer})
                else:  # a question without an answer would stand before the next one
                    messages.pop()


def _ask() -> str | None:
    """The next line, None at the end of the input. Ctrl-C asks again."""
    while True:
        try:
            return input("> " if sys.stdin.isatty() else "").strip()
        except KeyboardInterrupt:
            print(f"\n({HELP})", file=sys.stderr)
        except EOFError:
            return None


def _answer(client: Client, messages: list[dict[str, str]], options: dict[str, Any]) -> str:
    """Print the answer as it comes; what came of it, also when it was stopped."""
    stream = client.stream_chat(messages, **options)  # type: ignore[arg-type]  # names come from our own options
    try:
        with stream:
            for chunk in stream:
                print(chunk.text, end="", flush=True)
        print()
    except KeyboardInterrupt:
        print("\n(stopped)", file=sys.stderr)
    except PagodaError as error:
        print(f"\nerror: {error}", file=sys.stderr)
    return stream.completion.text
