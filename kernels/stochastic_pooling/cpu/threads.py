"""A kernel on several threads: those of PyTorch's OpenMP team where there is one, else our own.

A worker of OpenMP's looks for its next piece of work for a while before it sleeps. A thread of our
own would share the core with it, just after a convolution; so the workers themselves are asked.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from llvmlite import binding


def _team() -> Any:
    """The function that calls another on each thread of PyTorch's OpenMP team, if there is one.

    PyTorch loads its OpenMP runtime for all to see, on Linux; the runtimes of GCC, of LLVM and of
    Intel all have GCC's entry point.
    """
    if "parallel backend: OpenMP" not in torch.__config__.parallel_info():
        return None
    try:
        runtime = ctypes.CDLL(None)  # raises TypeError on Windows
        for name in ("omp_get_thread_num", "omp_get_num_threads"):
            address = ctypes.cast(getattr(runtime, name), ctypes.c_void_p).value
            binding.add_symbol(name, address)
        parallel = runtime.GOMP_parallel
    except (AttributeError, OSError, TypeError):
        return None
    parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    parallel.restype = None
    return parallel


_parallel = _team()
HAS_TEAM = _parallel is not None

_pool: ThreadPoolExecutor | None = None
_pool_lock = threading.Lock()


def _after_fork() -> None:
    """A forked child has the team and the pool, but none of their threads."""
    global _parallel, _pool, _pool_lock
    _parallel, _pool, _pool_lock = None, None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def run(kernel: Callable[[int], None], with_bias: bool, addresses: list[int], threads: int) -> bool:
    """Run a kernel.

    Args:
        kernel: see kernels.py.
        with_bias: whether the bias is added, or its gradient wanted.
        addresses: of the plan and the tensors.
        threads: how many to use.

    Returns:
        whether all numbers are such as the kernel takes.
    """

    def do(part: int, parts: int, start: Callable[[int], None] = kernel) -> bool:
        call = (ctypes.c_int64 * 4)(part, parts, with_bias, 0)
        count = len(addresses) + 1
        pointers = (ctypes.c_void_p * count)(ctypes.addressof(call), *addresses)
        start(ctypes.addressof(pointers))
        return call[3] == 0

    if threads == 1:
        return do(0, 1)
    if _parallel is not None:
        return do(0, 0, lambda pointers: _parallel(kernel, pointers, threads, 0))
    usual: list[bool] = []

    def do_some(begin: int, end: int) -> None:
        usual.extend(do(part, 4 * threads) for part in range(begin, end))

    share_out(do_some, 4 * threads, threads)
    return all(usual)


def share_out(
    function: Callable[..., object], tiles: int, threads: int, arguments: tuple[Any, ...] = ()
) -> None:
    """Call `function(begin, end, *arguments)` on parts of `range(tiles)` until all are done.

    The caller works too, and does what helpers that never got a thread would have done: calls from
    many threads at once do not wait for one another.
    """
    if threads == 1:
        function(0, tiles, *arguments)
        return
    parts = min(tiles, 8 * threads)
    bounds = [tiles * part // parts for part in range(parts + 1)]
    shares = itertools.count()

    def work() -> None:
        # `next` on a count is atomic.
        while (part := next(shares)) < parts:
            function(bounds[part], bounds[part + 1], *arguments)

    helpers = [helper for _ in range(threads - 1) if (helper := _submit(work)) is not None]
    try:
        work()
    finally:
        for helper in helpers:
            if not helper.cancel():
                helper.result()


def _submit(function: Callable[[], None]) -> Future[None] | None:
    global _pool
    with _pool_lock:
        if _pool is None:
            _pool = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="stochastic_pooling")
        try:
            return _pool.submit(function)
        except RuntimeError:  # the interpreter is shutting down: no new threads
            return None
