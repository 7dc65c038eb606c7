"""C functions and structures in ctypes' terms."""

import ctypes
import functools
from collections.abc import Callable
from ctypes import c_float as f32
from ctypes import c_int as i32
from ctypes import c_int64 as i64
from ctypes import c_void_p as ptr
from typing import Any

from kernels.cpu.build import library

__all__ = ["f32", "fields", "function", "i32", "i64", "ptr"]


def function(name: str, *arguments: type, result: type | None = None) -> Callable[[], Any]:
    """A look-up of the C function `name` with these argument types, made once, at its first call, because it
    builds the library. It gives None where there is no library."""

    @functools.cache
    def look_up() -> Any:
        lib = library()
        # A prototype of its own: attributes of the library's function would be shared between callers.
        return None if lib is None else ctypes.CFUNCTYPE(result, *arguments)((name, lib))

    return look_up


def fields(*groups: tuple[type, str]) -> list[tuple[str, type]]:
    """`_fields_` of a structure, from types and the names, between blanks, that each has."""
    return [(name, kind) for kind, names in groups for name in names.split()]
