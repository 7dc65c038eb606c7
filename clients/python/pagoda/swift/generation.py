"""How answers are drawn: ms-swift's `VllmGenerationConfig`, close to `transformers.GenerationConfig`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pagoda.errors import InvalidRequest


@dataclass(slots=True)
class VllmGenerationConfig:
    """Settable on the engine or given to a call. An attribute that is not here cannot be set by mistake.

    `temperature` 0 is greedy; `top_k` 0 or -1 keeps all tokens; without a `seed` every call draws anew.
    `num_beams` and `n` are there because programs read them: only 1 is supported.
    """

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    num_beams: int = 1
    n: int = 1
    seed: int | None = None
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
            if getattr(self, name) != 1:
                raise InvalidRequest(f"generation_config.{name}: only 1 is supported", field=name)
        options: dict[str, Any] = {
            "max_tokens": self.max_new_tokens,
            "temperature": float(self.temperature),
            "top_p": float(self.top_p),
            "repetition_penalty": float(self.repetition_penalty),
            "stop": [self.stop] if isinstance(self.stop, str) else list(self.stop),
        }
        if self.top_k > 0:
            options["top_k"] = self.top_k
        if self.seed is not None:
            options["seed"] = self.seed
        return options
