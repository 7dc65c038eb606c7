"""What the host knows of the rows on the device, as if no row ever stopped early."""

from __future__ import annotations

import numpy as np


class StepError(Exception):
    """A step that does not fit the rows: the scheduler and this worker disagree, so the session must end."""


class HostRows:
    """What the host knows of each slot; `biased` are slots whose bias columns are not clear."""

    def __init__(self, num_slots: int, biased: np.ndarray | None = None) -> None:
        self.used = np.zeros(num_slots, dtype=bool)
        self.biased = np.zeros(num_slots, dtype=bool) if biased is None else biased
        columns = np.zeros((6, num_slots), dtype=np.int64)
        self.num_tokens, self.num_computed, self.num_blocks = columns[:3]
        self.traits, self.num_logprobs, self.num_stops = columns[3:]
        # The last token of each prompt whose logprobs are wanted, else 0, and how many best tokens beside.
        self.told_until, self.num_prompt_top = np.zeros((2, num_slots), dtype=np.int64)

    def check_used(self, slot: int) -> None:
        """Raises StepError unless `slot` holds a row."""
        if slot >= len(self.used) or not self.used[slot]:
            raise StepError(f"slot {slot} holds no row")
