"""C functions with their prototypes, looked up once."""

import ctypes
from collections.abc import Callable
from ctypes import c_float as f32
from ctypes import c_int as i32
from ctypes import c_int64 as i64
from ctypes import c_void_p as ptr

from kernels.cpu.build import library

__all__ = ["f32", "function", "i32", "i64", "ptr"]


def function(name: str, *arguments: type, result: type | None = None) -> Callable | None:
    """The C function `name` with these argument types, or None where there is no library."""
    lib = library()
    if lib is None:
        return None
    # A prototype of its own: attributes of the library's function would be shared between callers.
    prototype = ctypes.CFUNCTYPE(result, *arguments)
    return prototype((name, lib))
