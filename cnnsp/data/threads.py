"""A pool of threads for compiled loops, which run without the interpreter's lock.

numba's own threads abort the process when two Python threads enter at once.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

_pool: ThreadPoolExecutor | None = None
_pool_lock = threading.Lock()


def _forget_pool() -> None:
    """In a forked child, which has the pool but none of its threads."""
    global _pool, _pool_lock
    _pool, _pool_lock = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)


def share_out(
    function: Callable[..., object], tiles: int, threads: int, arguments: tuple[Any, ...]
) -> None:
    """Call `function(begin, end, *arguments)` on parts of `range(tiles)` until all are done.

    The caller works too, and does what helpers that never got a thread would have done: calls from
    many threads at once do not wait for one another.
    """
    parts = min(tiles, 8 * threads) if threads > 1 else 1
    shares = itertools.count()

    def work() -> None:
        # `next` on a count is atomic.
        while (part := next(shares)) < parts:
            function(tiles * part // parts, tiles * (part + 1) // parts, *arguments)

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
            _pool = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="cnnsp")
        try:
            return _pool.submit(function)
        except RuntimeError:  # the interpreter is shutting down: no new threads
            return None
