"""How answers are drawn: ms-swift's `VllmGenerationConfig`, close to `transformers.GenerationConfig`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pagoda.errors import InvalidRequest


@dataclass(slots=True)
class VllmGenerationConfig:
    """Settable on the engine or given to a call. An attribute that is not here cannot be set by mistake.

    `temperature` 0 is greedy; `top_k` 0 or -1 keeps all tokens; without a `seed` every call draws anew.
    With `num_beams` above 1 answers are searched for, not drawn: `temperature`, `top_k`, `top_p` and `seed`
    play no part, and `n` is how many of the results are wanted.
    """

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    num_beams: int = 1
    n: int = 1
    seed: int | None = None
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    stop: Sequence[str] = ()

    @property
    def max_tokens(self) -> int:
        """Another name of `max_new_tokens`."""
        return self.max_new_tokens

    @max_tokens.setter
    def max_tokens(self, value: int) -> None:
        self.max_new_tokens = value

    @property
    def do_sample(self) -> bool:
        """Whether tokens are drawn; setting it to False makes the temperature 0."""
        return self.temperature > 0

    @do_sample.setter
    def do_sample(self, value: bool) -> None:
        if not value:
            self.temperature = 0.0
        elif self.temperature == 0:
            self.temperature = 1.0

    def options(self) -> dict[str, Any]:
        """The same as keyword arguments of `pagoda.Client`. Raises InvalidRequest."""
        for name in ("num_beams", "n"):
            if getattr(self, name) < 1:
                problem = f"is {getattr(self, name)}; must be at least 1"
                raise InvalidRequest(f"generation_config.{name}: {problem}", field=name)
        options: dict[str, Any] = {
            "max_tokens": self.max_new_tokens,
            "repetition_penalty": float(self.repetition_penalty),
            "stop": [self.stop] if isinstance(self.stop, str) else list(self.stop),
        }
        if self.n > 1:
            options["n"] = self.n
        if self.num_beams > 1:
            return options | self._search()
        options |= {"temperature": float(self.temperature), "top_p": float(self.top_p)}
        if self.top_k > 0:
            options["top_k"] = self.top_k
        if self.seed is not None:
            options["seed"] = self.seed
        return options

    def _search(self) -> dict[str, Any]:
        if self.n > self.num_beams:
            problem = f"is {self.n}; a search with num_beams={self.num_beams} has no more results than that"
            raise InvalidRequest(f"generation_config.n: {problem}", field="n")
        return {
            "beam_width": self.num_beams,
            "length_penalty": float(self.length_penalty),
            "early_stopping": self.early_stopping,
        }
