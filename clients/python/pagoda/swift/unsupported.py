"""Arguments that ms-swift has and Pagoda does not: their default is accepted, anything else is named."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pagoda.errors import InvalidRequest


def refuse(where: str, given: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Accept `given` where it says what `defaults` say anyway.

    Raises:
        InvalidRequest: an argument asks for something else; `field` is its name.
    """
    for name, value in given.items():
        if name not in defaults:
            raise InvalidRequest(f"{where}: the argument {name!r} is not supported", field=name)
        if value != defaults[name]:
            message = f"{where}: {name}={value!r} is not supported; leave it out ({defaults[name]!r})"
            raise InvalidRequest(message, field=name)
