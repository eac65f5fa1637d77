"""A pass on several threads: those of PyTorch's OpenMP team where there is one, else our own.

OpenMP's workers look for their next piece of work for a while before they sleep. A thread of our
own would share a core with one, just after a convolution; so the workers themselves are asked.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from llvmlite import binding


def _team() -> Callable[..., object] | None:
    """The function that calls another on each thread of PyTorch's OpenMP team, if there is one.

    PyTorch loads its runtime for all to see, on Linux and macOS. That of GCC, of LLVM and of Intel
    have GCC's entry point.
    """
    names = "omp_get_thread_num", "omp_get_num_threads"
    parallel, functions = None, [1, 1]
    try:
        runtime = ctypes.CDLL(None)  # a TypeError on Windows
        parallel, *functions = (getattr(runtime, name) for name in ("GOMP_parallel", *names))
    except (AttributeError, OSError, TypeError):
        pass
    # What is compiled names them, and calls them in a team.
    for name, function in zip(names, functions, strict=True):
        binding.add_symbol(name, ctypes.cast(function, ctypes.c_void_p).value)
    return parallel


_parallel = _team()
# See kernels.py; longer than any call needs.
_Call = ctypes.c_int64 * 12


def _after_fork() -> None:
    """A forked child has the team, but none of its threads."""
    global _parallel
    _parallel = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def run(body: Callable[[Any], None], threads: int, *arguments: int) -> bool:
    """Run a pass of kernels.py.

    Args:
        arguments: whether there is a bias, the addresses of the plan and of the tensors.

    Returns:
        whether all numbers are such as the pass takes.
    """

    def do(part: int, parts: int, start: Callable[[Any], object] = body) -> bool:
        call = _Call(0, part, parts, 0, *arguments)
        call[0] = ctypes.addressof(call)
        start(call)
        return call[3] == 0

    if threads == 1:
        return do(0, 1)
    if (parallel := _parallel) is not None:
        return do(0, 0, lambda call: parallel(body, call, threads, 0))
    # Threads for this call alone: there is nothing that a fork or other threads could break.
    with ThreadPoolExecutor(threads) as pool:
        return all(pool.map(do, range(threads), [threads] * threads))
