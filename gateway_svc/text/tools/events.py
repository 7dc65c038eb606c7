"""What a parser finds in a model's text, in the order of the text."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Ending(enum.Enum):
    """How a call ended."""

    WHOLE = "whole"
    BROKEN = "broken"  # the JSON of its arguments goes wrong
    CUT = "cut"  # the text ended within its arguments


@dataclass(frozen=True, slots=True)
class Content:
    """Text that is not of a call."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegun:
    """A call of a tool that there is. Its text begins at this character of all the text."""

    name: str
    at: int


@dataclass(frozen=True, slots=True)
class Arguments:
    """A piece of the JSON of the arguments of the call that began last."""

    text: str


@dataclass(frozen=True, slots=True)
class CallEnded:
    """The call that began last has its arguments. Its text ends before this character of all the text."""

    how: Ending
    at: int


Event = Content | CallBegun | Arguments | CallEnded
