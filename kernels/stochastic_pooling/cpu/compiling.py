"""What numba compiles: parts of functions, functions for Python, and functions for C."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
from numba.core import event, types

_log = logging.getLogger("stochastic_pooling")

# `void function(void **pointers)`
_SIGNATURE = types.void(types.CPointer(types.voidptr))
C_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def inlined(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile as a part of the functions that call it. No fast-math: the draw depends on order."""
    return numba.njit(function, nogil=True, error_model="numpy")


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile on first use, to run without the interpreter's lock, and keep the code on disk."""
    return _cached(numba.njit, nogil=True)(function)


def compiled_for_c(function: Callable[..., None], what: str) -> Callable[[int], None]:
    """Compile now, or find what was compiled before, for callers from any thread.

    Args:
        function: of an array of pointers.
        what: its name for the log.
    """
    # numba's cache knows of the file that a function is in, and not of those that it calls.
    function.__qualname__ = f"{function.__name__}-{_sources()}"
    with event.install_listener("numba:compile", _Announcement(what)):
        code = _cached(numba.cfunc, _SIGNATURE)(function)
    callable_from_c = C_FUNCTION(code.address)
    callable_from_c.keeps = code  # type: ignore[attr-defined]
    return callable_from_c


def _cached(compiler: Callable[..., Any], *arguments: Any, **options: Any) -> Callable[..., Any]:
    def decorate(function: Callable[..., Any]) -> Any:
        try:
            return compiler(*arguments, cache=True, error_model="numpy", **options)(function)
        except (RuntimeError, OSError):  # no folder that numba can write its cache to
            return compiler(*arguments, error_model="numpy", **options)(function)

    return decorate


@functools.cache
def _sources() -> str:
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


class _Announcement(event.Listener):
    """A line in the log when numba starts to compile, rather than finds what it compiled before."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.made = False

    def on_start(self, _: Any) -> None:
        if not self.made:
            _log.warning("compiling %s for this CPU: seconds now, none the next time", self.what)
        self.made = True

    def on_end(self, _: Any) -> None:
        pass
