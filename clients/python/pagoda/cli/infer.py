"""`pagoda infer`: a conversation in the terminal, with the words that `swift infer` knows."""

from __future__ import annotations

import signal
import sys
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from pagoda.cli.serve import as_interrupt
from pagoda.errors import PagodaError
from pagoda.swift.engine import Engine, get_vllm_engine
from pagoda.swift.inference import inference_stream_vllm, inference_vllm
from pagoda.swift.templates import Template, get_default_template_type, get_template

HELP = (
    "Input `exit` or `quit` to exit the conversation.\n"
    "Input `clear` to clear the history, `reset-system` to change the system message and clear the history.\n"
    "Input `multi-line` for queries of several lines, each ended by a line `#`; `single-line` ends that.\n"
    "Ctrl-C stops an answer; at the prompt it exits, as Ctrl-D does."
)
RULE = "-" * 50


@dataclass(frozen=True)
class Settings:
    """What the command line said: `sampling` for the generation's configuration, `engine` to make one."""

    model_type: str
    template_type: str | None
    system: str | None
    stream: bool
    sampling: dict[str, Any]
    engine: dict[str, Any]


class Conversation:
    """The turns so far."""

    def __init__(self, engine: Engine, template: Template, settings: Settings) -> None:
        self._engine, self._template, self._stream = engine, template, settings.stream
        self._system = settings.system
        self._history: list[list[str]] = []
        self._several_lines = False

    def run(self) -> None:
        """Read and answer until the user ends it."""
        while True:
            try:
                line = _ask("<<< " if not self._several_lines else "<<<[M] ", self._several_lines)
            except (EOFError, KeyboardInterrupt):
                print(file=sys.stderr)
                return
            match line.strip().lower():
                case "exit" | "quit":
                    return
                case "clear":
                    self._history = []
                case "reset-system":
                    self._reset_system()
                case "multi-line":
                    self._several_lines = True
                case "single-line":
                    self._several_lines = False
                case "":
                    pass
                case _:
                    self._answer(line)

    def _reset_system(self) -> None:
        try:
            self._system = _ask("<<<[S] ", self._several_lines)
        except (EOFError, KeyboardInterrupt):
            print("\n(unchanged)", file=sys.stderr)
            return
        self._history = []

    def _answer(self, query: str) -> None:
        request = {"query": query, "history": self._history, "system": self._system}
        shown = 0
        try:
            if self._stream:
                with closing(inference_stream_vllm(self._engine, self._template, [request])) as responses:
                    for (response,) in responses:
                        print(response["response"][shown:], end="", flush=True)
                        shown, self._history = len(response["response"]), response["history"]
            else:
                (response,) = inference_vllm(self._engine, self._template, [request])
                self._history = response["history"]
                print(response["response"], end="")
            print()
        except KeyboardInterrupt:
            print("\n(stopped)", file=sys.stderr)
        except PagodaError as error:
            print(f"\nerror: {error}", file=sys.stderr)
        print(RULE)


def run(settings: Settings) -> None:
    """Make the engine, talk, end the engine. Raises PagodaError, ClusterError, FileNotFoundError."""
    signal.signal(signal.SIGTERM, as_interrupt)
    signal.signal(signal.SIGHUP, as_interrupt)
    template_type = settings.template_type
    if template_type in (None, "AUTO"):  # ms-swift's word for it
        template_type = get_default_template_type(settings.model_type)
    template = get_template(template_type)  # a wrong name is said before anything is started
    engine = get_vllm_engine(settings.model_type, **settings.engine)
    try:
        for name, value in settings.sampling.items():
            setattr(engine.generation_config, name, value)
        print(f"{settings.model_type} at {engine.url}\n{HELP}", file=sys.stderr)
        Conversation(engine, template, settings).run()
    finally:
        engine.close()


def _ask(prompt: str, several_lines: bool) -> str:
    """What the user writes. Raises EOFError at the end of the input."""
    prompt = prompt if sys.stdin.isatty() else ""
    lines = [input(prompt)]
    while several_lines and lines[-1].strip() != "#" and not _is_word(lines):
        lines.append(input())
    return "\n".join(line for line in lines if line.strip() != "#") if several_lines else lines[0]


def _is_word(lines: list[str]) -> bool:
    """Whether a command is all that was written, which needs no end of its own."""
    return len(lines) == 1 and lines[0].strip().lower() in ("exit", "quit", "single-line", "clear")
