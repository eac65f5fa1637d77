"""What numba compiles: parts of functions, functions for Python, and functions for C, which run on
the threads of PyTorch's OpenMP team where there is one: just after a convolution these still look
for work, and a thread of our own would share a core with one."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numba
from llvmlite import binding
from numba.core import event, types
from numba.core.compiler_lock import global_compiler_lock

_log = logging.getLogger("stochastic_pooling")
# For numba's cache, which knows of a function's own file alone; read when they are imported.
_SOURCES = b"".join(file.read_bytes() for file in sorted(Path(__file__).parents[1].rglob("*.py")))
_Call = ctypes.c_int64 * 12  # longer than any call needs
if numba.config.DISABLE_JIT:  # type: ignore[attr-defined]
    raise ImportError("NUMBA_DISABLE_JIT is set, so that it compiles nothing")

# Compile as a part of the functions that call it. No fast-math: the draw depends on order.
inlined = numba.njit(error_model="numpy", forceinline=True)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile on first use, to run without the interpreter's lock, and keep the code on disk."""
    return _cached(functools.partial(numba.njit, nogil=True), function)


def compiled_for_c(function: Callable[..., None], what: str) -> Callable[[Any], None]:
    """Compile a function of an array of pointers, for callers from any thread; `what` says to the
    log which."""
    function.__qualname__ = f"{function.__name__}-{hashlib.sha256(_SOURCES).hexdigest()[:16]}"
    signature = types.void(types.CPointer(types.voidptr))
    with global_compiler_lock:  # or another thread sets them back meanwhile
        _set_thresholds(8192, 4096)  # else LLVM makes no vectors for more than 6 x 6 cells
        try:
            with event.install_listener("numba:compile", _Announcement(what)):
                code = _cached(functools.partial(numba.cfunc, signature), function)
        finally:
            _set_thresholds(300, 128)  # its own
    for_c = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(code.address)
    for_c.keeps = code  # type: ignore[attr-defined]
    return for_c


def _cached(compiler: Callable[..., Any], function: Callable[..., Any]) -> Any:
    try:
        return compiler(cache=True, error_model="numpy")(function)
    except Exception:  # no folder that numba can write its cache to, or damaged files in it
        return compiler(error_model="numpy")(function)


def _set_thresholds(unrolled: int, pairs: int) -> None:
    """How large the loops are that LLVM unrolls, and of how many pairs of places it asks whether
    they overlap."""
    binding.set_option("", f"-unroll-threshold={unrolled}")
    binding.set_option("", f"-vectorize-memory-check-threshold={pairs}")


class _Announcement(event.Listener):
    """A line in the log when numba compiles, rather than finds what it compiled before."""

    def __init__(self, what: str) -> None:
        self.what: str | None = what

    def on_start(self, _: Any) -> None:
        if self.what:
            _log.warning("compiling %s for this CPU: seconds now, none the next time", self.what)
        self.what = None

    on_end = on_start


def _team() -> Callable[..., object] | None:
    """What calls a function on each thread of PyTorch's OpenMP team, if there is one: GCC's entry
    point, which LLVM's and Intel's runtimes have, too. PyTorch loads its own for all to see."""
    names = "omp_get_thread_num", "omp_get_num_threads"
    parallel, functions = None, [1, 1]
    with contextlib.suppress(AttributeError, OSError, TypeError):  # the last one on Windows
        runtime = ctypes.CDLL(None)
        parallel, *functions = (getattr(runtime, name) for name in ("GOMP_parallel", *names))
    # What is compiled names them, and calls them in a team.
    for name, function in zip(names, functions, strict=True):
        binding.add_symbol(name, ctypes.cast(function, ctypes.c_void_p).value)
    return parallel


_parallel = _team()
_process = os.getpid()


def run(body: Callable[[Any], None], threads: int, *arguments: int) -> bool:
    """Run a pass of kernels.py, whose arguments are whether there is a bias, the addresses of the
    plan and of the tensors; False if there are numbers that it does not take."""
    if threads == 1:
        return _call(body, 0, 1, *arguments)
    # A forked child has the team, but none of its threads.
    if (parallel := _parallel) is not None and os.getpid() == _process:
        return _call(lambda call: parallel(body, call, threads, 0), 0, 0, *arguments)
    # Threads for this call alone: there is nothing that a fork or other threads could break.
    with ThreadPoolExecutor(threads) as pool:
        return all(pool.map(lambda part: _call(body, part, threads, *arguments), range(threads)))


def _call(function: Callable[[Any], object], part: int, parts: int, *arguments: int) -> bool:
    """Call with a pass's arguments for one of so many parts; with 0, those of a team."""
    call = _Call(0, part, parts, 0, *arguments)
    call[0] = ctypes.addressof(call)
    function(call)
    return not call[3]
