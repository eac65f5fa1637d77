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
_for_c = ctypes.CFUNCTYPE(None, ctypes.c_void_p)

# Compile as a part of the functions that call it. No fast-math: the draw depends on order.
inlined = numba.njit(error_model="numpy")


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile on first use, to run without the interpreter's lock, and keep the code on disk."""
    return _cached(functools.partial(numba.njit, nogil=True), function)


def compiled_for_c(function: Callable[..., None], what: str) -> Callable[[Any], None]:
    """Compile a function of an array of pointers, for callers from any thread; `what` says to the
    log which."""
    # numba's cache knows of the file that a function is in, and not of those that it calls.
    sources = b"".join(file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py")))
    function.__qualname__ = f"{function.__name__}-{hashlib.sha256(sources).hexdigest()[:16]}"
    signature = types.void(types.CPointer(types.voidptr))
    with event.install_listener("numba:compile", _Announcement(what)):
        code = _cached(functools.partial(numba.cfunc, signature), function)
    for_c = _for_c(code.address)
    for_c.keeps = code  # type: ignore[attr-defined]
    return for_c


def _cached(compiler: Callable[..., Any], function: Callable[..., Any]) -> Any:
    try:
        return compiler(cache=True, error_model="numpy")(function)
    except (RuntimeError, OSError):  # no folder that numba can write its cache to
        return compiler(error_model="numpy")(function)


class _Announcement(event.Listener):
    """A line in the log when numba compiles, rather than finds what it compiled before."""

    def __init__(self, what: str) -> None:
        self.what: str | None = what

    def on_start(self, _: Any) -> None:
        if self.what:
            _log.warning("compiling %s for this CPU: seconds now, none the next time", self.what)
        self.what = None

    def on_end(self, _: Any) -> None:
        pass
